"""Rounds of local SGD: when ranks meet, in which buckets their weights travel, and what each step owes."""

from collections import Counter

from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.comm.averaging import owed_calls
from pipeline.comm.buckets import BYTES_PER_MEBIBYTE, Sizes, flat_buckets, share_out
from pipeline.comm.codec import CODECS
from pipeline.comm.collectives import Call
from pipeline.comm.rounds import plan_rounds, quadratic_steps

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(st.integers(1, 200), st.integers(0, 250), lengths)
def test_rounds_follow_one_another_to_the_end_of_the_run(num_steps: int, start: int, lengths: list[int]) -> None:
    rounds = plan_rounds(num_steps, lambda step: lengths[step % len(lengths)], start)
    met = [step for step in range(1, num_steps + 1) if rounds.ends_round(step)]
    assert list(rounds.ends) == met
    begins = [start, *met]
    for begin, end in zip(begins, met, strict=False):
        assert end == min(num_steps, begin + lengths[begin % len(lengths)])
    assert rounds.is_synchronised(num_steps)
    for step in range(num_steps + 1):
        assert rounds.exchanges_gradients(step) == (step <= start)
        assert rounds.is_synchronised(step) == (step <= start or step in met)
        assert rounds.last_met(step) == max(at for at in range(step + 1) if rounds.is_synchronised(at))


def test_a_period_that_does_not_divide_the_run_ends_with_a_shorter_round() -> None:
    assert plan_rounds(11, lambda _: 4).ends == (4, 8, 11)
    assert plan_rounds(11, lambda _: 4, 2).ends == (6, 10, 11)


def test_quadratic_rounds_grow_as_the_learning_rate_falls() -> None:
    assert [quadratic_steps(2, 0.2, lr) for lr in (0.4, 0.1, 0.05, 0.03, 0.02)] == [2, 4, 16, 44, 100]


tensors = st.lists(st.tuples(st.integers(1, 3 * BYTES_PER_MEBIBYTE // 4), st.sampled_from([4, 8])), max_size=30)


@given(tensors, tensors, st.sampled_from([0.25, 1.0, None]))
def test_buckets_hold_each_tensor_once_and_no_more_than_they_may(
    parameters: list[tuple[int, int]], buffers: list[tuple[int, int]], megabytes: float | None
) -> None:
    sizes: Sizes = {
        origin: [(elements * itemsize, itemsize) for elements, itemsize in some]
        for origin, some in (("parameters", parameters), ("buffers", buffers))
    }
    buckets = flat_buckets(sizes, megabytes)
    for origin, tensors in sizes.items():
        mine = [bucket for bucket in buckets if bucket.origin == origin]
        assert [at for bucket in mine for at in range(bucket.first, bucket.end)] == list(range(len(tensors)))
        for bucket in mine:
            held = tensors[bucket.first : bucket.end]
            assert bucket.num_bytes == sum(num_bytes for num_bytes, _ in held)
            assert {itemsize for _, itemsize in held} == {bucket.itemsize}
            assert len(held) == 1 or bucket.num_bytes <= (megabytes or 25) * BYTES_PER_MEBIBYTE


@given(tensors.filter(bool), st.integers(1, 12))
def test_fragments_are_all_buckets_in_order_and_none_is_empty(
    parameters: list[tuple[int, int]], num_fragments: int
) -> None:
    sizes: Sizes = {"parameters": [(elements * itemsize, itemsize) for elements, itemsize in parameters]}
    buckets = flat_buckets(sizes, 0.25)
    fragments = share_out(buckets, min(num_fragments, len(buckets)))
    assert [bucket for fragment in fragments for bucket in fragment] == buckets
    assert all(fragments) and len(fragments) == min(num_fragments, len(buckets))


@given(st.integers(1, 120), st.integers(0, 30), st.integers(1, 20), st.integers(1, 6), st.integers(0, 9))
def test_each_fragment_leaves_once_in_a_round_and_has_arrived_before_the_next_one_leaves(
    num_local: int, start: int, period: int, num_fragments: int, delay: int
) -> None:
    assume(delay < period // num_fragments)
    num_steps = start + num_local
    rounds = plan_rounds(num_steps, lambda _: period, start, num_fragments=num_fragments, delay=delay)
    under_way: list[int] = []
    left: list[int] = []
    for step in range(1, num_steps + 1):
        is_last = step == num_steps
        assert len(rounds.leaving(step)) <= (num_fragments if is_last else 1)
        if not is_last:
            assert rounds.arriving(step) == (rounds.leaving(step - delay) if delay < step else ())
        for fragment in rounds.leaving(step):
            assert is_last or delay == 0 or not under_way or rounds.arriving(step)
            under_way.append(fragment)
            left.append(fragment)
        for fragment in rounds.arriving(step):
            assert under_way.pop(0) == fragment
        assert (rounds.under_way(step) is not None) == bool(under_way)
        assert rounds.is_synchronised(step) == (
            step <= start or is_last or (num_fragments == 1 and delay == 0 and rounds.ends_round(step))
        )
        if rounds.ends_round(step):
            assert left == list(range(num_fragments))
            left = []
    assert not under_way
    turned = [fragment for step in range(num_steps + 1) for fragment in rounds.turning(step)]
    assert turned == list(range(num_fragments)) * len(rounds.ends)


def test_what_a_step_owes() -> None:
    rounds = plan_rounds(7, lambda _: 3, 2)
    sizes: Sizes = {"parameters": [(40, 4), (60, 4)], "buffers": [(8, 4)]}
    (weights, statistics) = flat_buckets(sizes, 1.0)

    def owed(step: int, world_size: int = 2) -> Counter[Call] | None:
        return owed_calls(rounds, step, [[weights]], [statistics], codec=None, num_sums=5, world_size=world_size)

    meeting = Counter(
        Call("train", origin, "all_reduce", num_bytes, itemsize, -1)
        for origin, num_bytes, itemsize in (("parameters", 100, 4), ("buffers", 8, 4), ("metrics", 40, 8))
    )
    alone: Counter[Call] = Counter()
    assert [owed(step) for step in range(1, 8)] == [None, None, alone, alone, meeting, alone, meeting]
    assert [owed(step, world_size=1) for step in range(1, 8)] == [alone] * 7


def test_what_a_step_owes_in_int8_and_fragments() -> None:
    """500 values in two fragments, rounds of 6 steps, 2 of them under way; three ranks add up a block each."""
    rounds = plan_rounds(11, lambda _: 6, num_fragments=2, delay=2)
    fragments = [[one] for one in flat_buckets({"parameters": [(1600, 4), (400, 4)]}, 0.001)]
    reduced = Call("train", "parameters", "all_to_all", 3 * 260, 1, -1)
    gathered = Call("train", "parameters", "all_gather", 260, 1, -1)
    sums = Call("train", "metrics", "all_reduce", 40, 8, -1)
    owed = [
        owed_calls(rounds, step, fragments, [], codec=CODECS["int8"], num_sums=5, world_size=3) for step in range(1, 12)
    ]
    nothing: Counter[Call] = Counter()
    assert owed[2] == {reduced: 1} and owed[3] == {gathered: 1} and owed[4] == nothing
    assert owed[5] == {reduced: 1, sums: 1} and owed[6] == {gathered: 1}
    assert owed[7:10] == [nothing] * 3 and owed[10] == {reduced: 2, gathered: 2, sums: 1}
