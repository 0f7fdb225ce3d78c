"""A study has one owner at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError
from pipeline.studying.records import owned

HOLD = """
import sys
from pathlib import Path
from pipeline.studying.records import owned
with owned(Path(sys.argv[1]), "s"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_command_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refusal = rf"'s' is being written by another process \(.*pid {holder.pid}\): wait for it"
        with pytest.raises(ConfigError, match=refusal), owned(tmp_path / "s", "s"):
            pass
        holder.kill()
    with owned(tmp_path / "s", "s"):
        pass
