"""The steps of a training that need no second rank: what is refused at each, and what is found."""

import dataclasses
import fcntl
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ledger.traffic import Placement
from pipeline.comm.timeline import Timeline
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.compute import choose_compute
from pipeline.core.errors import CheckpointError, ConfigError, DataError, UserError
from pipeline.data.shards.manifest import Manifest, Split
from pipeline.run.checkpoint import AtomicCheckpointIO, checkpoint_path, sidecar_path
from pipeline.run.launch.ranks import find_ranks
from pipeline.training import steps
from pipeline.training.preflight import check_before_ranks
from pipeline.training.resume import free_fields, must_match
from pipeline.training.world import World
from tests.making.pictures import picture
from tests.making.shards import write_manifest, write_tar

HASH = "of the shards"
NAMES = ("ant", "bee")
TRAINING = {"train-0.tar": 4, "train-1.tar": 4}


@pytest.fixture
def world() -> World:
    """Of one: it decides alone, so no process group is needed."""
    ranks = find_ranks(1, {})
    assert ranks is not None
    compute = choose_compute(accelerator="cpu", precision="fp32")
    timeline = Timeline(1)
    meter = CollectiveMeter(observers=[timeline])
    return World(ranks, compute, meter, timeline, Placement.assumed(1), num_threads=1)


