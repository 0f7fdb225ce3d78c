"""stdout and stderr that end no work: what counts lies in files, and a log that takes no more is a pity, no failure."""

import contextlib
import io
import logging
import os
import select
import sys
from typing import Any, TextIO, cast

from typing_extensions import Buffer, override

from pipeline.core.text import printable

STDIN, STDOUT, STDERR = range(3)


def settle_streams() -> None:
    """Make stdin, stdout and stderr of this process and those it starts such that nothing printed can fail.

    A closed one becomes /dev/null: else the next file or socket to be opened had its number, and would be written into
    by whatever prints. Where a disk is full or a reader has gone, what is printed is dropped, with one warning on
    stderr; letters that the stream's encoding lacks, and what a terminal would obey, are printed as escapes. Streams
    that something else captures are left alone. Harmless the second time.
    """
    for descriptor in (STDIN, STDOUT, STDERR):
        with contextlib.suppress(OSError):
            _open_if_closed(descriptor)
    logging.raiseExceptions = False  # a library's log on a full disk would print a traceback for each of its lines
    sys.stdout = _settled(sys.stdout, sys.__stdout__, STDOUT)
    sys.stderr = _settled(sys.stderr, sys.__stderr__, STDERR)


def has_lost_output() -> bool:
    """Return whether something was printed to stdout that had a reader and was dropped."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _Output) and raw.has_lost


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: as a rule, this one
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)


def _settled(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    """Return the stream to use in place of `stream`, which Python opened on `descriptor`; None: it found it closed."""
    if stream is not None and stream is not original:
        return stream
    if isinstance(stream, io.TextIOWrapper):
        stream.flush()
        by_line = stream.line_buffering or stream.write_through
    else:
        by_line = descriptor == STDERR
    output = io.BufferedWriter(_Output(descriptor, "w", closefd=False))
    encoding = "utf-8" if stream is None else stream.encoding
    return _Text(output, encoding, errors="backslashreplace", line_buffering=by_line)


class _Text(io.TextIOWrapper):
    """Text on its way to where people read it: what would be obeyed and not seen is shown as an escape."""

    @override
    def write(self, text: str, /) -> int:
        return super().write(printable(text))

    def write_as_it_is(self, text: str, /) -> int:
        return super().write(text)


class _AsItIs:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return getattr(self._stream, "write_as_it_is", self._stream.write)(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def as_it_is(stream: TextIO) -> TextIO:
    """Return stdout or stderr without escapes: for what a terminal shall obey, and for data that a program reads."""
    return cast(TextIO, _AsItIs(stream))


class _Output(io.FileIO):
    """The bytes of a stream on their way out; what cannot be written is dropped."""

    has_lost = False

    @override
    def write(self, data: Buffer, /) -> int:
        num_bytes = memoryview(data).nbytes
        try:
            while (num_written := super().write(data)) is None:  # pyright: ignore[reportUnnecessaryComparison]
                select.select([], [self.fileno()], [])  # a pipe that somebody made non-blocking is full
        except BrokenPipeError:  # the reader has gone, as in `| head`: nothing to tell, and nobody
            return num_bytes
        except OSError as error:
            if not self.has_lost and self.fileno() == STDOUT:
                text = f"warning: stdout takes no more ({error.strerror}): what is printed is lost, the work goes on.\n"
                with contextlib.suppress(OSError):
                    os.write(STDERR, text.encode())
            self.has_lost = True
            return num_bytes
        return num_written
