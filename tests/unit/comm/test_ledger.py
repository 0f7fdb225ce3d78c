"""Pricing, attempts and the ledger of a world of one: everything that needs no second process."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.collectives import ORIGINS, PHASES, Call, CollectiveMeter
from pipeline.comm.ledger.attempts import Attempt, predicted_totals
from pipeline.comm.ledger.ledger import Conditions, Ledger
from pipeline.comm.ledger.traffic import Placement, StepTraffic, price
from pipeline.comm.strategy import MeteredDDP, gradient_bytes_by_parameter, rebuild_buckets
from pipeline.core.errors import LedgerError

CONDITIONS = Conditions(run="one", model="linear", hook="none", global_batch=4, step_seconds_p50=0.5)

calls = st.builds(
    Call,
    phase=st.sampled_from(PHASES),
    origin=st.sampled_from(ORIGINS),
    op=st.sampled_from(["all_reduce", "all_gather", "barrier"]),
    payload_bytes=st.integers(0, 10_000).map(lambda elements: 4 * elements),
    itemsize=st.just(4),
    root=st.just(-1),
)
counters = st.dictionaries(calls, st.integers(1, 9), max_size=5).map(Counter)
three = Placement.assumed(3)


def all_reduce(payload_bytes: int, phase: str = "train", origin: str = "gradients") -> Call:
    return Call(phase, origin, "all_reduce", payload_bytes, 4, -1)


# --- placement and price ---


def test_hosts_become_servers_in_order_of_appearance() -> None:
    placement = Placement.of_hosts(["node7", "node7", "node2", "node7"])
    assert placement.server_of_rank == (0, 0, 1, 0)
    assert (placement.num_servers, placement.world_size, placement.measured) == (2, 4, True)


@given(counters, counters)
def test_prices_add_up(one: Counter[Call], other: Counter[Call]) -> None:
    first, second, both = (price(calls, three, "gloo") for calls in (one, other, one + other))
    assert both.payload_bytes == first.payload_bytes + second.payload_bytes
    assert both.bytes_per_rank is not None and first.bytes_per_rank is not None and second.bytes_per_rank is not None
    assert list(both.bytes_per_rank) == [
        sum(pair) for pair in zip(first.bytes_per_rank, second.bytes_per_rank, strict=True)
    ]
    assert both.total_egress_bytes == sum(both.bytes_per_rank)  # every rank is a server


def test_one_unknown_operation_makes_the_sum_unknown() -> None:
    priced = price(
        Counter({all_reduce(400): 1, Call("train", "other", "all_to_all_single", 8, 4, -1): 1}), three, "gloo"
    )
    assert priced.bytes_per_rank is None
    assert priced.payload_bytes == 408
    assert "all_to_all_single" in str(priced.reason)


def test_unknown_values_are_left_out_of_the_metrics() -> None:
    assert StepTraffic(8, 8, None, None, None).metrics() == {"comm/gradient_bytes": 8, "comm/payload_bytes": 8}


def test_metrics_are_mean_over_ranks_and_busiest_server() -> None:
    metrics = StepTraffic(4, 8, (100, 300), (50, 70), 3_000_000_000).metrics()
    assert metrics["comm/transport_bytes"] == 200
    assert metrics["comm/server_egress_bytes"] == 70
    assert metrics["comm/total_gigabytes"] == 3


# --- attempts ---


@given(counters, counters, counters, st.booleans())
def test_an_attempt_survives_the_checkpoint(
    committed: Counter[Call], outside: Counter[Call], open_train: Counter[Call], complete: bool
) -> None:
    attempt = Attempt(
        2,
        10,
        Placement((0, 0, 1), True),
        "gloo",
        committed=committed,
        outside=outside,
        open_train=open_train,
        complete=complete,
    )
    assert Attempt.unpack(json.loads(json.dumps(attempt.pack()))) == attempt


def told(attempt: Attempt) -> dict[str, Any]:
    """What matters of the ledger.json an attempt left."""
    return {
        "attempts": [{"attempt": attempt.number, "lost_payload_bytes": attempt.lost_payload_bytes()}],
        "collectives": list(attempt.rows()),
    }


@given(counters, counters)
def test_work_after_the_checkpoint_is_lost_but_listed(checkpointed: Counter[Call], after: Counter[Call]) -> None:
    at_checkpoint = Attempt(1, 0, three, "gloo", committed=Counter(checkpointed))
    at_the_end = Attempt(1, 0, three, "gloo", committed=checkpointed + after)
    at_checkpoint.adopt_later_work(told(at_the_end))
    rows = list(at_checkpoint.rows())
    assert sum(row["num_calls"] for row in rows) == sum((checkpointed + after).values())
    lost = sum(row["num_calls"] for row in rows if not row["committed"])
    assert lost == sum(count for call, count in after.items() if call.phase == "train")
    assert not at_checkpoint.complete
    assert at_checkpoint.lost_payload_bytes() is None


def test_an_attempt_that_said_its_last_word_is_complete() -> None:
    ended = Attempt(1, 0, three, "gloo", committed=Counter({all_reduce(40): 2}), complete=True)
    resumed_from = Attempt(1, 0, three, "gloo", committed=Counter({all_reduce(40): 1}))
    resumed_from.adopt_later_work(told(ended))
    assert resumed_from.complete
    assert resumed_from.lost_payload_bytes() == 40


def test_attempts_on_other_ranks_are_not_added() -> None:
    committed = Counter({all_reduce(400): 1})
    same = [Attempt(number, 0, three, "gloo", committed=committed) for number in (1, 2)]
    per_rank, _, reason = predicted_totals(same)
    assert reason is None
    assert per_rank == [2 * size for size in price(committed, three, "gloo").bytes_per_rank or ()]
    other = Attempt(3, 0, Placement.assumed(2), "gloo", committed=committed)
    per_rank, per_server, reason = predicted_totals([*same, other])
    assert per_rank is None and per_server is None
    assert reason is not None


def test_an_unmetered_attempt_makes_totals_unknown() -> None:
    attempts = [Attempt(1, 0, three, "gloo", metered=False), Attempt(2, 0, three, "gloo")]
    assert predicted_totals(attempts)[0] is None


# --- a world of one ---


@pytest.fixture
def world_of_one() -> Iterator[None]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
def test_world_of_one_exchanges_nothing() -> None:
    meter = CollectiveMeter()
    meter.attach()
    model = torch.nn.Linear(5, 3)
    ddp = MeteredDDP(model, meter=meter, hook="fp16")
    rebuild_buckets(ddp, lambda: ddp(torch.ones(2, 5)).sum(), meter)
    ledger = Ledger(meter, gradient_bytes_by_parameter(model))
    with meter.phase("train"):
        ddp(torch.ones(2, 5)).sum().backward()
    step = ledger.commit_step()
    assert step == StepTraffic(0, 0, (0,), (0,), 0)
    content = ledger.to_json(CONDITIONS, ended=True)
    assert content["collectives"] == []
    assert content["gradient_bytes"] == 4 * (5 * 3 + 3)  # what it would owe with company
    assert content["closed"] is None
    assert "one" in content["null_reasons"]["closed"]
    json.dumps(content)


@pytest.mark.usefixtures("world_of_one")
def test_attempts_are_numbered_on() -> None:
    meter = CollectiveMeter()
    meter.attach()
    first = Ledger(meter, {"weight": 12})
    first.commit_step()
    second = Ledger(meter, {"weight": 12}, attempt=1)
    second.load_state_dict(first.state_dict())
    assert (second.attempt, second.num_steps) == (2, 1)
    later = Ledger(meter, {"weight": 12}, attempt=5)  # attempts 3 and 4 left no checkpoint
    later.load_state_dict(second.state_dict())
    content = later.to_json(CONDITIONS)
    assert [attempt["attempt"] for attempt in content["attempts"]] == [1, 2, 3, 4, 5]
    assert content["null_reasons"]["attempts.4.lost_payload_bytes"] == "This attempt is still running."


@pytest.mark.usefixtures("world_of_one")
def test_state_of_another_version_is_refused() -> None:
    meter = CollectiveMeter()
    meter.attach()
    ledger = Ledger(meter, {"weight": 12})
    with pytest.raises(LedgerError, match="version 99"):
        ledger.load_state_dict({**ledger.state_dict(), "version": 99})


# --- the meter ---


def test_attaching_needs_a_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        CollectiveMeter().attach()


def test_phases_nest_and_return() -> None:
    meter = CollectiveMeter()
    with meter.phase("train"):
        with pytest.raises(KeyError), meter.phase("validation"):
            raise KeyError
        assert meter.phase_name == "train"
    assert meter.phase_name == "startup"


def test_frozen_parameters_owe_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    assert gradient_bytes_by_parameter(model) == {"1.weight": 12, "1.bias": 4}
