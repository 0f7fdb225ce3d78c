"""Calls priced for NCCL, and the warning about ranks that are spread over servers."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.collectives import Call
from pipeline.comm.ledger.traffic import Placement, Sent, placement_warning, price
from pipeline.core.missing import Missing

SQUEEZENET_GRADIENT_BYTES = 4_941_984


def test_interleaved_ranks_are_warned_of_with_figures_and_remedy() -> None:
    warning = placement_warning(SQUEEZENET_GRADIENT_BYTES, Placement((0, 1, 0, 1), True), "gloo")
    assert warning is not None
    for part in ("servers 0, 1, 0, 1:", "14.83 MB", "7.41 MB", "srun --distribution=block", "torchrun"):
        assert part in warning


def test_of_many_ranks_the_first_are_shown() -> None:
    warning = placement_warning(SQUEEZENET_GRADIENT_BYTES, Placement((0, 1, 2) * 8, True), "gloo")
    assert warning is not None
    assert "servers 0, 1, 2, 0, 1, 2, 0, 1, ...:" in warning


@given(
    st.integers(1, 10**8).map(lambda elements: 4 * elements),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.permutations(range(5)),
)
def test_consecutive_ranks_are_not_warned_of(
    gradient_bytes: int, ranks_per_server: list[int], names: list[int]
) -> None:
    server_of_rank = tuple(names[server] for server, count in enumerate(ranks_per_server) for _ in range(count))
    placement = Placement(tuple(sorted(server_of_rank)), True)
    assert placement_warning(gradient_bytes, placement, "gloo") is None


@pytest.mark.parametrize(
    ("server_of_rank", "backend"),
    [
        ((0, 0, 0, 0), "gloo"),  # one server
        ((0, 1, 2, 3), "gloo"),  # one rank each
        ((0, 0, 1, 1), "gloo"),  # consecutive
        ((1, 1, 0, 0), "gloo"),  # consecutive, whatever the servers are called
        ((0, 1, 0, 1), "nccl"),  # it builds its rings by server
    ],
)
def test_nothing_to_mend_no_warning(server_of_rank: tuple[int, ...], backend: str) -> None:
    assert placement_warning(SQUEEZENET_GRADIENT_BYTES, Placement(server_of_rank, True), backend) is None


def test_an_assumed_placement_is_no_reason_to_warn() -> None:
    assert placement_warning(4_000_000, Placement.assumed(8), "gloo") is None


def test_nothing_owed_no_warning() -> None:
    assert placement_warning(0, Placement((0, 1, 0, 1), True), "gloo") is None


def test_nccl_is_priced_as_it_is_pinned_and_not_otherwise() -> None:
    """SqueezeNet 1.1's two buckets on two servers, ten steps: one channel, headers included."""
    step = [Call("train", "gradients", "all_reduce", size, 4, -1) for size in (2_048_000, 2_893_984)]
    calls, placement = Counter(dict.fromkeys(step, 10)), Placement((0, 1), True)
    for protocol, sent_bytes in (("simple", 4_942_016), ("ll", 9_884_584)):
        priced = price(calls, placement, "nccl", ("ring", protocol)).sent
        assert priced == Sent((10 * sent_bytes,) * 2, (10 * sent_bytes,) * 2)
    assert isinstance(price(calls, placement, "nccl").sent, Missing)
