"""The process groups of a program: each with a meter of its own, all of them added up over the ranks of the world."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch

from pipeline.comm.collectives import Call, CollectiveMeter
from pipeline.comm.ledger.attempts import Attempt, AttemptState
from pipeline.comm.ledger.reconcile import ROWS
from pipeline.comm.ledger.traffic import Placement, Sent, Traffic, price
from pipeline.core.errors import LedgerError
from pipeline.core.missing import Missing
from pipeline.core.schemas.ledger import CollectiveJson
from pipeline.metering import origins

Label = tuple[str, bool]
"""(phase, whether a committed step owns it), as in `reconcile.ROWS`."""
MAX_PRICED_STEPS = 256
NOT_ANNOUNCED = "Another rank has a process group that rank 0 is no member of, and the ranks compare at the end only."


class GroupMeter(CollectiveMeter):
    """Counts the collectives of one group of a program that names no origins: the stack tells them.

    Args:
        recording: Entered around all that the hook does: a fault of ours must not become the program's.
        announce: Told who asks for a collective, and the frame that issues it, before it is recorded.
    """

    def __init__(
        self,
        recording: Callable[[], AbstractContextManager[None]],
        announce: Callable[[str, FrameType | None], None],
    ) -> None:
        super().__init__()
        self._recording, self._announce = recording, announce

    def watch(self, group: Any, num_ranks: int, backend: str) -> None:
        """Record `group` from now on; it may be the default group before torch knows it.

        Raises:
            LedgerError: This torch cannot tell.
        """
        self.world_size, self.backend = num_ranks, backend
        if num_ranks == 1:
            return
        if not hasattr(group, "register_pre_hook"):
            raise LedgerError(
                f"torch {torch.__version__} does not report its collectives, torch 2.14 or later does: steps and the"
                " bytes of the connections are counted, and nothing is predicted."
            )
        group.register_pre_hook(id(self), self._on_collective)  # beside all others that watch this group
        self._group = group

    def detach(self) -> None:
        """Stop recording; what was recorded stays."""
        if self._group is not None:
            self._group.unregister_pre_hook(id(self))
        self._group = None

    def passes_by(self, op: str) -> None:
        """Record an operation that torch's hook does not tell, nor its bytes."""
        if self.enabled and self._group is not None:
            with self._recording():
                origin = origins.origin_of(sys._getframe(1), is_integer=True)
                self._announce(origin, None)
                with self._lock:
                    self._counts[Call(self._phase, origin, op, 0, 1, -1)] += 1

    def _on_collective(self, args: Any) -> None:
        if not self.enabled:
            return
        with self._recording():
            frame, tensors = sys._getframe().f_back, args.input_tensors
            is_integer = bool(tensors) and not (tensors[0].is_floating_point() or tensors[0].is_complex())
            is_backward = torch._C._current_graph_task_id() >= 0
            origin = origins.origin_of(frame, is_integer=is_integer, is_backward=is_backward)
            self._announce(origin, frame)
            self._local.origin, self._local.has_named_one = origin, True
            super()._on_collective(args)


@dataclass
class Group:
    """A process group, as far as this rank knows it."""

    name: str
    """torch's name, the same on all members."""
    ranks: tuple[int, ...]
    """Ranks in the world, in the group's order."""
    attempt: Attempt
    """What its members issued, by this rank's record."""
    meter: GroupMeter | None = None
    """None: this rank is no member."""
    unpredicted: dict[Label, str] = field(default_factory=dict[Label, str])
    """Why nothing can be predicted for a phase: its members differ, or torch does not tell."""

    @property
    def label(self) -> str:
        """How rows of the ledger name it."""
        return f"ranks {','.join(map(str, self.ranks))} ({self.name})"

    def collect(self) -> None:
        """Take what the meter has recorded since the last time."""
        if self.meter is not None:
            for call, count in self.meter.take().calls.items():
                (self.attempt.open_train if call.phase == "train" else self.attempt.outside)[call] += count

    def commit(self) -> Counter[Call]:
        """Let a step own what was recorded in training since the last one; returns that."""
        self.collect()
        calls, self.attempt.open_train = self.attempt.open_train, Counter()
        self.attempt.committed.update(calls)
        return calls

    def pack(self) -> "GroupState":
        """Return the group in plain types."""
        return {"name": self.name, "ranks": list(self.ranks), "attempt": self.attempt.pack()}


GroupState = dict[str, Any]
"""`name`, `ranks`, `attempt` as `Attempt.pack` made it."""


def server_placement(ranks: Sequence[int], world: Placement) -> Placement:
    """Return the servers of some of the ranks; their numbers stay those of the world."""
    return Placement(tuple(world.server_of_rank[rank] for rank in ranks), world.measured)