def write_labelled(path: Path, labels: Iterable[str]) -> None:
    """A shard of pictures with these labels."""
    content = picture(0, height=8, width=8)
    write_tar(
        path, [{"__key__": f"{path.stem[-1]}{n:06d}", "jpg": content, "cls": label} for n, label in enumerate(labels)]
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two training shards of four pictures, one validation shard of three; classes 0, 1, 2."""
    root = tmp_path / "shards"
    root.mkdir()
    for name, labels in (("train-0.tar", "0120"), ("train-1.tar", "1201"), ("val-0.tar", "012")):
        write_labelled(root / name, labels)
    write_manifest(root, {"train": TRAINING, "val": {"val-0.tar": 3}}, classes=("a", "b", "c"))
    return root


def configure(tmp_path: Path, *overrides: str) -> TrainConfig:
    base = [f"run_root={tmp_path / 'runs'}", f"data.root={tmp_path / 'shards'}", "name=a", "trainer.max_steps=4"]
    return compose("train", TrainConfig, [*base, "batch.global_size=2", "data.size=32", *overrides])


def test_shards_are_opened_with_their_classes(tmp_path: Path, shards: Path, world: World) -> None:
    del shards
    opened = steps.open_shards(configure(tmp_path), world)
    assert (opened.training.num_samples, opened.num_classes) == (8, 3)
    assert opened.validation is not None and opened.validation.num_samples == 3
    assert steps.open_shards(configure(tmp_path, "model.num_classes=1000"), world).num_classes == 1000
    assert steps.open_shards(configure(tmp_path, "trainer.validate_every_steps=0"), world).validation is None


def spoil(shards: Path, how: str) -> None:
    target = shards / "train-1.tar"
    if how == "missing":
        target.unlink()
    elif how == "shorter":
        target.write_bytes(target.read_bytes()[:-1024])
    elif how == "another content":
        content = bytearray(target.read_bytes())
        content[600] ^= 255
        target.write_bytes(content)
    elif how == "another count":
        manifest = Manifest.load(shards)
        split = Split(tuple(dataclasses.replace(shard, num_samples=9) for shard in manifest.split("train").shards))
        Manifest(manifest.classes, {**manifest.splits, "train": split}).save(shards)
    elif how in ("a label too high", "a label below zero", "not a label"):
        label = {"a label too high": "3", "a label below zero": "-1", "not a label": "cat"}[how]
        write_labelled(target, ["1", label, "0", "1"])
        write_manifest(shards, {"train": TRAINING, "val": {"val-0.tar": 3}}, classes=("a", "b", "c"))
    elif how == "no validation split":
        manifest = Manifest.load(shards)
        Manifest(manifest.classes, {"train": manifest.split("train")}).save(shards)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "train-1.tar"),
        ("shorter", "train-1.tar"),
        ("another content", "train-1.tar"),
        ("another count", "train-0.tar"),
        ("a label too high", "000001"),
        ("a label below zero", "000001"),
        ("not a label", "000001"),
    ],
)
def test_shards_that_are_not_what_they_say_are_data_errors(
    how: str, words: str, tmp_path: Path, shards: Path, world: World
) -> None:
    spoil(shards, how)
    with pytest.raises(DataError) as raised:
        steps.open_shards(configure(tmp_path, "data.verify=sha256"), world)
    assert words in str(raised.value) and raised.value.exit_code == 3


@pytest.mark.usefixtures("shards")
def test_a_classifier_smaller_than_the_labels_is_refused(tmp_path: Path, world: World) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_classes=2, but the shards have 3 classes"):
        steps.open_shards(configure(tmp_path, "model.num_classes=2"), world)


def test_a_label_of_foreign_shards_beyond_the_classifier_is_named(tmp_path: Path, shards: Path, world: World) -> None:
    """Nothing but the classifier says how many classes there are, so that it may be the label which is wrong."""
    (shards / "manifest.json").unlink()
    write_labelled(shards / "train-1.tar", "1251")
    assert steps.open_shards(configure(tmp_path), world).num_classes == 6
    assert steps.open_shards(configure(tmp_path, "model.num_classes=6"), world).num_classes == 6
    with pytest.raises(DataError, match=r"'1000002' of shard train-1\.tar has label 5.*model\.num_classes=4") as raised:
        steps.open_shards(configure(tmp_path, "model.num_classes=4"), world)
    assert raised.value.exit_code == 3


def test_one_class_alone_is_refused_in_words(tmp_path: Path, shards: Path, world: World) -> None:
    (shards / "manifest.json").unlink()
    for name, labels in (("train-0.tar", "0000"), ("train-1.tar", "0000"), ("val-0.tar", "000")):
        write_labelled(shards / name, labels)
    with pytest.raises(DataError, match=r"'train' has one class alone.*set model\.num_classes=2"):
        steps.open_shards(configure(tmp_path), world)
    assert steps.open_shards(configure(tmp_path, "model.num_classes=2"), world).num_classes == 2


@pytest.mark.parametrize(("more", "said"), [((), "training split is 3"), (("model.num_classes=4",), "num_classes=4")])
def test_a_validation_label_that_training_does_not_know_is_named(
    more: tuple[str, ...], said: str, tmp_path: Path, shards: Path, world: World
) -> None:
    (shards / "manifest.json").unlink()
    write_labelled(shards / "val-0.tar", "0172")
    with pytest.raises(DataError, match=rf"'0000002' of shard val-0\.tar has label 7.*{said}"):
        steps.open_shards(configure(tmp_path, *more), world)
    steps.open_shards(configure(tmp_path, *more, "trainer.validate_every_steps=0"), world)
    assert steps.open_shards(configure(tmp_path, "model.num_classes=8"), world).num_classes == 8


# --- the run directory ---


def test_without_a_validation_split_it_trains_and_says_so_unless_validation_is_asked_for(
    tmp_path: Path, shards: Path, world: World
) -> None:
    spoil(shards, "no validation split")
    check_before_ranks(configure(tmp_path))
    opened = steps.open_shards(configure(tmp_path), world)
    assert opened.validation is None
    ways = ("data.val_split=", "val_fraction=", "trainer.validate_every_steps=0")
    assert "no split 'val'" in opened.why_not_validated and all(way in opened.why_not_validated for way in ways)
    silent = steps.open_shards(configure(tmp_path, "trainer.validate_every_steps=0"), world)
    assert (silent.validation, silent.why_not_validated) == (None, "")
    asked = configure(tmp_path, "trainer.validate_every_steps=2")
    for check in (check_before_ranks, lambda config: steps.open_shards(config, world)):
        with pytest.raises(DataError, match="no split 'val'"):
            check(asked)


@pytest.fixture
def opened(tmp_path: Path, world: World) -> Iterator[steps.RunDirectory]:
    run = steps.open_run(configure(tmp_path), world)
    yield run
    run.close()


@pytest.mark.usefixtures("opened")
def test_a_second_job_on_a_run_is_refused(tmp_path: Path, world: World) -> None:
    with pytest.raises(UserError, match="being written by another process") as raised:
        steps.open_run(configure(tmp_path), world)
    assert raised.value.exit_code == 2


def test_an_earlier_start_that_keeps_the_lock_is_waited_for_no_longer_than_the_other_ranks_wait(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier start of the job: a lock of this process, and the name of another host."""
    path = tmp_path / "runs" / "a" / "lock"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": "77", "restart": "0"}))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"after 1 s .* the same command goes on") as raised:
            steps.open_run(configure(tmp_path), dataclasses.replace(world, timeout_seconds=2.0))
    assert raised.value.exit_code == 75


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, world: World) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(UserError, match="a part of that path is a file: set run_root=") as raised:
        steps.open_run(configure(tmp_path), world)
    assert raised.value.exit_code == 2


