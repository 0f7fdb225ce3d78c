"""What the process that others are forked from imports: what each of them would, for most of its time."""

import gc

gc.disable()  # as a rank does while it imports (pipeline/run/launch/variables.py)
import torch.distributed  # noqa: E402, F401
import torchmetrics  # noqa: E402, F401

import pipeline.training.steps  # noqa: E402, F401

gc.freeze()
gc.enable()
