"""Which connections are the job's, what every phase sent, and what becomes of the counts of a run cut short."""

import json
import struct
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.collectives import Call
from pipeline.comm.kernel.report import ConnectionReport, Endpoint, InterfaceReport, RankReport
from pipeline.comm.kernel.sockets import parse_tcp_info
from pipeline.comm.ledger.attempts import Attempt
from pipeline.comm.ledger.measured import InterfaceRow, Measured, Row
from pipeline.comm.ledger.reconcile import Verdict, match, reconcile
from pipeline.comm.ledger.traffic import Placement, Sent
from pipeline.core.errors import LedgerError
from pipeline.core.schemas.ledger import MeasuredJson
from tests.json_shape import mismatches


def connection(local: Endpoint, remote: Endpoint, store: bool = False, **by_label: int) -> ConnectionReport:
    return ConnectionReport(
        local,
        remote,
        store=store,
        by_label=by_label,
        retransmitted_bytes=1,
        on_wire_bytes=sum(by_label.values()) + 1,
        segment_header_bytes=66,
    )


def two_ranks() -> list[RankReport]:
    """Rank 0 and 1 joined by one connection; rank 0 also loads data and keeps the store."""
    a, b = ("10.0.0.1", 4000), ("10.0.0.2", 5000)
    store, client = ("10.0.0.1", 29500), ("10.0.0.2", 7000)
    return [
        RankReport(
            (
                connection(a, b, train=1000, startup=8),
                connection(("10.0.0.1", 4001), ("93.1.1.1", 443), train=5_000_000),
                connection(store, client, store=True, startup=300),
            ),
            InterfaceReport("eth0", tx_bytes=1367, tx_packets=1, segmentation_offload=False),
        ),
        RankReport((connection(b, a, train=1000, startup=8), connection(client, store, store=True, startup=300)), None),
    ]


def test_reports_travel_as_text() -> None:
    for report in two_ranks():
        assert RankReport.decode(report.encode()) == report


def predicted(per_rank: int) -> Attempt:
    """An attempt that owes what a 4-byte all-reduce owes, once in start-up, and `per_rank` training calls."""
    call = Call("train", "gradients", "all_reduce", 4, 4, -1)
    return Attempt(1, 0, Placement.assumed(2), "gloo", committed=Counter({call: per_rank}))


def test_only_connections_between_ranks_are_the_jobs() -> None:
    assert match(two_ranks()) == {(0, 0): 1, (1, 0): 0}


def test_foreign_traffic_is_left_out_and_the_store_has_its_own_row() -> None:
    attempt = predicted(3)
    measured = reconcile(two_ranks(), attempt.predictions(), attempt.placement, num_steps=3)
    assert [(row.phase, row.measured.bytes_per_rank) for row in measured.rows] == [
        ("startup", (8, 8)),
        ("train", (1000, 1000)),
    ]
    assert measured.store_bytes_per_rank == (300, 300)
    assert measured.retransmitted_bytes_per_rank == (1, 1)
    assert measured.closed is False
    table = measured.unexplained_table()
    assert table is not None and "startup" in table and "+8" in table


def test_the_card_is_explained_by_the_connections_that_leave_the_server() -> None:
    attempt = predicted(3)
    (card,) = reconcile(two_ranks(), attempt.predictions(), attempt.placement, 3).interfaces
    assert (card.tcp_bytes, card.header_bytes) == (1009 + 301, 66)
    assert card.residual_fraction == (1367 - 1310 - 66) / 1367


def test_what_was_sent_again_is_a_row_of_the_card_and_selective_acknowledgements_are_bounded() -> None:
    quiet, attempt = two_ranks(), predicted(3)
    (card,) = reconcile(quiet, attempt.predictions(), attempt.placement, 3).interfaces
    assert (card.retransmitted_bytes, card.sack_bytes_at_most) == (0, 0)
    again = [replace(one, again_on_wire_bytes=7) for one in quiet[0].connections]
    disturbed = [replace(one, is_disturbed=True) for one in quiet[1].connections]
    reports = [replace(quiet[0], connections=tuple(again)), replace(quiet[1], connections=tuple(disturbed))]
    (card,) = reconcile(reports, attempt.predictions(), attempt.placement, 3).interfaces
    assert (card.retransmitted_bytes, card.sack_bytes_at_most) == (2 * 7, 28)  # to the peer and to the store; 1 packet


def test_ranks_on_one_server_send_nothing_out_of_it() -> None:
    one_server = Placement((0, 0), measured=True)
    attempt = Attempt(1, 0, one_server, "gloo")
    measured = reconcile(two_ranks(), attempt.predictions(), one_server, 3)
    assert all(row.measured.egress_per_server == (0,) for row in measured.rows)


def test_what_nothing_explains_is_refused_where_the_run_is_strict() -> None:
    Verdict(None, strict=True).refuse()
    Verdict("rank 1: +8", strict=False).refuse()
    with pytest.raises(LedgerError, match=r"rank 1: \+8(.|\n)*comm\.strict=false"):
        Verdict("rank 1: +8", strict=True).refuse()


def row(committed: bool, value: int, phase: str = "train") -> Row:
    sent = Sent((value,), (value,))
    return Row(phase, committed, sent, sent)


@given(kept=st.integers(0, 10**12), told=st.integers(0, 10**12), unfinished=st.integers(0, 10**9))
def test_what_came_after_the_checkpoint_is_lost_work_not_forgotten(kept: int, told: int, unfinished: int) -> None:
    later = Measured(9, (row(True, kept + told), row(False, unfinished), row(True, 7, "startup")), (0,), (0,))
    adopted = later.with_committed(row(True, kept))
    lost = adopted.row("train", False)
    assert adopted.row("train", True) == row(True, kept)
    assert (lost.measured if lost else Sent((0,), (0,))) == Sent((told + unfinished,), (told + unfinished,))
    assert adopted.row("startup", True) == row(True, 7, "startup")


@pytest.mark.parametrize(
    ("sent_later", "predicted", "is_explained"),
    [(30, Sent((40, 40), (0,)), True), (29, Sent((40, 40), (0,)), False), (30, None, False)],
)
def test_what_one_phase_has_too_much_another_may_lack(
    sent_later: int, predicted: Sent | None, is_explained: bool
) -> None:
    first = Row("train", True, Sent((40, 40), (0,)), Sent((10, 40), (0,)))
    later = Row("train", False, predicted, Sent((40 + sent_later, 40), (0,)))
    assert Measured(1, (first, later), (0, 0), (0, 0)).is_explained_in_sum is is_explained


def test_measurements_survive_json() -> None:
    unpredicted = Row("train", False, None, Sent((4, 5), (9,)))
    card = InterfaceRow(
        0, "eth0", None, interface_bytes=0, tcp_bytes=3, header_bytes=2, retransmitted_bytes=1, sack_bytes_at_most=28
    )
    measured = Measured(9, (row(True, 7), unpredicted), (0, 1), (2, 3), (card,))
    assert Measured.from_json(json.loads(json.dumps(measured.to_json()))) == measured
    assert mismatches(measured.to_json(), MeasuredJson) == []


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