def spread(sent: Sent, ranks: Sequence[int], world: Placement) -> Sent:
    """Return what the members of a group sent, among all ranks and servers."""
    per_rank, per_server = [0] * world.world_size, [0] * world.num_servers
    for rank, num_bytes in zip(ranks, sent.bytes_per_rank, strict=True):
        per_rank[rank] += num_bytes
    for server, num_bytes in enumerate(sent.egress_per_server):
        per_server[server] += num_bytes
    return Sent(tuple(per_rank), tuple(per_server))


def add_up(parts: Sequence[tuple[Sequence[int], Traffic]], world: Placement) -> Traffic:
    """Return the traffic of several groups together; payload is rank 0's. Missing where one of them is."""
    payload_bytes, total = 0, Sent.nothing(world)
    missing: Missing | None = None
    for ranks, traffic in parts:
        payload_bytes += traffic.payload_bytes * (0 in ranks)
        if isinstance(traffic.sent, Missing):
            missing = traffic.sent
        else:
            total += spread(traffic.sent, ranks, world)
    return Traffic(payload_bytes, missing or total)


class StepPrices:
    """Prices steps: the same calls of a group are priced once."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, ...], frozenset[tuple[Call, int]]], Traffic] = {}

    def price(self, group: Group, calls: Counter[Call]) -> Traffic:
        """Return the traffic of a step's calls of one group, over the group's ranks."""
        key = (group.ranks, frozenset(calls.items()))
        if key not in self._known:
            if len(self._known) >= MAX_PRICED_STEPS:
                self._known.clear()
            attempt = group.attempt
            self._known[key] = price(calls, attempt.placement, attempt.backend, attempt.pinned)
        return self._known[key]


# --- over all ranks ---


def gathered(states: Mapping[int, Sequence[GroupState]], world: Placement) -> list[Group]:
    """Return every group of the world once, from what its members recorded.

    A group whose members do not agree keeps the first one's record, and its bytes are predicted by none.

    Args:
        states: By rank, what `Group.pack` returned for each of its groups.
        world: Servers of all ranks.
    """
    copies: dict[str, dict[int, GroupState]] = {}
    for rank, of_rank in states.items():
        for state in of_rank:
            copies.setdefault(state["name"], {})[rank] = state
    groups: list[Group] = []
    for name, by_rank in copies.items():
        first = next(iter(by_rank.values()))
        ranks = tuple(first["ranks"])
        attempts = {rank: Attempt.unpack(_state(state)) for rank, state in by_rank.items()}
        attempt = replace(next(iter(attempts.values())), placement=server_placement(ranks, world))
        groups.append(Group(name, ranks, attempt, unpredicted=disagreements(attempts)))
    return groups


def _state(state: GroupState) -> AttemptState:
    return state["attempt"]


def disagreements(attempts: Mapping[int, Attempt]) -> dict[Label, str]:
    """Return the phases in which members of a group differ, each with a sentence on one operation."""
    told = {rank: _content(attempt) for rank, attempt in attempts.items()}
    first = min(told)
    found: dict[Label, str] = {}
    for rank, content in sorted(told.items()):
        for key in sorted((told[first] - content) + (content - told[first])):
            phase, committed, op, payload_bytes, *_ = key
            found.setdefault(
                (phase, committed),
                f"ranks {first} and {rank} do not agree: {told[first][key]} and {content[key]} calls of {op} with"
                f" {payload_bytes:,} bytes in phase {phase}, so neither record stands for both.",
            )
    return found


def _content(attempt: Attempt) -> Counter[tuple[str, bool, str, int, int, int]]:
    """Count operations and sizes, whoever asked for them."""
    content: Counter[tuple[str, bool, str, int, int, int]] = Counter()
    for calls, committed in ((attempt.committed, True), (attempt.outside, True), (attempt.open_train, False)):
        for call, count in calls.items():
            if call.op not in ("send", "recv"):
                content[call.phase, committed, *call[2:]] += count
    return content


def predictions(groups: Sequence[Group], world: Placement) -> dict[Label, Traffic]:
    """Return the predicted traffic of all groups by (phase, committed), for each of `ROWS`."""
    by_group = [(group.ranks, _predictions(group)) for group in groups]
    return {label: add_up([(ranks, found[label]) for ranks, found in by_group], world) for label in ROWS}


def _predictions(group: Group) -> dict[Label, Traffic]:
    found = group.attempt.predictions()
    for label, why in group.unpredicted.items():
        found[label] = Traffic(found[label].payload_bytes, Missing(f"Group of {group.label}: {why}"))
    return found


def rows(groups: Sequence[Group]) -> list[CollectiveJson]:
    """Return the rows of `collectives` in ledger.json; those of sub-groups name their group."""
    every: list[CollectiveJson] = []
    for position, group in enumerate(groups):
        for row in group.attempt.rows():
            if position:
                row["group"] = group.label
            every.append(row)
    return every


def backend_of(config: str) -> str:
    """Return the backend that a group uses here, from torch's `cpu:gloo,cuda:nccl`."""
    by_device = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    if not by_device:
        return config
    device = "cuda" if torch.cuda.is_available() and "cuda" in by_device else "cpu"
    return by_device.get(device) or next(iter(by_device.values()))
