"""PowerSGD on real DDP over gloo, two and three ranks."""

import math
from collections import Counter
from typing import Any

import pytest

from tests.distributed.meter_ranks import run_ranks

Results = list[dict[str, Any]]
START_STEP, NUM_STEPS = 2, 6
DEAD_STEPS, LIVE_STEPS = 2, 3


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every rank found; all scenarios run in one start of the processes."""
    return run_ranks("meter_powersgd_rank.py", request.param, tmp_path_factory.mktemp("ranks"))


def test_every_all_reduce_is_of_the_gradients(ranks: Results) -> None:
    """Those that callbacks issue too: three for every bucket, once compression has begun."""
    for result in ranks:
        ledger = result["traffic"]["json"]
        num_buckets = len(ledger["buckets"])
        assert num_buckets > 2, "with fewer buckets their order is not put to the test"
        calls: Counter[tuple[str, str]] = Counter()
        for row in ledger["collectives"]:
            if row["phase"] == "train":
                calls[row["op"], row["origin"]] += row["num_calls"]
        assert calls == {("all_reduce", "gradients"): num_buckets * (START_STEP + 3 * (NUM_STEPS - START_STEP))}


def test_less_travels_than_is_owed(ranks: Results) -> None:
    ledger, steps = ranks[0]["traffic"]["json"], ranks[0]["traffic"]["steps"]
    owed = ledger["gradient_bytes"]
    assert [step["comm/gradient_bytes"] for step in steps] == [owed] * NUM_STEPS
    payloads = [step["comm/payload_bytes"] for step in steps]
    assert payloads[:START_STEP] == [owed] * START_STEP
    # Rank 2 of a 1001 x 301 and a 301 x 333 matrix (the layers' weights), and what is too small to be worth it.
    compressed = 4 * (2 * (1001 + 301) + 2 * (301 + 333) + 2 * (37 + 27) + 1001 + 301 + 37)
    assert payloads[START_STEP:] == [compressed] * (NUM_STEPS - START_STEP)


def test_all_ranks_take_the_same_step(ranks: Results) -> None:
    assert len({result["traffic"]["digest"] for result in ranks}) == 1


def test_plain_steps_are_those_of_an_uncompressed_run(ranks: Results) -> None:
    digests = ranks[0]["before_compression"]
    same = [digests[f"plain {step}"] == digests[f"powersgd {step}"] for step in range(START_STEP + 1)]
    assert same == [True] * START_STEP + [False]


def test_warm_up_passes_leave_no_trace(ranks: Results) -> None:
    for result in ranks:
        assert result["untouched_by_warm_up"]["once"] == result["untouched_by_warm_up"]["again"]


def test_a_resumed_run_is_the_unbroken_one(ranks: Results) -> None:
    for result in ranks:
        resume = result["resume"]
        assert resume["resumed"] == resume["whole"]
        assert resume["forgetful"] != resume["whole"]  # the state matters
        assert all(resume["same_state"].values())
        assert resume["errors_differ"] and resume["num_buckets"] > 2


def test_a_state_of_other_buckets_is_refused(ranks: Results) -> None:
    for result in ranks:
        assert "comm.bucket_megabytes" in result["other_buckets"]


def test_a_gradient_that_vanishes_comes_back(ranks: Results) -> None:
    """Behind dead ReLUs: nothing becomes NaN meanwhile, and the layer learns again afterwards."""
    for result in ranks:
        for lengths in result["vanished"].values():
            assert len(lengths) == 3
            for layer in lengths.values():
                dead, live = layer[: START_STEP + DEAD_STEPS], layer[START_STEP + DEAD_STEPS :]
                assert dead == [0.0] * len(dead)  # the fault fired
                assert len(live) == LIVE_STEPS and all(0 < length < math.inf for length in live)
