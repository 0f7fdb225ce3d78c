"""Several models under the same conditions, one report: what each costs on the wire, counted from its own run.

    python -m pipeline.compare name=first models=[squeezenet1_0,squeezenet1_1,alexnet] data.root=shards/builtin
    python -m pipeline.compare name=smaller models=[alexnet] hooks=[none,bf16,powersgd] data.root=shards/builtin
    python -m pipeline.compare name=again runs=[runs/first/squeezenet1_0,runs/first/alexnet]

Left in `<run_root>/<name>/`: comparison.json and .csv, the figures comparison*.png and .svg, report.html, and each
model's run beneath it, those on one rank in alone/.
"""

import sys
from pathlib import Path

from pipeline.config.compare import CompareConfig
from pipeline.core.cli import run_command
from pipeline.core.errors import ExitCode, LedgerError


def compare(config: CompareConfig) -> int:
    """Run or read every model, then write the report. Returns the exit code."""
    from pipeline.comparison import candidates, measure, tracking
    from pipeline.comparison.result import compare_outcomes, write_files
    from pipeline.core.terminal import Terminal
    from pipeline.reporting.comparison_tables import terminal_table
    from pipeline.reporting.page import write_comparison_report
    from pipeline.reporting.runs import read_run
    from pipeline.reporting.sections import comparison_sentence

    if config.runs:
        outcomes = measure.read_outcomes(config)
    else:
        checked = candidates.check_candidates(config)  # every mistake in the command is found before the first run
        shards = candidates.shards_for(config)
        outcomes = measure.measure(config, checked, shards)
    result = compare_outcomes(outcomes, config.baseline, config.directory)

    write_files(result, config.directory)
    training_run = read_run(Path(config.training_run)) if config.training_run else None
    runs = {outcome.name: outcome.run for outcome in outcomes if outcome.run}
    report = write_comparison_report(config.directory, result, runs, training_run)

    console = Terminal()
    console.print(terminal_table(result).to_rich())
    console.print(comparison_sentence(result), highlight=False)
    print(f"Report: {report}")
    for outcome in outcomes:
        if outcome.reason:
            print(f"error: {outcome.name}: {outcome.reason}", file=sys.stderr)
    tracking.mirror_comparison(result, config.name, config.directory, config.tracking)
    if open_ledgers := [outcome.name for outcome in outcomes if outcome.exit_code == ExitCode.LEDGER]:
        raise LedgerError(f"The ledger does not close for {', '.join(open_ledgers)}; the report says why.")
    return ExitCode.DONE if runs else outcomes[0].exit_code


if __name__ == "__main__":
    run_command("compare", CompareConfig, compare)
