"""The checkpoint protocol against everything that damages files."""

import errno
import importlib.metadata
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core import files
from pipeline.core.errors import CheckpointError
from pipeline.core.files import sha256_of_file
from pipeline.run import checkpoint_checks
from pipeline.run.checkpoint import (
    SECTION,
    AtomicCheckpointIO,
    checkpoint_path,
    find_best,
    find_latest,
    load,
    load_foreign,
    require_same_model,
    section_of,
    sidecar_path,
    taking,
    verify,
)
from pipeline.run.launch.environment import RankEnvironment
from pipeline.run.launch.ranks import RankInfo
from pipeline.run.provenance import versions


def state(step: int, num_values: int = 20_000) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "state_dict": {"model.weight": torch.randn(num_values, generator=generator)},
        "squeezewire": {"step": step, "world_size": 2, "model": "squeezenet1_1", "num_parameters": num_values},
    }


def save(directory: Path, *steps: int, io: AtomicCheckpointIO | None = None) -> AtomicCheckpointIO:
    io = io or AtomicCheckpointIO(keep=3)
    for step in steps:
        io.save_checkpoint(state(step), checkpoint_path(directory, step))
    return io


def latest(directory: Path) -> tuple[int, list[str]]:
    """(step found, warnings)."""
    warnings: list[str] = []
    found = find_latest(directory, warnings.append)
    assert found is not None
    return found.step, warnings


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- saving and finding ---


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 7)
    loaded = load(checkpoint_path(tmp_path, 7))
    assert torch.equal(loaded["state_dict"]["model.weight"], state(7)["state_dict"]["model.weight"])
    assert loaded["squeezewire"] == state(7)["squeezewire"]
    assert names(tmp_path) == ["last.json", "step=000000007.ckpt", "step=000000007.ckpt.json"]
    assert json.loads((tmp_path / "last.json").read_text()) == {"file": "step=000000007.ckpt", "step": 7}


def test_the_sidecar_says_what_it_is(tmp_path: Path) -> None:
    save(tmp_path, 7)
    info = verify(checkpoint_path(tmp_path, 7))
    assert (info.step, info.world_size, info.model, info.num_parameters) == (7, 2, "squeezenet1_1", 20_000)
    assert info.num_bytes == checkpoint_path(tmp_path, 7).stat().st_size
    assert info.versions["torch"] == importlib.metadata.version("torch")


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "not there") is None
    assert find_best(tmp_path) is None


def test_newest_is_by_step_not_by_date(tmp_path: Path) -> None:
    save(tmp_path, 9, 10)
    os.utime(checkpoint_path(tmp_path, 10), (0, 0))
    assert latest(tmp_path) == (10, [])


def test_retention_keeps_the_newest_that_verify(tmp_path: Path) -> None:
    io = save(tmp_path, 1, 2, 3, io=AtomicCheckpointIO(keep=2))
    assert [name for name in names(tmp_path) if name.endswith(".ckpt")] == [
        "step=000000002.ckpt",
        "step=000000003.ckpt",
    ]
    flip_a_bit(checkpoint_path(tmp_path, 3))
    save(tmp_path, 4, io=io)
    assert checkpoint_path(tmp_path, 2).exists(), "3 is damaged: 2 and 4 are the two that verify"
    save(tmp_path, 5, io=io)
    assert [name for name in names(tmp_path) if name.endswith(".ckpt")] == [
        "step=000000004.ckpt",
        "step=000000005.ckpt",
    ]


def test_a_state_of_another_step_is_a_programmers_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        AtomicCheckpointIO().save_checkpoint(state(3), checkpoint_path(tmp_path, 4))


