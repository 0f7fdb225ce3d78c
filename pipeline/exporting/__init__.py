"""What a trained network is shipped as: its files, their bytes, and what each costs in accuracy."""
