"""Variants of a training on several seeds, one report: what each costs on the wire and what it reaches.

    python -m pipeline.study study=strategies data.root=shards/cifar10
    python -m pipeline.study study=models data.root=shards/cifar10 study.budget.epochs=4 study.seeds=[0]

A study is a file of conf/study/. Stopped in any way, the same command goes on where it was. Left in
`<run_root>/<name>/`: study.json and .csv, its pictures as .png and .svg, report.html, and each variant's runs.
"""

import sys

from pipeline.config.study import StudyConfig
from pipeline.core.cli import run_command
from pipeline.core.errors import LedgerError


def study(config: StudyConfig) -> int:
    """Make the runs that are missing, then write the report. Returns the exit code."""
    from pipeline.core.terminal import Terminal
    from pipeline.reporting.study import study_sentence, terminal_table, write_study
    from pipeline.studying.plan import make_plan
    from pipeline.studying.records import owned
    from pipeline.studying.result import study_result
    from pipeline.studying.runs import make_runs

    plan = make_plan(config)  # every fault in the study is found before the first run
    part = config.study.part
    with owned(config.directory, config.name, part):
        made = make_runs(plan)
        result = study_result(plan, made)
        report = write_study(result, config.directory) if part is None else None

    console = Terminal()
    console.print(terminal_table(result).to_rich())
    console.print(study_sentence(result), highlight=False)
    print(f"Report: {report or f'once all parts have ended, the same command without study.part={part} writes it'}")
    failed = [(name, one) for name, runs in made.items() for one in runs if one.reason]
    for name, one in failed:
        print(f"error: {name}, seed {one.seed}: {one.reason}", file=sys.stderr)
    if open_ledgers := [row["name"] for row in result["rows"] if row["ledger_closed"] is False]:
        raise LedgerError(f"The ledger does not close for {', '.join(open_ledgers)}; the report says why.")
    return failed[0][1].exit_code if failed else 0


if __name__ == "__main__":
    run_command("study", StudyConfig, study)
