"""Which connections are the job's, what every phase sent, and what becomes of the counts of a run cut short."""

import struct
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.collectives import Call
from pipeline.comm.kernel.sockets import parse_tcp_info
from pipeline.comm.ledger.attempts import Attempt
from pipeline.comm.ledger.reconcile import Measured, Row, lay_side_by_side, match, unexplained_table
from pipeline.comm.ledger.traffic import Placement


def connection(local: tuple[str, int], remote: tuple[str, int], store: bool = False, **by_label: int) -> dict:
    return {
        "local": list(local),
        "remote": list(remote),
        "store": store,
        "by_label": by_label,
        "retransmitted_bytes": 1,
        "on_wire_bytes": sum(by_label.values()) + 1,
        "segment_header_bytes": 66,
    }


def two_ranks(sent: int = 1000, foreign: int = 5_000_000) -> list[dict]:
    """Rank 0 and 1 joined by one connection; rank 0 also loads data and keeps the store."""
    a, b = ("10.0.0.1", 4000), ("10.0.0.2", 5000)
    card = {"name": "eth0", "segmentation_offload": False, "tx_bytes": 1367, "tx_packets": 1}
    return [
        {
            "connections": [
                connection(a, b, train=sent, startup=8),
                connection(("10.0.0.1", 4001), ("93.1.1.1", 443), train=foreign),
                connection(("10.0.0.1", 29500), ("10.0.0.2", 7000), store=True, startup=300),
            ],
            "interface": card,
        },
        {
            "connections": [
                connection(b, a, train=sent, startup=8),
                connection(("10.0.0.2", 7000), ("10.0.0.1", 29500), store=True, startup=300),
            ],
            "interface": None,
        },
    ]


def predicted(per_rank: int) -> Attempt:
    """An attempt that owes what a 4-byte all-reduce owes, once in start-up, and `per_rank` training calls."""
    call = Call("train", "gradients", "all_reduce", 4, 4, -1)
    return Attempt(1, 0, Placement.assumed(2), "gloo", committed=Counter({call: per_rank}))


def test_only_connections_between_ranks_are_the_jobs() -> None:
    assert match(two_ranks()) == {(0, 0): 1, (1, 0): 0}


def test_side_by_side_foreign_traffic_is_left_out_and_the_store_has_its_own_row() -> None:
    attempt = predicted(3)
    measured = lay_side_by_side(two_ranks(), attempt.predictions(), attempt.placement, num_steps=3)
    assert [(row.phase, row.measured_bytes_per_rank) for row in measured.rows] == [
        ("startup", [8, 8]),
        ("train", [1000, 1000]),
    ]
    assert measured.store_bytes_per_rank == [300, 300]
    assert measured.retransmitted_bytes_per_rank == [1, 1]
    assert measured.closed is False
    table = unexplained_table(measured.unexplained)
    assert table is not None and "startup" in table and "+8" in table


def test_the_card_is_explained_by_the_connections_that_leave_the_server() -> None:
    attempt = predicted(3)
    (card,) = lay_side_by_side(two_ranks(), attempt.predictions(), attempt.placement, 3).interfaces
    assert (card.tcp_bytes, card.header_bytes) == (1009 + 301, 66)
    assert card.residual_fraction == (1367 - 1310 - 66) / 1367


def test_ranks_on_one_server_send_nothing_out_of_it() -> None:
    one_server = Placement((0, 0), measured=True)
    attempt = Attempt(1, 0, one_server, "gloo")
    measured = lay_side_by_side(two_ranks(), attempt.predictions(), one_server, 3)
    assert all(row.measured_egress_bytes == [0] for row in measured.rows)


def row(committed: bool, values: list[int], phase: str = "train") -> Row:
    return Row(phase, committed, values, values, values, values)


@given(kept=st.integers(0, 10**12), told=st.integers(0, 10**12), unfinished=st.integers(0, 10**9))
def test_what_came_after_the_checkpoint_is_lost_work_not_forgotten(kept: int, told: int, unfinished: int) -> None:
    later = Measured(9, [row(True, [kept + told]), row(False, [unfinished]), row(True, [7], "startup")], [0], [0])
    adopted = later.with_committed(row(True, [kept]))
    lost = adopted.row("train", False)
    assert adopted.row("train", True) == row(True, [kept])
    assert (lost.measured_bytes_per_rank if lost else [0]) == [told + unfinished]
    assert adopted.row("startup", True) == row(True, [7], "startup")
    assert Measured.from_json(adopted.to_json()) == adopted


def tcp_info(sent: int, retransmitted: int, unsent: int, segments: int, options: int) -> bytes:
    info = bytearray(232)
    info[5] = options
    struct.pack_into("I", info, 136, segments)
    struct.pack_into("I", info, 144, unsent)
    struct.pack_into("QQ", info, 200, sent, retransmitted)
    return bytes(info)


def test_bytes_are_counted_once_however_often_they_were_sent() -> None:
    counts = parse_tcp_info(tcp_info(sent=1500, retransmitted=400, unsent=70, segments=9, options=1))
    assert counts is not None
    assert (counts.sent_bytes, counts.retransmitted_bytes, counts.unsent_bytes) == (1170, 400, 70)
    assert (counts.segments, counts.has_timestamps) == (9, True)


def test_a_kernel_that_counts_no_bytes_is_told_from_one_that_counted_none() -> None:
    assert parse_tcp_info(bytes(192)) is None
    assert parse_tcp_info(bytes(232)) is not None
