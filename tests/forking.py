"""Processes forked from one that has imported torch: the same programs, without four seconds of imports for each.

What a test starts so is a process of its own, with arguments, environment, streams and exit code as if it had been
started by its command line; but /proc shows the command line and the environment of the process that it was forked
from. What looks there, or is about how processes are started, starts them by their command line (commands.py).
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.forked_imports"])
_settled: list[bool] = []


def started(
    script: Path, words: Sequence[object], environment: Mapping[str, str], *, log: Path, cwd: Path
) -> BaseProcess:
    """Start `python SCRIPT WORDS`.

    Args:
        script: The program.
        words: Its arguments.
        environment: All of it: nothing is inherited.
        log: Where stdout and stderr go.
        cwd: Working directory.
    """
    arguments = (str(script), list(map(str, words)), dict(environment), str(log), str(cwd))
    log.touch(mode=0o600)
    process = _FORKS.Process(target=_become, args=arguments)
    with _server_environment():
        process.start()
    return process


@contextmanager
def _server_environment() -> Iterator[None]:
    """While the first process is started, and with it the one that all are forked from: OpenMP reads its own once."""
    if _settled:
        yield
        return
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})
        _settled.append(True)


def _become(script: str, words: list[str], environment: dict[str, str], log: str, cwd: str) -> NoReturn:
    """Be `python SCRIPT WORDS` from here on."""
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(stream, number)
    sys.argv = [script, *words]
    code: int | str | None = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
