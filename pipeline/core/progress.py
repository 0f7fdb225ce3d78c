"""The one progress bar: on a terminal, and silence elsewhere, because log files are not terminals."""

import contextlib
import sys
from collections.abc import Generator
from dataclasses import dataclass

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.core.terminal import Terminal


@dataclass(frozen=True)
class Bar:
    """A bar under way, on stderr."""

    progress: Progress
    task: TaskID

    def update(self, num_done: int, what: str | None = None) -> None:
        """Show that `num_done` of the total are done; `what` replaces the words before the bar."""
        self.progress.update(self.task, completed=num_done, description=what)

    def describe(self, what: str) -> None:
        """Replace the words before the bar."""
        self.progress.update(self.task, description=what)

    @property
    def num_columns(self) -> int:
        """Width of the terminal in characters."""
        return self.progress.console.width

    def print(self, line: str) -> None:
        """Print a line above the bar, on stderr; printed too where no bar is shown."""
        self.progress.console.print(line, highlight=False, markup=False)


@contextlib.contextmanager
def progress_bar(what: str, total: int, *, unit: str = "items", bar_columns: int = 40) -> Generator[Bar]:
    """Show a bar while the block runs, and remove it at its end.

    Args:
        what: Words before the bar.
        total: When the work is done, in `unit`.
        unit: `items` (counted, with the time that remains), `bytes`, or `runs` (counted, with the time that passed).
        bar_columns: Width of the bar itself in characters.
    """
    console = Terminal(stderr=True)
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    clock = TimeElapsedColumn() if unit == "runs" else TimeRemainingColumn()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_columns),
        count,
        clock,
        console=console,
        disable=not console.is_terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else what is printed meanwhile would go to the terminal, not to its file
    ) as progress:
        yield Bar(progress, progress.add_task(what, total=total))
