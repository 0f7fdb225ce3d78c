"""The folder of an export: the files of the one before until all are made, and then none of them."""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.export import ExportConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError
from pipeline.export import export
from pipeline.exporting import steps
from pipeline.models import zoo

TINY: dict[str, Any] = {"base_e": 32, "incr_e": 32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(zoo.build("squeezenet_small", 3, **TINY).state_dict(), path)
    return path


def exported(root: Path, weights: Path, *asked: str) -> Path:
    """Without pictures, so that it takes no time."""
    model = ["model=squeezenet_small", *(f"+model.metaparameters.{key}={value}" for key, value in TINY.items())]
    asked = asked or ("formats=[safetensors]",)
    assert export(compose("export", ExportConfig, [f"checkpoint={weights}", f"run_root={root}", *model, *asked])) == 0
    return root / "export"


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changed(weights: Path, folder: Path) -> Path:
    path = folder / "changed.pth"
    torch.save({name: value + 1 for name, value in torch.load(weights).items()}, path)
    return path


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("in_the_midst_of", ["write_artefacts_report", "offer"])
def test_one_that_ends_in_its_tables_leaves_what_was_there(
    error: BaseException,
    in_the_midst_of: str,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = exported(tmp_path, weights)
    before = hashes(folder)
    assert {"model.safetensors", "artefacts.json", "artefacts.csv", "report.html", "latest.json"} <= set(before)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(steps, in_the_midst_of, fail)
        with pytest.raises(type(error)):
            exported(tmp_path, changed(weights, tmp_path))
    assert hashes(folder) == before and not (folder / "unfinished").exists()
    assert ("is as it was" in capsys.readouterr().err) == isinstance(error, KeyboardInterrupt)
    exported(tmp_path, changed(weights, tmp_path))
    assert all(hashes(folder)[name] != before[name] for name in ("model.safetensors", "artefacts.json", "latest.json"))
    assert "<title>export" in (folder / "report.html").read_text()


def test_nothing_is_said_to_be_as_it_was_once_files_are_exchanged(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path, weights)
    older = json.loads((folder / "latest.json").read_text())

    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "fsync_directory", interrupt)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path, changed(weights, tmp_path))
    assert json.loads((folder / "latest.json").read_text()) == older  # the last to be exchanged
    assert "as it was" not in capsys.readouterr().err and not (folder / "unfinished").exists()


def test_what_has_the_folder_s_name_is_named(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (folder / "unfinished").write_text("mine")
    with pytest.raises(ConfigError, match=r"export/unfinished is in the way.*Move it away, or give another name="):
        exported(tmp_path, weights)
    assert (folder / "unfinished").read_text() == "mine"
    (folder / "unfinished").unlink()
    (folder / "unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is in the way"):
        exported(tmp_path, weights)
    assert (folder / "unfinished").is_symlink()


def test_files_of_an_earlier_export_that_were_not_made_again_go(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path, weights, "formats=[safetensors,safetensors_fp16]")
    (folder / "model.sqz").write_text("of an earlier one")
    (folder / "notes.txt").write_text("mine")
    capsys.readouterr()
    exported(tmp_path, weights)
    assert "Removed, of an earlier export of this name: model_fp16.safetensors, model.sqz.\n" in capsys.readouterr().out
    assert not (folder / "model.sqz").exists() and (folder / "notes.txt").exists()
    exported(tmp_path, weights)
    assert "Removed" not in capsys.readouterr().out


def test_what_an_export_was_made_from_stays(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path, weights)
    own = folder / "model.safetensors"
    exported(tmp_path, own, "formats=[safetensors_fp16]")
    (folder / "model.sqz").write_text("the base")
    exported(tmp_path, own, "formats=[safetensors_fp16]", f"base={folder / 'model.sqz'}")
    assert own.exists() and (folder / "model.sqz").exists() and "Removed" not in capsys.readouterr().out
