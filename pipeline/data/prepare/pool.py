"""Tasks in worker processes that report progress, stop together, and never outlive their parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_connections
from typing import Any, TypeVar

from pipeline.core.errors import DataError
from pipeline.core.streams import settle_streams

Item = TypeVar("Item")
Result = TypeVar("Result")
Tick = Callable[[int], None]
Task = Callable[[Item, Tick], Result]
POLL_SECONDS = 0.2

# What a worker process shares with its parent, set once when it starts.
_shared: dict[str, Any] = {}


class StoppedError(RuntimeError):
    """Another task failed, so this one was given up."""


def run_tasks(
    task: Task[Item, Result],
    items: Sequence[Item],
    *,
    num_workers: int,
    report: Callable[[int], None],
    accept: Callable[[Result], None],
) -> list[Result]:
    """`task` on every item, over `num_workers` processes (1: in this one). Results in the order of `items`.

    Args:
        task: Called with an item and `tick`, which it calls with the number of units done since the last call.
        items: What the task is run on.
        num_workers: Number of processes; 1: this one.
        report: Called with the units done in all.
        accept: Called with each result as it comes; what it raises stops everything.

    Raises:
        DataError: a worker died. Otherwise what `task` or `accept` raises, after all workers have stopped.
    """
    if min(num_workers, len(items)) <= 1:
        return _run_here(task, items, report, accept)
    # A fork server imports the libraries once and has no threads; forking this process would copy torch's.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.data.prepare.preload"])
    num_done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(
        min(num_workers, len(items)), mp_context=context, initializer=_start_worker, initargs=(num_done, stop)
    ) as pool:
        try:
            futures = [pool.submit(_run_there, task, item) for item in items]
            pending: set[Future[Result]] = set(futures)
            while pending:
                done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                report(num_done.value)
                for future in done:
                    accept(future.result())
        except BrokenProcessPool as error:
            raise DataError(
                "A worker process died, most likely because memory ran out. Run the same command again with fewer "
                "num_workers=; what is finished is kept."
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _run_here(
    task: Task[Item, Result], items: Sequence[Item], report: Callable[[int], None], accept: Callable[[Result], None]
) -> list[Result]:
    num_done = 0

    def tick(amount: int) -> None:
        nonlocal num_done
        num_done += amount
        report(num_done)

    results = []
    for item in items:
        result = task(item, tick)
        accept(result)
        results.append(result)
    return results


def _start_worker(num_done: Any, stop: Any) -> None:
    """Runs once in every worker."""
    settle_streams()
    _shared.update(num_done=num_done, stop=stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too and stops us between two samples
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        wait_for_connections([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _run_there(task: Task[Item, Result], item: Item) -> Result:
    num_done, stop = _shared["num_done"], _shared["stop"]

    def tick(amount: int) -> None:
        with num_done.get_lock():
            num_done.value += amount
        if stop.is_set():
            raise StoppedError

    return task(item, tick)
