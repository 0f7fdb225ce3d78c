"""Variables for debugging with which torch does not start, or not for long."""

import os
import subprocess
import sys

import pytest

from pipeline.core.errors import ConfigError
from pipeline.run.launch.debugging import check_debugging


@pytest.mark.parametrize("level", ["DETAIL", "detail"])
def test_the_level_that_crashes_is_refused(level: str) -> None:
    with pytest.raises(ConfigError, match=rf"TORCH_DISTRIBUTED_DEBUG={level} .* Set TORCH_DISTRIBUTED_DEBUG=INFO"):
        check_debugging({"TORCH_DISTRIBUTED_DEBUG": level})


@pytest.mark.parametrize("level", [None, "", "OFF", "INFO", "info", "junk"])  # the last one torch itself refuses
def test_other_levels_are_torchs_own_affair(level: str | None) -> None:
    check_debugging({} if level is None else {"TORCH_DISTRIBUTED_DEBUG": level})


@pytest.mark.not_quick
@pytest.mark.parametrize("setting", ["TORCH_DISTRIBUTED_DEBUG=2", "TORCH_LOGS=junk"])
def test_what_torch_does_not_take_is_one_sentence(setting: str) -> None:
    code = (
        "from pipeline.run.launch.debugging import start_torch as s\ntry: s()\nexcept ValueError as e: print(repr(e))"
    )
    name, value = setting.split("=")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, name: value}
    )
    assert "ConfigError" in done.stdout and "torch does not start" in done.stdout and setting in done.stdout
