"""The command line as a user meets it: composition, nearest keys, exit codes."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.dashboard import DashboardConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.squeezenet import SqueezeNetConfig
from pipeline.config.training import TrainConfig, TrainerConfig
from pipeline.core import cli
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError
from pipeline.core.help import field_docs, help_text
from pipeline.core.typed import build
from pipeline.run.directory import validate_name

ROOT = Path(__file__).resolve().parents[3]
BASE = ["name=x", "data.root=somewhere", "trainer.max_steps=1"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.train", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trainer.max_step=1", "trainer.max_steps"),
        ("max_steps=1", "trainer.max_steps"),
        ("recipe.momentun=0.9", "recipe.momentum"),
        ("modle=alexnet", "model"),
        ("model=squeeznet1_0", "squeezenet1_0"),
        ("model=resnet8", "resnet18"),
    ],
)
def test_a_wrong_key_or_choice_names_the_nearest(override: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{nearest}'"):
        compose("train", TrainConfig, [*BASE, override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("recipe.lr=inf", "recipe.lr=inf is no number to compute with"),
        ("data.augment.scale=[nan,1]", "scale[0]=nan is no number"),
        (f"recipe.lr={'9' * 5000}", "9'... cannot be read: give a number"),
        ("trainer.max_epochs=1e999", "max_epochs=inf is no number"),
        (f"trainer.max_steps={2**63}", "trainer.max_steps has more digits than a number"),
        ("model.num_classes=9007199254740993", "at most 10,000,000"),
        ("data.size=65536", "data.size=65536 must be a positive number of pixels, and at most 65,535"),
        ("model=null", "model='null' does not exist"),
        (f"recipe.lr={'9' * 400}", "recipe.lr has more digits than a number"),
    ],
)
def test_what_is_no_number_is_none(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose("train", TrainConfig, [*BASE, override])
    assert said in str(raised.value)


def test_a_text_of_a_file_holds_no_character_of_value_0() -> None:
    values = cli.compose_container("train", TrainConfig, BASE)
    with pytest.raises(ConfigError, match=r"run_root='x\\x00' holds a character of value 0"):
        build(TrainConfig, values | {"run_root": "x\0"})


def test_a_text_can_be_written_into_files() -> None:
    with pytest.raises(ConfigError, match=r"data.root='\\ud800' holds half a character"):
        compose("train", TrainConfig, [*BASE, "data.root=\ud800"])


def test_metaparameters_are_open() -> None:
    config = compose("train", TrainConfig, [*BASE, "model.metaparameters.sr=0.5"])
    assert config.model.metaparameters["sr"] == 0.5


@pytest.mark.parametrize("name", ["sweep/lr=0.1", "a=b=c", "'sweep/lr=0.1'"])
def test_a_value_may_hold_an_equals_sign(name: str) -> None:
    assert compose("train", TrainConfig, [*BASE[1:], f"name={name}"]).name == name.strip("'")


@pytest.mark.parametrize("root", ["läufe/été", "my runs", "two  spaces", "日本"])
def test_a_path_may_hold_accents_and_spaces(root: str) -> None:
    config = compose("train", TrainConfig, [*BASE, f"run_root={root}"])
    assert config.run_root == root


def test_names_of_shards_may_hold_ranges_in_braces() -> None:
    names = "imagenet-train-{0000..1023}.tar"
    assert compose("train", TrainConfig, [*BASE, f"data.train_split={names}"]).data.train_split == names


def test_the_path_of_a_checkpoint_is_taken_as_it_is() -> None:
    path = "runs/x/checkpoints/step=000000012.ckpt"
    config = compose("evaluate", EvaluateConfig, ["data.root=somewhere", f"checkpoint={path}"])
    assert config.checkpoint == path


def test_an_unset_name_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="name is not set: add name="):
        compose("train", TrainConfig, BASE[1:])


def test_grammar_errors_are_configuration_errors() -> None:
    with pytest.raises(ConfigError):
        compose("train", TrainConfig, [*BASE, "seed=[1,"])
    with pytest.raises(ConfigError, match="not of the form key=value"):
        compose("train", TrainConfig, [*BASE, "seed"])


def test_help_lists_every_key_with_its_meaning() -> None:
    text = help_text("train", TrainConfig)
    for key in ("batch.global_size=", "trainer.max_steps=", "cluster.devices=", "comm.hook=", "data.root="):
        assert key in text
    for sentence in field_docs(TrainerConfig).values():
        assert sentence.split()[0] in text
    for key, sentence in field_docs(SqueezeNetConfig).items():
        assert f" model.metaparameters.{key}=" in text and sentence.split()[0] in text


def test_help_shows_the_values_of_the_choices_that_stand_beside_it() -> None:
    assert "\n  recipe.lr=null\n" in help_text("train", TrainConfig)
    text = help_text("train", TrainConfig, ["name=x", "recipe=adamw", "--help"])
    assert "\n  recipe.lr=0.0005\n" in text and "\n  recipe.optimizer=adamw\n" in text
    assert "\nKeys (key=value), with recipe=adamw:\n" in text
    with pytest.raises(ConfigError, match="Did you mean 'adamw'"):
        help_text("train", TrainConfig, ["recipe=adamx"])


@pytest.mark.parametrize(
    "given",
    [
        ["model=timm:resnet10t"],
        ["model=torchvision:resnet18"],
        ["model=package.module:factory"],
        ["model=path/to/file.py:factory"],
        ["--multirun", "recipe=adamw,sgd"],
        ["--multirun", "recipe=choice(adamw,sgd)"],
        ["+recipe=adamw"],
        ["++recipe=adamw"],
        ["~recipe"],
        ["~recipe=sgd"],
        ["recipe@elsewhere=adamw"],
        ["recipe.lr=1"],
    ],
)
def test_help_ignores_all_but_plain_choices(given: list[str]) -> None:
    assert help_text("train", TrainConfig, [*given, "--help"]) == help_text("train", TrainConfig)


def test_help_shows_the_last_of_two_choices() -> None:
    text = help_text("train", TrainConfig, ["recipe=sgd", "recipe=adamw"])
    assert text == help_text("train", TrainConfig, ["recipe=adamw"])


@pytest.mark.not_quick
def test_exit_codes_and_one_sentence() -> None:
    wrong_key = run(*BASE, "trainer.max_step=1")
    assert wrong_key.returncode == 2
    assert wrong_key.stderr.strip().splitlines() == [
        "error: Unknown key trainer.max_step. Did you mean 'trainer.max_steps'?"
    ]
    no_shards = run("name=x", "data.root=/nowhere", "trainer.max_steps=1", "cluster.devices=2")
    assert no_shards.returncode == 3
    assert "data.root=/nowhere is not a directory" in no_shards.stderr
    assert no_shards.stderr.count("\n") == 1


def test_carriage_returns_are_no_part_of_arguments(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither here nor in the ranks, which are started with this process's arguments."""
    found: list[object] = []
    monkeypatch.setattr(cli, "leave", lambda code: found.append(code))
    monkeypatch.setattr(cli, "leave_cause", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["dashboard", "name=a\r", "\r", "run_root=my runs\r"])
    cli.run_command("dashboard", DashboardConfig, lambda config: found.append(config))
    assert found == [DashboardConfig(name="a", run_root="my runs"), 0]
    assert sys.argv == ["dashboard", "name=a", "run_root=my runs"]
    assert "Windows' line ends" in capfd.readouterr().err