def test_a_fresh_run_starts_at_nothing(tmp_path: Path, world: World, opened: steps.RunDirectory) -> None:
    assert steps.find_start(configure(tmp_path), world, opened, HASH, NAMES) == steps.Start()


def save(config: TrainConfig, run: steps.RunDirectory, step: int, world_size: int = 1) -> Path:
    """A checkpoint that holds nothing but our own section."""
    path = checkpoint_path(run.checkpoints, step)
    section = {"step": step, "world_size": world_size, "model": config.model.name}
    section |= {"must_match": must_match(config, HASH), "free_fields": free_fields(config), "classes": list(NAMES)}
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "squeezewire": section}, path)
    return path


def test_the_newest_sound_checkpoint_is_where_it_starts(
    tmp_path: Path, world: World, opened: steps.RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path)
    save(config, opened, 2)
    newest = save(config, opened, 3)
    assert steps.find_start(config, world, opened, HASH, NAMES).step == 3
    newest.write_bytes(newest.read_bytes()[:-1])
    assert steps.find_start(config, world, opened, HASH, NAMES).step == 2
    assert "step=000000003.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=1", "seed was 0 and is 1"),
        ("batch.global_size=4", "batch.global_size was 2 and is 4"),
        ("model=squeezenet1_0", "model.name was 'squeezenet1_1' and is 'squeezenet1_0'"),
        ("data.shuffle_block=3", "data.shuffle_block was 0 and is 3"),
        ("data.tail=pad", "data.tail was 'drop' and is 'pad'"),
        ("recipe.prune.scope=global", "recipe.prune.scope was 'layer' and is 'global'"),
    ],
)
def test_a_run_does_not_change_what_it_is(
    override: str, words: str, tmp_path: Path, world: World, opened: steps.RunDirectory
) -> None:
    save(configure(tmp_path), opened, 2)
    with pytest.raises(CheckpointError) as raised:
        steps.find_start(configure(tmp_path, override), world, opened, HASH, NAMES)
    assert words in str(raised.value) and "another name=" in str(raised.value) and raised.value.exit_code == 4


def test_a_field_that_an_older_version_did_not_have_had_its_default(
    tmp_path: Path, world: World, opened: steps.RunDirectory
) -> None:
    known = must_match(configure(tmp_path), HASH)
    del known["data.tail"], known["data.shuffle_groups"]
    known = {key: value for key, value in known.items() if not key.startswith("recipe.prune.")}
    section = {"step": 2, "world_size": 1, "model": "squeezenet1_1", "must_match": known}
    content = {"state_dict": {}, "squeezewire": section}
    AtomicCheckpointIO().save_checkpoint(content, checkpoint_path(opened.checkpoints, 2))
    assert steps.find_start(configure(tmp_path), world, opened, HASH, NAMES).step == 2
    for override, words in (
        ("data.tail=pad", "data.tail was 'drop' and is 'pad'"),
        ("data.shuffle_groups=2", "data.shuffle_groups was 1 and is 2"),
        ("prune=third", r"recipe.prune.density was 1.0 and is 0.33"),
    ):
        with pytest.raises(CheckpointError, match=words):
            steps.find_start(configure(tmp_path, override), world, opened, HASH, NAMES)


def test_a_run_may_be_made_longer_and_validated_otherwise(
    tmp_path: Path, world: World, opened: steps.RunDirectory
) -> None:
    save(configure(tmp_path), opened, 2)
    longer = configure(tmp_path, "trainer.max_steps=99", "trainer.validate_every_steps=7", "recipe.lr=0.5")
    start = steps.find_start(longer, world, opened, HASH, NAMES)
    assert start.step == 2
    assert set(start.changes) == {
        "trainer.max_steps was 4 and is 99",
        "trainer.validate_every_steps was None and is 7",
        "recipe.lr was 0.00015625 and is 0.5",
    }
    assert steps.find_start(configure(tmp_path), world, opened, HASH, NAMES).changes == ()


