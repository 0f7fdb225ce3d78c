"""The meter against torch's own recorders, call by call, in one real DDP training on two ranks."""

from functools import cache
from typing import Any

import pytest

from pipeline.comm.collectives import Call
from pipeline.comm.wire import gloo
from tests.distributed.meter_ranks import run_ranks

NUM_RANKS, NUM_STEPS = 2, 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("calls")
    return run_ranks("meter_calls_rank.py", NUM_RANKS, out, env={"TORCH_FR_BUFFER_SIZE": "2000"})


def test_the_training_had_all_that_ddp_sends(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert {"buffers", "gradients", "parameters", "other"} <= set(found["origins"])
        assert {"all_reduce", "broadcast", "all_gather", "barrier"} <= {op for op, _ in found["meter"]}
        assert found["origins"].count("gradients") == 2 * NUM_STEPS  # two buckets; nothing in micro-batches before
        assert found["counted"] == len(found["meter"]) + 1  # and a barrier before


def test_every_call_is_the_flight_recorders(ranks: list[dict[str, Any]]) -> None:
    """Operation, bytes and order."""
    for found in ranks:
        assert found["meter"] == found["flight recorder"]


def test_every_call_is_the_profilers(ranks: list[dict[str, Any]]) -> None:
    """Operation and bytes; the order as far as it is known, which is that of each of gloo's threads."""
    for found in ranks:
        threads = [[tuple(call) for call in thread] for thread in found["profiler"]]
        assert sum(map(len, threads)) == len(found["meter"])
        assert is_merged([tuple(call) for call in found["meter"]], threads)


def test_ranks_issue_the_same(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["meter"] == ranks[1]["meter"]


def test_a_sparse_all_reduce_is_counted_and_not_priced(ranks: list[dict[str, Any]]) -> None:
    """Ranks may hold other numbers of values, so one of them cannot tell."""
    call = Call(*ranks[0]["sparse"])
    assert call.op == "sparse_all_reduce"
    assert call.payload_bytes == 3 * 4 + 3 * 2 * 8  # three values and their two int64 indices
    found = gloo.links(call.op, call.payload_bytes, call.itemsize, call.root, NUM_RANKS, "gloo")
    assert isinstance(found, gloo.NotDerivable)


def test_merging_respects_order() -> None:
    """The check itself."""
    assert is_merged(["a", "b", "a", "c"], [["a", "a"], ["b", "c"]])
    assert not is_merged(["a", "b", "a", "c"], [["a", "a"], ["c", "b"]])
    assert not is_merged(["a", "b"], [["a"], ["a"]])


def is_merged(whole: list[Any], parts: list[list[Any]]) -> bool:
    """Whether `whole` is the parts put together, each in its own order."""

    @cache
    def fits(taken: tuple[int, ...]) -> bool:
        if sum(taken) == len(whole):
            return all(count == len(part) for count, part in zip(taken, parts, strict=True))
        return any(
            count < len(part)
            and part[count] == whole[sum(taken)]
            and fits((*taken[:index], count + 1, *taken[index + 1 :]))
            for index, (count, part) in enumerate(zip(taken, parts, strict=True))
        )

    return fits((0,) * len(parts))
