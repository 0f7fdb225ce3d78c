"""What every command has in common: Hydra composition, typed configuration, help, and exit codes.

python -m pipeline.COMMAND key=value ...     run
python -m pipeline.COMMAND --help            what can be set
python -m pipeline.COMMAND --cfg job         the composed configuration (as any Hydra application; also --multirun)
"""

import contextlib
import os
import re
import shlex
import stat
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar

from pipeline.core import gate
from pipeline.core.errors import ConfigError, ExitCode, PeerLost, Preempted, UserError
from pipeline.core.exits import code_of, leave, leave_cause, rank
from pipeline.core.groups import CONF_DIRECTORY, check_choice, config_groups
from pipeline.core.help import help_text, version_text
from pipeline.core.overrides import as_typed, literal, split_override
from pipeline.core.secrets import redacted
from pipeline.core.streams import has_lost_output
from pipeline.core.surroundings import settle_surroundings
from pipeline.core.text import fitted, one_line, printable, shortened
from pipeline.core.trees import dotted_keys, flat
from pipeline.core.typed import build, is_text, leaf_hints, nearest, optional, require

T = TypeVar("T")
# A dictionary whose keys the configuration cannot know beforehand: keys below it may be added.
OPEN_KEYS = ("model.metaparameters.",)
LONGEST_VALUE_SHOWN = 200
"""Characters of a value that cannot be read which its message repeats."""
LONGEST_MESSAGE = 4000
"""Characters of an error that are printed: its begin and, for the remedy, its end."""


def run_command(
    command: str,
    schema: type[T],
    body: Callable[[T], int | None],
    *,
    argv: Sequence[str] | None = None,
    program: str | None = None,
    about: str | None = None,
) -> NoReturn:
    """Compose `conf/<command>.yaml` with the overrides, build `schema`, run `body`, exit with the documented code.

    Args:
        command: Name of the configuration.
        schema: Its dataclass.
        body: What is done; returns an exit code.
        argv: Arguments; None: those of this process.
        program: Name of the command; None: the configuration's.
        about: What `--help` says of it; None: what `schema` says.
    """

    def run(arguments: list[str]) -> int:
        if any(argument in ("-h", "--help") for argument in arguments):
            print(help_text(command, schema, arguments, program=program, about=about), flush=True)
            return ExitCode.DONE
        return _run(command, schema, body, arguments)

    run_plain(run, argv=argv)


def run_plain(body: Callable[[list[str]], int | None], *, argv: Sequence[str] | None = None) -> NoReturn:
    """Run `body` with the arguments, checked and cleaned, and exit with the documented code.

    Args:
        body: What is done; returns an exit code.
        argv: Arguments; None: those of this process.
    """
    has_lost_others = False
    try:
        notes = settle_surroundings()
    except UserError as error:
        _print_error(f"error: {error}")
        leave(int(error.exit_code))
    for note in notes if rank() in (None, "0") else ():
        print(f"note: {note}", file=sys.stderr, flush=True)
    if argv is None:  # what the ranks are started with, too
        sys.argv[1:] = _without_carriage_returns(sys.argv[1:])
    arguments = _without_carriage_returns(sys.argv[1:] if argv is None else argv)
    os.umask(os.umask(0o077) | stat.S_IWOTH)  # nothing a command leaves may be changed by everybody
    try:
        _check_arguments(arguments)
        if "--version" in arguments:
            print(version_text(), flush=True)
            code = int(ExitCode.DONE)
        else:
            code = int(body(arguments) or ExitCode.DONE)
    except UserError as error:
        text = one_line(shortened(str(error), LONGEST_MESSAGE))
        if not (isinstance(error, Preempted) and error.by_all_ranks) or rank() in (None, "0"):
            _print_error(f"{'preempted' if error.exit_code == ExitCode.PREEMPTED else 'error'}: {text}")
        code, has_lost_others = code_of(error), isinstance(error, PeerLost)
    except KeyboardInterrupt as error:
        _print_error("interrupted")
        code = code_of(error)
    except SystemExit as error:
        code = code_of(error)
    except Exception as error:
        _print_error(traceback.format_exc())
        code = code_of(error)
    if code == ExitCode.DONE and _only_tells(arguments) and has_lost_output():
        code = int(ExitCode.INTERNAL)
    leave_cause(code, has_lost_others=has_lost_others)
    leave(code)


