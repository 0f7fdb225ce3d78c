"""What is read from NCCL's log: lines by their format in its source, as no NCCL has run here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.wire import gloo, nccl, nccl_log
from pipeline.comm.wire.nccl_sends import Condition

LOGGED_OPS = {
    "AllReduce": "all_reduce",
    "Broadcast": "broadcast",
    "Reduce": "reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
}
PREFIX = "node3:417:431 [0] NCCL INFO "
START = (
    "NCCL version 2.28.9+cuda12.9",
    "  Protocol    |" + "".join(f" {name:>14} |" for name in ("LL", "LL128", "Simple") * 2),
    " Max NThreads |" + "".join(f" {threads:14} |" for threads in (512, 640, 512, 512, 640, 256)),
    " Max NThreads |" + "".join(f" {threads:14} |" for threads in (0, 0, 640, 0, 0, 640)),
    "4 coll channels, 4 collnet channels, 0 nvls channels, 4 p2p channels, 2 p2p channels per peer",
    "Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0",
    "Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0",
)
LOG = "\n".join(PREFIX + line for line in START)


def log_line(op: str, size: int, algorithm: str, protocol: str, low: int, high: int) -> str:
    """What rank 0 logs of a collective (enqueue.cc, `scheduleCollTasksToPlan`)."""
    return f"NCCL INFO {op}: {size} Bytes -> Algo {algorithm} proto {protocol} channel{{Lo..Hi}}={{{low}..{high}}}"


@given(
    st.sampled_from(sorted(LOGGED_OPS)),
    st.integers(1, 2**40),
    st.sampled_from(nccl.ALGORITHMS),
    st.sampled_from(["LL", "LL128", "Simple"]),
    st.tuples(st.integers(0, 31), st.integers(0, 31)).map(sorted),
)
def test_a_choice_is_read_back_from_its_line(
    op: str, size: int, algorithm: str, protocol: str, channels: list[int]
) -> None:
    low, high = channels
    line = log_line(op, size, algorithm.upper(), protocol.upper(), low, high)
    expected = nccl_log.Choice(LOGGED_OPS[op], size, algorithm, protocol.lower(), high - low + 1)
    for written in (line, f"node3:417:431 [0] {line}", f"{line} cgaClusterSize 0"):
        assert list(nccl_log.read_choices(written)) == [expected]


def test_choices_are_read_in_order_among_other_lines() -> None:
    lines = (
        "node3:417:417 [0] NCCL INFO NCCL_ALGO set by environment to Ring",
        log_line("AllReduce", 60, "RING", "LL", 0, 0),
        log_line("SendRecv", 60, "RING", "LL", 0, 0),
        log_line("Broadcast", 90, "RING", "SIMPLE", 1, 2),
    )
    choices = list(nccl_log.read_choices("\n".join(lines)))
    assert [(choice.op, choice.count_bytes) for choice in choices] == [("all_reduce", 60), ("broadcast", 90)]
    for choice in choices:
        found = nccl.links(choice.op, choice.count_bytes, 4, 0, [0, 1], choice.algorithm, choice.protocol)
        assert not isinstance(found, gloo.NotDerivable)


def test_the_start_of_a_log() -> None:
    assert nccl_log.read_version(LOG) == (2, 28, 9)
    assert nccl_log.read_condition(LOG) == Condition(4, (2, 28), 256)
    assert nccl_log.read_transports(LOG) == {"NET/Socket/0"}
    assert nccl_log.read_transports(PREFIX + "Channel 00 : 1[0] -> 0[0] via SHM/direct/direct") == {"SHM/direct/direct"}
    assert nccl_log.read_refusal(LOG) is None


@pytest.mark.parametrize("missing", ["NCCL version", "Max NThreads", "coll channels"])
def test_a_log_that_does_not_say_them(missing: str) -> None:
    cut = "\n".join(line for line in LOG.splitlines() if missing not in line)
    assert nccl_log.read_condition(cut) is None


def test_a_refusal_is_quoted() -> None:
    refusal = "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 19000"
    assert nccl_log.read_refusal(f"{LOG}\nnode3:417:431 [0] init.cc:904 NCCL WARN {refusal}\n") == refusal
