"""Ranks that read an epoch with one library's own means, one of whose jobs is killed: run by `benchmarks.exactness`.

    python streams.py LIBRARY < scenarios.jsonl > what-the-ranks-got.jsonl

A rank is a process in the gloo group of its job, with RANK, WORLD_SIZE and so on set as torchrun sets them; its
DataLoader has real workers. It writes down each batch it was given. At `kill_after` all ranks save their state as the
library documents it, and then SIGKILL takes the rank, batches in flight and all. Nothing of ours is imported but for
LIBRARY=squeezewire: the peers run under a Python of their own (requirements.txt says why).
"""
# The peers are not in the environment that is type-checked, and webdataset's names come from its lazy __init__.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

SEED = 0
LEAVING_SECONDS = 30.0  # torch's workers look every 5 seconds whether their rank is still there


class Scenario:
    """One job: its ranks, the state it begins with, and the step at which it dies.

    Args:
        data: directory of the tars; the library's own format is kept beside it.
        scratch: directory for what the ranks leave.
        state: directory of an earlier job's scratch to resume from.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.data, self.scratch = Path(values["data"]), Path(values["scratch"])
        self.num_samples: int = values["num_samples"]
        self.global_batch: int = values["global_batch"]
        self.world_size: int = values["world_size"]
        self.num_workers: int = values["num_workers"]
        self.kill_after: int | None = values["kill_after"]
        self.state: Path | None = Path(values["state"]) if values["state"] else None
        self.deadline_seconds: float = values["deadline_seconds"]
        self.options: dict[str, Any] = values["options"]

    @property
    def batch(self) -> int:
        """Of a rank."""
        return self.global_batch // self.world_size


class Library:
    """How one library reads, saves and resumes."""

    def __init__(self, scenario: Scenario, rank: int) -> None:
        self.scenario, self.rank = scenario, rank

    @staticmethod
    def prepare(scenario: Scenario) -> None:
        """Write the samples in the library's own format, where it has one."""

    def loader(self) -> Iterable[Any]:
        """The batches of this rank."""
        raise NotImplementedError

    def ids(self, batch: Any) -> list[int]:
        """Of a batch that `loader` gave."""
        raise NotImplementedError

    def state(self) -> Any:
        """What a checkpoint would hold, after the batch that was just given."""
        return None

    def resume(self, state: Any) -> None:
        """Before `loader` is iterated over."""


class WebDataset(Library):
    """Shards split by node and by worker, shuffled by a seed. It has no state: a resumed job begins the epoch anew."""

    def loader(self) -> Iterable[Any]:
        import webdataset

        shards = sorted(map(str, self.scenario.data.glob("*.tar")))
        dataset: Any = webdataset.WebDataset(
            shards, shardshuffle=100, detshuffle=True, seed=SEED, nodesplitter=webdataset.split_by_node
        )
        dataset = dataset.to_tuple("__key__").batched(self.scenario.batch)
        return webdataset.WebLoader(dataset, batch_size=None, num_workers=self.scenario.num_workers)

    def ids(self, batch: Any) -> list[int]:
        (keys,) = batch
        return [int(key[:9]) for key in keys]


class StatefulLoader(Library):
    """Of samples with an `id`, by a loader with a state of its own, which `loader` makes as `self.made`."""

    made: Any

    def ids(self, batch: Any) -> list[int]:
        return batch["id"].tolist()

    def state(self) -> Any:
        return self.made.state_dict()

    def resume(self, state: Any) -> None:
        self.made.load_state_dict(state)


class MosaicML(StatefulLoader):
    """MDS shards and the defaults of StreamingDataset; rank 0's state, as Composer saves it."""

    @staticmethod
    def prepare(scenario: Scenario) -> None:
        from streaming import MDSWriter

        out = scenario.data / "mds"
        if not out.exists():
            size_limit = 1 << 12  # bytes: about as many shards as there are tars
            with MDSWriter(out=str(out), columns={"id": "int", "jpg": "bytes"}, size_limit=size_limit) as writer:
                for number in range(scenario.num_samples):
                    writer.write({"id": number, "jpg": bytes(64)})

    def loader(self) -> Iterable[Any]:
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()  # as documented after a kill
        batch = self.scenario.batch
        dataset = StreamingDataset(
            local=str(self.scenario.data / "mds"), shuffle=True, shuffle_seed=SEED, batch_size=batch
        )
        self.made = StreamingDataLoader(dataset, batch_size=batch, num_workers=self.scenario.num_workers)
        return self.made


class LitData(StatefulLoader):
    """Chunks made by `optimize` and the defaults of StreamingDataset, or its drop_last=False; rank 0's state."""

    @staticmethod
    def prepare(scenario: Scenario) -> None:
        import litdata

        out = scenario.data / "litdata"
        if not out.exists():
            inputs, size = list(range(scenario.num_samples)), 40  # about as many chunks as there are tars
            litdata.optimize(fn=_sample, inputs=inputs, output_dir=str(out), chunk_size=size, num_workers=1)

    def loader(self) -> Iterable[Any]:
        from litdata import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(
            str(self.scenario.data / "litdata"), shuffle=True, seed=SEED, **self.scenario.options
        )
        self.made = StreamingDataLoader(dataset, batch_size=self.scenario.batch, num_workers=self.scenario.num_workers)
        return self.made


def _sample(number: int) -> dict[str, Any]:
    return {"id": number, "jpg": bytes(64)}


