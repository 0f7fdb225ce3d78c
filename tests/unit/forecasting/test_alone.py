"""Forecasts without a measured network: from one rank alone, and from a model's name and its speed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.all_reduce import Host, Network
from pipeline.comm.forecast import Bucket, StepForecast
from pipeline.comm.link import MeasuredLink, parse_links
from pipeline.config.model import InputConfig, ModelConfig
from pipeline.config.plan import PlanConfig
from pipeline.core.errors import ConfigError
from pipeline.core.missing import Missing
from pipeline.forecasting.alone import MIB, estimate_source, estimate_variables, fill_buckets, owed_calls, read_alone
from pipeline.forecasting.document import forecast
from pipeline.forecasting.grid import Cluster, clusters, egress_bytes, step_on, sufficient_bandwidth
from pipeline.forecasting.source import Source, read_source
from pipeline.forecasting.sources import read_sources, with_measured_links
from pipeline.models import zoo
from pipeline.reporting.runs import read_run
from tests.making.runs import timed_run

SQUEEZENET = estimate_source(ModelConfig(name="squeezenet1_0", input=InputConfig(size=64, resize_side=64)), 100.0, 8)


def run_alone(directory: Path, **changes: Any) -> Path:
    """A run on one rank whose buckets are ready when those of `timed_run` are."""
    run = timed_run()
    for bucket in run.ledger["buckets"]:
        bucket |= {"sent_seconds": bucket["ready_seconds"], "done_seconds": bucket["ready_seconds"]}
    run.ledger["per_step"]["calls"] = []
    run.ledger["time"] |= {"exposed_seconds": 0, "communication_seconds": 0}
    run.ledger |= {"world_size": 1, "num_servers": 1, "server_of_rank": [0], "global_batch": 8} | changes
    del run.environment["lab"]
    return run.write(directory)


def told(
    source: Source, servers: int, rate: float | None, algorithm: str = "ring", per_server: int = 1
) -> StepForecast:
    found = step_on(source, Cluster(servers, per_server, Network(rate), algorithm, "none", 8, 1))
    assert isinstance(found, StepForecast), found
    return found


# --- one rank ---


@pytest.mark.parametrize("rate", [1e7, 1e8, 1e9, 1e11])
def test_it_is_the_forecast_from_two_ranks_where_these_add_nothing(tmp_path: Path, rate: float) -> None:
    pair = read_source(read_run(timed_run().write(tmp_path / "pair")), None)
    one = read_alone(read_run(run_alone(tmp_path / "one")))
    # What only ranks that meet can show: late ranks, hosts that work on bytes while they compute.
    bare = replace(pair, host=Host(0.0, 0.0), step=replace(pair.step, waiting_seconds=0.0))
    free = replace(one, host=Host(0.0, 0.0))
    assert free.step.buckets == bare.step.buckets
    for servers in (2, 3, 64):
        here, there = told(free, servers, rate), told(bare, servers, rate)
        assert here.exposed_seconds == pytest.approx(there.exposed_seconds, rel=1e-12)
        assert here.egress_bytes == there.egress_bytes


def test_small_exchanges_cost_their_rounds(tmp_path: Path) -> None:
    source = read_alone(read_run(run_alone(tmp_path / "one")), round_seconds=0.001)
    assert told(source, 1, None).exposed_seconds == 0
    assert told(source, 2, None).exposed_seconds == pytest.approx(
        0.001 * (2 + 2 + 1)
    )  # last bucket, metrics, Lightning


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"buckets": []}, "repeat it with this version"),
        ({"hook": "powersgd"}, "comm.hook=powersgd"),
        ({"global_batch": None}, "pipeline.meter"),
    ],
)
def test_a_run_that_recorded_too_little_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_alone(read_run(run_alone(tmp_path / "one", **changes)))


def test_a_run_of_an_older_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    times = {"step_seconds": {"p50": 0.2, "p90": 0.3}, "data_wait_seconds": 0.01, "forward_seconds": None}
    reasons = {"time.forward_seconds": "A world of one exchanges nothing."}
    run = read_run(run_alone(tmp_path / "one", buckets=[], time=times, null_reasons=reasons))
    with pytest.raises(ConfigError, match=r"exchanges nothing\): repeat it with this version of the program"):
        read_alone(run)


@pytest.mark.parametrize(("more", "said"), [({}, "give bandwidth="), ({"measured_bandwidth": "1gbit"}, "no link")])
def test_a_link_must_be_named(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_sources(PlanConfig(run=str(run_alone(tmp_path / "one")), **more))


@given(st.lists(st.tuples(st.floats(1, 1e14), st.floats(0.01, 1e9)), min_size=1, max_size=5))
def test_what_ready_prints_is_read_back(links: list[tuple[float, float]]) -> None:
    measured = [MeasuredLink(at, at + 1, rate, trip) for at, (rate, trip) in enumerate(links)]
    printed = "\n".join(f"ok     link           {link}" for link in measured)
    found = parse_links(f"ok     disk\n{printed}\nReady.\n")
    assert [(link.sender, link.receiver) for link in found] == [(link.sender, link.receiver) for link in measured]
    for read, link in zip(found, measured, strict=True):
        assert read.bits_per_second == pytest.approx(link.bits_per_second, rel=0.0051)
        assert read.round_trip_microseconds == pytest.approx(link.round_trip_microseconds, rel=0.0051)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1.2.3 Gbit/s, 80 us", "is no link"),
        (". Gbit/s, 80 us", "is no link"),
        ("9.41 Gbit/s, , us", "is no link"),
        ("9.41 Gbit/s, 1,2 us", "is no link"),
        ("0.00 Gbit/s, 80 us", "no rate"),
        ("9.41 Gbit/s, 0 us", "no time"),
    ],
)
def test_a_link_that_ready_did_not_print_is_refused(tmp_path: Path, line: str, said: str) -> None:
    said_at = tmp_path / "ready.txt"
    said_at.write_text(f"server 0 to 1: {line} there and back\n")
    config = PlanConfig(run=str(run_alone(tmp_path / "one")), ready=str(said_at))
    with pytest.raises(ConfigError, match=f"ready={said_at}: .*{said}"):
        with_measured_links(config)


def test_the_time_of_a_round_is_told_once() -> None:
    with pytest.raises(ConfigError, match=r"round_seconds=0\.0 beside ready=ready\.txt"):
        PlanConfig(run="runs/x", ready="ready.txt", round_seconds=0.0)


def test_links_that_ready_measured_take_the_place_of_what_is_not_known(tmp_path: Path) -> None:
    said = tmp_path / "ready.txt"
    said.write_text(
        "".join(f"ok  link  {MeasuredLink(0, 1, rate, trip)}\n" for rate, trip in ((9.41e9, 80), (14.5e6, 120)))
    )
    config = PlanConfig(run=str(run_alone(tmp_path / "one")), ready=str(said))
    found = with_measured_links(config)
    assert (found.bandwidth, found.round_seconds) == (("14500000bit",), 60e-6)
    asked = with_measured_links(replace(config, bandwidth=("25gbit",)))
    assert asked.bandwidth == ("25gbit",)
    pair = with_measured_links(replace(config, run=str(timed_run().write(tmp_path / "pair"))))
    assert pair.bandwidth == ()  # the run's own
    said.write_text("Ready.")
    with pytest.raises(ConfigError, match="names no link"):
        with_measured_links(config)


def test_buffers_travel_by_type() -> None:
    calls = owed_calls(zoo.build_shapes("resnet18", 10), [100, 60], 2, 3)
    assert [(call["origin"], call["payload_bytes"], call["itemsize"], call["num_calls"]) for call in calls] == [
        ("buffers", 38_400, 4, 1), ("buffers", 160, 8, 1), ("gradients", 100, 2, 1), ("gradients", 60, 2, 1),
        ("lightning", 8, 8, 3), ("metrics", 32, 8, 1),
    ]  # fmt: skip


# --- a model's name ---


@given(st.lists(st.integers(1, 3 * MIB // 4), min_size=1, max_size=40), st.sampled_from([0.25, 1.0, 5.0, None]))
def test_buckets_are_filled_as_ddp_fills_them(sizes: list[int], megabytes: float | None) -> None:
    tensors = [torch.empty(size, device="meta") for size in sizes]
    limits = [MIB, 25 * MIB] if megabytes is None else [int(megabytes * MIB)]
    indices, _ = dist._compute_bucket_assignment_by_size(tensors, limits)  # pyright: ignore[reportPrivateImportUsage]
    found = fill_buckets([Bucket(4 * size, 4, float(position)) for position, size in enumerate(sizes)], megabytes)
    assert [bucket.payload_bytes for bucket in found] == [sum(4 * sizes[i] for i in bucket) for bucket in indices]
    assert [bucket.ready_seconds for bucket in found] == [max(bucket) for bucket in indices]


def test_layers_are_ready_by_their_share_of_the_multiply_adds() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 3, bias=False))
    found = estimate_variables(network, {"0": 30, "2": 10}, 8.0)
    assert found == (Bucket(24, 4, 2.0), Bucket(8, 4, 8.0), Bucket(32, 4, 8.0))


def test_a_rank_alone_trains_as_fast_as_was_said() -> None:
    assert told(SQUEEZENET, 1, 1e9).step_seconds == pytest.approx(8 / 100)
    assert sum(bucket.payload_bytes for bucket in SQUEEZENET.step.buckets) == 4_993_696
    assert SQUEEZENET.step.buckets[-1].ready_seconds == pytest.approx(SQUEEZENET.step.backward_seconds)
    assert egress_bytes(SQUEEZENET, Cluster(1, 1, Network(1e9), "ring", "none", 8, 1)) == 0


@given(
    st.floats(1e6, 1e12), st.floats(1, 1000), st.integers(1, 64),
    st.sampled_from(["ring", "hierarchical", "tree", "parameter_server"]), st.integers(1, 4),
)  # fmt: skip
def test_a_faster_link_never_makes_an_estimate_longer(
    rate: float, factor: float, servers: int, algorithm: str, per_server: int
) -> None:
    slow = told(SQUEEZENET, servers, rate, algorithm, per_server)
    fast = told(SQUEEZENET, servers, rate * factor, algorithm, per_server)
    assert fast.step_seconds <= slow.step_seconds * (1 + 1e-12)
    assert fast.step_seconds >= SQUEEZENET.step.compute_seconds


def test_what_was_not_measured_is_said_everywhere(tmp_path: Path) -> None:
    config = PlanConfig(
        model=ModelConfig(name="squeezenet1_0"), images_per_second=100.0, batch_per_rank=8, bandwidth=("1gbit",)
    )
    result = forecast(config, [SQUEEZENET, replace(SQUEEZENET, model="other", readiness="alone")])
    assert [source["readiness"] for source in result["sources"]] == ["estimated", "alone"]
    assert all(point["validated"] is False for point in result["points"])
    assert "ESTIMATE" in result["assumptions"][-2] and "one rank alone" in result["assumptions"][-1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"parameter_servers": 2}, r"parameter_servers=2 needs algorithm=\[parameter_server\]"),
        ({"parameter_servers": 2, "algorithm": ("parameter_server",), "servers_per_rack": 4}, "which racks"),
        ({"servers_per_rack": 8, "servers": (2, 8)}, r"has no effect on servers=\[2, 8\]"),
        ({"servers_per_rack": 9, "servers": (8,), "algorithm": ("parameter_server",)}, "has no effect"),
    ],
)
def test_racks_and_parameter_servers_without_meaning_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PlanConfig(run="runs/x", **more)


def test_a_lone_parameter_server_may_stand_in_a_rack_of_its_own() -> None:
    asked = PlanConfig(run="runs/x", servers=(8,), servers_per_rack=8, algorithm=("parameter_server",))
    (cluster,) = clusters(asked, SQUEEZENET)

    def exposed(servers_per_rack: int) -> float:
        network = Network(1e9, servers_per_rack=servers_per_rack, oversubscription=16.0)
        found = step_on(SQUEEZENET, replace(cluster, network=network))
        assert isinstance(found, StepForecast)
        return found.exposed_seconds

    assert exposed(8) > exposed(9) == told(SQUEEZENET, 8, 1e9, "parameter_server").exposed_seconds


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "one of the two"),
        ({"run": "runs/x", "model": ModelConfig(name="resnet50")}, "one of the two"),
        ({"model": ModelConfig(name="resnet50"), "batch_per_rank": 8}, "needs images_per_second="),
        ({"model": ModelConfig(name="resnet50"), "images_per_second": 1.0}, "needs batch_per_rank="),
        ({"run": "runs/x", "images_per_second": 1.0}, "belongs to model="),
    ],
)
def test_too_little_or_too_much_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PlanConfig(**given)


# --- the bandwidth that hides it ---


def bandwidth_that_hides(**changes: Any) -> float | Missing:
    return sufficient_bandwidth(SQUEEZENET, replace(Cluster(2, 4, Network(1e9), "ring", "none", 8, 1), **changes), 0.05)


def test_no_link_of_a_server_is_in_the_way_of_one_server() -> None:
    alone = bandwidth_that_hides(num_servers=1)
    assert isinstance(alone, Missing) and "sends nothing to others" in alone.reason
    assert isinstance(bandwidth_that_hides(num_servers=1, algorithm="parameter_server"), float)


def test_no_bandwidth_between_servers_makes_up_for_slow_links_inside_them() -> None:
    assert isinstance(bandwidth_that_hides(), float)
    slow = bandwidth_that_hides(network=Network(1e9, local_bits_per_second=1e8))
    assert isinstance(slow, Missing) and "the links inside servers" in slow.reason
