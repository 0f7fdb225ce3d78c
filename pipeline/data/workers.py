"""The processes that make batches ahead of time.

They come from a fork server, not by fork: a forked worker would hold copies of the rank's sockets, so that its peers
would not notice for seconds that the rank was killed, and of locks that gloo's threads hold at that moment.

Nothing here imports Lightning: what the fork server imports, every rank waits for when it starts.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pipeline.core.errors import ConfigError, DataError, ExitCode, UserError
from pipeline.core.streams import settle_streams
from pipeline.core.units import format_bytes
from pipeline.data.batches import LoadedBatch

MAX_AUTOMATIC_WORKERS = 16
PREFETCH_BATCHES = 2  # per worker
# Slurm sends these to every process of a step; a rank decides what they mean, its workers work on.
SIGNALS_FOR_RANKS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def choose_num_workers(configured: int | None, *, local_world_size: int, on_gpu: bool) -> int:
    """DataLoader processes for a rank; 0: the rank decodes by itself.

    Beside a GPU the cores are free for decoding. On the CPU the network takes some fifty times as long per picture as
    its decoding, so a worker could only take cores from it; one is enough where there are many.
    """
    if configured is not None:
        return configured
    cores = max(1, len(os.sched_getaffinity(0)) // local_world_size)
    if on_gpu:
        return min(MAX_AUTOMATIC_WORKERS, cores - 1)
    return 1 if cores >= 8 else 0


class BatchLoader(DataLoader[LoadedBatch]):
    """A DataLoader that raises a worker's DataError as it is, and that fetches ahead while it is iterated over."""

    ahead: AbstractContextManager[None] = nullcontext()

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with self.ahead:
            try:
                batches = super().__iter__()
            except OSError as error:  # what workers and rank wait for one another with lies there too
                raise ConfigError(_no_shared_memory("the data loader's workers", error)) from error
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if not str(error).startswith("DataLoader worker"):
                        raise
                    raise WorkerLost(
                        f"{' '.join(str(error).split()).rstrip('.')}: if memory ran out, ask for more or lower"
                        " data.num_workers."
                    ) from error
                if isinstance(batch, _Failure):
                    raise batch.error(batch.message)
                yield batch


def make_loader(
    dataset: Dataset[LoadedBatch],
    batches: Sampler,
    *,
    num_workers: int,
    pin_memory: bool,
    ahead: AbstractContextManager[None] | None = None,
) -> BatchLoader:
    """A DataLoader over whole batches. It draws nothing from torch's global generator; its workers ignore signals.

    `ahead` is entered while the loader is iterated over.
    """
    if num_workers:
        _start_fork_server()
    loader = BatchLoader(
        _Reporting(dataset),
        batch_sampler=batches,
        collate_fn=_already_a_batch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Iterating draws a seed for the workers; from the global generator it would shift the model's own numbers.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="forkserver" if num_workers else None,
        worker_init_fn=_start_worker,
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCH_BATCHES if num_workers else None,
    )
    if ahead is not None:
        loader.ahead = ahead
    return loader


class WorkerLost(UserError):
    """A worker was ended from outside, usually for want of memory; the next attempt may fare better."""

    exit_code = ExitCode.INTERNAL


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: torch would wrap it into a traceback, and the sentence would be lost."""

    message: str
    error: type[UserError] = DataError


class _Reporting(Dataset[Any]):
    """A dataset whose DataErrors are values."""

    def __init__(self, dataset: Dataset[LoadedBatch]) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> Any:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[Any]) -> Any:
        try:
            return self.dataset.__getitems__(items)  # type: ignore[attr-defined]
        except DataError as error:
            return _Failure(str(error))


def _already_a_batch(batch: Any) -> Any:
    """Return it, in a worker with its tensors in shared memory already.

    Left to the thread that hands batches over, one for which there is no room is dropped, and waited for for ever.
    """
    if get_worker_info() is None or not isinstance(batch, LoadedBatch):
        return batch
    tensors = [part for part in batch if isinstance(part, torch.Tensor)]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        return _Failure(_no_shared_memory(f"a batch of {format_bytes(num_bytes)}", error), ConfigError)
    return batch


def _no_shared_memory(what: str, error: Exception) -> str:
    return (
        f"No shared memory for {what} ({' '.join(str(error).split())}): make /dev/shm larger (a container's with"
        " --shm-size), or set data.num_workers=0, by which each rank loads by itself."
    )


def _start_fork_server() -> None:
    """Start the fork server, which imports this wing once for all workers, deaf to the signals meant for ranks.

    A blocked signal stays blocked in what is started meanwhile, and reaches this process when it is unblocked.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    with _blocked(signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        resource_tracker.ensure_running()  # of itself it ignores the others, and unblocks them here
    with _blocked(*SIGNALS_FOR_RANKS):
        forkserver.ensure_running()


@contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker_id: int) -> None:
    """In a new worker. It ends when its rank closes the loader or is gone, whatever signals arrive."""
    del worker_id
    settle_streams()
    threading.Thread(target=_end_with_rank, daemon=True).start()
    for number in SIGNALS_FOR_RANKS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_with_rank() -> None:
    """End with the rank. The watch of torch is on the process that forked the worker: the fork server, which waits.

    The rank holds the other end of the pipe that is joined here; a rank that is killed lets go of it too.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None
    rank.join()
    os._exit(1)


@atexit.register
def _kill_remaining_workers() -> None:
    """Runs before multiprocessing's own clean-up, which sends daemons SIGTERM, ignored here, and waits for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
