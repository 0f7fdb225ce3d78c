"""Structured random damage to what a command reads: `python -m tests.fuzzing --help`. `targets.py` lists what."""
