"""Ways around the check of a configuration: names made up while they are read, files from elsewhere, short flags."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config.training import TrainConfig
from pipeline.core import gate
from pipeline.core.cli import LONGEST_MESSAGE, compose
from pipeline.core.errors import ConfigError, DataError
from pipeline.data.shards import manifest

BASE = ("name=a", "data.root=x", "trainer.max_steps=1")
HIDDEN = "plainly-hidden"


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pipeline.train", *BASE, *arguments]
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[3]), "WORD": HIDDEN}
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.mark.parametrize(
    "override",
    [
        "tracking.entity=${oc.${model.metaparameters.a}:WORD}",
        "+x=${${model.metaparameters.a}.env:WORD}",
        r"model.metaparameters.b=$\{oc.env\:WORD\}",
        r"tracking.entity=${oc.decode:'$\{oc.' 'env:WORD}'}",
        "model.metaparameters.b=${oc.create:x}",
        "tracking.tags=[a,'${oc.${seed}:WORD}']",
    ],
)
def test_what_is_made_up_while_it_is_read_is_refused(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", HIDDEN)
    with pytest.raises(ConfigError, match=r"reads the environment|makes up while it is read") as raised:
        gate.refuse_argument(override)
    assert HIDDEN not in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        compose("train", TrainConfig, [*BASE, "model.metaparameters.a=env", override])
    assert HIDDEN not in str(raised.value)


def test_a_secret_in_pieces_is_found_where_they_meet() -> None:
    pieces = ["model.metaparameters.a=ghp", f"model.metaparameters.b={'a1B2' * 9}"]
    with pytest.raises(ConfigError, match=r"tracking.entity must hold no secret.*GitHub") as raised:
        entity = "tracking.entity=${model.metaparameters.a}_${model.metaparameters.b}"
        compose("train", TrainConfig, [*BASE, *pieces, entity])
    assert "a1B2" not in str(raised.value)


def test_an_escaped_opening_is_text() -> None:
    assert compose("train", TrainConfig, [*BASE, r"tracking.entity=\${a\${b}"]).tracking.entity == "${a${b}"


@pytest.mark.parametrize(
    "override", ["hydra.searchpath=[file:///x]", "+hydra.searchpath=[pkg://x]", " hydra.searchpath@a=[x]"]
)
def test_no_other_directory_is_searched(override: str) -> None:
    with pytest.raises(ConfigError, match="give the directory as --config-dir"):
        gate.refuse_argument(override)


@pytest.mark.parametrize("flag", ["--config-path=x", "--config-p=x", "-cp", "--config-n=x", "-cn", "--exp=x.pickle"])
def test_flags_are_what_their_abbreviations_are_to_hydra(flag: str) -> None:
    with pytest.raises(ConfigError, match="would"):
        gate.refuse_flags(["a=b", flag, *(["x"] if flag in ("-cp", "-cn") else [])])


@pytest.mark.parametrize("flags", [["--config-dir=x"], ["--config-d", "x"], ["-cd", "x"], ["--cfg=job"], ["-m"]])
def test_other_flags_are_taken(flags: list[str]) -> None:
    gate.refuse_flags(["a=b", *flags])


def test_a_flag_that_is_none_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--hydra-help"):
        gate.refuse_flags(["--conf=x"])


@pytest.mark.not_quick
@pytest.mark.parametrize("way", ["a path upwards", "a link", "a flag cut short", "a group of Hydra's own"])
def test_every_file_is_read_before_hydra_reads_it(way: str, tmp_path: Path) -> None:
    """Its text hides what it says from whoever looks for the words: YAML knows escapes."""
    evil = tmp_path / "elsewhere" / "evil.yaml"
    evil.parent.mkdir()
    evil.write_text('# @package _global_\ndata: {val_split: "\\x24{oc.\\x65nv:WORD}"}\n')
    up = f"{'../' * 20}{evil.with_suffix('')}"
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "experiment").symlink_to(evil.parent)
    arguments = {
        "a path upwards": [f"experiment={up}"],
        "a link": [f"--config-dir={tmp_path}/conf", "experiment=evil"],
        "a flag cut short": ["--config-d", f"{tmp_path}/conf", "experiment=evil"],
        "a group of Hydra's own": [f"hydra/launcher={up}"],
    }[way]
    ended = command("--cfg=all", "--resolve", *arguments)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert f"{evil} reads the environment" in ended.stderr and HIDDEN not in ended.stdout + ended.stderr


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """Nine aliases of nine aliases of ...: 200 bytes that are 3,000,000,000 values."""
    folds = "".join(f"f{i}: &f{i} [{', '.join([f'*f{i - 1}'] * 9)}]\n" for i in range(1, 10))
    values = yaml.safe_load("f0: &f0 []\n" + folds)
    with pytest.raises(ConfigError, match="more than 100,000 keys and values"):
        gate.refuse_values(values)


def test_a_job_of_a_sweep_ends_with_the_code_of_its_error() -> None:
    ended = command("--multirun", "trainer.max_steps=0,1")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: trainer.max_steps=0 must be positive." in ended.stderr


@pytest.mark.parametrize("value", ["inf", "[1,nan]", "{a:-inf}", "1e999"])
def test_metaparameters_are_numbers_to_compute_with(value: str) -> None:
    with pytest.raises(ConfigError, match=r"model.metaparameters.sr.* is no number to compute with"):
        compose("train", TrainConfig, [*BASE, f"model.metaparameters.sr={value}"])


@pytest.mark.not_quick
def test_a_message_is_bounded_and_keeps_its_remedy() -> None:
    ended = command(f"recipe.decay={'x' * 60_000}")
    assert ended.returncode == 2 and len(ended.stderr) < LONGEST_MESSAGE + 200
    assert ended.stderr.startswith("error: recipe.decay='xxx") and "linear, cosine, none" in ended.stderr


def test_a_double_among_sixty_thousand_shards_is_found_at_once() -> None:
    """Each name is looked at twice at most; it took one comparison for each pair of names."""
    looked_at = 0

    class Name(str):
        def __eq__(self, other: object) -> bool:
            nonlocal looked_at
            looked_at += 1
            return str.__eq__(self, other)  # type: ignore[arg-type]

        __hash__ = str.__hash__

    names = [*(f"a-{i:05d}.tar" for i in range(59_999)), "a-59998.tar"]
    shards = [{"name": Name(name), "bytes": 1, "sha256": "0" * 64, "num_samples": 1} for name in names]
    with pytest.raises(DataError, match=r"lists 'a-59998.tar' twice"):
        manifest._parse_split("train", {"num_samples": 60_000, "shards": shards}, "m")  # type: ignore[arg-type]
    assert looked_at < 10 * len(names)
