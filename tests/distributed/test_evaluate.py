"""Evaluation counts every picture once, on any number of ranks, whatever the weights come from."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from tests.commands import run
from tests.making.pairs import Pair
from tests.making.shards import CLASSES, NUM_TRAINING, NUM_VALIDATION, write_shards

REPOSITORY = Path(__file__).parents[2]
QUICK = ("data.num_workers=0", "cluster.num_threads=1", "batch_per_rank=4")
SMALL = ("data.size=32", *QUICK)
COUNTS = ("num_samples", "num_correct_top1", "num_correct_top5")


def evaluate(root: Path, shards: Path, devices: int, *more: str, expect: int = 0) -> tuple[dict[str, Any], str]:
    """(evaluation.json, what was said)."""
    where = [f"run_root={root}", "name=check", f"data.root={shards}", f"cluster.devices={devices}"]
    ended = run(["-m", "pipeline.evaluate", *where, *more], expect=expect)
    path = root / "check" / "evaluation.json"
    return json.loads(path.read_text()) if path.exists() else {}, ended.output


@pytest.mark.parametrize("devices", [(1, 3), pytest.param((1, 2), marks=pytest.mark.slow)], ids=str)
def test_a_run_is_judged_alike_on_any_number_of_ranks(
    devices: tuple[int, ...], two_ranks: Pair, shards: Path, tmp_path: Path
) -> None:
    results = [evaluate(tmp_path / str(n), shards, n, f"checkpoint={two_ranks.unbroken}", *QUICK)[0] for n in devices]
    first = results[0]
    assert first["schema"] == 1 and "best.ckpt" in first["checkpoint"]
    assert first["num_samples"] == NUM_VALIDATION
    assert first["top1"] == first["num_correct_top1"] / NUM_VALIDATION
    assert first["top5"] == first["num_correct_top5"] / NUM_VALIDATION
    for other in results[1:]:
        assert {key: other[key] for key in COUNTS} == {key: first[key] for key in COUNTS}
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)


def with_classes(root: Path, *classes: str) -> Path:
    """Other names in a manifest. Returns `root`."""
    path = root / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": classes}))
    return root


def test_labels_are_matched_by_the_names_of_the_classes(two_ranks: Pair, shards: Path, tmp_path: Path) -> None:
    """The same pictures with names and numbers the other way round; then with a class that nobody trained on."""
    keys = (f"checkpoint={two_ranks.unbroken}", *SMALL)
    right, _ = evaluate(tmp_path / "right", shards, 1, *keys)
    turned = {number: str(3 - number % 4) for number in range(sum(NUM_TRAINING) + NUM_VALIDATION)}
    other = with_classes(write_shards(tmp_path / "turned_shards", labels=turned), *reversed(CLASSES))
    found, said = evaluate(tmp_path / "turned", other, 1, *keys)
    assert "matched to outputs by class name" in said
    assert {key: found[key] for key in COUNTS} == {key: right[key] for key in COUNTS}
    strange = with_classes(write_shards(tmp_path / "strange_shards"), *CLASSES[:-1], "never seen")
    _, said = evaluate(tmp_path / "strange", strange, 1, *keys, expect=2)
    assert "1 of the split's 4 classes are not the model's: 'never seen'. The model was trained on 4: 'ant'" in said


def test_torchvisions_own_state_dict_is_read_as_it_is(shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.squeezenet1_1(num_classes=4)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    keys = ("model=squeezenet1_1", "data.split=train", *SMALL)
    result, said = evaluate(tmp_path, shards, 1, f"checkpoint={tmp_path / 'theirs.pth'}", *keys)
    assert result["num_samples"] == result["num_correct_top5"] == 60 and "of 60" in said


@pytest.mark.parametrize(
    ("weights", "override", "code", "words"),
    [
        ("another model", "model=squeezenet1_1", 4, ["does not fit squeezenet1_1"]),
        pytest.param(
            *("not weights", "model=squeezenet1_1", 4, ["is cut short"]),
            marks=pytest.mark.slow,
        ),
        pytest.param("none", "model=squeezenet1_1", 4, ["does not exist"], marks=pytest.mark.slow),
        ("another model", "model=squeezenet1_9", 2, ["squeezenet1_9", "Did you mean"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    weights: str, override: str, code: int, words: list[str], shards: Path, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    if weights == "another model":
        torch.save(torchvision.models.squeezenet1_0(num_classes=4).state_dict(), path)
    elif weights == "not weights":
        path.write_bytes(b"PK\x03\x04 and nothing else")
    result, said = evaluate(tmp_path, shards, 1, f"checkpoint={path}", override, *SMALL, expect=code)
    assert not result and "Traceback" not in said
    assert all(word in said for word in words), said


@pytest.mark.slow
def test_a_picture_that_does_not_decode_is_never_left_out(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", damaged=(70,))
    torch.save(torchvision.models.squeezenet1_1(num_classes=4).state_dict(), tmp_path / "w.pth")
    result, said = evaluate(
        tmp_path, shards, 2, f"checkpoint={tmp_path / 'w.pth'}", "model=squeezenet1_1", *SMALL, expect=3
    )
    assert not result and "24 of 25 pictures were scored" in said


# --- the authors' own weights on real photographs ---


def shared(relative: str) -> Path:
    """A file handed in beside the repository; skips where it is not."""
    root = Path(os.environ.get("SQUEEZEWIRE_SHARED", REPOSITORY.parent / "shared"))
    if not (root / relative).exists():
        pytest.skip(f"{relative} is not in {root} (SQUEEZEWIRE_SHARED names another place)")
    return root / relative


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 450 sample photographs as shards; their labels are places in the list of ILSVRC2012's 1000 classes."""
    source, classes = shared("data/imagenet-sample"), shared("data/imagenet_wnids.txt")
    out = tmp_path_factory.mktemp("photographs") / "shards"
    run(["-m", "pipeline.prepare", f"source={source}", f"classes={classes}", f"out={out}", "split=val"])
    return out


@pytest.mark.parametrize(
    "devices", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_the_authors_weights_score_what_they_do_in_caffe(devices: int, photographs: Path, tmp_path: Path) -> None:
    weights = shared("weights/squeezenet_v1_0_deepcompressed.npz")
    result, _ = evaluate(tmp_path, photographs, devices, "model=squeezenet1_0_caffe", f"checkpoint={weights}")
    assert {key: result[key] for key in COUNTS} == {
        "num_samples": 450,
        "num_correct_top1": 293,
        "num_correct_top5": 389,
    }
    assert result["loss"] == pytest.approx(1.430, abs=0.005)
    shutil.rmtree(tmp_path)
