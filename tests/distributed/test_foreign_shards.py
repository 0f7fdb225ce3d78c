"""Shards made by others, through the commands and on several ranks: indexed once, used as they are, never followed."""

import json
from pathlib import Path

import pytest

from tests.commands import SMALL, run, train
from tests.making.pictures import coloured
from tests.making.shards import write_shards, write_tar

HERE = Path(__file__).parent

NAMES = ("set-train-000.tar", "set-train-001.tar", "set-validation-000.tar")


def write_public(root: Path, sizes: tuple[int, int, int] = (30, 30, 13)) -> Path:
    """As public ImageNet comes: `.jpeg`, the label in `.json`, further members, timm's `_info.json`, no manifest."""
    root.mkdir(parents=True)
    first = 0
    for name, size in zip(NAMES, sizes, strict=True):
        samples = []
        for number in range(first, first + size):
            label = {"label": number % 4, "filename": f"{number}.JPEG", "width": 48}
            jpeg = coloured(number, number % 4)
            samples.append({"__key__": f"n{number % 4}/{number:05d}", "jpeg": jpeg, "json": label, "txt": "x"})
        write_tar(root / name, samples)
        first += size
    splits = {
        "train": {"filenames": NAMES[:2], "shard_lengths": sizes[:2], "num_samples": sum(sizes[:2]), "name": "train"},
        "validation": {"filenames": NAMES[2:], "shard_lengths": sizes[2:], "num_samples": sizes[2], "name": "x"},
    }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def opened_by(ranks: int, shards: Path, out: Path, *more: str) -> list[list[str]]:
    """Which tars each rank opened until the shards were open to all."""
    out.mkdir()
    where = [f"data.root={shards}", "name=x", f"cluster.devices={ranks}", "tracking=disabled"]
    run([str(HERE / "open_recorded.py"), *where, *SMALL, *more], environment={"OPENED_TO": str(out)})
    told = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    assert {facts["num_samples"] for facts in told} == {60}
    return [facts["opened"] for facts in told]


def test_one_rank_reads_and_the_others_take_its_index(tmp_path: Path) -> None:
    shards = write_public(tmp_path / "public")
    first, *others = opened_by(3, shards, tmp_path / "first", "data.val_split=validation")
    assert first == sorted(NAMES) and others == [[], []]


@pytest.mark.slow
def test_one_rank_hashes_for_all(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    first, second = opened_by(2, shards, tmp_path / "opened", "data.verify=sha256")
    assert first == sorted(2 * ["train-000000.tar", "train-000001.tar", "val-000000.tar"])  # hashed, scanned
    assert second == []


def test_public_shards_are_trained_on_as_they_are(tmp_path: Path) -> None:
    shards = write_public(tmp_path / "public")
    options = ("trainer.max_steps=2", "trainer.validate_every_steps=2", "data.val_split=validation")
    ended = train(tmp_path / "runs", shards, "public", 2, *options)
    assert "4 classes" in ended.output and "2 steps done" in ended.output
    rows = [json.loads(line) for line in (tmp_path / "runs" / "public" / "metrics.jsonl").read_text().splitlines()]
    assert [row["trainer/step"] for row in rows] == [1, 2] and rows[-1]["val/top1"] is not None
    assert not (tmp_path / "runs" / "public" / "quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.root='pipe:touch marker'", "data.root=pipe:touch marker is not a directory"),
        ("data.train_split='pipe:touch marker #.tar'", "begins like a URL"),
        ("data.train_split='../set-train-{000..001}.tar'", "does not stay inside data.root"),
        ("data.val_split=val", "train, validation"),
    ],
)
def test_what_leads_elsewhere_is_refused_and_nothing_is_run(override: str, words: str, tmp_path: Path) -> None:
    shards = write_public(tmp_path / "public")
    where = [f"run_root={tmp_path}/runs", f"data.root={shards}", "name=x", "tracking=disabled"]
    ended = run(["-m", "pipeline.train", *where, *SMALL, override], cwd=tmp_path, expect=3)
    assert words in ended.output and "Traceback" not in ended.output
    assert not list(tmp_path.rglob("marker")) and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_more_ranks_than_samples_are_a_sentence(tmp_path: Path) -> None:
    shards = write_public(tmp_path / "public", (1, 1, 13))
    options = ("batch.global_size=3", "data.val_split=validation", "model.num_classes=4")
    ended = train(tmp_path / "runs", shards, "few", 3, *options, expect=3)
    said = [line for line in ended.output.splitlines() if "error: " in line and "lost its connection" not in line]
    assert said and all(
        "has 2 samples, fewer than one global batch of 3: 3 ranks are too many" in line for line in said
    )
