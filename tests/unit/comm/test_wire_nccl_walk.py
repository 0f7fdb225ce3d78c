"""NCCL's formulas against its loops, walked send by send (nccl_walk.py): equal on every link, or wrong."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.wire import gloo, nccl
from pipeline.comm.wire.nccl_sends import Condition
from tests.unit.comm.nccl_walk import Task, walk

KIB, MIB = 1 << 10, 1 << 20
SQUEEZENET_BUCKETS = (2_048_000, 2_893_984)
ELEMENT_BYTES = 4
SIZES = (4, 400, 16 * KIB, 33_332, 81_920, 300_004, MIB, 5 * MIB + 4, *SQUEEZENET_BUCKETS)
WAYS = [
    *itertools.product(
        ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter"), ("ring",), ("Simple", "LL", "LL128")
    ),
    *itertools.product(("all_reduce",), ("tree",), ("Simple", "LL", "LL128")),
]
CONDITIONS = list(itertools.product((2, 3, 4, 5), (1, 2, 4), ((2, 28), (2, 30))))
NUM_CASES = len(WAYS) * len(SIZES) * len(CONDITIONS)


def derived(task: Task) -> list[dict[int, int]]:
    """Bytes of each rank to each peer by the formulas."""
    payload_bytes = task.count * task.size * (task.num_ranks if task.func == "reduce_scatter" else 1)
    condition = Condition(task.num_channels, task.version, task.simple_ring_threads)
    found = nccl.links(
        task.func,
        payload_bytes,
        task.size,
        task.root,
        range(task.num_ranks),
        task.algorithm,
        task.protocol,
        condition,
    )
    assert not isinstance(found, gloo.NotDerivable), found
    sent: list[dict[int, int]] = [{} for _ in range(task.num_ranks)]
    for (source, destination), link in found.items():
        sent[source][destination] = link.data_bytes
    return sent


def tasks(func: str, algorithm: str, protocol: str) -> list[Task]:
    return [
        Task(func, size_bytes // ELEMENT_BYTES, ELEMENT_BYTES, num_ranks, algorithm, protocol, num_channels, version)
        for size_bytes in SIZES
        for num_ranks, num_channels, version in CONDITIONS
    ]


@pytest.mark.parametrize(("func", "algorithm", "protocol"), WAYS)
def test_formulas_equal_the_loops(func: str, algorithm: str, protocol: str) -> None:
    cases = tasks(func, algorithm, protocol)
    wrong = [task for task in cases if derived(task) != walk(task)]
    assert not wrong, f"{len(wrong)} of {len(cases)}, such as {wrong[0]}"


def test_there_are_enough_cases() -> None:
    assert NUM_CASES >= 2000


@given(
    st.sampled_from(WAYS),
    st.one_of(st.integers(1, 3000), st.integers(3000, 2_000_000)),
    st.sampled_from((1, 2, 4, 8)),
    st.integers(2, 5),
    st.integers(1, 9),
    st.sampled_from(((2, 28), (2, 29), (2, 30))),
    st.sampled_from((256, 512)),
    st.integers(0, 4),
)
def test_formulas_equal_the_loops_anywhere(
    way: tuple[str, str, str],
    elements: int,
    element_bytes: int,
    num_ranks: int,
    num_channels: int,
    version: tuple[int, int],
    threads: int,
    root: int,
) -> None:
    task = Task(way[0], elements, element_bytes, num_ranks, *way[1:], num_channels, version, threads, root % num_ranks)
    assert derived(task) == walk(task)


@pytest.mark.parametrize(
    ("protocol", "bucket_bytes", "barrier_bytes"),
    [("Simple", 4_942_016, 20), ("LL128", 5_275_688, 2056), ("LL", 9_884_584, 24)],
)
def test_known_values(protocol: str, bucket_bytes: int, barrier_bytes: int) -> None:
    """SqueezeNet 1.1's two buckets, and a barrier, on two ranks and one channel: each rank's bytes to the other."""
    buckets = [Task("all_reduce", size // 4, 4, 2, "ring", protocol, 1, (2, 28)) for size in SQUEEZENET_BUCKETS]
    for rank in (0, 1):
        assert sum(derived(task)[rank][1 - rank] for task in buckets) == bucket_bytes
        assert sum(walk(task)[rank][1 - rank] for task in buckets) == bucket_bytes
    barrier = nccl.links("barrier", 0, 4, -1, [0, 1], "ring", protocol)
    assert not isinstance(barrier, gloo.NotDerivable)
    assert gloo.sent_bytes_per_rank(barrier, 2) == [barrier_bytes] * 2