def test_a_run_goes_on_at_the_rate_that_it_began_with_unless_one_is_given(
    tmp_path: Path, world: World, opened: steps.RunDirectory
) -> None:
    """As one of an older version does, whose default was 0.04 for every batch; finished or not."""
    save(configure(tmp_path, "recipe.lr=0.04"), opened, 4)

    def again(*overrides: str) -> tuple[float | None, tuple[str, ...]]:
        config = configure(tmp_path, *overrides)
        start = steps.find_start(config, world, opened, HASH, NAMES)
        setup = steps.Setup(config, world, cast(Any, None), cast(Any, None), opened, start)
        if not overrides:
            setup.refuse_without_effect()
        return setup.config.recipe.lr, start.changes

    assert again() == (0.04, ())
    assert again("recipe.lr=0.5") == (0.5, ("recipe.lr was 0.04 and is 0.5",))


def test_a_finished_run_takes_no_other_settings(tmp_path: Path, world: World, opened: steps.RunDirectory) -> None:
    """Where it runs and how it is watched may differ; what would have made another run is not swallowed."""
    save(configure(tmp_path), opened, 4)

    def again(*overrides: str) -> None:
        config = configure(tmp_path, *overrides)
        start = steps.find_start(config, world, opened, HASH, NAMES)
        steps.Setup(config, world, cast(Any, None), cast(Any, None), opened, start).refuse_without_effect()

    again()
    again("cluster.num_threads=1", "tracking=disabled", "data.num_workers=3", "data.root=elsewhere")
    for override in ("recipe.lr=0.5", "data.size=48", "trainer.max_steps=3", "data.augment.flip=false"):
        with pytest.raises(ConfigError, match=rf"a is finished.*{override.partition('=')[0]} was .*another name="):
            again(override)


def test_other_packages_are_said(tmp_path: Path, world: World, opened: steps.RunDirectory) -> None:
    """As if an upgrade had come in between: the checkpoint's sidecar tells older versions, and other ranks."""
    config = configure(tmp_path)
    path = save(config, opened, 2, world_size=3)
    sidecar = sidecar_path(path)
    record = json.loads(sidecar.read_text())
    installed = record["versions"]["torch"]
    record["versions"] |= {"torch": "2.4.0", "gone": "1"}
    sidecar.write_text(json.dumps(record))
    assert steps.find_start(config, world, opened, HASH, NAMES).changes == (
        "the number of ranks was 3 and is 1",
        f"torch was '2.4.0' and is '{installed}'",
        "gone was '1' and is None",
    )


def test_a_sidecar_of_another_step_is_refused(tmp_path: Path, world: World, opened: steps.RunDirectory) -> None:
    """Else a run of which three steps are done would count as finished."""
    config = configure(tmp_path)
    path, far = save(config, opened, 3), checkpoint_path(opened.checkpoints, 999_999_999)
    record = json.loads(sidecar_path(path).read_text())
    path.rename(far)
    sidecar_path(far).write_text(json.dumps(record | {"step": 999_999_999}))
    with pytest.raises(CheckpointError, match=r"holds step 3, and its sidecar says 999999999"):
        steps.find_start(config, world, opened, HASH, NAMES)


def test_other_shards_are_refused(tmp_path: Path, world: World, opened: steps.RunDirectory) -> None:
    save(configure(tmp_path), opened, 2)
    with pytest.raises(CheckpointError, match=r"data\.shards_sha256 was 'of the shards' and is 'of others'") as raised:
        steps.find_start(configure(tmp_path), world, opened, "of others", NAMES)
    assert "another name=" in str(raised.value) and raised.value.exit_code == 4


def test_other_names_for_the_same_labels_are_refused(tmp_path: Path, world: World, opened: steps.RunDirectory) -> None:
    config = configure(tmp_path)
    save(config, opened, 2)
    assert steps.find_start(config, world, opened, HASH, None).step == 2  # foreign shards name nothing
    with pytest.raises(CheckpointError, match=r"the name of class 1 was 'bee' and is 'cat'"):
        steps.find_start(config, world, opened, HASH, ("ant", "cat"))
    with pytest.raises(CheckpointError, match=r"the name of class 2 was not there and is 'cat'"):
        steps.find_start(config, world, opened, HASH, (*NAMES, "cat"))


def test_checkpoints_none_of_which_is_sound_are_not_trained_over(
    tmp_path: Path, world: World, opened: steps.RunDirectory
) -> None:
    path = save(configure(tmp_path), opened, 2)
    path.write_bytes(b"gone")
    with pytest.raises(UserError, match="none verifies") as raised:
        steps.find_start(configure(tmp_path), world, opened, HASH, NAMES)
    assert raised.value.exit_code == 4
