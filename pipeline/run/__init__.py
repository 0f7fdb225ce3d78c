"""A run: its ranks, its directory, its checkpoints, its record."""
