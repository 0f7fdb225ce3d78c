"""The wheel, in an environment of its own and a directory with a `pipeline.py` that nobody must run."""

import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.commands import SMALL, clean_environment

REPOSITORY = Path(__file__).resolve().parents[2]
TRAP = "raise SystemExit('the wrong pipeline.py')\n"


def ran(command: list[str | Path], cwd: Path, expect: int = 0) -> str:
    """stdout and stderr of a command, without the checkout on its path."""
    environment = {key: value for key, value in clean_environment().items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert ended.returncode == expect, ended.stdout
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of what git tracks, as `pip install .` would."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    names = [name for name in tracked.stdout.split("\0") if name and not name.startswith(("tests/", "benchmarks/"))]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name, follow_symlinks=False)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out)]
    ran([sys.executable, "-m", "pip", "wheel", *options, "."], source)
    (built,) = out.glob("squeezewire-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, in an environment that has our dependencies by way of a path, after its own, and not our code."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    ran([sys.executable, "-m", "pip", "--python", str(home / "bin/python"), "install", "--no-deps", "--no-index",
         "--quiet", wheel], home)  # fmt: skip
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # its own .pth files are not read
    where = ran([home / "bin/python", "-P", "-c", "import pipeline; print(pipeline.__file__)"], home)
    assert Path(where.strip()).is_relative_to(site)
    return home / "bin/squeezewire"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory with modules that stand in for ours and for the standard library's."""
    for name in ("pipeline.py", "random.py", "queue.py", "tokenize.py"):
        (tmp_path / name).write_text(TRAP)
    return tmp_path


def test_the_wheel_holds_the_configuration_and_what_is_no_code(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "conf"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    assert len(tracked) > 20 and {f"pipeline/{name}" for name in tracked} <= held
    assert {"pipeline/py.typed", "pipeline/reporting/templates/report.html.j2"} <= held
    assert not [name for name in held if name.startswith(("tests", "conf", "benchmarks", "docs"))]


def test_it_trains_where_a_pipeline_py_lies(installed: Path, elsewhere: Path, shards: Path) -> None:
    """Two ranks, a report written beside the training, the record of what it was made with."""
    keys = ["name=far", f"data.root={shards}", "cluster.devices=2", *SMALL, "tracking=disabled", "trainer.max_steps=2"]
    trained = ran([installed, "train", *keys], elsewhere)
    assert "the ledger closed" in trained
    run = elsewhere / "runs" / "far"
    assert json.loads((run / "ledger.json").read_text())["transport"]["residual_bytes_per_rank"] == [0, 0]
    assert (run / "report.html").is_file()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["git"]["commit"] is None and environment["packages"]["torch"]
    assert "top-1" in ran([installed, "evaluate", f"data.root={shards}", "checkpoint=runs/far"], elsewhere)


def test_it_says_what_it_is(installed: Path, elsewhere: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for command in (["--version"], ["train", "--version"]):
        assert ran([installed, *command], elsewhere) == f"squeezewire {project['version']}\n"
    for command in ("train", "ready", "requeue", "lab", "plan"):
        assert ran([installed, command, "--help"], elsewhere).startswith(f"squeezewire {command} ")
    listed = {row["model"]: row for row in json.loads(ran([installed, "models", "--json"], elsewhere))}
    assert listed["squeezenet1_0"]["gradient_bytes"] == 4_993_696 and listed["alexnet"]["published_top1"] == 0.56522
    told = ran([installed, "traim"], elsewhere, expect=2)
    assert "'traim' is no command. Did you mean 'train'?" in told and "Traceback" not in told
