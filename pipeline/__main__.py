"""The console command: `squeezewire train name=first` is `python -m pipeline.train name=first`.

    squeezewire COMMAND key=value ...     run; COMMAND --help says what can be set
    squeezewire models [--json]           models by name: parameters, bytes, published accuracy
    squeezewire completion bash           a script by which bash completes commands, keys and choices
    squeezewire --version_text

Unlike `python -m`, it does not look for `pipeline` in the working directory, where a `pipeline.py` may lie.
"""

import ast
import inspect
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.core.cli import run_plain
from pipeline.core.errors import ConfigError
from pipeline.core.help import version_text
from pipeline.core.typed import nearest

COMMANDS = (
    "prepare",
    "train",
    "evaluate",
    "predict",
    "compare",
    "study",
    "plan",
    "export",
    "lab",
    "meter",
    "report",
    "dashboard",
    "ready",
    "requeue",
)
OWN = ("models", "completion")


def main() -> NoReturn:
    """Run the command that the first argument names, and exit with its code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"pipeline.{name}", run_name="__main__", alter_sys=True)
    run_plain(lambda _: print(_answer(name, arguments), flush=True))


def _answer(name: str, arguments: list[str]) -> str:
    match [name, *arguments]:
        case ["-h" | "--help"]:
            return usage()
        case ["--version"]:
            return version_text()
        case ["models"] | ["models", "--json"]:
            from pipeline.models.listing import as_json, as_table, list_models

            return (as_json if arguments else as_table)(list_models())
        case ["completion", "bash"]:
            from pipeline.config.registry import register
            from pipeline.core.completion import bash_script

            register()  # the models are choices, too
            return bash_script({command: _configuration(command) for command in COMMANDS}, OWN)
        case _:
            known = [*COMMANDS, *OWN]
            what = f"{name!r} is no command.{nearest(name, known)}" if name not in OWN else f"{name} takes other words."
            raise ConfigError(f"{what} `squeezewire --help` lists all.")


def usage() -> str:
    """Return what `squeezewire --help` prints: how it is called, and what each command does."""
    lines = [inspect.cleandoc(__doc__ or ""), ""]
    for name in COMMANDS:
        tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text())
        lines.append(f"  {name:<10} {(ast.get_docstring(tree) or '').splitlines()[0]}")
    return "\n".join(lines)


def _configuration(command: str) -> str:
    """Return the name of a command's file in conf/: those about trainings take what `train` takes."""
    return "train" if command in ("ready", "requeue") else command


if __name__ == "__main__":
    main()
