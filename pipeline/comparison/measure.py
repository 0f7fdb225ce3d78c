"""Making the runs a comparison is made of, one `pipeline.train` after another, or reading runs already made."""

import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.comparison.candidates import Candidate, log_path, where_of
from pipeline.comparison.conditions import footing_difference, refuse_to_mix
from pipeline.comparison.launcher import choose_launcher, why_failed
from pipeline.comparison.outcome import Outcome, metered_gradient_bytes
from pipeline.comparison.result import choose_baseline, label_with_hook
from pipeline.config.compare import CompareConfig
from pipeline.core.compute import choose_accelerator
from pipeline.core.errors import ConfigError, ExitCode, LedgerError, UserError
from pipeline.core.overrides import literal
from pipeline.core.progress import progress_bar
from pipeline.core.typed import require
from pipeline.models import zoo
from pipeline.models.external import is_external
from pipeline.models.facts import model_facts
from pipeline.reporting.runs import RunRecord, read_run
from pipeline.run.memory import available_memory, refusal

_NOT_WANTED = "alone=false: no run on a single rank was made, against which to measure scaling."
_NOT_GIVEN = "No run on a single rank was given: alone_runs=[...]."


# --- the runs ---


def measure(config: CompareConfig, candidates: Sequence[Candidate], shards: str) -> list[Outcome]:
    """Run the trainings, one after another. A failure is an outcome with its reason.

    Args:
        config: Conditions of the comparison.
        candidates: What `check_candidates` accepted.
        shards: Directory of the shards.
    """
    # A comparison told to stop takes its run along: leaving by an exception ends the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    outcomes: list[Outcome] = []
    with progress_bar("", len(candidates), unit="runs") as bar:
        runner = _Runner(config, shards)
        for candidate in candidates:
            bar.update(len(outcomes), candidate.label)
            outcomes.append(runner.measure(candidate))
            bar.update(len(outcomes))
            bar.print(f"{candidate.label}: {'failed' if outcomes[-1].reason else 'done'}")
    return outcomes


