"""The ledger: what was issued, priced by the wire formulas, totalled over the life of a run.

A run may take several attempts. A training step counts once, in the attempt that committed it. What an attempt did
outside training, and the steps it took after the checkpoint from which the next one resumed, stay under that attempt.
"""

from collections import Counter
from collections.abc import Callable
from typing import TypedDict

from pipeline.comm.collectives import Call, CollectiveMeter
from pipeline.comm.ledger import document
from pipeline.comm.ledger.attempts import METER_OFF, Attempt, AttemptState, measured_totals, predicted_totals
from pipeline.comm.ledger.document import WORLD_OF_ONE, Conditions
from pipeline.comm.ledger.reconcile import Reconciler, Verdict
from pipeline.comm.ledger.traffic import Placement, StepTraffic, Traffic, price
from pipeline.core.errors import LedgerError
from pipeline.core.missing import Missing, to_json
from pipeline.core.schemas.ledger import LedgerJson

SCHEMA = 1
STATE_VERSION = 1
MAX_PRICED_STEPS = 256

_NOT_MEASURED = "The kernel does not count the bytes of a TCP connection (Linux 4.19 or later does)."
_NOT_COMPARED = "The ranks have not compared their counts yet: they do so at checkpoints and at the end."
_COST_ELSEWHERE = Missing("The meter's cost is measured by a benchmark of its own, not in every run.")


class LedgerState(TypedDict):
    """The ledger in plain types, as checkpoints hold it."""

    version: int
    num_steps: int
    total_egress_bytes: int | None
    attempts: list[AttemptState]


