"""What pages of Markdown hold: blocks and the command lines in them."""

import re
from collections.abc import Iterator


def fenced(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, language, body) of each fenced block."""
    for match in re.finditer(r"^```(.*)\n([\s\S]*?)^```$", text, re.MULTILINE):
        yield text[: match.start()].count("\n") + 1, match[1].strip(), match[2]


def lines_of(body: str) -> list[str]:
    """Each command line of a shell block, continuations joined."""
    joined = body.replace("\\\n", " ")
    return [part.strip() for line in joined.splitlines() for part in line.split("&&") if part.strip()]
