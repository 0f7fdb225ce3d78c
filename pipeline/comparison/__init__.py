"""Several models under the same conditions, one report.

The invariant: a comparison only ever starts public commands and reads what runs left behind. It never imports
`training/`, so each of its numbers comes from a run that anyone can repeat with the same command line, and a change
inside the training loop cannot change how models are compared.
"""
