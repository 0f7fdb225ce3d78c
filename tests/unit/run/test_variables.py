"""Variables of torch and Lightning that a run cannot go well with."""

import os
import subprocess
import sys

import pytest

from pipeline.core.errors import ConfigError
from pipeline.run.launch.variables import check_variables, start_torch


@pytest.mark.parametrize("level", ["DETAIL", "detail"])
def test_the_level_that_crashes_is_refused(level: str) -> None:
    with pytest.raises(ConfigError, match=rf"TORCH_DISTRIBUTED_DEBUG={level} .* Set TORCH_DISTRIBUTED_DEBUG=INFO"):
        check_variables({"TORCH_DISTRIBUTED_DEBUG": level})


@pytest.mark.parametrize("level", [None, "", "OFF", "INFO", "info", "junk"])  # the last one torch itself refuses
def test_other_levels_are_torchs_own_affair(level: str | None) -> None:
    check_variables({} if level is None else {"TORCH_DISTRIBUTED_DEBUG": level})


def test_what_lightning_would_obey_in_place_of_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"PL_TRAINER_FAST_DEV_RUN, PL_TRAINER_MAX_STEPS: .*unset it"):
        check_variables({"PL_TRAINER_MAX_STEPS": "1", "PL_TRAINER_FAST_DEV_RUN": "1", "PL_GLOBAL_SEED": "1"})


@pytest.mark.parametrize("is_torchrun", [True, False])
def test_the_store_of_torchruns_agent_is_for_its_ranks(is_torchrun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    start_torch(is_torchrun=is_torchrun)
    assert ("TORCHELASTIC_USE_AGENT_STORE" in os.environ) == is_torchrun


@pytest.mark.not_quick
@pytest.mark.parametrize("setting", ["TORCH_DISTRIBUTED_DEBUG=2", "TORCH_LOGS=junk"])
def test_what_torch_does_not_take_is_one_sentence(setting: str) -> None:
    code = (
        "from pipeline.run.launch.variables import start_torch\n"
        "try: start_torch(is_torchrun=True)\nexcept ValueError as error: print(repr(error))"
    )
    name, value = setting.split("=")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, name: value}
    )
    assert "ConfigError" in done.stdout and "torch does not start" in done.stdout and setting in done.stdout