def _run(command: str, schema: type[T], body: Callable[[T], int | None], arguments: list[str]) -> int:
    if any(argument.startswith("-") for argument in arguments):
        return _run_hydra_application(command, schema, body, arguments)
    return body(compose(command, schema, arguments)) or ExitCode.DONE


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (this command's own arguments, the command after the first `--`)."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise `ConfigError` for arguments that nothing may repeat, and that no file can hold."""
    for argument in arguments:
        if not is_text(argument):
            raise ConfigError(
                f"{argument!r} is not UTF-8, and config.yaml and the record of the command are: rename what it names"
                " (convmv does), or give a link to it with another name (ln -s)."
            )
    for argument in arguments:  # before anything, Hydra's own messages and printing included, can repeat it
        gate.refuse_argument(argument)


def _without_carriage_returns(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without what a script with Windows' line ends (CRLF) leaves at the end of its last one."""
    clean = [argument.rstrip("\r") for argument in arguments]
    if clean != list(arguments) and rank() is None:
        print("warning: carriage returns at the ends of arguments are left out: the command stands in a file with"
              " Windows' line ends (CRLF).", file=sys.stderr)  # fmt: skip
    return [argument for argument, before in zip(clean, arguments, strict=True) if argument or not before]


def _only_tells(arguments: Sequence[str]) -> bool:
    """Return whether the command line asks for nothing but printing."""
    return any(
        argument.partition("=")[0] in ("-h", "--help", "-c", "--cfg", "-i", "--info", "--version")
        for argument in arguments
    )


def _print_error(text: str) -> None:
    """Print to stderr, marked with the rank unless it is rank 0; URLs without what they may hold of secrets."""
    text = printable(redacted(text))
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more; the exit code still tells
        text = text if rank() in (None, "0") else f"[rank {rank()}] {text}"
        print(fitted(text, sys.stderr), file=sys.stderr, flush=True)


def compose(command: str, schema: type[T], overrides: Sequence[str]) -> T:
    """Return the typed configuration of `command` under `overrides` (Hydra's grammar).

    Raises:
        ConfigError: a key or a choice does not exist (the nearest is named), or a value is impossible.
    """
    return build(schema, compose_container(command, schema, overrides))


def compose_container(command: str, schema: type[Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return what `compose` types: the composed configuration in plain containers."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import (
        InterpolationResolutionError,
        MissingMandatoryValue,
        OmegaConfBaseException,
        UnsupportedInterpolationType,
    )

    require(
        CONF_DIRECTORY.is_dir(),
        f"No configuration at {CONF_DIRECTORY}: install with `pip install -e .` from the checkout.",
    )
    groups = config_groups()
    gate.watch_files()
    _check_form(overrides)
    typed, overrides = overrides, as_typed(overrides, schema)
    choices = [override for override in overrides if split_override(override)[0] in groups]
    try:
        with initialize_config_dir(str(CONF_DIRECTORY), version_base="1.3"):
            for override in choices:
                check_choice(*split_override(override), groups)
            # Composed twice: which keys there are depends on the choices of groups alone, and only when they are known
            # can a key be found wrong, or be opened; Hydra itself names no nearest key.
            base = OmegaConf.to_container(hydra_compose(command, choices))
            opened = [_open_or_check(override, base, groups) for override in overrides]
            _check_values(opened, base, schema)
            composed = hydra_compose(command, opened)
            container = _resolved(composed)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ConfigError(f"{key} is not set: add {key}=... to the command.") from error
    except (InterpolationResolutionError, UnsupportedInterpolationType, RecursionError) as error:
        key = str(getattr(error, "full_key", "") or "")
        value = next((value for name, value in map(split_override, reversed(typed)) if key in (name, "")), None)
        raise ConfigError(_one_line(error) if value is None else _no_interpolation(key, value)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    return container


def _resolved(composed: Any) -> dict[str, Any]:
    """Return a composed configuration in plain containers, what none may hold refused before and after resolving."""
    from omegaconf import OmegaConf

    gate.refuse_values(OmegaConf.to_container(composed, resolve=False))
    container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    gate.refuse_values(container, is_resolved=True)
    assert isinstance(container, dict)
    return typing.cast(dict[str, Any], container)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_form(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for an argument that is no `key=value`: as a rule, a blank stood outside of quotes."""
    for before, override in zip(["", *overrides], overrides, strict=False):
        if "=" not in override and not override.startswith("~"):
            together = (
                f" If it belongs to what stands before it, put both in quotes: {shlex.quote(f'{before} {override}')}."
            )
            raise ConfigError(f"{override!r} is not of the form key=value.{together if '=' in before else ''}")


def _check_values(overrides: Sequence[str], base: Any, schema: type[Any]) -> None:
    """Raise `ConfigError` for the first value that Hydra's grammar cannot read: of a number, a switch or a list."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError

    parser, hints = OverridesParser.create(), dict(leaf_hints(schema))
    for override in overrides:
        key, value = split_override(override)
        text: Any = value
        try:
            text = parser.parse_override(override).value()
            OmegaConf.create({"value": text if isinstance(text, str) else ""})
        except GrammarParseError as error:
            raise ConfigError(_no_interpolation(key, str(text))) from error
        except (HydraException, ValueError) as error:  # Python reads no number of thousands of digits
            hint, _ = optional(hints.get(key))
            kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a value or a [list]")
            default = flat(base).get(key)
            some = 0.1 if hint is float else 1
            example = shlex.quote(f"{key}={some if default in (None, '???') else literal(default)}")
            shown = repr(value) if len(value) < LONGEST_VALUE_SHOWN else f"{value[:LONGEST_VALUE_SHOWN]!r}..."
            raise ConfigError(f"{key}={shown} cannot be read: give {kind}, as in {example}.") from error


def _no_interpolation(key: str, value: str) -> str:
    """Say what to write for a value in which `${` names nothing."""
    return (
        f"{key}={value} cannot be read: ${{...}} stands for the value of another key, and this names none."
        f" For the text itself: {shlex.quote(f'{key}={literal(value)}')}"
    )


def _open_or_check(override: str, base: Any, groups: dict[str, tuple[str, ...]]) -> str:
    """Return the override, made an addition below an open key; `ConfigError` if its key does not exist."""
    key, _ = split_override(override)
    if key in groups or override.startswith(("+", "~")) or key.partition(".")[0] == "hydra":
        return override
    if key.startswith(OPEN_KEYS):
        return f"++{override}"
    known = set(dotted_keys(base))
    if key not in known:
        leaves = {name.rpartition(".")[2]: name for name in sorted(known)}
        guess = nearest(key, [*known, *groups])
        by_leaf = leaves.get(key.rpartition(".")[2])  # a right name in the wrong place is nearer than a similar one
        raise ConfigError(f"Unknown key {key}.{f' Did you mean {by_leaf!r}?' if by_leaf else guess}")
    return override


def _run_hydra_application(
    command: str, schema: type[T], body: Callable[[T], int | None], arguments: list[str]
) -> ExitCode | int:
    """Hand flags (--cfg, --info, --multirun, ...) to Hydra itself. No directory is ever named by the clock."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    codes: list[int] = []

    def task(configuration: Any) -> None:
        # The ranks a command starts are given its command line: this job's part of it, without Hydra's own flags.
        sys.argv = [sys.argv[0], *HydraConfig.get().overrides.task]
        container = _resolved(configuration)
        if "name" in container and (own := _of_job(swept, HydraConfig.get().overrides.task)):
            container["name"] = f"{container['name']}/{own}"
            sys.argv.append(f"name={literal(container['name'])}")  # the last one counts
        codes.append(int(body(build(schema, container)) or 0))

    is_sweep = any(argument in ("--multirun", "-m") for argument in arguments)
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    flags = [argument for argument in arguments if "=" not in argument or argument.startswith("-")]
    typed = as_typed(overrides, schema, is_sweep=is_sweep)
    swept = _swept_keys(typed) if is_sweep else frozenset[str]()
    with tempfile.TemporaryDirectory(prefix="sweep-") as sweep_directory:  # Hydra leaves a multirun.yaml there
        sys.argv = [
            f"pipeline.{command}",
            *typed,
            "hydra.run.dir=.",
            f"hydra.sweep.dir={sweep_directory}",
            "hydra.sweep.subdir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
            *flags,  # last: Hydra's parser takes overrides in one run only
        ]
        gate.refuse_flags(sys.argv[1:])
        gate.watch_files()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, and are not printed with a traceback
        try:
            hydra.main(config_path=str(CONF_DIRECTORY), config_name=command, version_base="1.3")(task)()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_one_line(error)) from error
    return next((code for code in codes if code), ExitCode.DONE)


def _swept_keys(overrides: Sequence[str]) -> frozenset[str]:
    """Return the keys that have several values under --multirun; none where the name is one of them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    keys: set[str] = set()
    for override in overrides:
        with contextlib.suppress(HydraException):  # Hydra itself will say so
            if parser.parse_override(override).is_sweep_override():
                keys.add(split_override(override)[0])
    return frozenset() if "name" in keys else frozenset(keys)


def _of_job(swept: Collection[str], overrides: Sequence[str]) -> str:
    """Return what tells one job of a sweep from the others, as a part of a name: `recipe.lr=0.1,seed=2`."""
    pairs = (split_override(override) for override in overrides)
    own = ",".join(f"{key}={value}" for key, value in pairs if key in swept)
    return re.sub(r"[^A-Za-z0-9_.+=@,-]+", "-", own.replace("'", "").replace('"', ""))
