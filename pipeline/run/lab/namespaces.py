"""Linux namespaces for this process and its children: networks, mounts, processes that end when this process ends.

1. A namespace lives as long as a process is in it. Each one made here is kept by a child of its own that waits for its
   standard input to end. Only this process holds the other end, so it ends with this process, however that ends.
2. The process that keeps the process table is its number 1: when it goes, the kernel kills whatever is still there,
   daemons included. Where no such table can be had, a process that waits in the same way kills them instead.
3. Without root the namespaces belong to a user namespace in which this user is root and no other user exists.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.core.errors import ConfigError
from pipeline.core.processes import our_module

# <linux/sched.h>
CLONE_NEWNS = 0x00020000  # mounts
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
# Of the namespace of the process that opens it: interfaces made later say nothing of themselves in IPv6.
NO_IPV6 = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
REMEDY = (
    "run it as root, or let ordinary users make user namespaces (sysctl user.max_user_namespaces=10000 and, where they"
    " exist, kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0); a container must"
    " be started with --privileged"
)
# Options of unshare(1): mounts of its own with a /proc of its own; what the machine mounts later is seen too.
OWN_PROC = ("--mount", "--propagation=slave", "--mount-proc")

Keeper = subprocess.Popen[bytes]
_moved: list[int] = []  # this process's id, once it has a network of its own


def enter_network() -> None:
    """Give this process an empty network and mounts of its own, for good; through a user namespace if it is not root.

    Mounts made here are invisible outside; those that the machine makes later are seen here too. Must be called while
    there is one thread.

    Raises:
        ConfigError: The kernel does not let this user, or it has happened already: a second process table is refused.
    """
    if os.getpid() in _moved:
        raise ConfigError("One process makes one lab: run the command once per value, instead of --multirun.")
    user, group = os.geteuid(), os.getegid()
    try:
        _unshare(CLONE_NEWNET | CLONE_NEWNS)
    except PermissionError:
        try:
            _unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS)
            Path("/proc/self/setgroups").write_text("deny")  # else the kernel refuses the next but one
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        except OSError as error:
            raise _refused(error) from error
    except OSError as error:
        raise _refused(error) from error
    _moved.append(os.getpid())
    _mount("--make-rslave", "/")
    _quieten_ipv6()


def replace_file(path: Path, text: str) -> None:
    """Let `path`, which must exist, hold `text` for this process and its children. Nothing is written to any disk.

    Must be called after `enter_network`.
    """
    passage = Path("/tmp")  # any directory: for a moment a file system in memory lies over it, for this process alone
    _mount("-t", "tmpfs", "tmpfs", str(passage))
    (passage / "file").write_text(text)
    _mount("--bind", str(passage / "file"), str(path))
    subprocess.run(["umount", str(passage)], check=True)


def keep_network() -> Keeper:
    """Make a network namespace: /proc/<its keeper's pid>/ns/net. `release` ends it.

    Returns:
        The process that keeps it.

    Raises:
        ConfigError: The kernel does not allow one more.
    """

    def prepare() -> None:
        _unshare(CLONE_NEWNET)
        _quieten_ipv6()

    try:
        return _keeper(prepare)
    except (OSError, subprocess.SubprocessError) as error:
        raise _refused(error) from error


def enter_processes() -> Keeper | None:
    """Give children that are started from now on a process table of their own, until `release`. Once per process.

    This process stays where it is and sees them under its own numbers. Each should be started through `unshare` with
    OWN_PROC, so that its /proc is that table. None where the kernel allows no such table or no /proc for it, as in most
    containers: `sweep_after` is for them.
    """
    # Tried out in a child first: a process that has asked for a table whose number 1 has died can start no child again.
    command = ["unshare", "--pid", "--fork", *OWN_PROC, "true"]
    if subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode != 0:
        return None
    _unshare(CLONE_NEWPID)
    # Orphans become number 1's children. The kernel collects the children of a process that ignores this signal.
    return _keeper(lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))


def sweep_after(networks: Sequence[Keeper]) -> Keeper:
    """Have all processes in these network namespaces killed at `release`, or when this process has ended."""
    descriptors = [os.open(f"/proc/{network.pid}/ns/net", os.O_RDONLY) for network in networks]
    try:
        return _keeper(None, [*our_module("pipeline.run.lab.reaper"), *map(str, descriptors)], descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def release(keeper: Keeper) -> None:
    """End a keeper, and with the last process in it its namespace. Returns when that has happened."""
    assert keeper.stdin is not None
    keeper.stdin.close()
    keeper.wait()


def _keeper(
    prepare: Callable[[], object] | None, command: Sequence[str] = ("cat",), descriptors: Sequence[int] = ()
) -> Keeper:
    # A process group of its own: Ctrl-C is not for it.
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=prepare,
        pass_fds=descriptors,
    )


def _unshare(flags: int) -> None:
    """Call unshare(2), which Python has from 3.12 on."""
    if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise _refused(" ".join(done.stderr.split()))


def _quieten_ipv6() -> None:
    # Where there is no IPv6, or /proc/sys is read-only: a few packets more that nobody sent.
    with contextlib.suppress(OSError):
        NO_IPV6.write_text("1")


def _refused(why: object) -> ConfigError:
    return ConfigError(f"This kernel does not let you make network namespaces ({why}): {REMEDY}.")
