"""All ranks of a run as one: the process group, its meter, and decisions taken together."""

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.kernel.counter import SocketCounter
from pipeline.comm.ledger.exchange import StoreExchange
from pipeline.comm.ledger.traffic import Placement
from pipeline.comm.plain_values import broadcast_value, gather_values
from pipeline.comm.timeline import CudaClock, HostClock, Timeline
from pipeline.comm.wire import nccl
from pipeline.config.comm import CommConfig
from pipeline.config.training import ClusterConfig
from pipeline.core.compute import Compute, keep_freed_memory, set_threads
from pipeline.core.errors import ConfigError, DataError, PeerLost, UserError
from pipeline.core.text import fitted
from pipeline.data.loader import Reader
from pipeline.run.launch import network
from pipeline.run.launch.preempt import StopRequest
from pipeline.run.launch.ranks import RankInfo, lab_conditions
from pipeline.training import same_run
from pipeline.training.endings import Endings
from pipeline.training.lost_peers import gist_of
from pipeline.training.meeting import Meeting, same_error, settle_places

T = TypeVar("T")
# Ranks that wait for long work of another one meet after this share of a collective's patience.
SHARE_OF_TIMEOUT = 0.25


@dataclass(frozen=True)
class World:
    """The ranks, what they compute with, the meter of what they exchange and the timeline of when."""

    ranks: RankInfo
    compute: Compute
    meter: CollectiveMeter
    timeline: Timeline
    placement: Placement
    num_threads: int
    counter: SocketCounter | None = None
    """Counts what this rank's connections send; None where nothing is exchanged, metered or counted by the kernel."""
    timeout_seconds: float = 600.0
    """How long a collective may wait for the other ranks."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Whether a signal asked this rank to stop."""
    exchange: StoreExchange | None = None
    """How the ranks compare what they are; None: there is one."""

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.ranks.world_size

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.ranks.rank == 0

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return device_of(self.compute)

    def reader(self, num_workers: int | None) -> Reader:
        """This rank as one that reads shards, with `num_workers` processes; None: as its cores allow."""
        return Reader.choose(
            num_workers,
            rank=self.rank,
            world_size=self.size,
            local_rank=self.ranks.local_rank,
            local_world_size=self.ranks.local_world_size,
            on_gpu=self.compute.accelerator == "gpu",
        )

    @contextlib.contextmanager
    def exchanging(self, origin: str) -> Iterator[None]:
        """Blocking collectives inside come from `origin`, and their time is waiting."""
        with self.meter.origin(origin), self.timeline.waiting():
            yield

    def wait_at_most(self, seconds: float) -> None:
        """From here on a collective that this rank begins waits so long for the others, as does an exchange."""
        if self.size > 1:
            dist.set_timeout(timedelta(seconds=seconds))
        if self.exchange is not None:
            self.exchange.wait_at_most(seconds)

    def say(self, text: str) -> None:
        """Print once, not once per rank."""
        if self.is_rank_zero:
            print(fitted(text), flush=True)

    def agree(self, work: Callable[[], T]) -> T:
        """`work()` on every rank; if it fails with a user error on any, every rank raises it.

        Raises:
            UserError: this rank's own, or the first other rank's with the same exit code. Collective.
        """
        result: T | None = None
        error: UserError | None = None
        try:
            result = work()
        except UserError as raised:
            error = raised
        for rank, found in enumerate(self._gather(None if error is None else (int(error.exit_code), str(error)))):
            if found is not None:
                raise error if error is not None else same_error(rank, *found)
        return result  # type: ignore[return-value]

    def locally_first(self, work: Callable[[bool], T]) -> T:
        """`work(True)` on the first rank of each machine; when all of these are done, `work(False)` on the others.

        For work that leaves something on the machine which spares the others most of it. It may take longer than a
        collective may wait: the ranks ask one another now and then.

        Raises:
            UserError: as `agree`. Collective.
        """
        if self.size == 1:
            return work(True)
        result: list[T] = []
        leads = self.ranks.local_rank == 0
        for whose_turn in (True, False):
            mine = [_begun(functools.partial(work, whose_turn))] if whose_turn == leads else []
            while True:
                wait(mine, self.timeout_seconds * SHARE_OF_TIMEOUT)
                if all(self._gather(all(future.done() for future in mine))):
                    break
            result += self.agree(lambda futures=mine: [future.result() for future in futures])
        return result[0]

    def require_same(self, value: str, complaint: str) -> None:
        """Raise DataError with `complaint` on every rank unless `value` is the same on all. Collective."""
        if len(set(self._gather(value))) > 1:
            raise DataError(complaint)

    def differences(self, facts: same_run.Facts) -> list[same_run.Difference]:
        """On which of these keys the ranks differ, the same list on every rank. Collective, without collectives."""
        return [] if self.exchange is None else same_run.compare(self.exchange, facts)

    def require_same_run(self, facts: same_run.Facts) -> None:
        """Refuse ranks that differ on one of these keys.

        Raises:
            ConfigError: on every rank, naming ranks, keys and values. Collective.
        """
        if found := self.differences(facts):
            raise ConfigError(same_run.refusal(found))

    def first_decides(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0 alone; every rank gets its result, which must be plain data, or its error. Collective."""
        result = self._try(work) if self.is_rank_zero else None
        value, error = cast(Any, broadcast_value(result, 0, self.device) if self.size > 1 else result)
        if error is not None:
            raise same_error(0, *error)
        return value

    @staticmethod
    def _try(work: Callable[[], T]) -> tuple[T | None, tuple[int, str] | None]:
        try:
            return work(), None
        except UserError as error:
            return None, (int(error.exit_code), str(error))

    def gather_hosts(self) -> list[str]:
        """Host name of every rank. Collective."""
        return [str(host) for host in self._gather(socket.gethostname())]

    def _gather(self, value: Any) -> list[Any]:
        return [value] if self.size == 1 else gather_values(value, self.device)


def device_of(compute: Compute) -> torch.device:
    """Return the device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if compute.accelerator == "gpu" else torch.device("cpu")


def _begun(work: Callable[[], T]) -> "Future[T]":
    """`work()` in a thread of its own, which does not keep a process that is told to end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextlib.contextmanager
def join_group(
    ranks: RankInfo,
    compute: Compute | Callable[[], Compute],
    cluster: ClusterConfig,
    comm: CommConfig | None = None,
    *,
    stop: StopRequest | None = None,
    facts: Callable[[Compute], same_run.Facts] | None = None,
    run_root: str | None = None,
) -> Iterator[World]:
    """Join the process group; leave it at the end of the block.

    The group exists before Lightning, so that the meter sees everything and the ranks can agree before work starts.
    A world of one has a group too: DDP then works the same, and exchanges nothing.

    Args:
        ranks: The place of this process among all.
        compute: What this rank computes with, or what chooses it; where that fails on one rank, it does on all.
        cluster: Threads and patience.
        comm: What is metered; None: the defaults.
        stop: Listening to signals; None: signals are not looked after.
        facts: What must be the same on all ranks (`same_run.facts_of`), by what this one computes with; compared before
            the group is made.
        run_root: Where ranks that were given no secret find one; None: they must have been given one.

    Raises:
        ConfigError: the ranks are not the same run.
        UserError: the ranks cannot meet; or a peer was lost, in place of torch's own report, which is long and names no
            cause.
        Preempted: the same, after a signal that asked to stop: the peer was not as patient.
    """
    comm = comm or CommConfig()
    meeting = Meeting(ranks, cluster.timeout_seconds, None if run_root is None else Path(run_root))
    found = network.interfaces()
    compute, pinned, num_threads, place = _get_ready(meeting, ranks, compute, cluster, comm, found)
    exchange = _require_same_run(meeting, ranks, {} if facts is None else facts(compute))
    settle_places(meeting, place, found)
    _begin_group(meeting, ranks, compute.backend, cluster.timeout_seconds)
    counter = _counter(ranks, meeting.port) if comm.meter else None
    clock = CudaClock() if compute.accelerator == "gpu" else HostClock()
    timeline = Timeline(ranks.world_size, clock, metered=comm.meter, enabled=comm.timeline)
    observers = [timeline] if counter is None else [timeline, counter]
    meter = CollectiveMeter(enabled=comm.meter, pinned=pinned, observers=observers)
    meter.attach()
    patience, stop = cluster.timeout_seconds, stop or StopRequest()
    with Endings(ranks, meeting, counter, stop).told():
        placement = _placement(ranks, compute)
        yield World(ranks, compute, meter, timeline, placement, num_threads, counter, patience, stop, exchange)
    # Only after success: tearing the group down waits for ranks which, after an error, wait for this one.
    meter.detach()
    dist.destroy_process_group()


def _get_ready(
    meeting: Meeting,
    ranks: RankInfo,
    choose: Compute | Callable[[], Compute],
    cluster: ClusterConfig,
    comm: CommConfig,
    found: Mapping[str, Sequence[str]],
) -> tuple[Compute, tuple[str, str] | None, int, network.Place | None]:
    """Do on every rank what can fail on one alone: (what it computes with, what NCCL is held to, threads, place)."""
    network.check_loopback(ranks, found)  # without which there is no meeting, either
    mine: list[tuple[Compute, tuple[str, str] | None, int, network.Place | None]] = []

    def get_ready() -> None:
        compute = choose() if callable(choose) else choose
        network.check_variable(compute.backend, os.environ, found)
        num_threads = set_threads(cluster.num_threads, ranks.local_world_size)
        if compute.accelerator == "gpu":
            torch.cuda.set_device(ranks.device_index(torch.cuda.device_count()))
        else:
            keep_freed_memory()
        place = network.find_place(ranks, os.environ, found) if compute.backend == "gloo" else None
        mine.append((compute, _pin_nccl(compute.backend, comm), num_threads, place))

    meeting.agree("ready", get_ready)
    return mine[0]


def _require_same_run(meeting: Meeting, ranks: RankInfo, facts: same_run.Facts) -> StoreExchange | None:
    """Compare what the ranks are. Returns what they go on exchanging through; None for one rank.

    Raises:
        ConfigError: They are not the same run.
        PeerLost: One is gone.
    """
    if ranks.world_size == 1:
        return None
    exchange = StoreExchange(ranks.rank, ranks.world_size, name="run", store=meeting.store)
    try:
        differences = same_run.compare(exchange, facts)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0][:200]
        raise PeerLost(
            f"Rank {ranks.rank} lost the others at {meeting.place}, before the first step ({reason})."
        ) from error
    if differences:
        raise ConfigError(same_run.refusal(differences))
    return exchange


def _begin_group(meeting: Meeting, ranks: RankInfo, backend: str, timeout_seconds: float) -> None:
    """Begin torch's process group around the store of the ranks.

    Raises:
        PeerLost: The ranks did not connect with one another in time, which gloo itself takes several times over, or one
            has ended.
    """

    def begin() -> None:
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(
            backend, store=meeting.store, timeout=timeout, world_size=ranks.world_size, rank=ranks.rank
        )

    if backend != "gloo":  # the others connect later, and know the device of the thread
        begin()
        return
    beginning = _begun(begin)
    deadline = time.monotonic() + timeout_seconds
    while not wait([beginning], 1.0).done:
        meeting.require_peers()
        if time.monotonic() > deadline:
            break
    try:
        beginning.result(0)
    except (RuntimeError, TimeoutError) as error:
        reason = f" ({gist_of(error)})" if isinstance(error, RuntimeError) else ""
        raise PeerLost(
            f"Rank {ranks.rank} got no connections with the others within {timeout_seconds:g} s{reason}:"
            f" {network.tell(meeting.places)}. Can they reach one another there, on all ports from 1024 on? Else set"
            f" {network.GLOO_VARIABLE} to the interface between the machines."
        ) from error


def _pin_nccl(backend: str, comm: CommConfig) -> tuple[str, str] | None:
    """Tell NCCL, before its first communicator, which algorithm and protocol to use, on one channel; returns them."""
    if backend != "nccl" or comm.nccl_algorithm is None or comm.nccl_protocol is None:
        return None
    os.environ.update(nccl.environment(comm.nccl_algorithm, comm.nccl_protocol))
    return comm.nccl_algorithm, comm.nccl_protocol


def _counter(ranks: RankInfo, store_port: int) -> SocketCounter | None:
    """Counts what this rank's connections send, from now on, while all is silent; None where the kernel does not."""
    if ranks.world_size == 1:
        return None
    counter = SocketCounter(store_port)
    return counter if counter.available else None


def _placement(ranks: RankInfo, compute: Compute) -> Placement:
    """Servers as the launcher knows them; on a single machine every rank is taken as a server of its own."""
    if ranks.num_nodes == 1 and lab_conditions() is None:
        return Placement.assumed(ranks.world_size)
    return Placement.of_hosts(gather_values(str(ranks.node_rank), device_of(compute)))