class _Runner:
    """Makes the runs of one comparison. A model's single-rank run is made once, after its first that succeeds."""

    def __init__(self, config: CompareConfig, shards: str) -> None:
        self._config, self._shards = config, shards
        self._launcher = choose_launcher(config)
        self._accelerator = choose_accelerator(config.cluster.accelerator)
        self._alone: dict[str, RunRecord | str] = {}

    def measure(self, candidate: Candidate) -> Outcome:
        """Make the candidate's run, and the single-rank run that belongs to it."""
        outcome = Outcome(candidate.model, candidate.facts, candidate.hook, candidate.label, command=_command_line())
        if reason := self._impossible(candidate):
            return replace(outcome, reason=reason, exit_code=ExitCode.CONFIG)
        outcome = with_run(self._run(outcome, candidate.slug, candidate.overrides), self._directory(candidate.slug))
        if outcome.run is None:
            return outcome
        found = self._run_alone(candidate, outcome.run)
        return replace(outcome, why_not_alone=found) if isinstance(found, str) else replace(outcome, alone=found)

    def _impossible(self, candidate: Candidate) -> str:
        """Return why nothing needs to be started; empty if something may."""
        taken = candidate.facts.footprint
        if taken is None:  # a network of others was tried before, and need not run without memory
            return "" if is_external(zoo.parse_spec(candidate.model)[0]) else candidate.facts.why_no_footprint
        available = available_memory(self._accelerator)
        return refusal(taken.training_memory_bytes, self._launcher.ranks_per_machine, available)

    def _run_alone(self, candidate: Candidate, run: RunRecord) -> RunRecord | str:
        """Return the model's run on one rank with as many threads as each rank of `run` has, or why there is none."""
        if not self._config.alone:
            return _NOT_WANTED
        if candidate.model not in self._alone:
            num_threads = run.recorded("num_threads_per_rank")
            overrides = [*candidate.alone_overrides, f"cluster.num_threads={literal(num_threads)}"]
            outcome = self._run(Outcome(candidate.model, candidate.facts), candidate.alone_slug, overrides, alone=True)
            if outcome.reason:
                self._alone[candidate.model] = f"The run on a single rank failed: {outcome.reason}"
            else:
                self._alone[candidate.model] = read_run(self._directory(candidate.alone_slug))
        return self._alone[candidate.model]

    def _run(self, outcome: Outcome, slug: str, overrides: Sequence[str], *, alone: bool = False) -> Outcome:
        """Start a training and wait for its end. Returns the outcome with the reason, if the training failed."""
        directory = self._directory(slug)
        if directory.exists():  # of an earlier comparison of this name, as checked: what is reported is measured now
            shutil.rmtree(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        where = where_of(self._config, f"{self._config.name}/{slug}")
        overrides = [*overrides, f"data.root={literal(self._shards)}"]
        code = self._launcher.run(self._launcher.command(overrides, where, alone=alone), log_path(directory))
        if not code:
            return outcome
        return replace(outcome, reason=why_failed(code, log_path(directory)), exit_code=max(code, ExitCode.INTERNAL))

    def _directory(self, slug: str) -> Path:
        return self._config.directory / slug


def with_run(outcome: Outcome, directory: Path) -> Outcome:
    """Return the outcome with its run, if there is one and its ledger carries what the model's parameters owe."""
    if outcome.reason:
        return outcome
    try:
        run = read_run(directory)
        metered_gradient_bytes(run, outcome.facts.parameter_bytes)
    except UserError as error:
        return replace(outcome, reason=str(error), exit_code=int(error.exit_code))
    return replace(outcome, run=run)


def _command_line() -> str:
    return shlex.join(["python", "-m", "pipeline.compare", *sys.argv[1:]])


# --- runs already made ---


def read_outcomes(config: CompareConfig) -> list[Outcome]:
    """Read the runs of `config.runs`.

    Raises:
        DataError: one is not a run.
        ConfigError: one is named twice, or the conditions differ.
        LedgerError: one's ledger does not carry what its model owes.
    """
    records = [read_run(Path(directory)) for directory in config.runs]
    places = [Path(directory).resolve() for directory in config.runs]
    models = [model_of(record) for record in records]
    labels = [
        label_with_hook(model, run.ledger["hook"], config.hooks) for model, run in zip(models, records, strict=True)
    ]
    for directory in places:
        require(places.count(directory) == 1, f"runs=[...] names {directory} more than once: name each run once.")
    labels = _with_run_names(labels, records)
    choose_baseline(config.baseline, models)
    refuse_to_mix(dict(zip(labels, records, strict=True)), hooks_may_differ=bool(config.hooks))
    for run in records:
        require(
            not config.hooks or run.ledger["hook"] in config.hooks,
            f"{run.directory} was compressed by {run.ledger['hook']}, which hooks={list(config.hooks)} does not name.",
        )
    alone = _read_alone(config.alone_runs)
    return [
        _read_outcome(model, label, run, alone.get(model), allow_code=config.allow_code)
        for model, label, run in zip(models, labels, records, strict=True)
    ]


def _with_run_names(labels: Sequence[str], records: Sequence[RunRecord]) -> list[str]:
    """Add to a label that several runs have the name of the run; its directory, where the names are the same too."""
    named = [f"{label} ({run.ledger['run']})" for label, run in zip(labels, records, strict=True)]
    placed = [f"{label} ({run.directory})" for label, run in zip(labels, records, strict=True)]
    return [
        label if labels.count(label) == 1 else name if named.count(name) == 1 else place
        for label, name, place in zip(labels, named, placed, strict=True)
    ]


def _read_outcome(model: str, label: str, run: RunRecord, alone: RunRecord | None, *, allow_code: bool) -> Outcome:
    num_classes = run.setting("model.num_classes") or 1000
    facts = model_facts(model, num_classes, run.crop, run.batch.per_rank, allow_code=allow_code)
    outcome = Outcome(model, facts, run.ledger["hook"], label, command=_command_line(), why_not_alone=_NOT_GIVEN)
    outcome = with_run(outcome, run.directory)
    if outcome.exit_code == ExitCode.LEDGER:
        raise LedgerError(outcome.reason)
    if alone is not None and (difference := footing_difference(run, alone)):
        raise ConfigError(f"alone_runs=[...], {model}: {difference}")
    return replace(outcome, alone=alone)


def _read_alone(directories: Sequence[str]) -> dict[str, RunRecord]:
    records = [read_run(Path(directory)) for directory in directories]
    by_model = {model_of(record): record for record in records}
    require(len(by_model) == len(records), "alone_runs=[...] holds a model more than once: keep one run of each.")
    return by_model


def model_of(record: RunRecord) -> str:
    """Return a run's model as a spec: its name and what its metaparameters add to it."""
    assert record.global_batch  # else refused: no model of ours
    told = record.config.get("model") or {}
    name, metaparameters = told.get("name") or record.ledger["model"], told.get("metaparameters") or {}
    zoo.check(name, metaparameters)
    return zoo.format_spec(name, metaparameters)
