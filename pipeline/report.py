"""The report of a run as it stands: while it trains, after it was stopped, or once it is done.

    python -m pipeline.report run=runs/first

Written into its directory as report.html, one file that holds everything: every attempt and what changed between them,
curves, the classes that are taken for one another, the worst pictures of the last validation, the ledger. A training
writes it itself, some time after its checkpoints and at its end. The directory of a comparison can be given too.
"""

from pathlib import Path

from pipeline.config.report import ReportConfig
from pipeline.core.cli import run_command
from pipeline.core.errors import ConfigError, ExitCode


def report(config: ReportConfig) -> int:
    """Write the page; returns the exit code."""
    from pipeline.reporting.page import write_report

    directory = Path(config.run)
    try:
        path = write_report(directory)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {directory / 'report.html'} ({error.strerror or error}): make the directory writable, or"
            " copy the run to a place that is, and give that as run=."
        ) from error
    print(f"The report: {path}")
    return ExitCode.DONE


if __name__ == "__main__":
    run_command("report", ReportConfig, report)
