"""The ledger of programs that others wrote: hooks in torch, what they see, and the files that are left."""
