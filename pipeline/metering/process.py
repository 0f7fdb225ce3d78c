"""What a metered process is about, apart from its groups: how it ends, what it is in, what it was told."""

import contextlib
import os
import sys
import threading
from types import FrameType

import torch

from pipeline.comm.wire import nccl


def is_dying() -> bool:
    """Tell whether this process ends because of an error."""
    error = sys.exc_info()[1]
    is_leaving = isinstance(error, SystemExit) and error.code in (None, 0)
    return (error is not None and not is_leaving) or getattr(sys, "last_value", None) is not None


def wait_for_cards(patience_seconds: float) -> None:
    """Let what is under way on the card end, so that it is counted; what a lost rank holds up is left."""
    if torch.cuda.is_initialized():
        waiting = threading.Thread(target=torch.cuda.synchronize, args=(torch.cuda.current_device(),), daemon=True)
        waiting.start()
        waiting.join(patience_seconds)


def is_active(frame: FrameType) -> bool:
    """Tell whether a call is under way in this thread."""
    at: FrameType | None = sys._getframe()
    while at is not None and at is not frame:
        at = at.f_back
    return at is not None


def note(path: str, line: str) -> None:
    """Tell the command that a rank joined, where it runs on this machine."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def connects_late(backend: str) -> bool:
    """Tell whether a group connects with its first collective only, as torch reads its variable."""
    return backend == "gloo" and os.environ.get("TORCH_GLOO_LAZY_INIT", "").lower() in ("1", "y", "yes", "t", "true")


def pinned(backend: str) -> tuple[str, str] | None:
    """Return NCCL's (algorithm, protocol) where the program's environment holds it to one way, else None."""
    if backend != "nccl":
        return None
    for algorithm in nccl.ALGORITHMS:
        for protocol in nccl.PROTOCOLS:
            wanted = nccl.environment(algorithm, protocol)
            if all(os.environ.get(name) == value for name, value in wanted.items()):
                return algorithm, protocol
    return None
