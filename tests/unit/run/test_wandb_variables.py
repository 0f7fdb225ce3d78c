"""W&B's variables: what contradicts is refused before the run, what is not obeyed is said, a sweep's id is kept."""

import os
from pathlib import Path

import pytest

from pipeline.config.dashboard import DashboardConfig
from pipeline.config.training import TrackingConfig
from pipeline.core.errors import ConfigError
from pipeline.run.directory import RunDirectory
from pipeline.run.record.tracking import wandb_id
from pipeline.run.record.wandb_variables import check_variables, mode_here

GONE = "3-4194999-unix-"


@pytest.mark.parametrize(
    ("asked", "variables", "mode", "said"),
    [
        ("offline", {}, "offline", ""),
        ("offline", {"WANDB_MODE": "disabled"}, "disabled", "W&B is disabled, as the environment asks"),
        ("online", {"WANDB_MODE": "dryrun"}, "offline", "W&B is offline, as the environment asks"),
        ("online", {"WANDB_DISABLED": "true"}, "disabled", "W&B is disabled"),
        ("offline", {"WANDB_MODE": "online"}, "offline", "WANDB_MODE=online is not obeyed: tracking.mode=offline is."),
        ("disabled", {"WANDB_MODE": "offline"}, "disabled", "WANDB_MODE=offline is not obeyed"),
        ("offline", {"WANDB_PROJECT": "other", "WANDB_NAME": "z"}, "offline", "WANDB_PROJECT, WANDB_NAME: not obeyed"),
        ("offline", {"WANDB_PROJECT": "squeezewire", "WANDB_ENTITY": "me"}, "offline", ""),
        ("offline", {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "WANDB_PROJECT": "other"}, "offline", ""),
    ],
)
def test_a_mode_is_obeyed_or_it_is_said(
    asked: str, variables: dict[str, str], mode: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mode_here(TrackingConfig(mode=asked), variables) == mode
    text = "".join(capsys.readouterr())
    assert said in text and bool(said) == bool(text)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WANDB_MODE": "ofline"}, "WANDB_MODE=ofline is not one of .* Did you mean 'offline'"),
        ({"WANDB_SERVICE": f"{GONE}/nowhere/gone.sock"}, "is of a process that is gone: unset WANDB_SERVICE"),
        ({"WANDB_BASE_URL": "ftp://x"}, "WANDB_BASE_URL=ftp://x is no address"),
        (
            {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r2"},
            "gives this run the id r2, .* W&B's run r1: choose another name=",
        ),
    ],
)
def test_what_contradicts_is_refused(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "wandb_id").write_text("r1\n")
    with pytest.raises(ConfigError, match=said):
        check_variables(TrackingConfig(), tmp_path / "wandb_id", variables)


def test_what_does_not_contradict_is_taken(tmp_path: Path) -> None:
    (tmp_path / "service.sock").touch()
    service = f"3-{os.getpid()}-unix-{tmp_path}/service.sock"
    sweep = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r1"}
    for variables in ({}, {"WANDB_SERVICE": service}, {"WANDB_BASE_URL": "https://wandb.example"}, sweep):
        check_variables(TrackingConfig(), tmp_path / "wandb_id", variables)
    check_variables(TrackingConfig(mode="disabled"), tmp_path / "none", {"WANDB_SERVICE": f"{GONE}/nowhere"})


def test_the_id_of_a_sweep_is_the_id_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    (tmp_path / "alone").mkdir()
    assert wandb_id(RunDirectory(tmp_path, "alone")).startswith("alone-")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    (tmp_path / "swept").mkdir()
    assert wandb_id(RunDirectory(tmp_path, "swept")) == "r1" == (tmp_path / "swept/wandb_id").read_text().strip()


@pytest.mark.parametrize("project", ["a/b", "a#b", "a:b", "", "x" * 129])
def test_a_project_that_wandb_refuses_is_refused(project: str) -> None:
    for make in (lambda: TrackingConfig(project=project), lambda: DashboardConfig(project=project)):
        with pytest.raises(ConfigError, match="must have 1 to 128 characters"):
            make()


@pytest.mark.parametrize("tag", ["", "t" * 65])
def test_a_tag_that_wandb_refuses_is_refused(tag: str) -> None:
    TrackingConfig(tags=("t" * 64,))
    with pytest.raises(ConfigError, match="W&B takes tags of 1 to 64"):
        TrackingConfig(tags=("ok", tag))
