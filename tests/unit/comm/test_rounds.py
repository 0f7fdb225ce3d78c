"""Rounds of local SGD: when ranks meet, in which buckets their weights travel, and what each step owes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.averaging import BYTES_PER_MEBIBYTE, Sizes, flat_buckets, owed_calls
from pipeline.comm.collectives import Call
from pipeline.comm.rounds import plan_rounds, quadratic_steps

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(st.integers(1, 200), st.integers(0, 250), lengths)
def test_rounds_follow_one_another_to_the_end_of_the_run(num_steps: int, start: int, lengths: list[int]) -> None:
    rounds = plan_rounds(num_steps, lambda step: lengths[step % len(lengths)], start)
    met = [step for step in range(1, num_steps + 1) if rounds.averages(step)]
    assert list(rounds.ends) == met
    begins = [start, *met]
    for begin, end in zip(begins, met, strict=False):
        assert end == min(num_steps, begin + lengths[begin % len(lengths)])
    assert rounds.is_synchronised(num_steps)
    for step in range(num_steps + 1):
        assert rounds.exchanges_gradients(step) == (step <= start)
        assert rounds.is_synchronised(step) == (step <= start or step in met)
        assert rounds.last_synchronised(step) == max(at for at in range(step + 1) if rounds.is_synchronised(at))


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


def test_what_a_step_owes() -> None:
    rounds = plan_rounds(7, lambda _: 3, 2)
    sizes: Sizes = {"parameters": [(40, 4), (60, 4)], "buffers": [(8, 4)]}

    def owed(step: int, world_size: int = 2) -> Counter[Call] | None:
        return owed_calls(rounds, step, sizes, bucket_megabytes=1.0, num_sums=5, world_size=world_size)

    meeting = Counter(
        Call("train", origin, "all_reduce", num_bytes, itemsize, -1)
        for origin, num_bytes, itemsize in (("parameters", 100, 4), ("buffers", 8, 4), ("metrics", 40, 8))
    )
    alone: Counter[Call] = Counter()
    assert [owed(step) for step in range(1, 8)] == [None, None, alone, alone, meeting, alone, meeting]
    assert [owed(step, world_size=1) for step in range(1, 8)] == [alone] * 7