# --- damage ---


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tear(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def wrong_sidecar(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    save(elsewhere, 5)
    shutil.move(sidecar_path(checkpoint_path(elsewhere, 5)), sidecar_path(path))
    shutil.rmtree(elsewhere)


def sidecar_not_ours(path: Path) -> None:
    sidecar_path(path).write_text("[1, 2]")


def directory_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def another_model(path: Path) -> None:
    torch.save(state(1, num_values=20_001), path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "torn at 0 %": tear(0.0),
    "torn at 50 %": tear(0.5),
    "torn at 99 %": tear(0.99),
    "one bit flipped": flip_a_bit,
    "sidecar missing": lambda path: sidecar_path(path).unlink(),
    "sidecar empty": lambda path: os.truncate(sidecar_path(path), 0),
    "sidecar not ours": sidecar_not_ours,
    "sidecar of another": wrong_sidecar,
    "valid file of another model": another_model,
    "a directory in its place": directory_in_its_place,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over_aloud(damage: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    damage(checkpoint_path(tmp_path, 2))
    step, warnings = latest(tmp_path)
    assert step == 1
    assert len(warnings) == 1 and "step=000000002.ckpt" in warnings[0]
    with pytest.raises(CheckpointError, match=r"step=000000002\.ckpt"):
        load(checkpoint_path(tmp_path, 2))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_none_to_trust_is_refused_never_a_fresh_start(damage: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    damage(checkpoint_path(tmp_path, 2))
    damage(checkpoint_path(tmp_path, 1))
    with pytest.raises(CheckpointError, match="train from the start"):
        find_latest(tmp_path, lambda _: None)


def test_checkpoints_gone_though_the_pointer_names_one_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint_path(tmp_path, 1).unlink()
    with pytest.raises(CheckpointError, match="none verifies"):
        find_latest(tmp_path)


def test_a_renamed_checkpoint_is_found_out(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for of in (lambda path: path, sidecar_path):
        of(checkpoint_path(tmp_path, 2)).rename(of(checkpoint_path(tmp_path, 9)))
    step, warnings = latest(tmp_path)
    assert step == 1 and "renamed" in warnings[0]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(position: int, bit: int, tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    if not path.exists():
        save(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    damaged = tmp_path / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    damaged.mkdir()
    checkpoint_path(damaged, 1).write_bytes(content)
    shutil.copyfile(sidecar_path(path), sidecar_path(checkpoint_path(damaged, 1)))
    with pytest.raises(CheckpointError):
        verify(checkpoint_path(damaged, 1))


def test_a_save_over_the_same_step_is_proven_at_every_moment(tmp_path: Path) -> None:
    io = save(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    before = path.read_bytes()
    io.save_checkpoint(state(1) | {"again": True}, path)
    after = path.read_bytes()
    assert load(path)["again"] is True
    path.write_bytes(before)  # as a crash between the sidecar and the rename would leave it
    assert latest(tmp_path) == (1, [])
    path.write_bytes(after[:-1])
    with pytest.raises(CheckpointError):
        verify(path)


# --- malice ---


class Attack:
    """Runs a shell command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("name", ["step=000000009.ckpt", "best.ckpt", "hpc_ckpt_9.ckpt"])
def test_a_malicious_file_is_not_executed(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    marker = tmp_path / "marker"
    torch.save({"state_dict": {}, "callbacks": Attack(marker)}, tmp_path / name)
    step, warnings = latest(tmp_path)
    assert step == 1
    assert len(warnings) == (0 if name == "best.ckpt" else 1)  # the best is asked only after all that are newer
    with pytest.raises(CheckpointError):
        load(tmp_path / name)
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_foreign(tmp_path / name)
    assert not marker.exists()


def test_a_malicious_file_with_a_sidecar_is_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = checkpoint_path(tmp_path, 1)
    AtomicCheckpointIO().save_checkpoint({"attack": Attack(marker)}, path)
    verify(path)
    with pytest.raises(CheckpointError, match="more than tensors"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the attack works where it is let in"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02."])
def test_a_foreign_file_that_is_none_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        load_foreign(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_foreign(tmp_path / "nothing.pth")


def test_a_flipped_bit_of_a_foreign_weight_is_found(tmp_path: Path) -> None:
    """torch.load reads it without a word."""
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 100] ^= 64
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["weight"], torch.arange(1000.0)), "the fault fired"
    with pytest.raises(
        CheckpointError, match=r"the checksum of its part 'weights/data/0' is another, so copy it again"
    ):
        load_foreign(path)


class Swollen:
    """A kilobyte that becomes a gigabyte when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (bytearray, (2**30,))


def packed(path: Path, *, num_zeros: int) -> None:
    """Pack a checkpoint as zip does, with so many bytes of zeros in place of its tensors."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(num_zeros) if "/data/" in name and num_zeros else content)


@pytest.mark.parametrize("is_proven", [True, False])
@pytest.mark.parametrize(
    ("content", "num_zeros", "said"),
    [
        ({"weight": torch.ones(8)}, 2**27, "would take 134.22 MB of memory, from 13"),
        ({"weight": Swollen()}, None, "holds a bytearray, which may be of any size"),
        ({"weight": [[] for _ in range(2**10)]}, None, "holds more than 1.02 kB of values beside its tensors"),
    ],
)
def test_a_file_that_swells_is_refused_before_it_is_read(
    content: dict[str, Any],
    num_zeros: int | None,
    said: str,
    is_proven: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint_checks, "MOST_PICKLE_BYTES", 2**10)
    path = tmp_path / "step=000000001.ckpt"
    torch.save(content, path)
    if num_zeros is not None:
        packed(path, num_zeros=num_zeros)
    if is_proven:
        record = {"step": 1, "num_bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        sidecar_path(path).write_text(json.dumps(record))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as raised:
            (load if is_proven else load_foreign)(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert said in str(raised.value)


def test_weights_of_others_may_be_packed_or_of_the_old_format(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(10**6)}, path)
    packed(path, num_zeros=0)
    assert len(load_foreign(path)["weight"]) == 10**6
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_foreign(path)["weight"], torch.ones(3))
    torch.save({"weight": Swollen()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="holds a bytearray"):
        load_foreign(path)


def test_a_foreign_state_dict_is_read(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pth")
    assert torch.equal(load_foreign(tmp_path / "weights.pth")["weight"], torch.ones(2))


# --- contents that are not what was saved ---

SECTION_AS_SAVED = {"step": 3, "world_size": 1, "model": "x", "classes": ["a"], "must_match": {}, "learner": {}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 4}, "holds step 4, and its sidecar says 3"),
        ({"step": "3"}, "its 'step' is of type str"),
        ({"num_classes": True}, "its 'num_classes' is of type bool"),
        ({"classes": ["a", 1]}, "its 'classes' is of type list"),
        ({"classes": ["a", "a"]}, "its classes are not those of its outputs"),
        ({"classes": ["a", "b"], "num_classes": 1}, "its classes are not those of its outputs"),
        ({"learner": None}, "its 'learner' is of type NoneType"),
        ({"free_fields": {"recipe.ema_decay": 0.9}}, "its averaged weights are missing"),
        (
            {"free_fields": {"recipe.ema_decay": 0.9}, "learner": {"average": torch.ones(2)}},
            "averaged weights are missing",
        ),
    ],
)
def test_a_section_that_is_not_as_it_was_saved_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert section_of({SECTION: SECTION_AS_SAVED}, tmp_path, 3) == SECTION_AS_SAVED
    with pytest.raises(CheckpointError) as raised:
        section_of({SECTION: SECTION_AS_SAVED | change}, tmp_path, 3)
    assert said in str(raised.value)


@pytest.mark.parametrize("content", [{}, {SECTION: None}, {SECTION: 7}])
def test_a_checkpoint_without_a_section_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not saved by a training of squeezewire"):
        section_of(content, tmp_path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": 1}, "of type dict, not a tensor"),
        (torch.ones(2, dtype=torch.int8), "of type torch.int8"),
        (torch.ones(2, dtype=torch.complex64), "of type torch.complex64"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.ones(2).to_sparse(), "without plain values"),
        (torch.ones(2, device="meta"), "without plain values"),
        (torch.ones(3), "weight is 3 there and 2 here"),
    ],
)
def test_what_cannot_be_weights_is_refused(value: object, said: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):  # others save so
        require_same_model({"weight": torch.ones(2)}, {"weight": torch.ones(2, dtype=dtype)}, path=tmp_path, model="x")
    found: Any = {"weight": value}
    with pytest.raises(CheckpointError) as raised:
        require_same_model({"weight": torch.ones(2)}, found, path=tmp_path, model="x")
    assert said in str(raised.value)


@pytest.mark.parametrize("error", [KeyError("complete"), RuntimeError("size mismatch"), TypeError("no"), IndexError()])
def test_a_part_that_cannot_be_taken_over_is_a_sentence(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"the accounts cannot be taken over .*restore it"),
        taking("the accounts", tmp_path),
    ):
        raise error
    with pytest.raises(torch.OutOfMemoryError), taking("the accounts", tmp_path):
        raise torch.OutOfMemoryError


# --- failing disks ---


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.not_quick
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        io = save(place, 1)
        before = snapshot(place)
        with pytest.raises(CheckpointError, match="No space left") as caught:
            io.save_checkpoint(state(2, num_values=400_000), checkpoint_path(place, 2))
        assert "make room" in str(caught.value)
        assert snapshot(place) == before
        assert latest(place) == (1, [])
        save(place, 2, io=io)
        assert latest(place) == (2, [])
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("step", [1, 2], ids=["over the same name", "under a new name"])
def test_a_write_cut_short_leaves_everything_as_it_was(step: int, tmp_path: Path) -> None:
    io = save(tmp_path, 1)
    before = snapshot(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(CheckpointError, match=os.strerror(errno.EFBIG)):
            io.save_checkpoint(state(step, num_values=400_000), checkpoint_path(tmp_path, step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert snapshot(tmp_path) == before


def _save_until_killed(directory: Path) -> None:
    io = AtomicCheckpointIO(keep=2)
    found = find_latest(directory)
    step = found.step if found else 0
    while True:
        step += 1
        path = checkpoint_path(directory, step)
        io.save_checkpoint(state(step), path)
        io.keep_as_best(path, score=step / 1000, metric="val/top1")


@pytest.mark.not_quick
def test_killed_at_any_moment_the_newest_is_whole_and_nothing_is_passed_over(tmp_path: Path) -> None:
    generator = random.Random(0)
    versions()  # kept by this process for all that it forks: looking them up takes longer than a save
    steps, longest = [0], 0.12
    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(target=_save_until_killed, args=(tmp_path,))
        process.start()
        time.sleep(generator.uniform(0.02, longest))
        process.kill()
        process.join()
        AtomicCheckpointIO().sweep(tmp_path)
        assert not list(tmp_path.glob("*.tmp.*"))
        if any(tmp_path.iterdir()):
            step, warnings = latest(tmp_path)
            assert warnings == [] and step >= steps[-1]
            steps.append(step)
            find_best(tmp_path)
        if steps[-1] == 0:
            longest *= 2  # a busy machine has not got to its first save yet
    assert steps[-1] > 0, "nothing was ever saved"


@pytest.mark.parametrize("is_newest_whole", [True, False])
def test_a_best_that_never_came_hides_no_later_step(is_newest_whole: bool, tmp_path: Path) -> None:
    """Killed between the sidecar of step 8 and its rename, `best.ckpt` is still the one of step 3."""
    io, best, aside = AtomicCheckpointIO(keep=2), tmp_path / "best.ckpt", tmp_path / "aside"
    save(tmp_path, 3, io=io)
    io.keep_as_best(checkpoint_path(tmp_path, 3), score=0.3, metric="val/top1")
    save(tmp_path, 7, 8, io=io)
    shutil.copyfile(best, aside)
    io.keep_as_best(checkpoint_path(tmp_path, 8), score=0.8, metric="val/top1")
    aside.replace(best)
    assert (found := find_best(tmp_path)) is not None and found.step == 3
    if not is_newest_whole:
        flip_a_bit(checkpoint_path(tmp_path, 8))
    step, warnings = latest(tmp_path)
    assert (step, len(warnings)) == ((8, 0) if is_newest_whole else (7, 1))


def _save_until_file_size(directory: Path, step: int, num_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and would be told of EFBIG instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    save(directory, step)
    os._exit(0)


@pytest.mark.not_quick
@pytest.mark.parametrize("step", [2, 3], ids=["over the same name", "under a new name"])
def test_killed_at_any_byte_of_a_save_the_one_before_is_whole(step: int, tmp_path: Path) -> None:
    """The kernel ends the process when the file would grow beyond a limit: 20 random ones, the first and the last."""
    save(tmp_path, 1, 2)
    before = snapshot(tmp_path)
    num_bytes = checkpoint_path(tmp_path, 2).stat().st_size
    generator = random.Random(step)
    offsets = [0, num_bytes - 1, *(generator.randrange(num_bytes) for _ in range(20))]
    for offset in offsets:
        arguments = (tmp_path, step, offset)
        process = multiprocessing.get_context("fork").Process(target=_save_until_file_size, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGXFSZ, "it was not killed"
        (torn,) = tmp_path.glob("*.tmp.*")
        assert torn.stat().st_size == offset
        assert latest(tmp_path) == (2, [])
        AtomicCheckpointIO().sweep(tmp_path)
        assert snapshot(tmp_path) == before
    save(tmp_path, step)
    assert latest(tmp_path) == (step, [])


def test_a_used_up_quota_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: the error that a file system with quotas gives. To set one up needs such a file system."""
    io = save(tmp_path, 1)
    before = snapshot(tmp_path)

    def refuse(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"quota exceeded.*make room"):
        io.save_checkpoint(state(2), checkpoint_path(tmp_path, 2))
    monkeypatch.undo()
    assert snapshot(tmp_path) == before and latest(tmp_path) == (1, [])


# --- best ---


def test_the_best_outlives_retention(tmp_path: Path) -> None:
    io = save(tmp_path, 1, io=AtomicCheckpointIO(keep=2))
    io.keep_as_best(checkpoint_path(tmp_path, 1), score=0.5, metric="val/top1")
    save(tmp_path, 2, 3, 4, io=io)
    best = find_best(tmp_path)
    assert best is not None
    assert (best.step, best.score, best.metric, best.model) == (1, 0.5, "val/top1", "squeezenet1_1")
    assert not checkpoint_path(tmp_path, 1).exists()
    assert load(best.path)["squeezewire"]["step"] == 1


def test_the_best_is_replaced_and_may_be_named_twice(tmp_path: Path) -> None:
    io = save(tmp_path, 1, 2)
    for step, score in ((1, 0.5), (2, 0.6), (2, 0.6)):
        io.keep_as_best(checkpoint_path(tmp_path, step), score=score, metric="val/top1")
        best = find_best(tmp_path)
        assert best is not None and (best.step, best.score) == (step, score)
    assert not list(tmp_path.glob("*.tmp.*"))


def test_the_best_is_the_last_resort(tmp_path: Path) -> None:
    io = save(tmp_path, 1, io=AtomicCheckpointIO(keep=2))
    io.keep_as_best(checkpoint_path(tmp_path, 1), score=0.5, metric="val/top1")
    save(tmp_path, 2, 3, io=io)
    flip_a_bit(checkpoint_path(tmp_path, 2))
    flip_a_bit(checkpoint_path(tmp_path, 3))
    step, warnings = latest(tmp_path)
    assert step == 1 and len(warnings) == 2


@pytest.mark.parametrize("kind", ["hardlink_to", "symlink_to"])
def test_what_has_the_temporary_name_is_never_written_through(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can know that name; were it known, what lies there would still be left as it is."""
    io = save(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    for name in ("best.ckpt", "step=000000002.ckpt"):
        getattr(tmp_path / f"{name}.tmp.guessed.{os.getpid()}", kind)(path)
    with pytest.raises(CheckpointError, match="File exists"):
        io.keep_as_best(path, score=0.5, metric="val/top1")
    with pytest.raises(CheckpointError, match="File exists"):
        save(tmp_path, 2, io=io)
    verify(path)
    monkeypatch.undo()
    io.keep_as_best(path, score=0.5, metric="val/top1")
    save(tmp_path, 2, io=io)
    verify(path)


def test_sweep_removes_sidecars_whose_checkpoint_never_came(tmp_path: Path) -> None:
    io = save(tmp_path, 1, 2)
    checkpoint_path(tmp_path, 2).unlink()
    io.sweep(tmp_path)
    assert names(tmp_path) == ["last.json", "step=000000001.ckpt", "step=000000001.ckpt.json"]


# --- models ---


def test_a_checkpoint_of_another_model_is_told_with_both_names() -> None:
    expected = torch.nn.Linear(2, 3).state_dict()
    require_same_model(expected, torch.nn.Linear(2, 3).state_dict(), path=Path("a.ckpt"), model="x")
    with pytest.raises(CheckpointError, match="holds alexnet, which does not fit squeezenet") as caught:
        require_same_model(
            expected,
            torch.nn.Linear(4, 3, bias=False).state_dict() | {"extra": torch.ones(1)},
            path=Path("a.ckpt"),
            model="squeezenet",
            found_model="alexnet",
        )
    assert "weight is 3x4 there and 3x2 here" in str(caught.value)
    assert "missing: bias" in str(caught.value) and "unknown: extra" in str(caught.value)


# --- Lightning ---


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")  # four samples need none; 2026-11-24
@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning"
)  # Lightning 2.6.6 calls what torch 2.14 deprecates; 2026-11-24
@pytest.mark.filterwarnings("ignore:The `srun` command is available:UserWarning")  # Lightning looks for it; 2026-11-24
def test_lightnings_own_checkpoint_goes_through(tmp_path: Path) -> None:
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2)), batch_size=2)
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO(), RankEnvironment(RankInfo(0, 1, 0, 1, 0, 1, "127.0.0.1", 29500, "single"))],
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    module = Tiny()
    trainer.fit(module, data)
    trainer.save_checkpoint(checkpoint_path(tmp_path, 2))
    found = find_latest(tmp_path)
    assert found is not None and (found.step, found.model) == (2, None)
    content = load(found.path)
    assert torch.equal(content["state_dict"]["layer.weight"], module.layer.weight)
    assert "momentum_buffer" in content["optimizer_states"][0]["state"][0]
