"""Kill every process that is in one of the given network namespaces, once standard input ends.

    python -m pipeline.run.lab.reaper FD ...

FD: descriptors of the namespaces, inherited and kept open, so that no other namespace can come to bear their numbers
meanwhile. `namespaces.sweep_after` starts it where the kernel allows no process table that would do the same.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

PAUSE_SECONDS = 0.02


def processes_in(networks: Collection[str]) -> list[int]:
    """Return the living processes in these namespaces, each as /proc/<pid>/ns/net names it: `net:[4026532255]`."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended, or another user's
            if str((directory / "ns/net").readlink()) in networks:
                found.append(int(directory.name))
    return found


def sweep(networks: Collection[str]) -> None:
    """Kill until none is left: one that is killed may just have started another."""
    while found := processes_in(networks):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    sys.stdin.read()
    sweep([str(Path(f"/proc/self/fd/{descriptor}").readlink()) for descriptor in sys.argv[1:]])
