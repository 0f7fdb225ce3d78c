"""Paths are left out of whatever text, and nothing else is."""

from pathlib import Path

import pytest

from pipeline.config.privacy import published, without_places
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError

BASE = ["name=sweep/lr=0.1", "trainer.max_steps=1"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/data/of/alice/shards", ".../shards"),
        ("data.root=/users/alice/shards", "data.root=.../shards"),
        ("a='/users/al ice/x'", "a='.../x'"),
        ("/users/al ice/x", ".../x"),
        ("runs=[/users/alice/x,/users/alice/y]", "runs=[.../x,.../y]"),
        ("~bob/x", "~bob/x"),
        ("/my/home", "~"),
        ("/my/home/shards", ".../shards"),
        ("in /my/home/shards", "in ~/shards"),
        ("/my/homework/x", ".../x"),
        ("fatal: '/srv/a/.git' is not yours", "fatal: '.../.git' is not yours"),
        ("s3://bucket/alice/set", "s3:/.../set"),
        ("sweep/lr=0.1", "sweep/lr=0.1"),
        ("runs/first", "runs/first"),
        ("train-{0000..1023}.tar", "train-{0000..1023}.tar"),
        ("1/2", "1/2"),
    ],
)
def test_folders_are_left_out(text: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/my/home")
    assert without_places({"a": [text]}) == {"a": [left]}


def test_it_is_asked_for() -> None:
    there = "data.root=/srv/of/alice/shards"
    kept = published(compose("train", TrainConfig, [*BASE, there]))
    left_out = published(compose("train", TrainConfig, [*BASE, there, "privacy=strict"]))
    assert kept["data"]["root"] == "/srv/of/alice/shards" and left_out["data"]["root"] == ".../shards"
    assert left_out["name"] == "sweep/lr=0.1" and Path(left_out["run_root"]) == Path("runs")
    with pytest.raises(ConfigError, match="privacy='no' is not one of open, strict"):
        compose("train", TrainConfig, [*BASE, there, "privacy=no"])


def test_loggers_that_name_the_host_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy=strict does not go with tracking.loggers=\[tensorboard\]"):
        compose("train", TrainConfig, [*BASE, "data.root=x", "privacy=strict", "tracking=tensorboard"])
    assert compose("train", TrainConfig, [*BASE, "data.root=x", "tracking=csv"]).tracking.loggers == ("csv",)
    with pytest.raises(ConfigError, match=r"tracking.loggers='?comet"):
        compose("train", TrainConfig, [*BASE, "data.root=x", "tracking.loggers=[comet]"])
