"""What is decided before the first step: arithmetic, threads, and which steps mean what."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.rounds import Rounds, plan_rounds
from pipeline.config.comm import CommConfig
from pipeline.config.pruning import PruneConfig
from pipeline.config.training import BatchConfig, BatchSplit, ClusterConfig, RecipeConfig, TrainConfig, TrainerConfig
from pipeline.core.cli import compose
from pipeline.core.compute import choose_compute, set_threads
from pipeline.core.errors import ConfigError, DataError
from pipeline.training.plan import StepPlan, make_plan, make_rounds, require_compression
from pipeline.training.resume import must_match

CPU = ClusterConfig(accelerator="cpu")


def plan_of(num_samples: int, global_size: int, **trainer: float | int | None) -> StepPlan:
    return make_plan(
        TrainerConfig(**trainer),  # type: ignore[arg-type]
        BatchConfig(global_size=global_size),
        num_samples,
        1,
        validate=True,
    )


@given(
    st.integers(1, 5000),
    st.integers(1, 200),
    st.integers(1, 300),
    st.one_of(st.none(), st.integers(0, 40)),
    st.one_of(st.none(), st.integers(0, 40)),
)
def test_a_plan_is_due_at_its_intervals_and_at_the_end(
    num_samples: int, global_size: int, max_steps: int, validate: int | None, save: int | None
) -> None:
    keys = {"max_steps": max_steps, "validate_every_steps": validate, "checkpoint_every_steps": save}
    if num_samples < global_size:
        with pytest.raises(DataError, match="fewer than one global batch"):
            plan_of(num_samples, global_size, **keys)
        return
    plan = plan_of(num_samples, global_size, **keys)
    assert plan.num_steps == max_steps
    assert plan.steps_per_epoch * global_size + plan.dropped_per_epoch == num_samples
    assert 0 <= plan.dropped_per_epoch < global_size
    for due, every in ((plan.validation_due, validate), (plan.checkpoint_due, save)):
        interval = plan.steps_per_epoch if every is None else every
        steps = {step for step in range(1, max_steps + 1) if due(step)}
        assert steps == (set() if not interval else {*range(interval, max_steps + 1, interval), max_steps})


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "expected"), [(None, 3, 30), (None, 0.25, 2), (None, 0.01, 1), (7, 3, 7), (70, 3, 30)]
)
def test_epochs_are_whole_global_batches_and_the_smaller_limit_wins(
    max_steps: int | None, max_epochs: float, expected: int
) -> None:
    plan = plan_of(105, 10, max_steps=max_steps, max_epochs=max_epochs)
    assert (plan.num_steps, plan.steps_per_epoch, plan.dropped_per_epoch) == (expected, 10, 5)


def test_too_few_samples_for_a_batch_names_the_largest_that_fits() -> None:
    with pytest.raises(DataError, match=r"11 samples, fewer than one global batch of 12:.*at most 9\.") as raised:
        make_plan(TrainerConfig(max_steps=1), BatchConfig(global_size=12), 11, 3, validate=True)
    assert raised.value.exit_code == 3


def test_too_few_samples_for_the_ranks_promises_no_batch_of_zero() -> None:
    with pytest.raises(DataError) as raised:
        make_plan(TrainerConfig(max_steps=1), BatchConfig(global_size=4), 2, 4, validate=True)
    assert "at most 0" not in str(raised.value)


@pytest.mark.parametrize(
    ("num_samples", "tail", "steps", "sentence"),
    [
        (105, "drop", 10, "10 an epoch of 105 pictures, 5 left out of each epoch (data.tail=drop)"),
        (105, "pad", 11, "11 an epoch of 105 pictures, 5 of them shown twice in each epoch (data.tail=pad)"),
        (1100, "drop", 110, "110 an epoch of 1,100 pictures, 0 left out of each epoch"),
        (1100, "pad", 110, "110 an epoch of 1,100 pictures, 0 left out of each epoch"),
    ],
)
def test_the_tail_of_an_epoch_is_counted_and_named(num_samples: int, tail: str, steps: int, sentence: str) -> None:
    trainer = TrainerConfig(max_epochs=2)
    plan = make_plan(trainer, BatchConfig(global_size=10), num_samples, 1, validate=False, tail=tail)
    assert (plan.steps_per_epoch, plan.num_steps, plan.checkpoint_every_steps) == (steps, 2 * steps, steps)
    assert plan.epoch_sentence == sentence
    assert steps * 10 == num_samples - plan.dropped_per_epoch + plan.repeated_per_epoch


@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_less_than_one_batch_is_no_epoch_whatever_the_tail(tail: str) -> None:
    with pytest.raises(DataError, match="fewer than one global batch of 12"):
        make_plan(TrainerConfig(max_steps=1), BatchConfig(global_size=12), 11, 3, validate=True, tail=tail)


def test_without_validation_nothing_is_validated() -> None:
    plan = make_plan(TrainerConfig(max_steps=4), BatchConfig(global_size=2), 9, 1, validate=False)
    assert not any(plan.validation_due(step) for step in range(1, 5))
    assert [step for step in range(1, 5) if plan.checkpoint_due(step)] == [4]


# --- rounds ---


def test_a_round_longer_than_the_run_is_refused() -> None:
    recipe = RecipeConfig()
    assert make_rounds(CommConfig(), recipe, 10) is None
    assert make_rounds(CommConfig(period=10), recipe, 10) == Rounds(0, (10,))
    with pytest.raises(ConfigError, match=r"comm\.period=11 is longer than the run of 10 steps"):
        make_rounds(CommConfig(period=11), recipe, 10)
    late = CommConfig(period=4, rule="post_local", local_start_step=7)
    with pytest.raises(ConfigError, match=r"comm\.period=4 after comm\.local_start_step=7 is longer"):
        make_rounds(late, recipe, 10)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_quadratic_rounds_follow_the_learning_rate(decay: str) -> None:
    recipe = RecipeConfig(lr=0.4, warmup_steps=20, decay=decay)
    rounds = make_rounds(CommConfig(period=2, rule="qsr", qsr_alpha=0.6), recipe, 400)
    assert rounds is not None
    begins = [0, *rounds.ends]
    lengths = [end - begin for begin, end in itertools.pairwise(begins)]
    assert lengths[:10] == [2] * 10  # the warm-up is as long as its peak says
    assert lengths[:-1] == sorted(lengths[:-1]) and lengths[-2] > 20 and begins[-1] == 400
    for begin, length in zip(begins[10:], lengths[10:-1], strict=False):
        assert length == max(2, math.floor((0.6 / recipe.learning_rate(begin, 400)) ** 2))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 20))
def test_what_is_validated_is_an_average_and_at_most_a_round_late(
    num_steps: int, period: int, every: int, start: int
) -> None:
    rounds = plan_rounds(num_steps, lambda _: period, start)
    plan = StepPlan(100, BatchSplit(10, 10, 1), num_steps, 10, every, 3, rounds)
    validated = [step for step in range(1, num_steps + 1) if plan.validation_due(step)]
    assert validated[-1] == num_steps and all(map(rounds.is_synchronised, validated))
    meetings = [step for step in range(1, num_steps + 1) if rounds.is_synchronised(step)]
    expected = {next(at for at in meetings if at >= due) for due in (*range(every, num_steps + 1, every), num_steps)}
    assert validated == sorted(expected)
    assert [step for step in range(1, num_steps + 1) if plan.checkpoint_due(step)] == [
        step for step in range(1, num_steps + 1) if step % 3 == 0 or step == num_steps
    ]


# --- arithmetic ---


@pytest.mark.parametrize("hook", ["none", "powersgd"])
def test_a_compression_that_would_never_begin_is_refused(hook: str) -> None:
    trainer = TrainerConfig(max_steps=20)
    plan = make_plan(trainer, BatchConfig(global_size=2), 9, 1, validate=False)
    compute = choose_compute(accelerator="cpu", precision=trainer.precision, memory_format=trainer.memory_format)
    require_compression(CommConfig(hook=hook, powersgd_start_step=19), plan, compute)
    if hook == "none":
        require_compression(CommConfig(hook=hook, powersgd_start_step=20), plan, compute)
        return
    with pytest.raises(ConfigError, match="the run has 20 steps, so that none would be compressed"):
        require_compression(CommConfig(hook=hook, powersgd_start_step=20), plan, compute)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("memory_format", ["auto", "channels_last", "contiguous"])
def test_what_is_asked_for_is_used(precision: str, memory_format: str) -> None:
    compute = choose_compute(accelerator="cpu", precision=precision, memory_format=memory_format)
    assert (compute.accelerator, compute.precision, compute.backend) == ("cpu", precision, "gloo")
    assert compute.lightning_precision == {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]
    channels_last = memory_format == "channels_last" or (memory_format == "auto" and precision == "bf16")
    assert compute.memory_format == (torch.channels_last if channels_last else torch.contiguous_format)
    assert "as trainer.precision asks" in compute.sentence and precision in compute.sentence


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "precision", "reason"),
    [
        (True, True, "bf16", "the CPU has AMX"),
        (False, True, "bf16", "the CPU has AVX512-BF16"),
        (False, False, "fp32", "this CPU gains nothing from bf16"),
    ],
)
def test_bf16_is_chosen_where_the_cpu_gains(
    amx: bool, avx512_bf16: bool, precision: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No one machine has all three kinds of CPU.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    compute = choose_compute(accelerator="cpu", precision="auto")
    assert (compute.precision, compute.reason, compute.channels_last) == (precision, reason, precision == "bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        choose_compute(accelerator="gpu", precision="auto")
    assert choose_compute(accelerator="auto", precision="auto").accelerator == "cpu"


@pytest.fixture
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("same_threads_afterwards")
def test_threads_are_as_configured_else_the_cores_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert set_threads(3, 2) == torch.get_num_threads() == 3
    cores = len(os.sched_getaffinity(0))
    for local_ranks in (1, 2, 1000):
        expected = max(1, cores // local_ranks)
        monkeypatch.setenv("OMP_NUM_THREADS", "")  # the call before has set it
        assert set_threads(None, local_ranks) == torch.get_num_threads() == expected


# --- what must match ---


def test_every_field_that_shapes_the_order_or_the_weights_must_match() -> None:
    config = compose("train", TrainConfig, ["name=a", "data.root=x", "trainer.max_steps=1"])
    changed = {
        "model.name": dataclasses.replace(config, model=dataclasses.replace(config.model, name="alexnet")),
        "seed": dataclasses.replace(config, seed=9),
        "batch.global_size": dataclasses.replace(config, batch=BatchConfig(global_size=8)),
        "data.shuffle_block": dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle_block=2)),
        "data.shuffle_groups": dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle_groups=2)),
        "data.tail": dataclasses.replace(config, data=dataclasses.replace(config.data, tail="pad")),
        "recipe.prune.every_steps": dataclasses.replace(
            config, recipe=dataclasses.replace(config.recipe, prune=PruneConfig(every_steps=7))
        ),
    }
    base = must_match(config, "shards")
    for key, other in changed.items():
        assert {name for name, value in must_match(other, "shards").items() if value != base[name]} == {key}
    longer = dataclasses.replace(config, trainer=TrainerConfig(max_steps=99))
    assert must_match(longer, "shards") == base  # a run may be made longer
    other_shards = must_match(config, "others").items()
    assert {name for name, value in other_shards if value != base[name]} == {"data.shards_sha256"}
