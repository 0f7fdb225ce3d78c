"""rich's console for this program: what rich itself sends to the terminal is obeyed, names in its text are escaped."""

import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from typing_extensions import override

from pipeline.core.streams import as_it_is
from pipeline.core.text import printable


class Terminal(Console):
    """A console whose text holds nothing that a terminal obeys.

    Args:
        stderr: Print there and not to stdout.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(file=as_it_is(sys.stderr if stderr else sys.stdout), stderr=stderr)

    @override
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
