"""The accounts of a metered program on rank 0: steps priced, compared with the kernel's counts, and ledger.json."""

import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from pipeline.comm.collectives import Call
from pipeline.comm.ledger import document
from pipeline.comm.ledger.document import WORLD_OF_ONE, Conditions
from pipeline.comm.ledger.measured import Measured
from pipeline.comm.ledger.traffic import Sent, StepTraffic, Traffic
from pipeline.comm.timeline import NUM_TIMED_STEPS
from pipeline.core.missing import Missing, known, to_json
from pipeline.core.schemas.ledger import LedgerJson
from pipeline.metering.groups import NOT_ANNOUNCED, Group, Label, StepPrices, add_up, predictions, rows
from pipeline.metering.owed import Owed
from pipeline.metering.record import Record

SCHEMA = 1
OLDEST_SECONDS = 30.0
UNTIMED = (
    "Buckets of others' programs are not timed: that takes a communication hook of DDP, in place of what the program"
    " has."
)
NO_BATCH = Missing("The program does not say how many samples its step takes.")
NO_OPTIMIZER = Missing("No optimiser of torch has stepped, so that nothing says what gradients there are.")
NOT_COUNTED = "The kernel does not count the bytes of a TCP connection (Linux 4.19 or later does)."
UNDER_WAY = (
    "Something was under way when a step or a phase ended, so that its bytes were counted in the next one: all phases"
    " together agree to the byte, and by phase there are residuals. Wait for asynchronous collectives before the step."
)
NOT_COMPARED = "The ranks have not compared their counts: the program ended before, or some are not metered."


