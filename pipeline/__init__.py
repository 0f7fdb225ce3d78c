"""Train SqueezeNet with DDP and account for every byte: the commands on top, the rooms below."""

import os
import sys

# `python -m pipeline.train` looks first in the current folder, where a `random.py` or `queue.py` would stand in for the
# standard library's. While Python looks for the command, its argument is still `-m`.
if sys.argv[:1] == ["-m"] and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH109, PTH120
    del sys.path[0]
