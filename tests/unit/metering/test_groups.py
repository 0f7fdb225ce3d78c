"""What the members of groups recorded, added up over the world."""

from collections import Counter

import pytest

from pipeline.comm.collectives import Call
from pipeline.comm.ledger.attempts import Attempt
from pipeline.comm.ledger.traffic import Placement, Sent, price
from pipeline.core.missing import Missing
from pipeline.metering.groups import Group, backend_of, gathered, predictions, rows, server_placement

WORLD = Placement((0, 0, 1), measured=True)
GRADIENTS = Call("train", "gradients", "all_reduce", 4096, 4, -1)
OWN = Call("train", "__main__.average", "all_reduce", 400, 4, -1)


def group(name: str, ranks: tuple[int, ...], *calls: Call) -> Group:
    placement = server_placement(ranks, WORLD)
    return Group(name, ranks, Attempt(1, 0, placement, "gloo", committed=Counter(calls)))


def told(*by_rank: list[Group]) -> list[Group]:
    return gathered({rank: [one.pack() for one in groups] for rank, groups in enumerate(by_rank)}, WORLD)


def test_every_group_counts_once_and_also_those_without_rank_0() -> None:
    world, far = group("0", (0, 1, 2), GRADIENTS), group("1", (1, 2), OWN)
    every = told([world], [world, far], [world, far])
    predicted = predictions(every, WORLD)["train", True]
    whole = price(Counter([GRADIENTS]), WORLD, "gloo").sent
    pair = price(Counter([OWN]), Placement((0, 1), measured=True), "gloo").sent
    assert isinstance(whole, Sent) and isinstance(pair, Sent)
    first, second, third = whole.bytes_per_rank
    assert predicted.sent == Sent(
        (first, second + pair.bytes_per_rank[0], third + pair.bytes_per_rank[1]),
        tuple(a + b for a, b in zip(whole.egress_per_server, pair.egress_per_server, strict=True)),
    )
    assert predicted.payload_bytes == 4096  # rank 0's
    assert [row.get("group") for row in rows(every)] == [None, "ranks 1,2 (1)"]


def test_members_that_disagree_are_named_and_nothing_is_predicted_for_their_phase() -> None:
    every = told([group("0", (0, 1, 2), GRADIENTS)], [group("0", (0, 1, 2), GRADIENTS, OWN)], [])
    found = predictions(every, WORLD)
    sent = found["train", True].sent
    assert isinstance(sent, Missing) and "ranks 0 and 1 do not agree: 0 and 1 calls of all_reduce" in sent.reason
    assert found["startup", True].sent == Sent.nothing(WORLD)


def test_who_asked_is_no_disagreement() -> None:
    other = GRADIENTS._replace(origin="__main__.main")
    (one,) = told([group("0", (0, 1, 2), GRADIENTS)], [group("0", (0, 1, 2), other)], [])
    assert one.unpredicted == {}


@pytest.mark.parametrize(("config", "backend"), [("cpu:gloo,cuda:gloo", "gloo"), ("gloo", "gloo"), ("cpu:ucc", "ucc")])
def test_the_backend_is_read_from_torchs_text(config: str, backend: str) -> None:
    assert backend_of(config) == backend
