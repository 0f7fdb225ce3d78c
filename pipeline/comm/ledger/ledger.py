"""The ledger: what was issued, priced by the wire formulas, totalled over the life of a run.

A run may take several attempts. A training step counts once, in the attempt that committed it. What an attempt did
outside training, and the steps it took after the checkpoint from which the next one resumed, stay under that attempt.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.comm.collectives import Call, CollectiveMeter
from pipeline.comm.ledger.attempts import METER_OFF, Attempt
from pipeline.comm.ledger.reconcile import Reconciler
from pipeline.comm.ledger.schema import WORLD_OF_ONE, attempt_rows, transport_and_servers
from pipeline.comm.ledger.traffic import Placement, StepTraffic, Traffic, price
from pipeline.comm.step_times import MedianTimes, bucket_fields, time_fields
from pipeline.core.errors import LedgerError

SCHEMA = 1
STATE_VERSION = 1

_NOT_MEASURED = "The kernel does not count the bytes of a TCP connection (Linux 4.19 or later does)."
_NOT_COMPARED = "The ranks have not compared their counts yet: they do so at checkpoints and at the end."


@dataclass(frozen=True)
class Conditions:
    """What `ledger.json` says about the run beside its bytes."""

    run: str
    model: str
    hook: str
    global_batch: int
    step_seconds_p50: float | None = None
    step_seconds_p90: float | None = None
    data_wait_seconds: float | None = None
    """Mean per step."""
    communication: MedianTimes | None = None
    """Medians of this attempt's steps (Timeline.medians)."""
    why_untimed: str = "Communication was not timed in this run."
    """The reason why there are none."""


