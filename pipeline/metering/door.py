"""The two ways in: a command that is run with the meter in its processes, and a block of a program's own code."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.metering.settings import VARIABLE, Settings

if TYPE_CHECKING:
    from pipeline.metering.patches import Patches

PRIVATE = "_squeezewire_metering"
"""Name of our package in a metered program (`startup/sitecustomize.py`)."""
STARTUP = Path(__file__).parent / "startup"
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def environment_of(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a metered command. Its Pythons, and theirs, run `startup/sitecustomize.py` first.

    PYTHONPATH is what every launcher hands on to the ranks (torchrun, mpirun, srun, multiprocessing) and no command
    line has to be changed for; `python -I` and `-E` ignore it. Only that one folder is added, which holds one module:
    what a program imports stays what it was.
    """
    path = [str(STARTUP), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(path), VARIABLE: settings.encode()}


def run_metered(settings: Settings, argv: Sequence[str]) -> tuple[int, list[int]]:
    """Run a command under the meter, with our standard streams, passing signals on.

    Returns:
        The command's exit code, 128 + n where signal n ended it; and the ranks of its processes that were metered.
    """
    with tempfile.NamedTemporaryFile("r", prefix="squeezewire-meter-") as notes:
        environment = environment_of(replace(settings, notes=notes.name), os.environ)
        child = subprocess.Popen(argv, env=environment)
        before: dict[int, object] = {number: signal.signal(number, _pass_on(child)) for number in FORWARDED}
        # Ctrl-C reaches the command by itself, which decides what comes of it.
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        joined = [int(line.split()[0]) for line in notes.read().splitlines()]
    return code if code >= 0 else 128 - code, joined


def _pass_on(child: "subprocess.Popen[bytes]") -> Callable[[int, object], None]:
    def handler(number: int, frame: object) -> None:
        del frame
        child.send_signal(number)

    return handler


# --- in the program ---


entered: list["Patches"] = []
"""The meter that the environment asked for, once it is in place."""


def enter() -> None:
    """Meter this process as the environment tells. Called when it is about to make its first process group."""
    settings = Settings.given()
    if settings is None:
        return
    from pipeline.metering.patches import Patches
    from pipeline.metering.record import say

    patches = Patches(settings)
    entered.append(patches)
    try:
        patches.install()
    except Exception as error:
        patches.remove()
        say(f"nothing is metered ({type(error).__name__}: {error}).")


class Metered:
    """What a program may tell the meter: the phases of its run. Steps are recognised."""

    def __init__(self, set_phase: Callable[[str], str | None]) -> None:
        self._set_phase = set_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is exchanged inside belongs to a phase: startup, train, validation or checkpoint.

        Enter and leave it on every rank, when nothing of this rank is under way.

        Raises:
            ValueError: There is no such phase.
        """
        left = self._set_phase(name)
        try:
            yield
        finally:
            if left is not None:
                self._set_phase(left)


def _tell_outer(phase: str) -> str | None:
    """Tell a phase to the meter around the program, whose modules have another name in it."""
    outer = sys.modules.get(f"{PRIVATE}.metering.door")
    return outer.entered[-1].set_phase(phase) if outer is not None and outer.entered else None


@contextmanager
def attach(name: str, *, run_root: str | Path = "runs", placement: str = "host") -> Iterator[Metered]:
    """Meter what this process exchanges with other ranks inside the block; on every rank alike.

    Groups, modules and optimisers may be made before or inside the block, in any order. At its end, or when the default
    group is destroyed inside it, the ranks' counts are compared, and rank 0 has written `ledger.json`,
    `metrics.jsonl` and `report.html` to the run's directory. In a program under `pipeline.meter` the block has
    no run of its own: its phases are told to that one.

    Args:
        name: Name of the run.
        run_root: Directory of all runs.
        placement: `host`: servers are told apart by machine and boot; `rank`: each rank is taken as a server.

    Yields:
        What the program may tell: `with ledger.phase("validation"): ...`.

    Raises:
        ConfigError: The name cannot be one, or on rank 0 the run cannot be written.
    """
    from pipeline.config.meter import PLACEMENTS
    from pipeline.core.typed import one_of
    from pipeline.metering.patches import Patches
    from pipeline.metering.record import report_quietly, say
    from pipeline.run.directory import validate_name

    validate_name(name)
    one_of("placement", placement, PLACEMENTS)
    if Settings.given() is not None:
        say(f"{name}: pipeline.meter meters this whole program, and is told the phases of the block.")
        yield Metered(_tell_outer)
        return
    settings = Settings(name, str(Path(run_root).absolute()), placement)
    patches = Patches(settings, is_strict=True)
    patches.install()
    try:
        yield Metered(patches.set_phase)
    finally:
        patches.remove()
        if patches.session is None:
            say(f"{name}: no process group was made inside the block or before it, so nothing was metered.")
        if patches.is_writer:
            report_quietly(settings)
