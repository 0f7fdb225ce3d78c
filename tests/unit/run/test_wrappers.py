"""Weights of others: taken out of their wrappers, or called what they are; torch's advice to run code is not shown."""

import argparse
import pathlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.core.errors import CheckpointError
from pipeline.run.checkpoint_files import load_foreign
from pipeline.run.wrappers import unwrap

STATE = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()


def prefixed(*prefixes: str) -> dict[str, Any]:
    return OrderedDict((f"{''.join(prefixes)}{key}", value) for key, value in STATE.items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (STATE, []),
        ({"epoch": 3, "arch": "x", "state_dict": prefixed("module.")}, ["'state_dict'", "'module.'"]),
        ({"model": STATE, "epoch": 3, "args": argparse.Namespace(lr=0.1, tags=["a"])}, ["'model'"]),
        ({"model_state_dict": STATE, "optimizer_state_dict": {"lr": 1}}, ["'model_state_dict' (optimizer_state_dict"]),
        ({"state_dict": prefixed("_orig_mod.")}, ["'state_dict'", "'_orig_mod.'"]),
        (prefixed("_orig_mod.", "module."), ["'_orig_mod.'", "'module.'"]),
        ({"state_dict": prefixed("model."), "hyper_parameters": {}}, ["'state_dict' (hyper_parameters", "'model.'"]),
        ({"n_averaged": torch.tensor(3), **prefixed("module.")}, ["'module.'"]),
        ({"state_dict": STATE, "state_dict_ema": STATE}, ["'state_dict' (state_dict_ema not read)"]),
    ],
)
def test_weights_are_taken_out_and_it_is_said(content: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    state, clauses = unwrap(load_foreign(tmp_path / "weights.pth"))
    assert list(state) == list(STATE) and all(torch.equal(state[key], STATE[key]) for key in STATE)
    assert len(clauses) == len(said) and all(what in clause for what, clause in zip(said, clauses, strict=True))


def cut(path: Path) -> None:
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-100])


def cut_legacy(path: Path) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:300])


def broken_safetensors(path: Path) -> None:
    """Its header tells of more than there is."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


@pytest.mark.parametrize("length", [48, 64, 123])  # 123 is the code of "{", with which JSON would begin
def test_safetensors_are_read_whatever_their_name(length: int, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save_file({f"module.{key}": value for key, value in STATE.items()}, path, metadata={"format": "pt"})
    state, said = unwrap(load_foreign(path))
    assert all(torch.equal(state[key], STATE[key]) for key in STATE) and len(said) == 1
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'[:-1].ljust(length - 1) + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    if length > 54:
        assert load_foreign(path)["a"].tolist() == [0.0]


def torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"net/{name}", b"")


FILES: dict[str, Callable[[Path], object]] = {
    "is a pointer of git-LFS": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
    "is a web page": lambda path: path.write_text("\n<!DOCTYPE html><html>login</html>"),
    "is empty": lambda path: path.touch(),
    "is cut short": cut,
    "is damaged": cut_legacy,
    "is JSON": lambda path: path.write_text('{"error": "not found"}'),
    "was not read (SafetensorError)": broken_safetensors,
    "is a TorchScript archive": torchscript,
    "more than tensors and plain values (pathlib.": lambda path: torch.save({"args": pathlib.PurePosixPath("x")}, path),
    "(torch.nn.modules.linear.Linear)": lambda path: torch.save(nn.Linear(1, 1), path),
    "cannot be read": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
@pytest.mark.parametrize("what", FILES)
def test_a_file_is_called_what_it_is(what: str, suffix: str, tmp_path: Path) -> None:
    from pipeline.models import zoo
    from pipeline.models.caffe import load_npz

    path = tmp_path / f"weights{suffix}"
    FILES[what](path)
    with pytest.raises(CheckpointError) as raised:
        _ = load_foreign(path) if suffix == ".pth" else load_npz(path, zoo.build("squeezenet_small", 2))
    said = str(raised.value)
    assert what in said or suffix == ".npz", said
    assert "weights_only" not in said and "trust" not in said and "\x1b" not in said, said
