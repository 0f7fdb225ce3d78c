"""The manifest says what lies beside it, or why it cannot be believed."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import DataError, ExitCode
from pipeline.data.shards.manifest import Manifest, Shard, Split

SHARD = Shard("train-000000.tar", 10240, "ab" * 32, 3)
TWICE = {"name": "train-000000.tar", "bytes": 10240, "sha256": "ab" * 32, "num_samples": 3}
MANIFEST = Manifest(("cat", "dog"), {"train": Split((SHARD,), {"seed": 7})}, {"made_by": "a test"})


def test_the_json_is_the_published_contract(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "schema": 1,
        "classes": ["cat", "dog"],
        "splits": {
            "train": {
                "num_samples": 3,
                "shards": [{"name": "train-000000.tar", "bytes": 10240, "sha256": "ab" * 32, "num_samples": 3}],
                "seed": 7,
            }
        },
        "made_by": "a test",
    }


shards = st.builds(
    Shard,
    name=st.from_regex(r"[a-z]{1,8}-[0-9]{6}\.tar", fullmatch=True),
    bytes=st.integers(0, 2**50),
    sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    num_samples=st.integers(0, 10**9),
)
splits = st.builds(
    Split,
    shards=st.lists(shards, max_size=3, unique_by=lambda shard: shard.name).map(tuple),
    extra=st.just({"seed": 1}),
)


@given(
    classes=st.lists(st.text(max_size=8), unique=True, max_size=4).map(tuple),
    by_name=st.dictionaries(st.sampled_from(["train", "val", "test"]), splits),
)
def test_saved_and_loaded_it_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, classes: tuple[str, ...], by_name: dict[str, Split]
) -> None:
    root = tmp_path_factory.mktemp("manifest")
    manifest = Manifest(classes, by_name)
    manifest.save(root)
    assert Manifest.load(root) == manifest


def test_a_missing_split_names_those_that_exist() -> None:
    with pytest.raises(DataError, match=r"no split 'validation'.*there is: train") as caught:
        MANIFEST.split("validation")
    assert caught.value.exit_code == ExitCode.DATA


def test_a_manifest_that_is_larger_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = MANIFEST.save(tmp_path)
    monkeypatch.setattr("pipeline.data.shards.manifest.MAX_MANIFEST_BYTES", path.stat().st_size)
    assert Manifest.load(tmp_path) == MANIFEST
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match=rf"manifest\.json has more than {path.stat().st_size - 1} bytes"):
        Manifest.load(tmp_path)


def test_no_manifest_means_unfinished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json does not exist.*unfinished"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": 2}, "schema 2"),
        ({"classes": ["cat", "cat"]}, "distinct strings"),
        ({"classes": [1, 2]}, "distinct strings"),
        ({"classes": "ab"}, "distinct strings"),
        ({"splits": {"train": {"num_samples": 4, "shards": []}}}, "says 4 samples.*sum to 0"),
        ({"splits": {"train": {"num_samples": 0}}}, "not a manifest"),
        ({"splits": []}, "not a manifest"),
        ({"splits": {"train": MANIFEST.to_json()["splits"]["train"] | {"shards": [TWICE, TWICE]}}}, "twice"),
        ({"splits": {"train": {"num_samples": 1, "shards": [{"name": "../x.tar"}]}}}, "not a manifest"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST.to_json(), **change}))
    with pytest.raises(DataError, match=sentence):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../x.tar"},
        {"name": "/x.tar"},
        {"name": ""},
        {"name": "."},
        {"name": ".."},
        {"name": "pipe:touch marker"},
        {"name": "x\n.tar"},
        {"name": 3},
        {"bytes": -1},
        {"bytes": True},
        {"bytes": 2**63},
        {"sha256": None},
        {"sha256": ["ab" * 32]},
        {"sha256": {"a": 1}},
        {"sha256": "../x"},
    ],
)
def test_a_shard_cannot_lie_elsewhere_or_be_negative(tmp_path: Path, change: dict[str, Any]) -> None:
    value: dict[str, Any] = json.loads(json.dumps(MANIFEST.to_json()))
    value["splits"]["train"]["shards"][0] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match="plain file name"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 10**5])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match="manifest"):
        Manifest.load(tmp_path)
