"""Making the runs of a study that are missing, one `pipeline.train` after another, and going on with those begun."""

import math
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pipeline.comparison.candidates import log_path
from pipeline.comparison.launcher import why_failed
from pipeline.comparison.outcome import metered_gradient_bytes
from pipeline.core.errors import ExitCode, Preempted, UserError
from pipeline.core.progress import Bar, progress_bar
from pipeline.reporting.runs import RunRecord, is_run, read_run
from pipeline.studying.plan import Plan, Planned, where_of
from pipeline.studying.records import differing_keys, read_record, record_path, write_record

PROBE = "probe"
PROBE_STEPS, PROBE_PLAIN_STEPS, PROBE_SEED = 8, 4, 0
"""Of a run that tells bytes and seconds of a step; under PowerSGD half of it is plain."""
GRACE_SECONDS = 90.0
"""For a training to save and leave: its launcher waits 60 s for its ranks, and 15 s more for those that do not obey."""


@dataclass(frozen=True)
class Made:
    """What became of a variant on one seed."""

    seed: int
    place: str
    """Directory of the run, below the study's."""
    run: RunRecord | None = None
    reason: str = ""
    """Why there is no run, as a sentence; empty where there is one."""
    exit_code: int = ExitCode.DONE


class _Failed(Exception):
    """A training that ended with an error."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


def make_runs(plan: Plan) -> dict[str, list[Made]]:
    """Make what is missing; returns by variant what became of each seed. A failure is a reason, and the others go on.

    Raises:
        Preempted: a signal asks to stop; the training under way has saved its state.
    """
    signal.signal(signal.SIGTERM, _stop)
    seeds = plan.config.study.seeds
    made: dict[str, list[Made]] = {}
    with progress_bar("", len(plan.variants) * len(seeds), unit="runs") as bar:
        for planned in plan.variants:
            rows = made[planned.variant.name] = list[Made]()
            for seed in seeds:
                bar.describe(f"{planned.variant.name}, seed {seed}")
                rows.append(_make(plan, planned, seed, bar))
                bar.update(sum(map(len, made.values())))
    return made


def _stop(*_: object) -> NoReturn:
    raise Preempted("SIGTERM: the training under way has been asked to save. The same command goes on.")


def _make(plan: Plan, planned: Planned, seed: int, bar: Bar) -> Made:
    """Make the run of a variant on a seed, unless it is there."""
    run = f"seed{seed}"
    directory = plan.config.directory / planned.place(run)
    said = f"{planned.variant.name}, seed {seed}"
    try:
        num_steps = plan.num_steps(planned) or _affordable_steps(plan, planned)
        is_new = _train(plan, planned, run, {"seed": seed, "trainer.max_steps": num_steps})
        record = read_run(directory)
        if planned.facts.config.comm.period is None:  # else most steps exchange nothing, as the ledger knows
            metered_gradient_bytes(record, planned.facts.of_one.gradient_bytes)
    except _Failed as error:
        bar.print(f"{said}: failed")
        return Made(seed, planned.place(run), reason=error.reason, exit_code=error.code)
    except Preempted:
        raise
    except UserError as error:
        bar.print(f"{said}: {error}")
        return Made(seed, planned.place(run), reason=str(error), exit_code=int(error.exit_code))
    bar.print(f"{said}: {'done' if is_new else 'was there'}")
    return Made(seed, planned.place(run), record)


def _train(plan: Plan, planned: Planned, run: str, values: Mapping[str, Any]) -> bool:
    """Train, or go on with what was begun; a finished run is left as it is. Returns whether anything was started.

    Raises:
        _Failed: the training did not end well.
    """
    directory = plan.config.directory / planned.place(run)
    overrides, conditions = plan.overrides(planned, run, values), plan.conditions
    record = read_record(directory)
    is_other = record is None or bool(differing_keys(record, overrides, conditions))
    if record and not is_other and record["exit_code"] == ExitCode.DONE and is_run(directory):
        return False
    if run == PROBE and is_other and record_path(directory).exists():
        shutil.rmtree(directory, ignore_errors=True)  # of an earlier plan: it tells nothing of this one
    write_record(directory, overrides, conditions, None)
    launcher, where = plan.launcher, where_of(plan.config, f"{plan.config.name}/{planned.place(run)}")
    log = log_path(directory)
    code = launcher.run(launcher.command(overrides, where, alone=False), log, grace_seconds=GRACE_SECONDS)
    if code == ExitCode.PREEMPTED:
        raise Preempted(
            f"The training {directory} was asked to stop and has saved its state. The same command goes on."
        )
    write_record(directory, overrides, conditions, code)
    if code:
        raise _Failed(max(code, ExitCode.INTERNAL), why_failed(code, log))
    return True


# --- steps for gigabytes or seconds ---


def _affordable_steps(plan: Plan, planned: Planned) -> int:
    """Return how many steps the budget pays for, by a run of a few steps, which is made once.

    Raises:
        _Failed: it did not end well.
    """
    few: dict[str, Any] = {
        "seed": PROBE_SEED,
        "trainer.max_steps": PROBE_STEPS,
        "trainer.validate_every_steps": 0,
        "trainer.checkpoint_every_steps": 0,
    }
    comm, budget = planned.facts.config.comm, plan.config.study.budget
    num_plain = comm.powersgd_start_step if comm.hook == "powersgd" else 0
    if num_plain:
        few["comm.powersgd_start_step"] = min(num_plain, PROBE_PLAIN_STEPS)
    _train(plan, planned, PROBE, few)
    probe = read_run(plan.config.directory / planned.place(PROBE))
    if budget.seconds is not None:
        seconds = probe.step_seconds
        steps = math.floor(budget.seconds / seconds) if seconds else 0
    else:
        totals = probe.series("comm/total_gigabytes")[1]
        first, last = totals[1] - totals[0], totals[-1] - totals[-2]
        steps = steps_for_gigabytes(budget.amount, first, last, num_plain)
    if steps < 1:
        raise _Failed(
            ExitCode.CONFIG, f"study.budget.{budget.kind}={budget.amount:g} does not pay for one step: raise it."
        )
    return steps


def steps_for_gigabytes(budget: float, plain: float, compressed: float, num_plain: int) -> int:
    """Return the most steps that move no more than a budget.

    Args:
        budget: In gigabytes.
        plain: Gigabytes of a step that is not compressed.
        compressed: Gigabytes of one that is.
        num_plain: Steps before the first compressed one.
    """
    of_plain = math.floor(budget / plain)
    return of_plain if of_plain <= num_plain else num_plain + math.floor((budget - num_plain * plain) / compressed)
