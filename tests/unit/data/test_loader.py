"""Through real DataLoaders: the same samples and pixels in the same order, whatever the ranks, workers and restarts."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipeline.config.data import AugmentConfig, DataConfig
from pipeline.config.model import InputConfig
from pipeline.config.training import BatchSplit
from pipeline.core.errors import DataError
from pipeline.data.batches import LoadedBatch, replacements
from pipeline.data.index import ShardIndex
from pipeline.data.loader import Reader, evaluation_loader, training_loader
from pipeline.data.order import BatchOrder
from pipeline.data.workers import choose_num_workers
from tests.making.pictures import picture
from tests.making.shards import samples_of, write_manifest, write_shards, write_tar

INPUT = InputConfig(size=16, resize_side=20)
GLOBAL_BATCH = 12
STEPS_PER_EPOCH = 4
NUM_SAMPLES = STEPS_PER_EPOCH * GLOBAL_BATCH + 5


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    root = write_shards(tmp_path_factory.mktemp("loader") / "shards", train=(20, 3, NUM_SAMPLES - 23))
    return ShardIndex.open(root, "train")


def batches_of(
    index: ShardIndex,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_micro_batches: int = 1,
    num_workers: int = 0,
    start_step: int = 0,
    num_steps: int = 6,
    **data: Any,
) -> list[LoadedBatch]:
    batch = BatchSplit(GLOBAL_BATCH, GLOBAL_BATCH // world_size // num_micro_batches, num_micro_batches)
    reader = Reader(rank=rank, world_size=world_size, num_workers=num_workers)
    loader = training_loader(
        index, DataConfig(**data), INPUT, reader, batch, seed=3, start_step=start_step, num_steps=num_steps
    )
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def steps_of(index: ShardIndex, world_size: int, num_micro_batches: int = 1, **changed: Any) -> list[LoadedBatch]:
    """The global batches, put together again from what every rank loads."""
    ranks = [
        batches_of(index, rank=rank, world_size=world_size, num_micro_batches=num_micro_batches, **changed)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    in_order = [batch for together in zip(*ranks, strict=True) for batch in together]
    size = world_size * num_micro_batches
    return [joined(in_order[start : start + size]) for start in range(0, len(in_order), size)]


def joined(parts: list[LoadedBatch]) -> LoadedBatch:
    images, labels, ids, bad = zip(*parts, strict=True)
    return LoadedBatch(torch.cat(images), torch.cat(labels), torch.cat(ids), tuple(one for some in bad for one in some))


def assert_same(ours: list[LoadedBatch], expected: list[LoadedBatch]) -> None:
    assert len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.sample_ids_B.tolist() == theirs.sample_ids_B.tolist()
        assert torch.equal(mine.labels_B, theirs.labels_B)
        assert torch.equal(mine.images_BCHW, theirs.images_BCHW)
        assert mine.bad == theirs.bad


@pytest.fixture(scope="module")
def uninterrupted(index: ShardIndex) -> list[LoadedBatch]:
    return steps_of(index, world_size=1)


# Which samples


def test_an_epoch_shows_each_sample_at_most_once_and_whole_batches_only(
    index: ShardIndex, uninterrupted: list[LoadedBatch]
) -> None:
    order = BatchOrder(num_samples=NUM_SAMPLES, global_batch=GLOBAL_BATCH, seed=3, index_hash=index.index_hash)
    for step, batch in enumerate(uninterrupted):
        assert batch.sample_ids_B.tolist() == order.batch_samples(step).tolist()
        assert batch.labels_B.tolist() == [index.label(i) for i in batch.sample_ids_B.tolist()]
    first_epoch = torch.cat([batch.sample_ids_B for batch in uninterrupted[:STEPS_PER_EPOCH]])
    assert len(set(first_epoch.tolist())) == STEPS_PER_EPOCH * GLOBAL_BATCH


@pytest.mark.not_quick
@pytest.mark.parametrize(
    ("world_size", "num_micro_batches", "num_workers"),
    [(1, 1, 1), (1, 1, 2), (1, 3, 0), (2, 1, 1), (3, 2, 0), (4, 1, 0)],
)
def test_ranks_and_workers_change_neither_samples_nor_pixels(
    index: ShardIndex, uninterrupted: list[LoadedBatch], world_size: int, num_micro_batches: int, num_workers: int
) -> None:
    assert_same(steps_of(index, world_size, num_micro_batches, num_workers=num_workers), uninterrupted)


@pytest.mark.parametrize("start_step", range(7))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_a_run_resumed_anywhere_on_any_number_of_ranks_goes_on_alike(
    index: ShardIndex, uninterrupted: list[LoadedBatch], start_step: int, world_size: int
) -> None:
    """Step 4 begins the second epoch; step 6 is the end of the run."""
    assert_same(steps_of(index, world_size, start_step=start_step), uninterrupted[start_step:])


@pytest.mark.not_quick
def test_a_resumed_run_with_workers_goes_on_alike(index: ShardIndex, uninterrupted: list[LoadedBatch]) -> None:
    assert_same(steps_of(index, 2, start_step=3, num_workers=1), uninterrupted[3:])


def test_a_finished_run_has_nothing_left_to_load(index: ShardIndex) -> None:
    assert batches_of(index, start_step=6) == batches_of(index, start_step=9) == []


def test_the_block_shuffle_reaches_the_loader(index: ShardIndex, uninterrupted: list[LoadedBatch]) -> None:
    blocks = steps_of(index, 2, shuffle_block=1)
    shards = [index.shard_name(i) for batch in blocks[:STEPS_PER_EPOCH] for i in batch.sample_ids_B.tolist()]
    assert sum(one != other for one, other in zip(shards[1:], shards, strict=False)) <= 2
    assert blocks[0].sample_ids_B.tolist() != uninterrupted[0].sample_ids_B.tolist()


# What a batch is


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_are_uint8_and_channels_last_without_a_copy(index: ShardIndex, num_workers: int) -> None:
    batch = batches_of(index, num_workers=num_workers)[0]
    assert batch.images_BCHW.shape == (GLOBAL_BATCH, 3, 16, 16) and batch.images_BCHW.dtype == torch.uint8
    assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels_B.dtype == batch.sample_ids_B.dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_every_global_generator_alone(index: ShardIndex, num_workers: int) -> None:
    """The model's random numbers must not depend on the loader (dropout after a resume)."""
    before, before_numpy = torch.get_rng_state(), np.random.get_state(legacy=False)
    batches_of(index, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state(legacy=False)) == str(before_numpy)


