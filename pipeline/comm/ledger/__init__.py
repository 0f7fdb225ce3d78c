"""The ledger: what the gradients owe, what was issued, what was sent, and whether they agree."""
