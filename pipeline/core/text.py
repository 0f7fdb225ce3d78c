"""Text at the border, where it is printed or becomes part of a page: names may hold what a terminal or a browser obeys.

A file, class, key or run may be called nearly anything. Inside, a name stays what it is; where people see it, what
would move the cursor, colour the line or turn the direction of the writing is shown as an escape, as Python writes it.
"""

import re
import shutil
import sys
import textwrap
from typing import TextIO

_LABEL = re.compile(r" *(\w[\w ]*?  +)?")
"""What a line begins with that the lines it goes on in stand clear of: blanks, and a label with two behind it."""
# Control characters but line feed and tab; marks that have no width or turn the direction; separators of lines; halves
# of surrogate pairs, by which names that are not UTF-8 come; tags.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def printable(text: str) -> str:
    r"""Return `text` with an escape (`\x1b`, `\u202e`) for each character that is obeyed and not seen."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    r"""Return what `printable` does, line feed (`\n`) and tab (`\t`) as escapes too: for a name among others."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def shortened(text: str, most: int) -> str:
    """Return `text`, at most about `most` characters of it: three quarters from its begin, one from its end."""
    if len(text) <= most:
        return text
    at_end = most // 4
    return f"{text[: most - at_end]} [... {len(text) - most:,} characters are left out ...] {text[-at_end:]}"


def fitted(text: str, stream: TextIO | None = None) -> str:
    """Return `text` for `stream`, or for stdout: on a terminal, lines are broken between words.

    It would break them anywhere. What goes on in a further line stands below its beginning. A word longer than the
    terminal is wide stays whole.
    """
    if not (stream or sys.stdout).isatty():
        return text
    columns = shutil.get_terminal_size().columns
    return "\n".join(_folded(line, columns) for line in text.split("\n"))


def _folded(line: str, columns: int) -> str:
    label = _LABEL.match(line)
    indent = 0 if label is None else label.end()
    return "\n".join(
        textwrap.wrap(
            line,
            columns,
            subsequent_indent=" " * (indent if 2 * indent < columns else 0),
            break_long_words=False,
            break_on_hyphens=False,
        )
        or [""]
    )
