"""A study: variants of a training, each on several seeds, and one report on what each of them costs and gives.

Like a comparison, on whose launcher it stands, a study only ever starts public commands and reads what runs left.
"""
