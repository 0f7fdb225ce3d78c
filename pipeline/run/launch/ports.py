"""A TCP port for the ranks to meet at."""

import contextlib
import errno
import random
import socket
from collections.abc import Iterator

from pipeline.core.errors import ConfigError

# Below Linux's ephemeral range (32768 and up): a port the kernel would hand out may be taken by any outgoing connection
# in the seconds between our looking and rank 0 listening; here only another listener can take it.
SERVICE_PORTS = range(10_000, 30_000)
NUM_ATTEMPTS = 200


def free_port() -> int:
    """Find a port on which nothing listens now.

    Returns:
        A port of `SERVICE_PORTS`.

    Raises:
        ConfigError: None was found.
    """
    with reserved_port() as port:
        return port


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Find a free port and keep it from every other caller on the machine until the block ends.

    The reservation is a socket name in Linux's abstract namespace: it belongs to the same network namespace as the port
    itself, and the kernel drops it with its process, so nothing stale can be left.
    """
    for _ in range(NUM_ATTEMPTS):
        # SystemRandom: a seeded generator would send every run of the machine to the same port.
        port = random.SystemRandom().choice(SERVICE_PORTS)
        with socket.socket(socket.AF_UNIX) as reservation:
            try:
                reservation.bind(f"\0squeezewire-port-{port}")
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue  # another caller's; any other error: no such namespace here (not Linux), go without
            if is_free(port):
                yield port
                return
    raise ConfigError(
        f"No free TCP port between {SERVICE_PORTS.start} and {SERVICE_PORTS.stop - 1} in {NUM_ATTEMPTS} tries:"
        " set MASTER_PORT to one that is free."
    )


def is_free(port: int) -> bool:
    """Whether a listener could be opened on `port`, on all addresses."""
    with socket.socket(socket.AF_INET) as probe:
        # As the listener itself does: a connection in TIME_WAIT does not make a port busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
