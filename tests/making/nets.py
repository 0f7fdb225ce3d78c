"""A file with networks of a user's own, as `model=path/to/file.py:factory` names them, and one that lies beside it."""

from pathlib import Path

_NETS = '''
import torch
from torch import nn
from blocks import Block


def tiny(num_classes, width=4):
    return nn.Sequential(Block(3, width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def raises(num_classes):
    raise RuntimeError("no luck")


def nothing(num_classes):
    return None


def no_vector(num_classes):
    return nn.Conv2d(3, num_classes, 1)


def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


class Idle(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.used, self.idle = nn.Linear(3, num_classes), nn.Linear(3, 3)

    def forward(self, images):
        return self.used(images.mean((2, 3)))


class Reckons(nn.Module):
    """Cannot be built or run without memory."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3 * int(torch.ones(1).item()), num_classes)

    def forward(self, images):
        return self.head(images.mean((2, 3)) * float(images.mean()))


thing = 3
'''

_BLOCKS = """
from torch import nn


class Block(nn.Sequential):
    def __init__(self, num_in, num_out):
        super().__init__(nn.Conv2d(num_in, num_out, 3, 2, 1), nn.BatchNorm2d(num_out), nn.ReLU())
"""


def write_nets(folder: Path) -> Path:
    """Write nets.py and what it imports; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "blocks.py").write_text(_BLOCKS)
    path = folder / "nets.py"
    path.write_text(_NETS)
    return path
