"""What NCCL's log says of a run: its version, its channels and threads, and what it chose for each collective.

The log is that of rank 0 under NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET,TUNING. Files named are those of NCCL 2.28.9
and 2.30.7.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.comm.wire.nccl_sends import Condition


@dataclass(frozen=True, slots=True)
class Choice:
    """What NCCL's log says of one collective."""

    op: str
    """Operation, as the meter names it."""
    count_bytes: int
    """As NCCL counts: one rank's input, for reduce_scatter one rank's output."""
    algorithm: str
    protocol: str
    num_channels: int


_LOG_LINE = re.compile(
    r"NCCL INFO (?P<op>\w+): *(?P<bytes>\d+) Bytes -> Algo (?P<algorithm>\w+) +proto (?P<protocol>\w+) +"
    r"channel\{Lo\.\.Hi\}=\{(?P<low>\d+)\.\.(?P<high>\d+)\}"
)
_LOGGED_OPS = {
    "AllReduce": "all_reduce",
    "Broadcast": "broadcast",
    "AllGather": "all_gather",
    "Reduce": "reduce",
    "ReduceScatter": "reduce_scatter",
}


def read_choices(log: str) -> Iterator[Choice]:
    """Yield every collective in the log of rank 0 under NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=TUNING, in order.

    Other lines are ignored (enqueue.cc, `scheduleCollTasksToPlan`, writes those that are read here).
    """
    for line in log.splitlines():
        found = _LOG_LINE.search(line)
        if found is None or found["op"] not in _LOGGED_OPS:
            continue
        yield Choice(
            _LOGGED_OPS[found["op"]],
            int(found["bytes"]),
            found["algorithm"].lower(),
            found["protocol"].lower(),
            int(found["high"]) - int(found["low"]) + 1,
        )


_VERSION = re.compile(r"NCCL version (\d+)\.(\d+)\.(\d+)")
_CHANNELS = re.compile(r"(\d+) coll channels")
_THREADS = re.compile(r"Max NThreads \|(.*)")
_SIMPLE_RING_COLUMN = 5  # the first block's columns: LL, LL128 and Simple of the tree, then of the ring
_TRANSPORT = re.compile(r"Channel \d+(?:/\d+)? : .* via (\S+)")
_REFUSAL = re.compile(r"Duplicate GPU detected.*")


def read_version(log: str) -> tuple[int, int, int] | None:
    """Return NCCL's version (init.cc, `showVersion`)."""
    found = _VERSION.search(log)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def read_condition(log: str) -> Condition | None:
    """Return version, channels and threads of the first communicator; None if the log does not say them.

    Channels are said by init.cc, `initTransportsRank`, threads by graph/tuning.cc, `ncclTopoTuneModel`.
    """
    version, channels, threads = read_version(log), _CHANNELS.search(log), _THREADS.search(log)
    if version is None or channels is None or threads is None:
        return None
    columns = [column.strip() for column in threads[1].split("|")]
    if len(columns) <= _SIMPLE_RING_COLUMN or not columns[_SIMPLE_RING_COLUMN].isdecimal():
        return None
    return Condition(int(channels[1]), version[:2], int(columns[_SIMPLE_RING_COLUMN]))


def read_transports(log: str) -> set[str]:
    """Return the transports that connections use, such as `NET/Socket/0` (transport/net.cc, p2p.cc, shm.cc)."""
    return {found[1] for found in _TRANSPORT.finditer(log)}


def read_refusal(log: str) -> str | None:
    """Return the line that says that two ranks may not share a GPU (init.cc, `initTransportsRank`)."""
    found = _REFUSAL.search(log)
    return None if found is None else found[0].strip()
