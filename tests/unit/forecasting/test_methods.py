"""`plan methods=`: the shortest rounds of local steps whose exchange does not show."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.all_reduce import exchange
from pipeline.comm.wire import gloo
from pipeline.config.model import InputConfig, ModelConfig
from pipeline.config.plan import METHODS, PlanConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError
from pipeline.core.schemas.forecast import ForecastJson, MethodJson
from pipeline.forecasting.alone import estimate_source
from pipeline.forecasting.document import forecast
from pipeline.forecasting.source import read_source
from pipeline.reporting.forecast import forecast_sentences, methods_table
from pipeline.reporting.runs import read_run
from tests.json_shape import mismatches
from tests.making.runs import timed_run

SQUEEZENET = ModelConfig(name="squeezenet1_0", input=InputConfig(size=64, resize_side=64))
CONFIG = PlanConfig(
    model=SQUEEZENET,
    images_per_second=100.0,
    batch_per_rank=8,
    servers=(1, 2, 8),
    bandwidth=("100mbit", "10gbit"),
    algorithm=("tree", "ring"),
    methods=tuple(METHODS),
)
SOURCE = estimate_source(SQUEEZENET, 100.0, 8)


def rounds(config: PlanConfig = CONFIG) -> list[MethodJson]:
    return forecast(config, [SOURCE])["methods"]


def test_there_is_a_row_for_every_ring_of_several_ranks_and_none_unasked() -> None:
    result = forecast(CONFIG, [SOURCE])
    assert not mismatches(result, ForecastJson)
    assert [(row["num_servers"], row["bandwidth_bits_per_second"], row["method"]) for row in result["methods"]] == [
        (servers, rate, method) for rate in (1e8, 1e10) for servers in (2, 8) for method in METHODS
    ]
    assert rounds(replace(CONFIG, methods=())) == []


@given(share=st.floats(0.001, 0.9), rate=st.sampled_from(["10mbit", "100mbit", "1gbit", "100gbit"]))
def test_the_round_is_the_shortest_of_which_so_little_shows(share: float, rate: str) -> None:
    for row in rounds(replace(CONFIG, exposed_share=share, bandwidth=(rate,), servers=(2, 3))):
        period, compute = row["period"], SOURCE.step.compute_seconds

        def shown(num_steps: int, seconds: float = row["exchange_seconds"], alone: float = compute) -> float:
            return seconds / (num_steps * alone + seconds)

        assert shown(period) <= share * (1 + 1e-9)
        assert period == 1 or shown(period - 1) > share * (1 - 1e-9)
        assert row["step_seconds"] == pytest.approx(compute + row["exchange_seconds"] / period)


def test_bytes_are_those_of_a_ring_in_as_many_bits_as_travel() -> None:
    """Of n ranks each sends 2 (n - 1) / n of the weights; a block of 256 has a scale of 4 bytes in whole numbers."""
    num_weights = 1_248_424
    for row in rounds():
        num_bits = {"local": 32, "local_bf16": 16, "local_int8": 8 + 1 / 8, "local_int4": 4 + 1 / 8}[row["method"]]
        n = row["num_servers"]
        ring = 2 * (n - 1) / n * num_weights * num_bits / 8
        assert ring <= row["server_egress_bytes_per_exchange"] < 1.04 * ring
        assert row["bytes_share"] == pytest.approx(num_bits / 32 / row["period"], rel=0.05)


def test_a_slower_link_wants_longer_rounds_and_fewer_bits_shorter_ones() -> None:
    eight = [row["period"] for row in rounds() if row["num_servers"] == 8]
    slow, fast = eight[: len(METHODS)], eight[len(METHODS) :]
    assert all(more > less for more, less in zip(slow, fast, strict=True))
    assert slow == sorted(slow, reverse=True)


def test_it_is_told_as_a_table_and_in_a_sentence_for_the_largest_cluster() -> None:
    result = forecast(CONFIG, [SOURCE])
    table = methods_table(result)
    assert table is not None and len(table.rows) == 4
    (said,) = (
        sentence for sentence in forecast_sentences(result) if "8 servers, 64 pictures per step, 100 Mbit/s" in sentence
    )
    periods = {row["method"]: row["period"] for row in result["methods"][4:8]}
    assert all(f"{method} {period:,}" in said for method, period in periods.items())
    assert any("accuracy is not forecast" in sentence for sentence in result["assumptions"])


@given(
    num_servers=st.integers(1, 6), per_server=st.integers(1, 4), blocks=st.integers(1, 50), per_rack=st.integers(1, 4)
)
def test_an_all_to_all_asks_what_its_links_add_up_to(
    num_servers: int, per_server: int, blocks: int, per_rack: int
) -> None:
    num_ranks = num_servers * per_server
    servers = [rank // per_server for rank in range(num_ranks)]
    links = gloo.links("all_to_all", num_ranks * 260 * blocks, 1, -1, num_ranks, "gloo")
    assert not isinstance(links, gloo.NotDerivable)
    found = exchange("all_to_all", num_ranks * 260 * blocks, 1, servers, per_rack)
    assert not isinstance(found, gloo.NotDerivable)
    assert found.egress_bytes == max(gloo.egress_bytes_per_server(links, servers))
    racks = [server // per_rack for server in servers]
    assert found.uplink_bytes == max(gloo.egress_bytes_per_server(links, racks))
    inside = [
        sum(link.data_bytes for (a, b), link in links.items() if a == rank and servers[a] == servers[b])
        for rank in range(num_ranks)
    ]
    assert found.local_bytes == max(inside)


def test_several_ranks_of_a_server_and_a_slow_switch_make_rounds_longer() -> None:
    def periods(**changes: Any) -> list[int]:
        config = replace(CONFIG, servers=(4,), bandwidth=("100mbit",), batch_per_rank=8, **changes)
        return [row["period"] for row in rounds(config)]

    lone = periods()
    assert all(more > less for more, less in zip(periods(ranks_per_server=(4,)), lone, strict=True))
    racks = periods(servers_per_rack=2, oversubscription=8.0)
    assert all(more > less for more, less in zip(racks, lone, strict=True))
    assert all(more > less for more, less in zip(periods(latency_seconds=0.05), lone, strict=True))
    twice = periods(accumulate=2)
    assert all(less <= more and abs(2 * less - more) <= 2 for less, more in zip(twice, lone, strict=True))


def test_each_kind_of_cluster_is_told_and_compressed_gradients_add_no_row() -> None:
    config = replace(CONFIG, ranks_per_server=(1, 8), hook=("none", "bf16"), methods=("local",), bandwidth=("1gbit",))
    result = forecast(config, [SOURCE])
    told = [(row["num_servers"], row["ranks_per_server"]) for row in result["methods"]]
    assert told == [(2, 1), (8, 1), (2, 8), (8, 8)]
    said = [sentence for sentence in forecast_sentences(result) if "comm.period" in sentence]
    assert len(said) == 2 and "8 servers of 8 ranks" in said[1]


def test_a_run_that_knows_no_link_is_asked_for_one(tmp_path: Path) -> None:
    run = timed_run(bandwidth=None)
    source = read_source(read_run(run.write(tmp_path)), None)
    with pytest.raises(ConfigError, match=r"knows none: give bandwidth="):
        forecast(PlanConfig(run=str(tmp_path), methods=("local",)), [source])


def test_what_is_told_is_a_training_that_can_be_asked_for() -> None:
    for row in rounds():
        options = ["comm=local", f"comm.codec={METHODS[row['method']]}", f"comm.period={row['period']}"]
        compose("train", TrainConfig, ["name=a", "data.root=x", "trainer.max_steps=9999", *options])


def test_a_run_of_which_a_part_was_frozen_is_refused(tmp_path: Path) -> None:
    run = timed_run()
    run.ledger["buckets"] = run.ledger["buckets"][:1]
    source = read_source(read_run(run.write(tmp_path)), None)
    config = PlanConfig(run=str(tmp_path), methods=("local",))
    with pytest.raises(ConfigError, match=r"exchanged 512,000 gradients, and squeezenet1_0 has 1,248,424 weights"):
        forecast(config, [source])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"methods": ("locale",)}, "Did you mean 'local'"),
        ({"algorithm": ("tree",)}, "add ring to algorithm="),
        ({"servers": (1,)}, "ask for 2 or more"),
    ],
)
def test_what_cannot_be_asked_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(CONFIG, **values)