# Validation


def evaluated(index: ShardIndex, world_size: int, batch_size: int, num_workers: int = 0) -> list[list[LoadedBatch]]:
    return [
        list(
            evaluation_loader(
                index,
                INPUT,
                Reader(rank=rank, world_size=world_size, num_workers=num_workers),
                batch_size=batch_size,
            )
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, NUM_SAMPLES + 2])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_validation_counts_each_picture_exactly_once(index: ShardIndex, world_size: int, batch_size: int) -> None:
    ranks = evaluated(index, world_size, batch_size)
    shapes = [[tuple(batch.images_BCHW.shape) for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    everything = joined([batch for batches in ranks for batch in batches])
    real = everything.sample_ids_B >= 0
    ids = everything.sample_ids_B[real].tolist()
    assert sorted(ids) == list(range(NUM_SAMPLES))
    assert everything.labels_B[real].tolist() == [index.label(i) for i in ids]
    assert (everything.sample_ids_B[~real] == -1).all() and (everything.labels_B[~real] == 0).all()


@pytest.mark.not_quick
def test_validation_does_not_depend_on_workers(index: ShardIndex) -> None:
    assert_same(evaluated(index, 1, 10, num_workers=1)[0], evaluated(index, 1, 10)[0])


# Bad samples

BAD_JPEGS = {
    "truncated": picture(0, height=200, width=200)[:2000],
    "garbage": b"\xff\xd8 nothing to see",
    "empty": b"",
}


@pytest.fixture
def damaged(tmp_path: Path) -> ShardIndex:
    """Three bad pictures among ten, two of them neighbours; a PNG under a JPEG's name is fine."""
    samples = samples_of(0, 10)
    for sample_id, content in zip((2, 3, 7), BAD_JPEGS.values(), strict=True):
        samples[sample_id]["jpg"] = content
    samples[5]["jpg"] = picture(5, encoding="PNG")
    write_tar(tmp_path / "train-000000.tar", samples)
    write_manifest(tmp_path, {"train": {"train-000000.tar": 10}})
    return ShardIndex.open(tmp_path, "train")


def one_epoch(index: ShardIndex, rank: int = 0, world_size: int = 1, num_workers: int = 0) -> Iterator[LoadedBatch]:
    config = DataConfig(augment=AugmentConfig(crop="center", flip=False))
    reader = Reader(rank=rank, world_size=world_size, num_workers=num_workers)
    batch = BatchSplit(10, 10 // world_size, 1)
    return iter(training_loader(index, config, INPUT, reader, batch, seed=0, start_step=0, num_steps=1))


def test_a_bad_picture_is_replaced_by_a_good_one_and_named(damaged: ShardIndex) -> None:
    (batch,) = one_epoch(damaged)
    assert sorted(batch.sample_ids_B.tolist()) == list(range(10))  # the order stays what it is
    assert {bad.sample_id for bad in batch.bad} == {2, 3, 7}
    for bad in batch.bad:
        assert f"{bad.sample_id:09d}" in bad.reason and "train-000000.tar" in bad.reason
    place_of = {sample_id: place for place, sample_id in enumerate(batch.sample_ids_B.tolist())}
    for sample_id in (2, 3, 7):
        stand_in = next(other for other in replacements(sample_id, 10) if other not in (2, 3, 7))
        place = place_of[sample_id]
        assert batch.labels_B[place] == damaged.label(stand_in)
        assert torch.equal(batch.images_BCHW[place], batch.images_BCHW[place_of[stand_in]])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_and_workers_replace_alike_and_keep_their_batches_full(damaged: ShardIndex, num_workers: int) -> None:
    (whole,) = one_epoch(damaged)
    halves = [next(one_epoch(damaged, rank, 2, num_workers)) for rank in range(2)]
    assert [len(half.labels_B) for half in halves] == [5, 5]
    assert_same([joined(halves)], [whole])


def test_validation_leaves_a_bad_picture_out_and_names_it(damaged: ShardIndex) -> None:
    batch = joined(evaluated(damaged, 2, 3)[0] + evaluated(damaged, 2, 3)[1])
    assert sorted(batch.sample_ids_B[batch.sample_ids_B >= 0].tolist()) == [0, 1, 4, 5, 6, 8, 9]
    assert sorted(bad.sample_id for bad in batch.bad) == [2, 3, 7]


def test_where_nothing_decodes_the_batch_is_black_and_everything_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", [{**sample, "jpg": b"\xff\xd8"} for sample in samples_of(0, 10)])
    write_manifest(tmp_path, {"train": {"train-000000.tar": 10}})
    index = ShardIndex.open(tmp_path, "train")
    (batch,) = one_epoch(index)
    assert not batch.images_BCHW.any() and {bad.sample_id for bad in batch.bad} == set(range(10))
    assert batch.labels_B.tolist() == [index.label(i) for i in batch.sample_ids_B.tolist()]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_shard_that_cannot_be_read_is_no_bad_picture(tmp_path: Path, num_workers: int) -> None:
    """What fails in passing would be replaced in this attempt alone, and the next one would train on other pictures."""
    index = ShardIndex.open(write_shards(tmp_path / "shards", train=(5, 5)), "train")
    (tmp_path / "shards" / "train-000001.tar").unlink()  # in the middle of a run
    with pytest.raises(DataError, match=r"^Sample '00000000[5-9]' of shard .*/train-000001\.tar .*No such file"):
        next(one_epoch(index, num_workers=num_workers))
    with pytest.raises(DataError, match=r"^Sample '000000005' of shard .*/train-000001\.tar .*No such file"):
        list(evaluation_loader(index, INPUT, Reader(num_workers=num_workers), batch_size=10))


# Workers


def test_the_number_of_workers_follows_the_machine_unless_told() -> None:
    cores = len(os.sched_getaffinity(0))
    assert choose_num_workers(3, local_world_size=1, on_gpu=False) == 3
    assert choose_num_workers(0, local_world_size=1, on_gpu=True) == 0
    assert choose_num_workers(None, local_world_size=cores, on_gpu=True) == 0
    assert choose_num_workers(None, local_world_size=cores, on_gpu=False) == 0
    assert 0 <= choose_num_workers(None, local_world_size=1, on_gpu=True) < cores


PROGRAM = """
import sys

def main(root):
    from pipeline.config.data import AugmentConfig
    from pipeline.config.model import InputConfig
    from pipeline.data.batches import TrainBatches, TrainSamples
    from pipeline.data.order import BatchOrder
    from pipeline.data.index import ShardIndex
    from pipeline.data.workers import make_loader

    index = ShardIndex.open(root, "train")
    order = BatchOrder(num_samples=10, global_batch=10, seed=0, index_hash=index.index_hash)
    batches = TrainBatches(order, rank=0, world_size=1, num_micro_batches=1, start_step=0, num_steps=500)
    samples = TrainSamples(index, InputConfig(size=16, resize_side=20), AugmentConfig(), 0)
    global loaded  # still alive when the interpreter ends
    loaded = iter(make_loader(samples, batches, num_workers=2, pin_memory=False))
    for line in sys.stdin:
        if "fail" in line:
            raise RuntimeError("as a run may")
        for _ in range(int(line)):
            next(loaded)
        print("loaded", line, end="", flush=True)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


class Loading:
    """A process with two workers in the middle of a run, and everything it has started."""

    def __init__(self, directory: Path) -> None:
        program = directory / "run.py"
        program.write_text(PROGRAM)
        self.process = subprocess.Popen(
            [sys.executable, str(program), str(write_shards(directory / "shards", train=(10,)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.load(1)
        self.started = psutil.Process(self.process.pid).children(recursive=True)

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def load(self, num_batches: int) -> None:
        self.say(str(num_batches))
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"loaded {num_batches}\n"


@pytest.fixture
def loading(tmp_path: Path) -> Iterator[Loading]:
    running = Loading(tmp_path)
    yield running
    with running.process:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)


def assert_all_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


@pytest.mark.not_quick
def test_signals_meant_for_ranks_leave_workers_alone_and_its_death_ends_them(loading: Loading) -> None:
    """Slurm sends its warning to every process of a step; the loaders must go on until their rank has saved."""
    assert len(loading.started) >= 4  # two workers, the fork server, multiprocessing's resource tracker
    for child in loading.started:
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            child.send_signal(number)
    loading.load(400)
    loading.process.kill()
    assert loading.process.wait(timeout=60) == -signal.SIGKILL
    assert_all_end(loading.started)


@pytest.mark.not_quick
def test_a_process_that_fails_with_workers_running_does_end(loading: Loading) -> None:
    loading.say("fail")
    assert loading.process.wait(timeout=60) == 1
    assert_all_end(loading.started)
