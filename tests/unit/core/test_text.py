"""Names that a terminal or a browser would obey are shown as escapes, wherever they come out."""

import io
import os
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.terminal import Terminal
from pipeline.core.text import fitted, one_line, printable, shortened
from pipeline.reporting.tables import Column, make_table

EVIL = "a\x1b[2J\u202eb\u2066\x9bc"
SHOWN = r"a\x1b[2J\u202eb\u2066\x9bc"
ROOT = Path(__file__).resolve().parents[3]


@given(st.text())
def test_nothing_is_left_that_is_obeyed(text: str) -> None:
    shown = printable(text)
    assert not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in shown.replace("\n", "").replace("\t", "")
    )
    assert not any(unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
                   for c in shown)  # fmt: skip
    assert printable(shown) == shown and len(one_line(text).splitlines()) <= 1


@pytest.mark.parametrize("text", ["läufe/été", "日本　語", "עברית", "العربية", "a\tb\nc", "🙂", "x\u00a0y", r"a\x1b"])
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_lines_are_broken_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    text = "run: a sentence that is longer than it\n  the wire    4 MB sent, as predicted\n\nshort"
    assert fitted(text, io.StringIO()) == text
    terminal = Screen()
    assert fitted(text, terminal).splitlines() == [
        "run: a sentence that is longer",
        "than it",
        "  the wire    4 MB sent, as",
        "              predicted",
        "",
        "short",
    ]
    assert fitted("/a/path/that/is/longer/than/the/screen is", terminal).splitlines()[1] == "is"


def test_a_long_text_keeps_both_ends() -> None:
    assert shortened("a" * 100, 100) == "a" * 100
    cut = shortened("begin" + "x" * 10_000 + "end", 400)
    assert cut.startswith("begin") and cut.endswith("end") and "9,608 characters are left out" in cut
    assert len(cut) < 500


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_tables_and_bars_escape_names_and_nothing_of_richs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = _Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    table = make_table(EVIL[:1], [Column("name", "name"), Column("n", "n")], [{"name": EVIL, "n": 1}])
    console = Terminal()
    console.width = 200
    console.print(table.to_rich(), EVIL, highlight=False)
    assert screen.getvalue().count(SHOWN) == 2 and "\x1b[1m" in screen.getvalue()
    assert not any(mark in screen.getvalue() for mark in ("\x1b[2J", "\u202e", "\x9b"))


PROGRAM = """
import sys
from pipeline.config.dashboard import DashboardConfig
from pipeline.core.cli import run_command
from pipeline.core.errors import DataError
from pipeline.core.progress import progress_bar
from pipeline.core.streams import as_it_is

def body(config):
    with progress_bar(NAME, 2) as bar:
        bar.update(1, NAME)
        bar.print("line " + NAME)
        print("note " + NAME)
        print("warning " + NAME, file=sys.stderr)
    print("data " + NAME, file=as_it_is(sys.stdout))
    raise DataError(NAME + "\\nsecond line")

run_command("dashboard", DashboardConfig, body, argv=["name=x"])
"""


@pytest.mark.not_quick
def test_what_a_command_says_is_escaped() -> None:
    program = f"NAME = {EVIL!r}\n{PROGRAM}"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    said = ended.stdout.decode() + ended.stderr.decode()
    for line in ("line ", "note ", "warning ", "error: "):
        assert line + SHOWN in said, said
    assert rf"{SHOWN}\nsecond line" in said and f"data {EVIL}".encode() in ended.stdout
    assert ended.returncode == 3


@pytest.mark.not_quick
def test_a_bar_on_a_terminal_is_escaped() -> None:
    program = f"NAME = {EVIL!r}\n{PROGRAM}".replace("file=as_it_is(sys.stdout)", "")
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    try:
        while read := os.read(master, 65_536):
            seen += read
    except OSError:  # Linux's way of saying that nobody holds the other end
        pass
    os.close(master)
    assert child.wait(60) == 3
    said = seen.decode()
    assert "\x1b[" in said, "no bar was drawn"  # rich's own
    assert all(start + SHOWN in said for start in ("line ", "error: ", "data ")), said
    assert all(rf"{start} a\u202eb" in said for start in ("note", "warning")), said  # of these rich takes controls away
    assert not any(mark in said for mark in ("\x1b[2J", "\u202e", "\u2066", "\x9b"))
