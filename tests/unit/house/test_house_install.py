"""What installs this: the console command's words, the container files, and that they name what is there."""

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pipeline.__main__ as console
from pipeline.models.listing import as_table, list_models
from tests.unit.house.test_house_conf import SCHEMAS

REPOSITORY = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def squeezewire(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_the_script_is_a_function_and_every_command_is_one_of_it() -> None:
    module, _, function = PROJECT["scripts"]["squeezewire"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert {*SCHEMAS, "ready", "requeue"} == set(console.COMMANDS)
    told = console.usage()
    assert all(re.search(rf"^  {name} +[A-Z].*[.:?]$", told, re.MULTILINE) for name in console.COMMANDS)


@pytest.mark.not_quick
def test_bash_completes_commands_keys_choices_and_paths(tmp_path: Path) -> None:
    script = tmp_path / "squeezewire"
    script.write_text(squeezewire("completion", "bash").stdout)
    (tmp_path / "my_shards").mkdir()
    expected = {
        "squeezewire tra": ["train"],
        "squeezewire train trainer.max": ["trainer.max_epochs=", "trainer.max_steps="],
        "squeezewire train model=squeezenet1_0_s": ["squeezenet1_0_simple_bypass"],
        "squeezewire compare tracking.tr": ["tracking.trainings="],
        "squeezewire train data.root=my_": ["my_shards"],
        "squeezewire nonsense": [],
    }
    for line, words in expected.items():
        ask = f"""source {shlex.quote(str(script))}; COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}
            read -ra COMP_WORDS <<< "$COMP_LINE"; _squeezewire; printf '%s\\n' "${{COMPREPLY[@]}}" """
        told = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert (told.stdout.split(), told.stderr) == (words, ""), line


def test_the_list_of_models_fits_a_terminal() -> None:
    lines = as_table(list_models()).splitlines()
    assert max(map(len, lines)) <= 80
    assert "squeezenet1_0                     1,248,424     4,993,696   58.09%   80.42%" in lines
    assert "squeezenet_small                  1,235,496     4,941,984        -        -" in lines


@pytest.mark.not_quick
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["traim"], "Did you mean 'train'?"),
        (["models", "--jsn"], "takes other words"),
        (["completion", "fish"], "takes"),
    ],
)
def test_other_words_are_refused(arguments: list[str], says: str) -> None:
    ended = squeezewire(*arguments)
    assert ended.returncode == 2 and says in ended.stderr and "Traceback" not in ended.stderr


def copied(text: str) -> list[str]:
    """What a container's file takes from the checkout."""
    of_docker = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    section = re.search(r"^%files\n((?: +.*\n)+)", text, re.MULTILINE)
    return of_docker + [line.split()[0] for line in (section[1] if section else "").splitlines()]


@pytest.mark.parametrize("name", ["Dockerfile", "squeezewire.def"])
def test_containers_take_what_is_there_and_all_that_is_needed(name: str) -> None:
    """Neither is built here."""
    text = (REPOSITORY / name).read_text()
    assert {"conf", "pipeline", PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"} <= set(copied(text))
    assert all((REPOSITORY / file).exists() for file in copied(text))
    (python,) = re.findall(r"^From:? python:([\d.]+)-slim$", text, re.MULTILINE | re.IGNORECASE)
    assert f"PYTHON ?= python{python}\n" in (REPOSITORY / "Makefile").read_text()
    installed = re.findall(
        r"pip install --no-cache-dir (?:-c (\S+) )?(?:--index-url \S+ )?(.+?)(?:;| \\)?$", text, re.M
    )
    assert installed and all(constraints in copied(text) for constraints, _ in installed)
    assert "'.[timm]'" in [what for _, what in installed] and "timm" in PROJECT["optional-dependencies"]
    assert {"squeezewire"} <= set(re.findall(r"squeezewire(?= --version)|(?<=ENTRYPOINT \[\")\w+", text))
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert name != "Dockerfile" or {f"!{file}" for file in copied(text)} <= set(ignored)
