"""One start of a run, and what it did: the unit in which the ledger survives kills and restarts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

from pipeline.comm.collectives import PHASES, Call
from pipeline.comm.ledger.measured import Measured
from pipeline.comm.ledger.traffic import Placement, Sent, Traffic, price
from pipeline.core.missing import Missing
from pipeline.core.schemas.ledger import CollectiveJson, LedgerJson, MeasuredJson

METER_OFF = "The meter was off in this run or one of its attempts (comm.meter=false)."
OTHER_SERVERS = "Attempts of this run had different ranks or servers; their bytes cannot be added by rank."


class AttemptState(TypedDict):
    """An attempt in plain types, as checkpoints hold it."""

    number: int
    first_step: int
    server_of_rank: list[int]
    placement_measured: bool
    backend: str
    pinned: list[str] | None
    metered: bool
    committed: list[list[Any]]
    """The fields of each call, and how often it was issued."""
    outside: list[list[Any]]
    open_train: list[list[Any]]
    later: list[list[Any]]
    """The fields of each `RowKey`, then number of calls and payload bytes."""
    complete: bool
    measured: MeasuredJson | None


class RowKey(NamedTuple):
    """What the collectives in one row of `collectives` in ledger.json have in common."""

    op: str
    origin: str
    phase: str
    committed: bool
    """False: training that belongs to no committed step, so that the run's totals are without it."""


@dataclass
class Attempt:
    """One start of the run: the conditions it ran under and the calls it issued."""

    number: int
    """Number of the attempt, from 1."""
    first_step: int
    """Committed steps before it."""
    placement: Placement
    backend: str
    """Backend of the process group."""
    pinned: tuple[str, str] | None = None
    """NCCL's (algorithm, protocol), if the configuration held it to one."""
    metered: bool = True
    """False: something was exchanged and not counted."""
    committed: Counter[Call] = field(default_factory=Counter[Call])
    """Calls of training, in steps that count."""
    outside: Counter[Call] = field(default_factory=Counter[Call])
    """Calls of start-up, validation and checkpoints."""
    open_train: Counter[Call] = field(default_factory=Counter[Call])
    """Calls of training that no step has committed so far."""
    later: dict[RowKey, tuple[int, int]] = field(default_factory=dict[RowKey, tuple[int, int]])
    """(number of calls, payload bytes) after its last checkpoint, as its ledger.json reported."""
    complete: bool = False
    """Whether it said that it issues nothing more."""
    measured: Measured | None = None
    """What its ranks counted when they last compared; of a past attempt, as of its checkpoint or its last word."""

    def totals(self) -> dict[RowKey, tuple[int, int]]:
        """Return (number of calls, payload bytes) of every row, whether checkpointed or reported later."""
        totals = dict(self.later)
        for calls, committed in ((self.committed, True), (self.outside, True), (self.open_train, False)):
            for call, count in calls.items():
                _add(totals, RowKey(call.op, call.origin, call.phase, committed), count, count * call.payload_bytes)
        return totals

    def rows(self) -> Iterator[CollectiveJson]:
        """Yield the attempt's rows of `collectives` in ledger.json."""
        for key, (num_calls, payload_bytes) in self.totals().items():
            yield {
                "op": key.op,
                "origin": key.origin,
                "phase": key.phase,
                "attempt": self.number,
                "committed": key.committed,
                "num_calls": num_calls,
                "payload_bytes": payload_bytes,
            }

    def lost_payload_bytes(self, *, is_running: bool) -> int | Missing:
        """Return the payload of training that no committed step owns; Missing while that is not all known."""
        if not self.metered:
            return Missing(METER_OFF)
        if self.complete:
            return sum(payload for key, (_, payload) in self.totals().items() if not key.committed)
        if is_running:
            return Missing("This attempt is still running.")
        return Missing("This attempt ended without a last word; what it issued after it last wrote is not known.")

    # --- over restarts ---

    def pack(self) -> AttemptState:
        """Return the attempt in plain types, for a checkpoint."""
        return {
            "number": self.number,
            "first_step": self.first_step,
            "server_of_rank": list(self.placement.server_of_rank),
            "placement_measured": self.placement.measured,
            "backend": self.backend,
            "pinned": None if self.pinned is None else list(self.pinned),
            "metered": self.metered,
            "committed": _pack_calls(self.committed),
            "outside": _pack_calls(self.outside),
            "open_train": _pack_calls(self.open_train),
            "later": [[*key, *totals] for key, totals in self.later.items()],
            "complete": self.complete,
            "measured": None if self.measured is None else self.measured.to_json(),
        }

    @classmethod
    def unpack(cls, packed: AttemptState) -> "Attempt":
        """Read what `pack` made."""
        pinned = packed["pinned"]
        return cls(
            number=packed["number"],
            first_step=packed["first_step"],
            placement=Placement(tuple(packed["server_of_rank"]), packed["placement_measured"]),
            backend=packed["backend"],
            pinned=None if pinned is None else (pinned[0], pinned[1]),
            metered=packed["metered"],
            committed=_unpack_calls(packed["committed"]),
            outside=_unpack_calls(packed["outside"]),
            open_train=_unpack_calls(packed["open_train"]),
            later={RowKey(*row[:4]): (row[4], row[5]) for row in packed["later"]},
            complete=packed["complete"],
            measured=None if packed["measured"] is None else Measured.from_json(packed["measured"]),
        )

    def adopt_later_work(self, previous: LedgerJson | None) -> None:
        """Learn from `previous`, the run's last ledger.json, what this attempt issued after its checkpoint.

        Its training beyond what the checkpoint holds is lost work. `complete` stays False if the attempt never said,
        in that file, that it had ended.
        """
        if previous is None:
            return
        for told in previous["attempts"]:
            if told["attempt"] == self.number:
                self.complete = self.complete or told["lost_payload_bytes"] is not None
                self._adopt_later_measurement(told.get("measured"))
        known = self.totals()
        extra: dict[RowKey, tuple[int, int]] = {}
        for row in previous["collectives"]:
            if row["attempt"] != self.number:
                continue
            told_key = RowKey(row["op"], row["origin"], row["phase"], row["committed"])
            num_calls, payload_bytes = known.get(told_key, (0, 0))
            more_calls, more_bytes = row["num_calls"] - num_calls, row["payload_bytes"] - payload_bytes
            if more_calls > 0:
                _add(extra, told_key._replace(committed=told_key.phase != "train"), more_calls, more_bytes)
        for key, (num_calls, payload_bytes) in extra.items():
            _add(self.later, key, num_calls, payload_bytes)

    def _adopt_later_measurement(self, told: MeasuredJson | None) -> None:
        """Take a comparison later than the checkpoint's, its steps after the checkpoint as lost work."""
        if told is None:
            return
        later = Measured.from_json(told)
        kept_steps = 0 if self.measured is None else self.measured.num_steps
        if later.num_steps >= kept_steps:
            kept = None if self.measured is None else self.measured.row("train", True)
            self.measured = later.with_committed(kept)

    def price_committed(self) -> Traffic:
        """Return the predicted traffic of all its committed steps."""
        return price(self.committed, self.placement, self.backend, self.pinned)

    def predictions(self) -> dict[tuple[str, bool], Traffic]:
        """Return the predicted traffic of everything issued so far, by (phase, committed)."""
        by_phase = {phase: Counter[Call]() for phase in PHASES if phase != "train"}
        for call, count in self.outside.items():
            by_phase[call.phase][call] += count
        calls = {(phase, True): found for phase, found in by_phase.items()}
        calls |= {("train", True): self.committed, ("train", False): self.open_train}
        return {label: price(found, self.placement, self.backend, self.pinned) for label, found in calls.items()}


