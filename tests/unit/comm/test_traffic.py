"""The warning about ranks that are spread over servers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.ledger.traffic import Placement, placement_warning

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