class Squeezewire(Library):
    """Ours. The state is the number of steps done, which a checkpoint of `train` holds."""

    def loader(self) -> Iterable[Any]:
        from pipeline.config.data import AugmentConfig, DataConfig
        from pipeline.config.model import InputConfig
        from pipeline.config.training import BatchSplit
        from pipeline.data.batches import TrainBatches
        from pipeline.data.index import ShardIndex
        from pipeline.data.loader import Reader, training_loader

        index = ShardIndex.open(self.scenario.data, "train")
        augment = AugmentConfig(crop="center", flip=False)
        config = DataConfig(augment=augment, **self.scenario.options)
        steps = -(-index.num_samples // self.scenario.global_batch)
        if config.tail == "drop":
            steps = index.num_samples // self.scenario.global_batch
        global_batch, world_size = self.scenario.global_batch, self.scenario.world_size
        loader = training_loader(
            index,
            config,
            InputConfig(size=8, resize_side=8),
            Reader(rank=self.rank, world_size=world_size, num_workers=self.scenario.num_workers),
            BatchSplit(global_batch, global_batch // world_size, 1),
            seed=SEED,
            start_step=0,
            num_steps=steps,
        )
        assert isinstance(loader.batch_sampler, TrainBatches)
        self.batches, self.done = loader.batch_sampler, 0
        return loader

    def ids(self, batch: Any) -> list[int]:
        self.done += 1
        return batch.sample_ids_B.tolist()

    def state(self) -> Any:
        return self.batches.start_step + self.done

    def resume(self, state: Any) -> None:
        self.batches.start_step = state


LIBRARIES: dict[str, tuple[type[Library], str]] = {
    "webdataset": (WebDataset, "webdataset"),
    "mosaicml-streaming": (MosaicML, "mosaicml-streaming"),
    "litdata": (LitData, "litdata"),
    "squeezewire": (Squeezewire, "squeezewire"),
}
"""By name: how it reads, and its distribution on PyPI."""


def rank_process(library: type[Library], scenario: Scenario, rank: int) -> None:
    """One rank, from joining its group to its end. Its batches go to rank<r>.jsonl, an error to rank<r>.error."""
    os.setsid()  # so that the rank and all it starts can be ended together
    size = scenario.world_size
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", NODE_RANK="0", GROUP_RANK="0")
    log = os.open(scenario.scratch / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        _read(library(scenario, rank), scenario, rank)
    except BaseException as error:
        traceback.print_exc()
        (scenario.scratch / f"rank{rank}.error").write_text(f"{type(error).__name__}: {error}")
        raise


def _read(library: Library, scenario: Scenario, rank: int) -> None:
    import torch
    from torch import distributed

    distributed.init_process_group(
        "gloo",
        init_method=f"file://{scenario.scratch}/store",
        rank=rank,
        world_size=scenario.world_size,
        timeout=timedelta(seconds=scenario.deadline_seconds),
    )
    loader = library.loader()
    if scenario.state is not None:
        # At most one state goes into a checkpoint, rank 0's, and that one is there on any number of ranks.
        library.resume(torch.load(scenario.state / "rank0.state", weights_only=True))
    with (scenario.scratch / f"rank{rank}.jsonl").open("w") as got:
        for step, batch in enumerate(loader, start=1):
            got.write(json.dumps(library.ids(batch)) + "\n")
            if step == scenario.kill_after:
                got.flush()
                torch.save(library.state(), scenario.scratch / f"rank{rank}.state")
                distributed.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()  # whoever has fewer batches waits here, where DDP would hang
    distributed.destroy_process_group()


def run(library: type[Library], scenario: Scenario) -> dict[str, Any]:
    """All ranks of a job. Returns what they were given, and how they ended: `ended`, `hangs` or an error."""
    scenario.scratch.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=rank_process, args=(library, scenario, rank)) for rank in range(scenario.world_size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + scenario.deadline_seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    hangs = any(rank.is_alive() for rank in ranks)
    for rank in ranks:
        assert rank.pid is not None
        _end_group(rank.pid, 0.0 if hangs else LEAVING_SECONDS)
        rank.join()
    errors = sorted(path.read_text() for path in scenario.scratch.glob("rank*.error"))
    killed = {rank.exitcode for rank in ranks} == {-signal.SIGKILL}
    expected = killed if scenario.kill_after else all(rank.exitcode == 0 for rank in ranks)
    status = "hangs" if hangs else f"fails: {errors[0]}" if errors else "ended" if expected else "dies"
    return {"status": status, "steps_of_rank": [_steps(scenario.scratch, rank) for rank in range(scenario.world_size)]}


def _end_group(leader: int, patience_seconds: float) -> None:
    """What a rank has left behind may notice that it is gone and tidy up; then it is killed."""
    deadline = time.monotonic() + patience_seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(leader, 0)
            time.sleep(0.05)
        os.killpg(leader, signal.SIGKILL)


def _shared_memory() -> set[Path]:
    """What MosaicML Streaming keeps in shared memory; a killed job leaves it there."""
    return {path for path in Path("/dev/shm").glob("[0-9]*_*") if path.name[:6].isdecimal() and path.name[6] == "_"}


def _steps(scratch: Path, rank: int) -> list[list[int]]:
    path = scratch / f"rank{rank}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("]")]


def main() -> int:
    """One line of JSON in and out for each scenario; the first line out says which versions these are."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries' own words
    library, package = LIBRARIES[sys.argv[1]]
    names = (package, "torch", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if name != "squeezewire"}
    print(json.dumps(versions), file=out, flush=True)
    import torch.distributed
    import torch.utils.data  # noqa: F401  # once, for all ranks

    there_before = _shared_memory()
    for line in sys.stdin:
        scenario = Scenario(json.loads(line))
        # In a process of its own, because a rank must not inherit what the library has started.
        preparing = multiprocessing.get_context("fork").Process(target=library.prepare, args=(scenario,))
        preparing.start()
        preparing.join()
        print(json.dumps(run(library, scenario)), file=out, flush=True)
    for left in _shared_memory() - there_before:
        left.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