# --- all attempts of a run, the present one last ---


def predicted_totals(attempts: Sequence[Attempt]) -> Sent | Missing:
    """Return the predicted bytes of all committed steps; Missing if they cannot be added."""
    if not all(attempt.metered for attempt in attempts):
        return Missing(METER_OFF)
    worked = [attempt for attempt in attempts if attempt.committed] or attempts[-1:]
    if len({attempt.placement.server_of_rank for attempt in worked}) > 1:
        return Missing(OTHER_SERVERS)
    total = Sent.nothing(worked[-1].placement)
    for attempt in worked:
        sent = attempt.price_committed().sent
        if isinstance(sent, Missing):
            return sent
        total += sent
    return total


def measured_totals(attempts: Sequence[Attempt], num_steps: int, why_unmeasured: str) -> Sent | Missing:
    """Return the bytes counted in all committed steps; Missing if they were not, or cannot be added.

    Args:
        attempts: Every attempt, the present one last.
        num_steps: Committed steps of the run.
        why_unmeasured: Why the present attempt measured nothing, if so.
    """
    measured = attempts[-1].measured
    if measured is None:
        return Missing(why_unmeasured)
    if measured.num_steps != num_steps:
        return Missing(f"The ranks last compared their counts after step {measured.num_steps}: see attempts.")
    worked = [attempt for attempt in attempts if attempt.committed]
    if any(attempt.measured is None for attempt in worked):
        return Missing("An earlier attempt was not measured.")
    if len({attempt.placement.server_of_rank for attempt in worked}) > 1:
        return Missing(OTHER_SERVERS)
    rows = [attempt.measured.row("train", True) for attempt in worked if attempt.measured]
    return sum((row.measured for row in rows if row), Sent.nothing((worked or attempts)[-1].placement))


def _add(totals: dict[RowKey, tuple[int, int]], key: RowKey, num_calls: int, payload_bytes: int) -> None:
    before = totals.get(key, (0, 0))
    totals[key] = (before[0] + num_calls, before[1] + payload_bytes)


def _pack_calls(calls: Counter[Call]) -> list[list[Any]]:
    return [[*call, count] for call, count in calls.items()]


def _unpack_calls(packed: list[list[Any]]) -> Counter[Call]:
    return Counter({Call(*row[:-1]): row[-1] for row in packed})
