"""One training of a sweep file, for slurm/train.sh: a line holds the overrides of one, in the words a shell would read.

    python -m pipeline.run.launch.sweep FILE NUMBER

Prints them for a shell's `eval`. Trainings are counted from 1; blank lines and comments are none.
"""

import re
import shlex
import sys
from pathlib import Path

from pipeline.core.errors import ConfigError, ExitCode

# All of a line but its comment: a `#` begins one where a word could begin.
_BEFORE_COMMENT = re.compile(r"""(?:\\.\#*|'[^']*'|"(?:\\.|[^"\\])*"|[^'"\\\#]|(?<=\S)\#)*(?=\#|$)""")


def read_sweep(path: Path) -> list[list[str]]:
    """Return the overrides of each training. Windows' line ends and byte order mark are taken for what they are.

    Raises:
        ConfigError: The file cannot be read, a quote is not closed, or a training has no name of its own.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"SQUEEZEWIRE_SWEEP={path} cannot be read: {error}.") from error
    trainings: list[list[str]] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            code = _BEFORE_COMMENT.match(line)
            words = shlex.split(code[0] if code else line)
        except ValueError as error:
            raise ConfigError(f"Line {number} of {path} is not what a shell could read: {error}.") from error
        names = [word for word in words if word.startswith("name=")]
        if words and not names:
            raise ConfigError(f"Line {number} of {path} gives no name=, and every training needs its own.")
        if words and names[-1] in lines:
            raise ConfigError(f"Lines {lines[names[-1]]} and {number} of {path} both give {names[-1]}: change one.")
        if words:
            lines[names[-1]] = number
            trainings.append(words)
    return trainings


def main(file: str, number: str) -> int:
    """Print one training's overrides. Returns the exit code."""
    try:
        trainings = read_sweep(Path(file))
        if not number.isdigit() or not 1 <= int(number) <= len(trainings):
            raise ConfigError(f"{file} holds {len(trainings)} trainings, and none is number {number}: see --array.")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    print(shlex.join(trainings[int(number) - 1]))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
