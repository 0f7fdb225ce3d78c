"""Pricing, attempts and the ledger of a world of one: everything that needs no second process."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.collectives import ORIGINS, PHASES, Bucket, Call, CollectiveMeter
from pipeline.comm.ddp import MeteredDDP, gradient_bytes_by_parameter, rebuild_buckets
from pipeline.comm.ledger.attempts import Attempt, measured_totals, predicted_totals
from pipeline.comm.ledger.document import Conditions
from pipeline.comm.ledger.ledger import Ledger
from pipeline.comm.ledger.measured import InterfaceRow, Measured, Row
from pipeline.comm.ledger.traffic import Placement, Sent, StepTraffic, price
from pipeline.comm.step_times import BucketTimes, MedianTimes
from pipeline.comm.timeline import Timeline
from pipeline.core.errors import LedgerError
from pipeline.core.missing import Missing
from pipeline.core.schemas.ledger import LedgerJson
from tests.json_shape import mismatches

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
    assert isinstance(both.sent, Sent) and isinstance(first.sent, Sent) and isinstance(second.sent, Sent)
    assert both.sent == first.sent + second.sent
    assert both.sent - second.sent == first.sent
    assert sum(both.sent.egress_per_server) == sum(both.sent.bytes_per_rank)  # every rank is a server


def test_one_unknown_operation_makes_the_sum_unknown() -> None:
    priced = price(
        Counter({all_reduce(400): 1, Call("train", "other", "all_to_all_single", 8, 4, -1): 1}), three, "gloo"
    )
    assert priced.payload_bytes == 408
    assert isinstance(priced.sent, Missing)
    assert "all_to_all_single" in priced.sent.reason


def test_unknown_values_are_left_out_of_the_metrics() -> None:
    assert StepTraffic(8, 8, None, None, None).metrics() == {"comm/gradient_bytes": 8, "comm/payload_bytes": 8}


def test_metrics_are_mean_over_ranks_and_busiest_server() -> None:
    metrics = StepTraffic(4, 8, (100, 300), (50, 70), 3_000_000_000).metrics()
    assert metrics["comm/transport_bytes"] == 200
    assert metrics["comm/server_egress_bytes"] == 70
    assert metrics["comm/total_gigabytes"] == 3


# --- attempts ---


def measured_at(num_steps: int, *rows: Row) -> Measured:
    return Measured(num_steps, rows, retransmitted_bytes_per_rank=(), store_bytes_per_rank=())


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


def told(attempt: Attempt) -> Any:
    """What matters of the ledger.json an attempt left."""
    lost = attempt.lost_payload_bytes(is_running=True)
    return {
        "attempts": [{"attempt": attempt.number, "lost_payload_bytes": None if isinstance(lost, Missing) else lost}],
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
    assert isinstance(at_checkpoint.lost_payload_bytes(is_running=False), Missing)


def test_an_attempt_that_said_its_last_word_is_complete() -> None:
    ended = Attempt(1, 0, three, "gloo", committed=Counter({all_reduce(40): 2}), complete=True)
    resumed_from = Attempt(1, 0, three, "gloo", committed=Counter({all_reduce(40): 1}))
    resumed_from.adopt_later_work(told(ended))
    assert resumed_from.complete
    assert resumed_from.lost_payload_bytes(is_running=False) == 40


def test_attempts_on_other_ranks_are_not_added() -> None:
    committed = Counter({all_reduce(400): 1})
    same = [Attempt(number, 0, three, "gloo", committed=committed) for number in (1, 2)]
    once = price(committed, three, "gloo").sent
    assert isinstance(once, Sent)
    assert predicted_totals(same) == once + once
    other = Attempt(3, 0, Placement.assumed(2), "gloo", committed=committed)
    total = predicted_totals([*same, other])
    assert isinstance(total, Missing) and "different ranks" in total.reason


def test_other_ranks_that_have_committed_nothing_yet_change_no_total() -> None:
    """A run resumed on fewer ranks or more, which compare before their first step."""
    row = Row("train", True, None, Sent((7, 8, 9), (7, 8, 9)))
    worked = Attempt(1, 0, three, "gloo", committed=Counter({all_reduce(400): 1}), measured=measured_at(1, row))
    for num_ranks in (1, 2, 4):
        resumed = Attempt(2, 1, Placement.assumed(num_ranks), "gloo", measured=measured_at(1))
        assert predicted_totals([worked, resumed]) == predicted_totals([worked])
        assert measured_totals([worked, resumed], 1, "never") == row.measured


def test_an_unmetered_attempt_makes_totals_unknown() -> None:
    attempts = [Attempt(1, 0, three, "gloo", metered=False), Attempt(2, 0, three, "gloo")]
    assert isinstance(predicted_totals(attempts), Missing)


# --- ledger.json: what is not known, and why ---


def recorded(world_size: int = 2, *, backend: str = "gloo", enabled: bool = True) -> CollectiveMeter:
    """A meter that has recorded the first step of two ranks, as it would be on rank 0."""
    meter = CollectiveMeter(enabled=enabled)
    meter.world_size, meter.backend = world_size, backend
    meter.buckets[0] = Bucket(40, ("weight",))
    record_step(meter)
    return meter


def record_step(meter: CollectiveMeter) -> None:
    if meter.enabled:
        meter._counts[all_reduce(40)] += 1
        meter._gradient_bytes += 40


def make_ledger(meter: CollectiveMeter, *, attempt: int = 1, placement: Placement | None = None) -> Ledger:
    placement = placement or Placement.assumed(meter.world_size)
    return Ledger(meter, {"conv.weight": 40}, placement=placement, attempt=attempt, rank=0, reconciler=None)


def write(ledger: Ledger, conditions: Conditions = CONDITIONS, *, ended: bool = False) -> LedgerJson:
    """What `ledger.json` says, which is what the contract says it is; each reason names a null."""
    content = ledger.to_json(conditions, ended=ended)
    assert mismatches(content, LedgerJson) == []
    assert json.loads(json.dumps(content)) == content
    for path in content["null_reasons"]:
        assert value_at(content, path) is None, path
    return content


def value_at(tree: Any, path: str) -> Any:
    """The value under a dotted path, as `null_reasons` names it."""
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


UNMEASURED = {
    *("closed", "transport.measured_bytes_per_rank", "transport.retransmitted_bytes_per_rank"),
    *("transport.residual_bytes_per_rank", "servers.measured_egress_bytes", "servers.counter", "servers.interface"),
    *("servers.residual_fraction", "attempts.0.measured"),
}
UNPREDICTED = {"transport.predicted_bytes_per_rank", "servers.predicted_egress_bytes"}
UNTIMED = {
    *(f"time.{name}_seconds" for name in ("forward", "backward", "communication", "exposed", "overlapped")),
    *("time.bus_bandwidth_bytes_per_second", "time.step_seconds.p90", "time.data_wait_seconds"),
    *(f"buckets.0.{name}_seconds" for name in ("ready", "sent", "done")),
}
NO_STEP = {f"per_step.{name}" for name in ("payload_bytes", "transport_bytes_per_rank", "server_egress_bytes", "calls")}
ALWAYS = {"meter_overhead_fraction"}


def test_before_the_first_step() -> None:
    content = write(make_ledger(recorded()))
    reasons = content["null_reasons"]
    assert reasons.keys() == UNMEASURED | UNTIMED | NO_STEP | ALWAYS | {"attempts.0.lost_payload_bytes"}
    assert reasons["attempts.0.lost_payload_bytes"] == "This attempt is still running."
    assert reasons["time.forward_seconds"] == CONDITIONS.why_untimed
    assert content["transport"]["predicted_bytes_per_rank"] == [0, 0]


def test_without_a_kernel_that_counts() -> None:
    ledger = make_ledger(recorded())
    ledger.commit_step()
    content = write(ledger, ended=True)
    assert content["null_reasons"].keys() == UNMEASURED | UNTIMED | ALWAYS
    assert "Linux 4.19" in content["null_reasons"]["closed"]
    assert content["per_step"]["transport_bytes_per_rank"] == content["transport"]["predicted_bytes_per_rank"]
    assert content["attempts"][0]["lost_payload_bytes"] == 0


def test_with_the_meter_off() -> None:
    ledger = make_ledger(recorded(enabled=False))
    ledger.commit_step()
    content = write(ledger, ended=True)
    lost = {"attempts.0.lost_payload_bytes"}
    assert content["null_reasons"].keys() == UNMEASURED | UNPREDICTED | UNTIMED | NO_STEP | ALWAYS | lost
    assert "comm.meter=false" in content["null_reasons"]["per_step.calls"]


def test_where_the_backend_chooses_its_algorithm() -> None:
    ledger = make_ledger(recorded(backend="nccl"))
    ledger.commit_step()
    content = write(ledger, ended=True)
    unpriced = {"per_step.transport_bytes_per_rank", "per_step.server_egress_bytes", "algorithm"}
    assert content["null_reasons"].keys() == UNMEASURED | UNPREDICTED | UNTIMED | unpriced | ALWAYS
    assert "nccl chooses" in content["null_reasons"]["algorithm"]
    assert content["per_step"]["calls"] is not None and content["per_step"]["payload_bytes"] == 40


def test_a_killed_attempt_says_what_it_could_not_say() -> None:
    """Resumed from a checkpoint, without the ledger.json that the attempt left."""
    first = make_ledger(recorded())
    first.commit_step()
    second = make_ledger(recorded(), attempt=2)
    second.load_state_dict(first.state_dict())
    reasons = write(second)["null_reasons"]
    assert "without a last word" in reasons["attempts.0.lost_payload_bytes"]
    assert "could compare" in reasons["attempts.0.measured"]
    assert reasons["attempts.1.lost_payload_bytes"] == "This attempt is still running."


def test_when_all_is_known() -> None:
    placement = Placement((0, 1), measured=True)
    ledger = make_ledger(recorded(), placement=placement)
    step = ledger.commit_step()
    assert step.transport_bytes_per_rank is not None and step.server_egress_bytes is not None
    sent = Sent(step.transport_bytes_per_rank, step.server_egress_bytes)
    cards = tuple(InterfaceRow(server, "eth0", True, 1000, 900, 90) for server in (0, 1))
    ledger._present.measured = Measured(1, (Row("train", True, sent, sent),), (0, 3), (5, 5), cards)
    times = MedianTimes(0.1, 0.2, 0.3, 0.4, 0.5, 1e6, {0: BucketTimes(0.1, 0.2, 0.3)})
    conditions = replace(CONDITIONS, step_seconds_p90=0.7, data_wait_seconds=0.0, communication=times)
    content = write(ledger, conditions, ended=True)
    assert content["null_reasons"].keys() == ALWAYS
    assert content["closed"] is True
    assert content["transport"]["residual_bytes_per_rank"] == [0, 0]
    assert content["transport"]["retransmitted_bytes_per_rank"] == [0, 3]
    assert content["servers"]["residual_fraction"] == [0.01, 0.01]

    record_step(ledger._meter)
    ledger.commit_step()
    later = write(ledger, conditions)
    assert later["closed"] is True and later["transport"]["measured_bytes_per_rank"] is None
    assert "after step 1" in later["null_reasons"]["transport.measured_bytes_per_rank"]


def test_cards_that_cannot_be_read_are_said_to_be() -> None:
    ledger = make_ledger(recorded(), placement=Placement((0, 1), measured=True))
    ledger.commit_step()
    sent = Sent((1, 2), (1, 2))
    ledger._present.measured = Measured(1, (Row("train", True, sent, Sent((1, 3), (1, 3))),), (0, 0), (0, 0))
    content = write(ledger)
    assert content["closed"] is False
    assert content["servers"]["measured_egress_bytes"] == [1, 3]
    for name in ("interface", "residual_fraction"):
        assert "was not read" in content["null_reasons"][f"servers.{name}"]


def test_attaching_needs_a_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        CollectiveMeter().attach()


# --- a world of one: from here on the module has a group ---


def attached() -> CollectiveMeter:
    meter = CollectiveMeter()
    meter.attach()
    return meter


def test_a_step_that_owes_no_gradients_owes_what_it_is_told() -> None:
    meter = recorded()
    meter._gradient_bytes = 0
    owed = {1: Counter({all_reduce(40): 1}), 2: Counter[Call]()}
    placement = Placement.assumed(2)
    ledger = Ledger(meter, {"w": 40}, placement=placement, attempt=1, rank=0, reconciler=None, owed=lambda at: owed[at])
    assert ledger.commit_step().payload_bytes == 40
    meter._counts[all_reduce(40)] += 2
    with pytest.raises(
        LedgerError, match=r"Step 2 owes no collective, but issued 2 all_reduce of 40 bytes .* too many"
    ):
        ledger.commit_step()


@pytest.mark.usefixtures("world_of_one")
def test_world_of_one_exchanges_nothing() -> None:
    timeline = Timeline(1)
    meter = CollectiveMeter(observers=[timeline])
    meter.attach()
    model = torch.nn.Linear(5, 3)
    ddp = MeteredDDP(model, meter=meter, timeline=timeline, hook="fp16")
    rebuild_buckets(ddp, lambda: ddp(torch.ones(2, 5)).sum(), meter)
    owed = gradient_bytes_by_parameter(model)
    ledger = Ledger(meter, owed, placement=Placement.assumed(1), attempt=1, rank=0, reconciler=None)
    images = torch.full((2, 5), 1.001)
    with meter.phase("train"):
        with timeline.backward():
            ddp(images).sum().backward()
        assert timeline.take_step() is not None
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, images.sum(0).expand(3, 5))  # neither divided nor rounded to fp16
    step = ledger.commit_step()
    assert step == StepTraffic(0, 0, (0,), (0,), 0)
    content = write(ledger, ended=True)
    assert content["collectives"] == []
    assert content["gradient_bytes"] == 4 * (5 * 3 + 3)  # what it would owe with company
    assert content["closed"] is None
    assert "one" in content["null_reasons"]["closed"]
    timed = write(ledger, replace(CONDITIONS, communication=timeline.medians()))
    (bucket,) = timed["buckets"]
    assert bucket["bytes"] == content["gradient_bytes"]
    assert (bucket["ready_seconds"] or 0) > 0 and (timed["time"]["backward_seconds"] or 0) > 0
    assert timed["time"]["exposed_seconds"] == 0
    assert "one" in timed["null_reasons"]["time.bus_bandwidth_bytes_per_second"]


@pytest.mark.usefixtures("world_of_one")
def test_attempts_are_numbered_on() -> None:
    meter = attached()
    first = make_ledger(meter)
    first.commit_step()
    second = make_ledger(meter)
    second.load_state_dict(first.state_dict())
    assert (second.attempt, second.num_steps) == (2, 1)
    later = make_ledger(meter, attempt=5)  # attempts 3 and 4 left no checkpoint
    later.load_state_dict(second.state_dict())
    content = write(later)
    assert [attempt["attempt"] for attempt in content["attempts"]] == [1, 2, 3, 4, 5]
    assert content["null_reasons"]["attempts.4.lost_payload_bytes"] == "This attempt is still running."


@pytest.mark.usefixtures("world_of_one")
def test_state_of_another_version_is_refused() -> None:
    ledger = make_ledger(attached())
    state = ledger.state_dict()
    state["version"] = 99
    with pytest.raises(LedgerError, match="version 99"):
        ledger.load_state_dict(state)


# --- the meter ---


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
