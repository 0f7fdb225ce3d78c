"""One attempt at a run: its steps, its plan, its learner, and what it leaves behind."""
