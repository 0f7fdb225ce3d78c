"""The forecast's arithmetic: limits that must hold for any step, and cases small enough to do by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.all_reduce import (
    ALGORITHMS,
    HEADER_SHARE,
    AllReduce,
    Host,
    Network,
    all_reduce,
    tree_levels,
)
from pipeline.comm.forecast import (
    Bucket,
    MeasuredBucket,
    Step,
    StepForecast,
    calibrated,
    fit_host,
    forecast,
    queues,
)
from pipeline.comm.wire.gloo import NotDerivable, gloo_ring_all_reduce, sent_bytes_per_rank

SQUEEZENET_BUCKETS = (Bucket(2_048_000, 4, 0.010), Bucket(2_945_696, 4, 0.080))
STEP = Step(0.04, 0.08, 0.01, SQUEEZENET_BUCKETS)
PLACEMENTS = st.sampled_from(
    [(0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 0, 1, 1), (0, 0, 0, 0, 1, 1, 1, 1), tuple(range(16))]
)
BANDWIDTHS = st.floats(1e6, 1e12)


def told(
    step: Step, algorithm: str, placement: tuple[int, ...], network: Network, host: Host | None = None
) -> StepForecast:
    found = forecast(step, algorithm, placement, network, host or Host())
    assert isinstance(found, StepForecast), found
    return found


@st.composite
def steps(draw: st.DrawFn) -> Step:
    ready = sorted(draw(st.lists(st.floats(0, 1), min_size=1, max_size=5)))
    sizes = draw(st.lists(st.integers(1, 10**7), min_size=len(ready), max_size=len(ready)))
    buckets = tuple(Bucket(4 * size, 4, at) for size, at in zip(sizes, ready, strict=True))
    return Step(draw(st.floats(0, 1)), ready[-1], draw(st.floats(0, 1)), buckets)


# --- the pipeline of buckets ---


def test_a_step_by_hand() -> None:
    # 1 Gbit/s: bucket 1 takes 17.13 ms from 10 ms, is done before bucket 2 is ready at 80 ms, which takes 24.64 ms.
    network = Network(1e9)
    found = told(STEP, "ring", (0, 1), network)
    last = 8 * (2_945_696 + 4 * 2 * 72) * (1 + HEADER_SHARE) / 1e9
    assert found.exposed_seconds == pytest.approx(last, rel=1e-12)
    assert found.step_seconds == pytest.approx(0.13 + last, rel=1e-12)


def test_a_slow_link_makes_the_second_bucket_wait_for_the_first() -> None:
    network = Network(1e8)
    busy = network.seconds(2_048_000 + 576) + network.seconds(2_945_696 + 576)
    assert told(STEP, "ring", (0, 1), network).exposed_seconds == pytest.approx(0.010 + busy - 0.080, rel=1e-12)


@given(steps(), PLACEMENTS, st.sampled_from(ALGORITHMS), BANDWIDTHS, st.floats(1, 100))
def test_a_faster_link_never_makes_a_step_longer(
    step: Step, placement: tuple[int, ...], algorithm: str, bandwidth: float, factor: float
) -> None:
    slow = forecast(step, algorithm, placement, Network(bandwidth), Host(1e-9, 1e-5))
    fast = forecast(step, algorithm, placement, Network(bandwidth * factor), Host(1e-9, 1e-5))
    if isinstance(slow, NotDerivable) or isinstance(fast, NotDerivable):
        assert slow == fast
        return
    assert fast.step_seconds <= slow.step_seconds
    assert fast.egress_bytes == slow.egress_bytes


@given(steps(), PLACEMENTS, BANDWIDTHS)
def test_exposed_time_lies_between_the_last_bucket_and_all_of_them(
    step: Step, placement: tuple[int, ...], bandwidth: float
) -> None:
    network = Network(bandwidth)
    found = told(step, "ring", placement, network)
    last = all_reduce("ring", step.buckets[-1].payload_bytes, 4, placement)
    assert isinstance(last, AllReduce)
    assert network.seconds(last.card_bytes) * (1 - 1e-9) - 1e-12 <= found.exposed_seconds
    assert found.exposed_seconds <= found.communication_seconds * (1 + 1e-9)
    assert found.step_seconds == pytest.approx(step.compute_seconds + found.exposed_seconds, rel=1e-12)


@given(steps(), PLACEMENTS)
def test_without_a_limit_or_a_cost_nothing_is_exposed(step: Step, placement: tuple[int, ...]) -> None:
    found = told(step, "ring", placement, Network(None))
    assert found.exposed_seconds == 0
    assert found.step_seconds == step.compute_seconds


@given(steps())
def test_one_rank_alone_only_computes(step: Step) -> None:
    found = told(step, "ring", (0,), Network(1e6, 1.0), Host(1.0, 1.0))
    assert (found.step_seconds, found.egress_bytes) == (step.compute_seconds, 0)


@given(steps(), PLACEMENTS, st.floats(1e-6, 1e-2))
def test_latency_is_paid_once_per_round_of_the_ring(step: Step, placement: tuple[int, ...], latency: float) -> None:
    found = all_reduce("ring", step.buckets[0].payload_bytes, 4, placement)
    assert isinstance(found, AllReduce)
    added = found.seconds(Network(None, latency), Host()) - found.seconds(Network(None), Host())
    assert added == pytest.approx(2 * (len(placement) - 1) * latency, rel=1e-9)


@given(PLACEMENTS, st.floats(1e-6, 1e-2))
def test_small_exchanges_cost_the_rounds_that_the_measured_run_did_not_have(
    placement: tuple[int, ...], per_round: float
) -> None:
    step = replace(STEP, blocking_all_reduces=1, blocking_broadcasts=2, waiting_seconds=0.003)
    found = told(step, "ring", placement, Network(None), Host(0.0, per_round))
    without = told(STEP, "ring", placement, Network(None), Host(0.0, per_round))
    ranks = len(placement)
    more = 2 * (ranks - 1) + 2 * (ranks - 1).bit_length() - 4  # two ranks had 2 rounds and 2 times 1
    assert found.step_seconds - without.step_seconds == pytest.approx(0.003 + more * per_round, rel=1e-9)


# --- algorithms ---


def test_the_ring_moves_what_gloo_moves() -> None:
    found = all_reduce("ring", 4_993_696, 4, (0, 1, 2))
    assert isinstance(found, AllReduce)
    assert found.egress_bytes == max(sent_bytes_per_rank(gloo_ring_all_reduce(4_993_696, 4, 3), 3))


def test_a_parameter_server_carries_every_payload_in_and_out() -> None:
    for num_ranks in (2, 8, 64):
        found = all_reduce("parameter_server", 4_000_000, 4, tuple(range(num_ranks)))
        assert isinstance(found, AllReduce)
        assert found.card_bytes == 2 * num_ranks * 4_000_000  # grows with the ranks, as FireCaffe found


@pytest.mark.parametrize(("num_ranks", "levels"), [(1, []), (2, [1]), (3, [2]), (7, [2, 2]), (8, [1, 2, 2])])
def test_levels_of_the_tree(num_ranks: int, levels: list[int]) -> None:
    assert tree_levels(range(num_ranks)) == levels
    assert tree_levels([0] * num_ranks, are_inside=True) == levels


def test_a_tree_beats_a_parameter_server_on_many_servers_and_a_ring_beats_both() -> None:
    placement, network = tuple(range(128)), Network(1e10)
    ring, tree, server = (
        told(STEP, algorithm, placement, network).communication_seconds
        for algorithm in ("ring", "tree", "parameter_server")
    )
    assert ring < tree < server


def test_ranks_of_one_server_cost_no_link() -> None:
    for algorithm in ("ring", "hierarchical", "tree", "halving_doubling"):
        found = all_reduce(algorithm, 4_000_000, 4, (0, 0, 0, 0))
        assert isinstance(found, AllReduce)
        assert (found.card_bytes, found.num_rounds) == (0, 0)


def test_a_hierarchy_sends_least_from_servers_with_many_ranks() -> None:
    placement = tuple(rank // 8 for rank in range(32))
    ring, hierarchy = (all_reduce(name, 4_000_000, 4, placement) for name in ("ring", "hierarchical"))
    assert isinstance(ring, AllReduce)
    assert isinstance(hierarchy, AllReduce)
    assert hierarchy.egress_bytes < ring.egress_bytes
    assert hierarchy.num_rounds < ring.num_rounds


def test_what_an_algorithm_cannot_do_is_a_reason() -> None:
    found = forecast(STEP, "halving_doubling", (0, 1, 2), Network(1e9), Host())
    assert isinstance(found, NotDerivable)
    assert "power of two" in found.reason


# --- links inside servers, switches, several parameter servers ---


@given(steps(), PLACEMENTS, st.sampled_from(ALGORITHMS), st.floats(1e8, 1e12), st.floats(1, 50), st.floats(1, 8))
def test_slower_links_inside_servers_and_between_racks_never_make_a_step_shorter(
    step: Step, placement: tuple[int, ...], algorithm: str, local: float, factor: float, oversubscribed: float
) -> None:
    free, slow = Network(1e9), Network(1e9, 0.0, local, 2, oversubscribed)
    found = [
        forecast(step, algorithm, placement, network, Host())
        for network in (
            free,
            slow,
            replace(slow, local_bits_per_second=local / factor),
            replace(slow, oversubscription=9),
        )
    ]
    if isinstance(found[0], NotDerivable):
        assert all(one == found[0] for one in found)
        return
    seconds = [one.step_seconds for one in found if isinstance(one, StepForecast)]
    assert seconds[0] <= seconds[1] * (1 + 1e-12)
    assert seconds[1] <= min(seconds[2:]) * (1 + 1e-12)


def test_a_tree_inside_a_server_goes_level_by_level() -> None:
    within = all_reduce("tree", 4_000_000, 4, (0,) * 8)
    assert isinstance(within, AllReduce) and within.local_bytes == 10 * 4_000_000  # 1, 2 and 2 up, the same down
    two = all_reduce("tree", 4_000_000, 4, (0, 0, 0, 0, 1, 1, 1, 1))
    assert isinstance(two, AllReduce)
    # Inside: of ranks 1 and 2 with 0, and of 3 with 1. Between: 4 to 1, 5 and 6 to 2; 7 to 3.
    assert (two.local_bytes, two.card_bytes) == (2 * 3 * 4_000_000, 2 * 4 * 4_000_000)


@given(steps(), st.integers(2, 7), st.integers(1, 8), st.integers(2, 64))
def test_every_variable_crosses_a_workers_card_however_many_hold_them(
    step: Step, num_servers: int, per_server: int, holders: int
) -> None:
    whole = tuple(replace(bucket, payload_bytes=8 * bucket.payload_bytes) for bucket in step.buckets)
    step = replace(step, buckets=whole, variables=tuple(part for part in step.buckets for _ in range(8)))
    placement = tuple(rank // per_server for rank in range(num_servers * per_server))
    found = forecast(step, "parameter_server", placement, Network(1e9), Host(), 1, holders)
    one = told(step, "parameter_server", placement, Network(1e9))
    assert isinstance(found, StepForecast)
    crossing = Network(1e9).seconds(2 * per_server * sum(variable.payload_bytes for variable in step.variables))
    assert found.communication_seconds >= crossing * (1 - 1e-9)
    assert found.step_seconds <= one.step_seconds * (1 + 1e-9)


def test_two_stages_of_a_hierarchy_follow_one_another_and_a_ring_does_both_at_once() -> None:
    placement = tuple(rank // 4 for rank in range(8))
    network = Network(1e9, local_bits_per_second=1e9)
    hierarchy, ring = (all_reduce(name, 4_000_000, 4, placement) for name in ("hierarchical", "ring"))
    assert isinstance(hierarchy, AllReduce) and isinstance(ring, AllReduce)
    assert hierarchy.local_bytes == 2 * 3 * 1_000_000  # reduce-scatter and all-gather among four
    assert hierarchy.seconds(network, Host()) == pytest.approx(8 * 6e6 / 1e9 + network.seconds(4_000_000))
    assert ring.seconds(network, Host()) == network.seconds(ring.card_bytes)


def test_a_ring_crosses_a_rack_once_and_a_parameter_server_is_crowded_there() -> None:
    placement, rate = tuple(range(8)), 1e9
    ring = all_reduce("ring", 8_000_000, 4, placement, 4)
    assert isinstance(ring, AllReduce) and ring.uplink_bytes == ring.egress_bytes
    # An uplink as fast as four servers carries one server's bytes in a fourth of the time.
    assert Network(rate, 0.0, None, 4, 1.0).uplink_seconds(1e6) == pytest.approx(Network(rate).seconds(1e6) / 4)
    assert ring.seconds(Network(rate, 0.0, None, 4, 4.0), Host()) == pytest.approx(ring.seconds(Network(rate), Host()))
    crowded = all_reduce("parameter_server", 8_000_000, 4, placement, 4)
    assert isinstance(crowded, AllReduce) and crowded.uplink_bytes == 2 * 8 * 8_000_000


def test_variables_lie_whole_on_the_servers() -> None:
    """One large variable of four: more servers do not help, as an even split would say."""
    sizes = (100, 100, 8_000_000, 100)
    step = replace(
        STEP, buckets=(Bucket(8_000_300, 4, 0.01),), variables=tuple(Bucket(4 * s // 4, 4, 0.01) for s in sizes)
    )
    placement = tuple(range(16))

    def exposed(num_servers: int) -> float:
        found = forecast(step, "parameter_server", placement, Network(1e9), Host(), 1, num_servers)
        assert isinstance(found, StepForecast)
        return found.exposed_seconds

    least = Network(1e9).seconds(2 * 16 * 8_000_000)
    assert exposed(1) > exposed(2) == pytest.approx(least)
    assert exposed(64) == exposed(2)
    dealt = queues(step, "parameter_server", 2)  # from the model's first, the last to be ready
    assert [[one.payload_bytes for one in queue] for queue in dealt] == [[100, 100, 100], [8_000_000]]


# --- other steps ---


def test_twice_the_pictures_take_twice_the_passes() -> None:
    double = STEP.with_batch(2)
    assert (double.forward_seconds, double.backward_seconds, double.other_seconds) == (0.08, 0.16, 0.01)
    assert [bucket.ready_seconds for bucket in double.buckets] == [0.02, 0.16]
    assert [bucket.payload_bytes for bucket in double.buckets] == [2_048_000, 2_945_696]


def test_accumulation_spreads_the_same_bytes_over_more_passes() -> None:
    four = STEP.accumulating(4)
    network = Network(1e8)
    assert told(four, "ring", (0, 1), network).exposed_seconds == told(STEP, "ring", (0, 1), network).exposed_seconds
    assert four.compute_seconds == pytest.approx(4 * 0.12 + 0.01)
    assert four.accumulating(1).compute_seconds == pytest.approx(STEP.compute_seconds)


def test_compression_halves_what_travels() -> None:
    half = STEP.compressed(0.5, 2)
    whole = told(STEP, "ring", (0, 1), Network(1e8)).communication_seconds
    assert told(half, "ring", (0, 1), Network(1e8)).communication_seconds == pytest.approx(whole / 2, rel=1e-3)


# --- the fit ---


@given(st.floats(0, 1e-8), st.floats(0, 1e-3), st.sampled_from([(0, 1), (0, 1, 2)]), st.floats(1e9, 1e10))
def test_the_fit_finds_what_computing_ranks_added(
    per_byte: float, per_round: float, placement: tuple[int, ...], bandwidth: float
) -> None:
    network = Network(bandwidth)
    end, measured = 0.0, []
    for bucket in SQUEEZENET_BUCKETS:  # the first is done while ranks compute, the second when they do not
        found = all_reduce("ring", bucket.payload_bytes, 4, placement)
        assert isinstance(found, AllReduce)
        computing = bucket is SQUEEZENET_BUCKETS[0]
        end = max(end, bucket.ready_seconds) + found.seconds(network, Host(0.0, per_round))
        end += found.host_bytes * per_byte * computing
        measured.append(MeasuredBucket(bucket.payload_bytes, 4, bucket.ready_seconds, bucket.ready_seconds, end))
    assert measured[0].done_seconds < 0.080
    fitted = fit_host(measured, "ring", placement, network, per_round)
    assert fitted.seconds_per_round == per_round
    assert fitted.seconds_per_byte == pytest.approx(per_byte, abs=1e-14)
    again = told(STEP, "ring", placement, network, fitted)
    assert again.exposed_seconds == pytest.approx(end - 0.080, abs=1e-8)


@given(steps(), st.sampled_from([(0, 1), (0, 1, 2)]), BANDWIDTHS, st.floats(0, 1e-6), st.floats(0, 2))
def test_the_measured_run_is_forecast_as_it_was_measured(
    step: Step, placement: tuple[int, ...], bandwidth: float, per_byte: float, exposed: float
) -> None:
    network = Network(bandwidth)
    least = told(step, "ring", placement, network, Host(0.0, 1e-4)).exposed_seconds
    fitted, host = calibrated(step, Host(per_byte, 1e-4), placement, network, exposed)
    found = forecast(fitted, "ring", placement, network, host, len(placement))
    assert isinstance(found, StepForecast)
    # Bytes take their time on the link, whatever was measured.
    assert found.exposed_seconds == pytest.approx(max(exposed, least), rel=1e-6, abs=1e-9)
    assert host.seconds_per_byte <= per_byte