class Ledger:
    """Accounts for what `meter` records.

    Life: construct it after the process group and the model exist; `load_state_dict` when resuming; `commit_step` after
    every optimiser step; `to_json` whenever `ledger.json` is written. All ranks may keep one; rank 0's is the record.

    gradient_bytes_by_parameter: trainable parameters in the model's order (strategy.gradient_bytes_by_parameter).
    attempt: number of this start of the run, from 1; raised if the loaded state is as late.
    reconciler: compares with the kernel's counts; None where nothing is measured. rank: of this process.
    """

    def __init__(
        self,
        meter: CollectiveMeter,
        gradient_bytes_by_parameter: dict[str, int],
        placement: Placement | None = None,
        attempt: int = 1,
        reconciler: Reconciler | None = None,
        rank: int = 0,
    ) -> None:
        placement = placement or Placement.assumed(meter.world_size)
        assert placement.world_size == meter.world_size
        self.num_steps = 0
        self.gradient_bytes = sum(gradient_bytes_by_parameter.values())
        self._meter = meter
        self._by_parameter = gradient_bytes_by_parameter
        self._total_egress_bytes: int | None = 0
        self._open_gradient_bytes = 0  # of the step under way
        self._last: StepTraffic | None = None
        self._last_calls: Counter[Call] | None = None
        self._reconciler, self._rank = reconciler, rank
        self._priced: dict[frozenset[tuple[Call, int]], Traffic] = {}
        # A world of one has nothing to count.
        metered = meter.enabled or meter.world_size == 1
        self._present = Attempt(attempt, 0, placement, meter.backend, meter.pinned, metered)
        self._past: list[Attempt] = []

    @property
    def attempt(self) -> int:
        """Number of this start of the run, from 1."""
        return self._present.number

    # --- during the run ---

    def commit_step(self) -> StepTraffic:
        """Close an optimiser step: what the train phase issued since the last commit belongs to it.

        Raises LedgerError when the gradients DDP handed over are not the bytes the model owes.
        """
        self.num_steps += 1
        if not self._present.metered:
            self._total_egress_bytes = None
            self._last = StepTraffic(None, None, None, None, None)
            return self._last
        self._collect()
        gradient_bytes, self._open_gradient_bytes = self._open_gradient_bytes, 0
        self._check_gradients(gradient_bytes)
        train, self._present.open_train = self._present.open_train, Counter()
        traffic, self._last_calls = self._price_step(train), train
        self._present.committed.update(train)
        egress = traffic.total_egress_bytes
        if self._total_egress_bytes is not None:
            self._total_egress_bytes = None if egress is None else self._total_egress_bytes + egress
        self._last = StepTraffic(
            gradient_bytes,
            traffic.payload_bytes,
            traffic.bytes_per_rank,
            traffic.egress_per_server,
            self._total_egress_bytes,
            self._residual_bytes(traffic),
        )
        return self._last

    def _residual_bytes(self, traffic: Traffic) -> int | None:
        """Of the step that ends. Counts it as committed."""
        if self._reconciler is None:
            return None
        measured = self._reconciler.counter.commit()
        return None if traffic.bytes_per_rank is None else measured - traffic.bytes_per_rank[self._rank]

    def _collect(self) -> None:
        """Take what the meter has into the present attempt."""
        taken = self._meter.take()
        for call, count in taken.calls.items():
            (self._present.open_train if call.phase == "train" else self._present.outside)[call] += count
        self._open_gradient_bytes += taken.gradient_bytes

    def _check_gradients(self, gradient_bytes: int) -> None:
        if self._meter.world_size == 1 or gradient_bytes == self.gradient_bytes:
            return
        if gradient_bytes == 0:
            raise LedgerError(
                f"Step {self.num_steps} reduced no gradient through DDP's communication hook, but the model owes "
                f"{self.gradient_bytes:,} bytes; train through MeteredDDPStrategy or set comm.meter=false."
            )
        raise LedgerError(
            f"Step {self.num_steps} reduced {gradient_bytes:,} bytes of gradients, but the model owes "
            f"{self.gradient_bytes:,}; one optimiser step must reduce each trainable parameter once."
        )

    def _price_step(self, train: Counter[Call]) -> Traffic:
        """Steps repeat: the same calls are priced once."""
        key = frozenset(train.items())
        if key not in self._priced:
            if len(self._priced) >= 256:
                self._priced.clear()
            self._priced[key] = price(train, self._present.placement, self._present.backend, self._present.pinned)
        return self._priced[key]

    def compare(self) -> str | None:
        """Lay predicted and counted bytes of all ranks side by side. Collective; no collective may be under way.

        Returns the sentence about bytes nobody can explain, on every rank, or None. `refuse` makes it an error.
        """
        if self._reconciler is None:
            return None
        self._collect()
        measured, unexplained = self._reconciler.compare(
            self._meter.phase_name, self._present.predictions, self.num_steps
        )
        self._present.measured = measured
        return unexplained

    def refuse(self, unexplained: str | None) -> None:
        """Raise LedgerError on every rank if `compare` found something and the run is strict."""
        if self._reconciler is not None:
            self._reconciler.refuse(unexplained)

    # --- over restarts ---

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, in plain types. Everything issued up to now is in it."""
        self._collect()
        return {
            "version": STATE_VERSION,
            "num_steps": self.num_steps,
            "total_egress_bytes": self._total_egress_bytes,
            "attempts": [attempt.pack() for attempt in (*self._past, self._present)],
        }

    def load_state_dict(self, state: dict[str, Any], previous: dict[str, Any] | None = None) -> None:
        """Go on from a checkpoint's `state`, before the first step.

        previous: the `ledger.json` found in the run directory, if any. From it comes what earlier attempts issued
        after that checkpoint; without it, or for what a killed attempt could not write, the rows are unknown.
        """
        assert self.num_steps == 0, "load_state_dict() comes before the first step"
        if state["version"] != STATE_VERSION:
            raise LedgerError(
                f"The checkpoint's ledger has version {state['version']}, this program reads {STATE_VERSION}; "
                "resume with the version of the program that wrote it, or start a new run."
            )
        self.num_steps = state["num_steps"]
        self._total_egress_bytes = state["total_egress_bytes"]
        self._past = [Attempt.unpack(packed) for packed in state["attempts"]]
        checkpointed = self._past[-1]
        self._present.number = max(self._present.number, checkpointed.number + 1)
        self._present.first_step = self.num_steps
        checkpointed.adopt_later_work(previous)
        for number in range(checkpointed.number + 1, self._present.number):  # died before a checkpoint of its own
            silent = Attempt(number, self.num_steps, checkpointed.placement, checkpointed.backend)
            silent.adopt_later_work(previous)
            self._past.append(silent)

    # --- ledger.json ---

    def to_json(self, conditions: Conditions, ended: bool = False) -> dict[str, Any]:
        """The content of `ledger.json`, all attempts together.

        ended: this attempt issues nothing more, so what is listed for it is all there is.
        """
        self._collect()
        self._present.complete = ended
        attempts = [*self._past, self._present]
        placement, last = self._present.placement, self._last
        why = self._why_unmeasured()
        compared, reasons = transport_and_servers(attempts, self.num_steps, why)
        listed, more_reasons = attempt_rows(attempts, why)
        reasons |= more_reasons | _null_reasons(
            self._meter, conditions, reasons.get("transport.predicted_bytes_per_rank"), last
        )
        return {
            "schema": SCHEMA,
            "closed": compared["closed"],
            "run": conditions.run,
            "model": conditions.model,
            "backend": self._meter.backend,
            "algorithm": self._algorithm(),
            "hook": conditions.hook,
            "world_size": self._meter.world_size,
            "num_servers": placement.num_servers,
            "server_of_rank": list(placement.server_of_rank),
            "placement": "measured" if placement.measured else "assumed",
            "num_steps": self.num_steps,
            "global_batch": conditions.global_batch,
            "gradient_bytes": self.gradient_bytes,
            "layers": _layers(self._by_parameter),
            "buckets": [
                {
                    "index": index,
                    "bytes": bucket.num_bytes,
                    "num_parameters": len(bucket.parameters),
                    **bucket_fields(conditions.communication, index),
                }
                for index, bucket in sorted(self._meter.buckets.items())
            ],
            "collectives": [row for attempt in attempts for row in attempt.rows()],
            "attempts": listed,
            "transport": compared["transport"],
            "servers": compared["servers"],
            "per_step": {
                "payload_bytes": None if last is None else last.payload_bytes,
                "transport_bytes_per_rank": _list_or_none(last and last.transport_bytes_per_rank),
                "server_egress_bytes": _list_or_none(last and last.server_egress_bytes),
                "calls": _calls(self._last_calls),
            },
            "time": {
                "step_seconds": {"p50": conditions.step_seconds_p50, "p90": conditions.step_seconds_p90},
                "data_wait_seconds": conditions.data_wait_seconds,
                **time_fields(conditions.communication),
            },
            "meter_overhead_fraction": None,
            "null_reasons": reasons,
        }

    def _algorithm(self) -> str | None:
        if self._meter.pinned is not None:
            return " ".join(self._meter.pinned)
        return "ring" if self._meter.backend == "gloo" else None

    def _why_unmeasured(self) -> str:
        if self._meter.world_size == 1:
            return WORLD_OF_ONE
        if not self._present.metered:
            return METER_OFF
        return _NOT_MEASURED if self._reconciler is None else _NOT_COMPARED


def _layers(by_parameter: dict[str, int]) -> list[dict[str, Any]]:
    """Weight and bias of a module are one layer; shares sum to 1."""
    by_layer: dict[str, int] = {}
    for name, num_bytes in by_parameter.items():
        layer = name.rpartition(".")[0] or name
        by_layer[layer] = by_layer.get(layer, 0) + num_bytes
    total = sum(by_layer.values())
    return [{"name": name, "bytes": size, "share": size / total} for name, size in by_layer.items()]


def _calls(step: Counter[Call] | None) -> list[dict[str, Any]] | None:
    """Every collective of one step as rank 0 issued it: all that a wire formula needs, for any number of ranks."""
    if step is None:
        return None
    return [
        {
            "op": call.op,
            "origin": call.origin,
            "payload_bytes": call.payload_bytes,
            "itemsize": call.itemsize,
            "root": call.root,
            "num_calls": count,
        }
        for call, count in sorted(step.items())
    ]


def _list_or_none(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else list(values)


def _null_reasons(
    meter: CollectiveMeter, conditions: Conditions, reason: str | None, last: StepTraffic | None
) -> dict[str, str]:
    """Why each null is null, by its path."""
    reasons: dict[str, str] = {}
    untimed = WORLD_OF_ONE if meter.world_size == 1 else conditions.why_untimed
    for name, value in time_fields(conditions.communication).items():
        if value is None:
            reasons[f"time.{name}"] = untimed
    for position, index in enumerate(sorted(meter.buckets)):
        for name, value in bucket_fields(conditions.communication, index).items():
            if value is None:
                reasons[f"buckets.{position}.{name}"] = untimed
    reasons["meter_overhead_fraction"] = "The meter's cost is measured by a benchmark of its own, not in every run."
    if meter.backend != "gloo" and meter.pinned is None:
        reasons["algorithm"] = f"{meter.backend} chooses its algorithm at run time."
    if last is None:
        for name in ("payload_bytes", "transport_bytes_per_rank", "server_egress_bytes", "calls"):
            reasons[f"per_step.{name}"] = "This attempt has completed no step."
    elif last.transport_bytes_per_rank is None:
        for name in ("transport_bytes_per_rank", "server_egress_bytes"):
            reasons[f"per_step.{name}"] = reason or "A collective of the last step has no exact formula."
        if last.payload_bytes is None:
            reasons["per_step.payload_bytes"] = reasons["per_step.calls"] = METER_OFF
    for name, value in (
        ("step_seconds.p50", conditions.step_seconds_p50),
        ("step_seconds.p90", conditions.step_seconds_p90),
        ("data_wait_seconds", conditions.data_wait_seconds),
    ):
        if value is None:
            reasons[f"time.{name}"] = "No time was handed to the ledger."
    return reasons
