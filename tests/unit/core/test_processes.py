"""A check in a process of its own: what it raises arrives, and nothing it imported does."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
from pipeline.core.errors import CheckpointError, UserError
from pipeline.core.processes import apart
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
def check():
    import torch
    {body}
try:
    apart(check)
    print("sound")
except UserError as error:
    print(type(error).__name__, error)
except RuntimeError as error:
    print(error)
print("torch" in sys.modules)
"""


@pytest.mark.not_quick
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("pass", "sound"),
        ("raise CheckpointError('Café: x' * 2)", "CheckpointError Café: xCafé: x"),
        ("1 / 0", "A check before the start ended with 1."),
        ("os.kill(os.getpid(), signal.SIGTERM)", "A check before the start ended with -15."),
    ],
)
def test_what_a_check_raises_arrives_and_torch_does_not(body: str, said: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=root)
    assert done.stdout == f"{said}\nFalse\n"
    assert ("ZeroDivisionError" in done.stderr) == (body == "1 / 0")