@pytest.mark.not_quick
def test_files_of_the_current_folder_are_not_taken_for_pythons_own(tmp_path: Path) -> None:
    for name in ("random", "queue", "data"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the folder')\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.train", *BASE, "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0 and "max_steps: 1" in done.stdout, done.stderr


@pytest.mark.not_quick
def test_cfg_job_prints_the_configuration_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.train", *BASE, "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert "max_steps: 1" in done.stdout
    assert list(tmp_path.iterdir()) == []


SAY_WHAT_IS_RUN = """
import shlex, sys
from pipeline.config.training import TrainConfig
from pipeline.core.cli import run_command

def say(config):
    print(config.name, config.recipe.lr, config.seed, shlex.join(sys.argv[1:]))

run_command("train", TrainConfig, say)
"""


@pytest.mark.not_quick
@pytest.mark.parametrize(
    ("swept", "names"),
    [
        (("name=x", "recipe.lr=0.1,0.2", "seed=3"), ["x/recipe.lr=0.1", "x/recipe.lr=0.2"]),
        (("name=x", "data.root=a b,~/c", "seed=1,2"), None),
        (("name=x,y", "recipe.lr=0.1"), ["x", "y"]),
        (("name=x", "recipe.lr=0.1"), ["x"]),
    ],
)
def test_each_job_of_a_sweep_has_a_name_of_its_own(
    swept: tuple[str, ...], names: list[str] | None, tmp_path: Path
) -> None:
    """The ranks are started with it too. Nothing is left in the folder."""
    line = [sys.executable, "-c", SAY_WHAT_IS_RUN, "data.root=r", "trainer.max_steps=1", *swept, "--multirun"]
    answer = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert not list(tmp_path.iterdir())
    jobs = [shlex.split(text) for text in answer.stdout.splitlines() if not text.startswith("[")]
    told = [job[0] for job in jobs]
    assert told == names if names else len(set(told)) == 4, answer.stdout
    for name, lr, seed, *overrides in jobs:
        config = compose("train", TrainConfig, overrides)
        assert (config.name, str(config.recipe.lr), str(config.seed)) == (name, lr, seed)
        validate_name(name)