class Account:
    """What rank 0 knows of a program's traffic."""

    def __init__(self, record: Record, world: Group, owed: Owed, *, is_measured: bool) -> None:
        """Account for the run that `record` writes.

        Args:
            record: The run's files.
            world: The default group.
            owed: Knows the program's modules.
            is_measured: Whether the kernel counts.
        """
        self._record, self._world, self._owed = record, world, owed
        world.attempt.number = record.attempt
        self._placement = world.attempt.placement
        self._prices = StepPrices()
        self._num_steps = 0
        self._by_parameter: Mapping[str, int] = {}
        self._last: StepTraffic | None = None
        self._last_calls: Counter[Call] = Counter()
        self._total_egress_bytes: int | None = 0
        self._measured: Measured | None = None
        self._groups_of_all: Sequence[Group] = ()
        self._why_last: str | None = None
        self._why_not = (
            WORLD_OF_ONE if self._placement.world_size == 1 else NOT_COMPARED if is_measured else NOT_COUNTED
        )
        self._step_seconds: deque[float] = deque(maxlen=NUM_TIMED_STEPS)
        self._own_seconds: deque[float] = deque(maxlen=NUM_TIMED_STEPS)
        self._last_step_at: float | None = None
        self._begun = self._written = time.monotonic()

    # --- a step ---

    def commit(
        self,
        groups: Sequence[Group],
        calls: Sequence[Counter[Call]],
        owed: Mapping[str, int],
        sent_bytes: int | None,
        *,
        now: float,
        own_seconds: float,
    ) -> None:
        """Price a step and record it.

        Args:
            groups: The groups that this rank knows.
            calls: What each of them issued in the step.
            owed: Bytes of the gradients, by parameter.
            sent_bytes: What this rank's connections sent; None: not counted.
            now: When the step ended.
            own_seconds: What the meter itself took since the last step ended.
        """
        self._num_steps += 1
        self._by_parameter = owed
        priced = [(group.ranks, self._prices.price(group, found)) for group, found in zip(groups, calls, strict=True)]
        traffic = add_up(priced, self._placement)
        self._last_calls = sum(calls, Counter[Call]())
        self._last = self._step_traffic(groups, traffic, sum(owed.values()), sent_bytes)
        row: dict[str, float | int | None] = {}
        if self._last_step_at is not None:
            seconds = now - self._last_step_at
            row["perf/step_seconds"] = seconds
            self._step_seconds.append(seconds)
            self._own_seconds.append(own_seconds)
        self._last_step_at = now
        self._record.log(self._num_steps, {**row, **self._last.metrics()})

    def owe(self, owed: Mapping[str, int]) -> None:
        """Another optimiser has stepped in the step that was recorded last: take what all of them owe."""
        self._by_parameter = owed

    def _step_traffic(
        self, groups: Sequence[Group], traffic: Traffic, owed_bytes: int, sent_bytes: int | None
    ) -> StepTraffic:
        """Add the step to the total. What rank 0 itself sent is known; all of it only where it is in every group."""
        sent = traffic.sent
        if isinstance(sent, Missing):
            self._total_egress_bytes = None
            return StepTraffic(owed_bytes, traffic.payload_bytes, None, None, None)
        own = sent.bytes_per_rank[0]
        residual = None if sent_bytes is None else sent_bytes - own
        if any(group.meter is None for group in groups):
            self._total_egress_bytes = None
            return StepTraffic(owed_bytes, traffic.payload_bytes, None, None, None, residual)
        if self._total_egress_bytes is not None:
            self._total_egress_bytes += sum(sent.egress_per_server)
        per_rank, egress = sent.bytes_per_rank, sent.egress_per_server
        return StepTraffic(owed_bytes, traffic.payload_bytes, per_rank, egress, self._total_egress_bytes, residual)

    # --- what the ranks compare ---

    def predict(self, groups: Sequence[Group]) -> dict[Label, Traffic]:
        """Return the predicted traffic of all groups of the world."""
        return predictions(groups, self._placement)

    def compared(self, groups: Sequence[Group], measured: Measured) -> None:
        """Take over what came out when all ranks' counts were compared."""
        self._groups_of_all, self._measured = groups, measured

    def not_compared(self, why: str) -> None:
        """Remember why the ranks' counts were not compared in the end."""
        self._why_not = self._why_last = why

    @property
    def _is_all_compared(self) -> bool:
        """Whether the ranks have compared everything up to the last step."""
        return self._why_last is None and self._measured is not None and self._measured.num_steps == self._num_steps

    # --- ledger.json ---

    def write_if_old(self, groups: Sequence[Group]) -> None:
        """Write ledger.json, each time after twice the time, so that a short program that is killed leaves it, too."""
        now = time.monotonic()
        if now - self._written >= min(OLDEST_SECONDS, self._written - self._begun):
            self.write(groups)

    def write(self, groups: Sequence[Group], *, ended: bool = False) -> None:
        """Write ledger.json."""
        for group in groups:
            group.collect()
        self._written = time.monotonic()
        self._record.write_ledger(self._content(groups, ended=ended))

    def close(self, groups: Sequence[Group], *, is_dying: bool) -> None:
        """Write the last ledger.json; the record is complete."""
        self.write(groups, ended=not is_dying)
        self._record.close()

    def abandon(self) -> None:
        """Write nothing more: what was counted since the last ledger.json is not all."""
        self._record.close()

    def _content(self, groups: Sequence[Group], *, ended: bool) -> LedgerJson:
        every = self._with_others(groups)
        attempt = self._world.attempt
        attempt.complete, attempt.measured = ended, self._measured
        predicted = predictions(self._groups_of_all if self._is_all_compared else every, self._placement)[
            "train", True
        ].sent
        if self._measured is None and any(group.meter is None for group in groups):
            predicted = Missing(NOT_ANNOUNCED)
        measured = self._sent()
        p50, p90 = self._percentiles()
        conditions = Conditions(
            run=self._record.name,
            model=self._owed.model,
            hook=self._owed.hook,
            global_batch=NO_BATCH,
            step_seconds_p50=p50,
            step_seconds_p90=p90,
        )
        untimed = WORLD_OF_ONE if self._placement.world_size == 1 else UNTIMED
        content, reasons = to_json(
            {
                "schema": SCHEMA,
                "closed": self._closed(predicted),
                "run": conditions.run,
                "model": conditions.model,
                "backend": attempt.backend,
                "algorithm": self._algorithm(),
                "hook": conditions.hook,
                "world_size": self._placement.world_size,
                "num_servers": self._placement.num_servers,
                "server_of_rank": self._placement.server_of_rank,
                "placement": "measured" if self._placement.measured else "assumed",
                "num_steps": self._num_steps,
                "global_batch": conditions.global_batch,
                "gradient_bytes": sum(self._by_parameter.values()) if self._by_parameter else NO_OPTIMIZER,
                "layers": document.layers(self._by_parameter),
                "buckets": [],
                "collectives": rows(every),
                "attempts": [document.attempt_section(attempt, is_running=True, why_unmeasured=self._why_not)],
                "transport": document.transport([attempt], predicted, measured),
                "servers": document.servers(attempt, predicted, measured),
                "per_step": document.per_step(self._last, self._last_calls, predicted),
                "time": document.time(conditions, untimed),
                "meter_overhead_fraction": known(self._overhead(), "No second step was timed."),
            }
        )
        content["null_reasons"] = reasons
        return content

    def _closed(self, predicted: Sent | Missing) -> bool | Missing:
        """Tell whether all agrees to the last step: what was not compared since is neither."""
        if self._measured is None:
            return Missing(self._why_not)
        if self._measured.closed is None:
            whys = (why for group in self._groups_of_all for why in group.unpredicted.values())
            reason = predicted.reason if isinstance(predicted, Missing) else NOT_COMPARED
            return Missing(next(whys, reason))
        if self._measured.unexplained and not self._measured.is_explained_in_sum:
            return False
        if not self._is_all_compared:
            return Missing(self._why_stale())
        return Missing(UNDER_WAY) if self._measured.unexplained else True

    def _why_stale(self) -> str:
        assert self._measured is not None
        last = f"The ranks last compared their counts after step {self._measured.num_steps}: see attempts."
        return f"{self._why_last} {last}" if self._why_last else last

    def _with_others(self, groups: Sequence[Group]) -> list[Group]:
        """Return this rank's groups, which are up to date, and others as they were when the ranks last compared."""
        own = {group.name for group in groups if group.meter is not None}
        return [
            *(group for group in groups if group.meter is not None),
            *(group for group in self._groups_of_all if group.name not in own),
        ]

    def _sent(self) -> Sent | Missing:
        """Return what was counted in all committed steps."""
        if self._measured is None:
            return Missing(self._why_not)
        if not self._is_all_compared:
            return Missing(self._why_stale())
        row = self._measured.row("train", True)
        return Sent.nothing(self._placement) if row is None else row.measured

    def _algorithm(self) -> str | Missing:
        attempt = self._world.attempt
        if attempt.pinned is not None:
            return " ".join(attempt.pinned)
        return "ring" if attempt.backend == "gloo" else Missing(f"{attempt.backend} chooses its algorithm at run time.")

    def _percentiles(self) -> tuple[float | None, float | None]:
        if len(self._step_seconds) < 2:
            return (self._step_seconds[0], self._step_seconds[0]) if self._step_seconds else (None, None)
        deciles = statistics.quantiles(self._step_seconds, n=10, method="inclusive")
        return statistics.median(self._step_seconds), deciles[8]

    def _overhead(self) -> float | None:
        """Return the share of the timed steps that was spent in the meter's own code on this rank."""
        total = sum(self._step_seconds)
        return sum(self._own_seconds) / total if total else None
