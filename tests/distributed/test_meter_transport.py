"""The wire formulas against the kernel: what gloo's sockets sent, operation by operation, to the byte."""

from pathlib import Path

import pytest

from tests.distributed.meter_ranks import run_ranks


@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_prediction_is_what_the_kernel_counted(num_ranks: int, tmp_path: Path) -> None:
    ranks = run_ranks("meter_transport_rank.py", num_ranks, tmp_path)
    if any(row["measured"] is None for rows in ranks for row in rows):
        pytest.skip("this kernel does not count the bytes of a socket (TCP_INFO is too short)")
    wrong = [(rank, row) for rank, rows in enumerate(ranks) for row in rows if row["measured"] != row["predicted"]]
    assert not wrong
    assert sum(row["measured"] for row in ranks[0]) > 0
