"""Other processes of this program: the same code, whatever lies in the working directory."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from pipeline.core import errors

CODE_ROOT = Path(__file__).resolve().parents[2]


def our_module(name: str) -> list[str]:
    """Return the command that runs a module of ours, such as `pipeline.train`; its arguments follow.

    Python looks first in the working directory, where a `pipeline.py` would stand in for all of this (-P: it does not).
    In a checkout that is not installed, that is where the code is.
    """
    try:
        is_in_checkout = Path.cwd() == CODE_ROOT
    except FileNotFoundError:  # the directory was removed
        is_in_checkout = False
    return [sys.executable, *(() if is_in_checkout else ("-P",)), "-m", name]


def apart(check: Callable[[], None]) -> None:
    """Do a check that needs torch in a process of its own: the parent of the ranks stays small, and has no threads.

    Where torch is imported already, there is nothing to be kept out, and a process with threads is not to be forked.

    Raises:
        UserError: That the check raised there.
        RuntimeError: It ended otherwise; the traceback was printed.
    """
    if "torch" in sys.modules:
        check()
        return
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a parent of ranks blocks what ends it
            check()
            code = 0
        except errors.UserError as error:
            os.write(writing, json.dumps([type(error).__name__, str(error)]).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if said:
        name, message = json.loads(said)
        raise getattr(errors, name)(message)
    if status != 0:
        raise RuntimeError(f"A check before the start ended with {os.waitstatus_to_exitcode(status)}.")
