"""TMPDIR, HOME and MPLBACKEND as notebooks, containers and clusters set them."""

import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import surroundings
from pipeline.core.errors import ConfigError
from pipeline.core.surroundings import LONGEST_FOLDER_BYTES, NO_HOME, settle_surroundings, settle_temporary_folder


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("HOME", "TMPDIR", "TEMP", "TMP", "MPLBACKEND"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is undone
        monkeypatch.delenv(name)


@pytest.fixture
def long_folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / ("é" * 60)
    folder.mkdir()
    yield folder


def test_a_long_tmpdir_is_replaced_and_it_is_said(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(long_folder))
    (note,) = settle_temporary_folder()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == "/tmp"
    assert str(long_folder) in note and f"{LONGEST_FOLDER_BYTES} bytes" in note and note.endswith("lie in /tmp.")
    assert settle_temporary_folder() == []


def test_a_tmpdir_that_is_not_there_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    (note,) = settle_temporary_folder()
    assert "gone cannot be written to" in note and Path(os.environ["TMPDIR"]).is_dir()


def test_a_tmpdir_that_will_do_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle_temporary_folder() == [] and "TMPDIR" not in os.environ
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    assert settle_temporary_folder() == [] and os.environ["TMPDIR"] == "/dev/shm"


def test_no_short_folder_is_an_error(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(long_folder))
    monkeypatch.setattr(surroundings, "SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(ConfigError, match="set TMPDIR to a folder with a shorter path"):
        settle_temporary_folder()


def test_no_folder_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gettempdir() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    with pytest.raises(ConfigError, match="set TMPDIR"):
        settle_temporary_folder()


@pytest.mark.parametrize("home", [None, ""])
def test_home_is_that_of_the_users_list_or_none(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if home is not None:
        monkeypatch.setenv("HOME", home)
    settle_surroundings()
    assert os.environ["HOME"] == pwd.getpwuid(os.getuid()).pw_dir

    def getpwuid(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    settle_surroundings()
    assert os.environ["HOME"] == NO_HOME and Path.home() == Path(NO_HOME)
    assert not (Path.home() / ".netrc").exists()
    with pytest.raises(OSError):
        (Path.home() / ".cache").mkdir(parents=True)


def test_figures_are_drawn_into_files(monkeypatch: pytest.MonkeyPatch) -> None:
    settle_surroundings()
    assert "MPLBACKEND" not in os.environ
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    settle_surroundings()
    assert os.environ["MPLBACKEND"] == "agg"
