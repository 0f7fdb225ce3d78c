"""Several models under the same conditions, one report: what each costs on the wire, counted from its own run.

    python -m pipeline.compare name=first models=[squeezenet1_0,squeezenet1_1,alexnet] data.root=shards/builtin
    python -m pipeline.compare name=again runs=[runs/first/squeezenet1_0,runs/first/alexnet]

Left in `<run_root>/<name>/`: comparison.json, .csv, .png and .svg, report.html, and each model's run beneath it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import run_command
from pipeline.config import BatchConfig, ClusterConfig, CommConfig, CompareTrackingConfig, DataConfig, one_of, require
from pipeline.errors import ExitCode, LedgerError


@dataclass(frozen=True, kw_only=True)
class CompareLabConfig:
    """Whether each training runs on a cluster of network namespaces, as `pipeline.lab` makes one."""

    servers: int | None = None
    """Null: no; cluster.devices ranks of this machine. Else how many, and cluster.devices is not used."""
    ranks_per_server: int = 1
    bandwidth: str | None = None
    """Of each server's link: 1gbit, 100mbit. Null: as fast as the machine."""
    placement: str = "contiguous"
    offloads: bool = False


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train several models for a few steps each, under the same conditions, and compare what they send."""

    name: str = "comparison"
    """The comparison's directory under run_root."""
    run_root: str = "runs"
    models: tuple[str, ...]
    """Names of the registry, with metaparameters if you like: [squeezenet1_0,squeezenet1_0:sr=0.5,alexnet]."""
    runs: tuple[str, ...] = ()
    """Run directories already made: report on these and run nothing. Their conditions must agree."""
    training_run: str | None = None
    """A training run whose curves the report shows too. Null: the run in the comparison's own directory, if any."""
    baseline: str | None = None
    """The model the others are multiples of. Null: squeezenet1_0 if it is among the models, else the first."""
    steps: int = 10
    """Optimiser steps per model."""
    num_classes: int = 1000
    """Outputs of every classifier, whatever the shards hold: 1000 compares the models as published."""
    precision: str = "auto"
    """As trainer.precision: `auto`, `fp32`, `bf16`."""
    seed: int = 0
    data: DataConfig
    batch: BatchConfig
    cluster: ClusterConfig
    comm: CommConfig
    tracking: CompareTrackingConfig
    lab: CompareLabConfig

    def __post_init__(self) -> None:
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        require(bool(self.models or self.runs), "Nothing to compare: give models=[...] or runs=[...].")
        require(len(set(self.models)) == len(self.models), f"models={list(self.models)} names a model twice.")
        require(self.steps >= 1, f"steps={self.steps} must be at least 1.")
        require(self.num_classes >= 2, f"num_classes={self.num_classes} must be at least 2.")
        require(
            bool(self.runs) or self.num_ranks >= 2,
            "One rank alone sends nothing: give cluster.devices, or lab.servers, at least 2.",
        )
        require(self.comm.meter or bool(self.runs), "comm.meter=false leaves nothing to compare: set it to true.")

    @property
    def num_ranks(self) -> int:
        """Of each training."""
        return self.lab.servers * self.lab.ranks_per_server if self.lab.servers else self.cluster.devices

    @property
    def directory(self) -> Path:
        """Where the comparison lies."""
        return Path(self.run_root) / self.name


def compare(config: CompareConfig) -> int:
    """Run or read every model, then write the report. Returns the exit code."""
    from rich.console import Console

    from pipeline import comparison, comparison_tracking, measuring
    from pipeline.report.page import write_comparison_report
    from pipeline.report.records import read_run
    from pipeline.report.sections import comparison_sentence
    from pipeline.report.tables import comparison_table

    if config.runs:
        outcomes = measuring.read_outcomes(config)
    else:
        candidates = measuring.check_candidates(config)  # every mistake in the command is found before the first run
        shards = measuring.shards_for(config)
        outcomes = measuring.measure(config, candidates, shards)
    result = comparison.compare_outcomes(outcomes, config.baseline, config.directory)

    comparison.write_files(result, config.directory)
    training_run = read_run(Path(config.training_run)) if config.training_run else None
    runs = {outcome.model: outcome.run for outcome in outcomes if outcome.run}
    report = write_comparison_report(config.directory, result, runs, training_run)

    Console().print(comparison_table(result).to_rich(), comparison_sentence(result), highlight=False)
    print(f"Report: {report}")
    for outcome in (each for each in outcomes if each.reason):
        print(f"error: {outcome.model}: {outcome.reason}", file=sys.stderr)
    comparison_tracking.mirror_comparison(result, config.name, config.directory, config.tracking)
    if open_ledgers := [outcome.model for outcome in outcomes if outcome.exit_code == ExitCode.LEDGER]:
        raise LedgerError(f"The ledger does not close for {', '.join(open_ledgers)}; the report says why.")
    return ExitCode.DONE if runs else outcomes[0].exit_code


if __name__ == "__main__":
    from pipeline.measuring import quote_models

    run_command("compare", CompareConfig, compare, argv=quote_models(sys.argv[1:]))
