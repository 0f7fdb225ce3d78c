"""Typed configuration: what is refused, and with which remedy."""

import re
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.comm import CommConfig
from pipeline.config.data import DataConfig
from pipeline.config.model import InputConfig
from pipeline.config.training import BatchConfig, RecipeConfig, TrainConfig, TrainerConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError
from pipeline.core.typed import build


@given(
    world_size=st.integers(1, 64),
    per_rank=st.integers(1, 512),
    max_per_rank=st.integers(1, 512),
)
def test_split_covers_the_global_batch_within_the_limit(world_size: int, per_rank: int, max_per_rank: int) -> None:
    batch = BatchConfig(global_size=world_size * per_rank, max_per_rank=max_per_rank)
    try:
        split = batch.split(world_size)
    except ConfigError as error:  # no divisor near the limit: every remedy it names works
        below, above, most = re.findall(r"(\d+)(?: or|,|\.$)", str(error).partition(": set ")[2])
        assert int(below) < batch.global_size < int(above)
        for size, limit in ((below, max_per_rank), (above, max_per_rank), (batch.global_size, most)):
            BatchConfig(global_size=int(size), max_per_rank=int(limit)).split(world_size)
        return
    assert split.num_micro_batches <= 4 * -(-per_rank // max_per_rank)
    assert split.per_rank * split.num_micro_batches * world_size == split.global_size == batch.global_size
    assert split.per_rank <= max_per_rank


@pytest.mark.parametrize(
    ("share", "limit", "micro_batches"),
    [(256, 256, 1), (258, 256, 2), (257, 257, 1), (512, 256, 2), (7, 4, 7), (3, 2, 3), (300, 256, 2), (96, 10, 12)],
)
def test_sensible_splits_stay_as_they_are(share: int, limit: int, micro_batches: int) -> None:
    assert BatchConfig(global_size=2 * share, max_per_rank=limit).split(2).num_micro_batches == micro_batches


def test_a_prime_share_is_refused_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"257 micro-batches of 1: set batch.global_size to 512 or 516, or .* to 257"):
        BatchConfig(global_size=514, max_per_rank=256).split(2)


@given(world_size=st.integers(2, 64), global_size=st.integers(1, 4096))
def test_indivisible_global_batch_is_refused_with_sizes_that_work(world_size: int, global_size: int) -> None:
    batch = BatchConfig(global_size=global_size)
    if global_size % world_size == 0:
        assert BatchConfig(global_size=global_size, max_per_rank=4096).split(world_size).num_micro_batches == 1
        return
    with pytest.raises(ConfigError, match=f"not divisible by {world_size} ranks") as caught:
        batch.split(world_size)
    assert str(global_size // world_size * world_size + world_size) in str(caught.value)


@given(size=st.integers(1, 512))
def test_resizing_an_input_keeps_a_valid_input(size: int) -> None:
    resized = InputConfig().resized(size)
    assert resized.size == size
    assert resized.resize_side >= size


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Unknown key momentun\. Did you mean 'momentum'"):
        build(RecipeConfig, {"momentun": 0.9})


def test_missing_key_names_the_argument_to_add() -> None:
    from pipeline.config.model import ModelConfig

    with pytest.raises(ConfigError, match="name is not set"):
        build(ModelConfig, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "fast"}, "lr='fast' must be of type float"),
        ({"lr": True}, "lr=True must be of type float"),
        ({"lr": None, "optimizer": "adamw"}, r"recipe\.lr is null.*give recipe\.lr with adamw"),
        ({"lr": -1.0}, "recipe.lr=-1.0 must be positive"),
        ({"decay": "linaer"}, "Did you mean 'linear'"),
        ({"nesterov": True, "momentum": 0.0}, "recipe.nesterov"),
        ({"nesterov": True, "optimizer": "adamw", "lr": 0.001}, "recipe.nesterov=true is of SGD"),
        ({"optimizer": "adam"}, "recipe.optimizer"),
        ({"head_lr_factor": -1.0}, "recipe.head_lr_factor"),
        ({"beta2": 1.0}, "recipe.beta2"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(RecipeConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hook": "fp17"}, "Did you mean 'fp16'"),
        ({"powersgd_rank": 0}, r"comm\.powersgd_rank=0 must be at least 1"),
        ({"powersgd_start_step": 1}, r"comm\.powersgd_start_step=1 must be at least 2"),
        ({"hook": "powersgd", "find_unused_parameters": True}, r"set comm\.find_unused_parameters=false"),
        ({"period": 0}, r"comm\.period=0 must be at least 1"),
        ({"period": 4, "hook": "bf16"}, r"comm\.hook=bf16 compresses gradients.*set comm\.hook=none"),
        ({"period": 4, "rule": "qrs"}, "Did you mean 'qsr'"),
        ({"period": 4, "rule": "post_local"}, r"needs comm\.local_start_step="),
        ({"period": 4, "rule": "qsr"}, r"comm\.rule=qsr with comm\.qsr_alpha=None"),
        ({"period": 4, "qsr_alpha": 0.1}, r"comm\.qsr_alpha=0\.1 is of comm\.rule=qsr"),
        ({"period": 4, "local_start_step": -1}, r"comm\.local_start_step=-1 must not be negative"),
        ({"rule": "qsr"}, r"comm\.rule=qsr is about local steps: set comm\.period="),
        ({"local_start_step": 3}, r"comm\.local_start_step=3 is about local steps"),
        ({"codec": "int8"}, r"comm\.codec=int8 is about local steps: set comm\.period="),
        ({"period": 8, "codec": "int9"}, "Did you mean 'int8'"),
        ({"period": 8, "outer_lr": 0.0}, r"comm\.outer_lr=0\.0 must be positive"),
        ({"period": 8, "outer_momentum": 1.0}, r"comm\.outer_momentum=1\.0 must be at least 0.*less than 1"),
        ({"period": 8, "fragments": 0}, r"comm\.fragments=0 must be at least 1"),
        ({"period": 8, "fragments": 9}, r"comm\.fragments=9 .* comm\.period=8: set it to at most 8"),
        ({"period": 8, "delay": -1}, r"comm\.delay=-1 must not be negative"),
        ({"period": 8, "delay": 8}, r"comm\.delay=8 must be less than the 8 steps.*at most 7"),
        ({"period": 8, "fragments": 3, "delay": 2}, r"comm\.delay=2 must be less than the 2 steps.*at most 1"),
    ],
)
def test_impossible_compressions_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(CommConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache_bytes": 0}, r"data\.cache_bytes=0 must be positive"),
        ({"fetch_timeout_seconds": 0}, r"data\.fetch_timeout_seconds must be positive"),
        ({"shuffle_groups": 0}, r"data\.shuffle_groups=0 must be >= 1"),
        ({"tail": "wrap"}, r"data\.tail='wrap'.*drop.*pad"),
    ],
)
def test_impossible_ways_to_read_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, values)