class Ledger:
    """Accounts for what `meter` records.

    Life: construct it after the process group and the model exist; `load_state_dict` when resuming; `commit_step` after
    every optimiser step; `to_json` whenever `ledger.json` is written. All ranks may keep one; rank 0's is the record.
    """

    def __init__(
        self,
        meter: CollectiveMeter,
        gradient_bytes_by_parameter: dict[str, int],
        *,
        placement: Placement,
        attempt: int,
        rank: int,
        reconciler: Reconciler | None,
        owed: Callable[[int], Counter[Call] | None] = lambda _: None,
        is_under_way: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """Account for one attempt at a run.

        Args:
            meter: Records the collectives of this rank.
            gradient_bytes_by_parameter: Of the trainable parameters in the model's order
                (strategy.gradient_bytes_by_parameter).
            placement: The servers of the ranks.
            attempt: Number of this start of the run, from 1; raised if the loaded state is as late.
            rank: Rank of this process.
            reconciler: Compares with the kernel's counts; None where nothing is measured.
            owed: Returns the collectives that a step, numbered from 1, owes in the phase `train`; None for one that
                owes its gradients through DDP.
            is_under_way: Returns whether a collective that a step has issued may still send after its end: the step's
                residual is then told with that of the next step after which none may.
        """
        assert placement.world_size == meter.world_size
        self.num_steps = 0
        self.gradient_bytes = sum(gradient_bytes_by_parameter.values())
        self._meter = meter
        self._by_parameter = gradient_bytes_by_parameter
        self._total_egress_bytes: int | None = 0
        self._open_gradient_bytes = 0  # of the step under way
        self._last: StepTraffic | None = None
        self._last_calls: Counter[Call] | None = None
        self._reconciler, self._rank, self._owed, self._is_under_way = reconciler, rank, owed, is_under_way
        self._open_residual_bytes = 0  # of the steps since nothing was under way
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

        Raises:
            LedgerError: The gradients that DDP handed over are not the bytes that the model owes, or the collectives of
                a step without gradients are not those that it owes.
        """
        self.num_steps += 1
        if not self._present.metered:
            self._total_egress_bytes = None
            self._last = StepTraffic(None, None, None, None, None)
            return self._last
        self._collect()
        gradient_bytes, self._open_gradient_bytes = self._open_gradient_bytes, 0
        owed = self._owed(self.num_steps)
        if owed is None:
            self._check_gradients(gradient_bytes)
        else:
            self._check_calls(owed)
        train, self._present.open_train = self._present.open_train, Counter()
        traffic, self._last_calls = self._price_step(train), train
        self._present.committed.update(train)
        measured = None if self._reconciler is None else self._reconciler.commit()
        self._last = self._step_traffic(gradient_bytes, traffic, measured)
        return self._last

    def _step_traffic(self, gradient_bytes: int, traffic: Traffic, measured_bytes: int | None) -> StepTraffic:
        """Add the step to the total; `measured_bytes` is what this rank sent in it."""
        if isinstance(traffic.sent, Missing):
            self._total_egress_bytes = None
            return StepTraffic(gradient_bytes, traffic.payload_bytes, None, None, None)
        per_rank, egress = traffic.sent.bytes_per_rank, traffic.sent.egress_per_server
        if self._total_egress_bytes is not None:
            self._total_egress_bytes += sum(egress)
        residual = None
        if measured_bytes is not None:
            self._open_residual_bytes += measured_bytes - per_rank[self._rank]
            if not self._is_under_way(self.num_steps):
                residual, self._open_residual_bytes = self._open_residual_bytes, 0
        return StepTraffic(gradient_bytes, traffic.payload_bytes, per_rank, egress, self._total_egress_bytes, residual)

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

    def _check_calls(self, owed: Counter[Call]) -> None:
        issued = self._present.open_train
        if issued == owed:
            return
        differences = ((issued - owed, "too many"), (owed - issued, "too few"))
        wrong = " and ".join(f"{_told(calls)} {how}" for calls, how in differences if calls)
        raise LedgerError(
            f"Step {self.num_steps} owes {_told(owed)}, but issued {wrong}. With comm.period ranks exchange weights"
            " at the steps that it says, and nothing else in a step: take out what does, or set comm.period=null."
        )

    def _price_step(self, train: Counter[Call]) -> Traffic:
        """Steps repeat: the same calls are priced once."""
        key = frozenset(train.items())
        if key not in self._priced:
            if len(self._priced) >= MAX_PRICED_STEPS:
                self._priced.clear()
            self._priced[key] = price(train, self._present.placement, self._present.backend, self._present.pinned)
        return self._priced[key]

    def compare(self) -> Verdict:
        """Reconcile predicted and counted bytes of all ranks. Collective; no collective may be under way.

        Whether what nothing explains is an error is left to `Verdict.refuse`, so that what was found can be written
        first.
        """
        if self._reconciler is None:
            return Verdict(None, strict=False)
        self._collect()
        phase, predict = self._meter.phase_name, self._present.predictions
        self._present.measured, verdict = self._reconciler.compare(phase, predict, self.num_steps)
        return verdict

    # --- over restarts ---

    def state_dict(self) -> LedgerState:
        """Return everything issued up to now, in plain types, for the checkpoint."""
        self._collect()
        return {
            "version": STATE_VERSION,
            "num_steps": self.num_steps,
            "total_egress_bytes": self._total_egress_bytes,
            "attempts": [attempt.pack() for attempt in (*self._past, self._present)],
        }

    def load_state_dict(self, state: LedgerState, previous: LedgerJson | None = None) -> None:
        """Resume from a checkpoint's `state`, before the first step.

        Args:
            state: What `state_dict` returned.
            previous: The `ledger.json` found in the run directory, if any. From it comes what earlier attempts issued
                after that checkpoint; without it, or for what a killed attempt could not write, the rows are unknown.

        Raises:
            LedgerError: `state` is of another version of the program.
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

    def to_json(self, conditions: Conditions, ended: bool = False) -> LedgerJson:
        """Return the content of `ledger.json`, all attempts together.

        Args:
            conditions: What it says beside the bytes.
            ended: Whether this attempt issues nothing more, so that what is listed for it is all there is.
        """
        self._collect()
        self._present.complete = ended
        meter, present, placement = self._meter, self._present, self._present.placement
        attempts = [*self._past, present]
        unmeasured, untimed = self._why_unmeasured(), conditions.why_untimed
        if meter.world_size == 1 and conditions.communication is not None:
            untimed = WORLD_OF_ONE  # all that is not known of what was timed
        predicted = predicted_totals(attempts)
        measured = measured_totals(attempts, self.num_steps, unmeasured)
        content, reasons = to_json(
            {
                "schema": SCHEMA,
                "closed": document.closed(attempts, predicted, measured),
                "run": conditions.run,
                "model": conditions.model,
                "backend": meter.backend,
                "algorithm": self._algorithm(),
                "hook": conditions.hook,
                "world_size": meter.world_size,
                "num_servers": placement.num_servers,
                "server_of_rank": placement.server_of_rank,
                "placement": "measured" if placement.measured else "assumed",
                "num_steps": self.num_steps,
                "global_batch": conditions.global_batch,
                "gradient_bytes": self.gradient_bytes,
                "layers": document.layers(self._by_parameter),
                "buckets": document.buckets(meter.buckets, conditions.communication, untimed),
                "collectives": [row for attempt in attempts for row in attempt.rows()],
                "attempts": [
                    document.attempt_section(attempt, is_running=attempt is present, why_unmeasured=unmeasured)
                    for attempt in attempts
                ],
                "transport": document.transport(attempts, predicted, measured),
                "servers": document.servers(present, predicted, measured),
                "per_step": document.per_step(self._last, self._last_calls, predicted),
                "time": document.time(conditions, untimed),
                "meter_overhead_fraction": _COST_ELSEWHERE,
            }
        )
        content["null_reasons"] = reasons
        return content

    def _algorithm(self) -> str | Missing:
        if self._meter.pinned is not None:
            return " ".join(self._meter.pinned)
        backend = self._meter.backend
        return "ring" if backend == "gloo" else Missing(f"{backend} chooses its algorithm at run time.")

    def _why_unmeasured(self) -> str:
        if self._meter.world_size == 1:
            return WORLD_OF_ONE
        if not self._present.metered:
            return METER_OFF
        return _NOT_MEASURED if self._reconciler is None else _NOT_COMPARED


def _told(calls: Counter[Call]) -> str:
    """Collectives in words."""
    words = [
        f"{count} {call.op} of {call.payload_bytes:,} bytes ({call.origin})" for call, count in sorted(calls.items())
    ]
    return " and ".join(words) or "no collective"