@pytest.mark.parametrize("option", ["recipe.ema_decay=0.9", "recipe.prune.density=0.5"])
def test_what_needs_the_same_weights_in_every_step_is_refused_beside_local_steps(option: str) -> None:
    options = ["name=a", "data.root=x", "trainer.max_steps=1", "comm=local", option]
    with pytest.raises(ConfigError, match=option.replace(".", r"\.") + r" .*comm\.period=16"):
        compose("train", TrainConfig, options)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (["batch.global_size=512"], 0.04),
        (["batch.global_size=32"], 0.0025),
        (["batch.global_size=8192"], 0.08),
        (["batch.global_size=32", "recipe.lr=0.03"], 0.03),
        (["batch.global_size=32", "recipe=adamw"], 0.0005),
    ],
)
def test_a_rate_that_is_not_given_is_in_proportion_to_the_batch(options: list[str], rate: float) -> None:
    config = compose("train", TrainConfig, ["name=a", "data.root=x", "trainer.max_steps=1", *options])
    assert config.recipe.learning_rate(config.recipe.warmup_steps, 200) == pytest.approx(rate, rel=1e-12)


def test_groups_that_do_not_divide_the_batch_are_refused() -> None:
    options = ["name=a", "data.root=x", "trainer.max_steps=1", "batch.global_size=12", "data.shuffle_groups=5"]
    with pytest.raises(ConfigError, match=r"data\.shuffle_groups=5 must divide batch\.global_size=12"):
        compose("train", TrainConfig, options)


@pytest.mark.parametrize("root", ["https://host:8080/a/b", "s3://bucket/pre/fix", "shards/odd@name?#", "/a/b"])
def test_addresses_without_secrets_are_taken(root: str) -> None:
    assert DataConfig(root=root).root == root


@pytest.mark.parametrize(
    "root", ["http://me:geheim@host/x", "http://geheim@host/x", "http://me:geh/eim@host", "http://host/x?key=geheim"]
)
def test_an_address_with_a_secret_is_refused_without_it(root: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.root=http://.*\*\*\*.* must hold no user") as caught:
        DataConfig(root=root)
    assert "geh" not in str(caught.value) and "eim" not in str(caught.value)


def test_nothing_says_how_long_to_train() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps or trainer\.max_epochs"):
        TrainerConfig()


def test_plain_containers_survive_a_round_trip() -> None:
    recipe = build(RecipeConfig, {"lr": 1, "decay": "cosine"})
    assert recipe.lr == 1.0
    assert build(RecipeConfig, asdict(recipe)) == recipe
    given_input = build(InputConfig, {"mean": [104, 117, 123], "channel_order": "bgr"})
    assert given_input.mean == (104.0, 117.0, 123.0)
