"""The trainings of a study before the first of them: known, possible on these ranks, alike in what is not compared."""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.comparison.candidates import slug_of
from pipeline.comparison.launcher import Launcher, choose_launcher
from pipeline.config.study import StudyConfig, Variant
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.compute import choose_accelerator
from pipeline.core.errors import ConfigError, DataError, UserError
from pipeline.core.overrides import literal, split_override
from pipeline.core.trees import flat
from pipeline.core.typed import require
from pipeline.data.index import open_split
from pipeline.data.order import steps_per_epoch
from pipeline.data.shards.manifest import NoSplitError
from pipeline.models import zoo
from pipeline.models.cost import ModelCost, cost
from pipeline.models.trial import try_apart
from pipeline.run.directory import validate_name
from pipeline.run.memory import available_memory, refusal
from pipeline.studying.records import (
    LOCK,
    SUFFIXES,
    differing_keys,
    earlier_shards,
    read_record,
    record_path,
)

# What the study itself tells every training: a variant that said otherwise would not stand on the same ground.
RESERVED = ("name", "run_root", "seed", "trainer.max_steps", "trainer.max_epochs")
RESERVED_GROUPS = ("data", "cluster")
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Facts:
    """What is known of a variant without a run."""

    config: TrainConfig
    """Of its trainings, but for the seed."""
    of_one: ModelCost
    """What one picture takes."""
    of_batch: ModelCost
    """What a rank's batch takes."""
    num_parameters_of_1000_classes: int
    """As publications count, whose sizes are those of ImageNet's classifier."""

    @property
    def memory_of_rank_bytes(self) -> int:
        """What a rank certainly needs: weights, buffers, gradients, momentum, and the activations that are kept."""
        one = self.of_one
        return (
            4 * one.num_parameters + one.buffer_bytes + 2 * one.gradient_bytes + self.of_batch.training_activation_bytes
        )


@dataclass(frozen=True)
class Planned:
    """A variant, and what its trainings are told; the seed and the steps are still to come."""

    variant: Variant
    slug: str
    """Its directory below the study's."""
    overrides: tuple[str, ...]
    facts: Facts

    def place(self, run: str) -> str:
        """Return the directory of one of its runs, `seed0` say, below the study's."""
        return f"{self.slug}/{run}"


@dataclass(frozen=True)
class Plan:
    """What is to be trained."""

    config: StudyConfig
    launcher: Launcher
    num_samples: int
    """Pictures of the training split."""
    shards_sha256: str
    """Their content and order, as environment.json of a run has it."""
    variants: tuple[Planned, ...]

    @property
    def conditions(self) -> dict[str, Any]:
        """What makes runs what they are besides the overrides of `train`, by key; as JSON has it."""
        budget = self.config.study.budget
        return {
            "launcher": self.launcher.kind,
            "ranks": self.launcher.num_ranks,
            "machines": self.launcher.num_machines,
            **flat({"lab": asdict(self.config.lab)}),
            # What is counted in steps is told as trainer.max_steps.
            "study.budget": {"kind": budget.kind, "amount": budget.amount} if budget.is_measured else "counted",
        }

    def steps_per_epoch(self, planned: Planned) -> int:
        """Return the optimiser steps of a pass over the training split."""
        return steps_per_epoch(self.num_samples, planned.facts.config.batch.global_size, self.config.data.tail)

    def num_steps(self, planned: Planned) -> int | None:
        """Return the steps of each of its runs; None: a run of a few steps is to tell."""
        budget = self.config.study.budget
        if budget.kind == "steps":
            return budget.steps
        if budget.epochs is not None:
            return max(1, math.floor(budget.epochs * self.steps_per_epoch(planned)))
        return None

    def overrides(self, planned: Planned, run: str, values: Mapping[str, Any]) -> list[str]:
        """Return all that `train` is told in one run.

        Args:
            planned: Its variant.
            run: Its name below the variant's.
            values: By key, what this run has of its own.
        """
        told = {**_where(self.config, f"{self.config.name}/{planned.place(run)}"), "trainer.max_epochs": None, **values}
        return [*planned.overrides, *(f"{key}={literal(value)}" for key, value in told.items())]


def make_plan(config: StudyConfig) -> Plan:
    """Return what is to be trained; everything that can be known to be wrong with it is said at once.

    Raises:
        ConfigError: after a line for each fault. Variants that share a name or a directory, differ in data or seed, or
            cannot be composed, built or run on these ranks; runs that are there and were told something else.
        DataError: there are no shards at data.root.
    """
    launcher = choose_launcher(config)
    validate_name(config.name)
    index = open_split(config.data, config.data.train_split)
    faults = _Faults()
    faults.add(*_of_names(config))
    planned: list[Planned] = []
    for variant in config.study.chosen:
        with faults.of(variant.name):
            planned.append(_plan_variant(config, launcher, variant, index.num_classes, index.num_samples))
    with faults.of(""):
        _check_validation(config)
    plan = Plan(config, launcher, index.num_samples, index.index_hash, tuple(planned))
    for one in planned:
        faults.add(*_of_steps(plan, one), *_of_earlier_runs(plan, one))
    faults.refuse(config.name)
    return plan


class _Faults:
    """Sentences about what is wrong, collected."""

    def __init__(self) -> None:
        self._said: list[str] = []

    def add(self, *sentences: str) -> None:
        self._said += [sentence for sentence in sentences if sentence not in self._said]

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Collect the error that the block raises, with the variant's name before it, if it is of one."""
        try:
            yield
        except UserError as error:
            self.add(f"{name}: {error}" if name else str(error))

    def refuse(self, name: str) -> None:
        """Say every fault, if there is one.

        Raises:
            ConfigError: there is one.
        """
        if len(self._said) == 1:
            raise ConfigError(self._said[0])
        if self._said:
            for sentence in self._said:
                print(f"error: {sentence}", file=sys.stderr)
            raise ConfigError(f"{len(self._said)} faults in the study {name}, each told above: nothing was started.")


def _of_names(config: StudyConfig) -> Iterator[str]:
    slugs: dict[str, str] = {}
    for variant in config.study.chosen:
        name, slug = variant.name, slug_of(variant.name).casefold()  # a disk may take a and A for the same
        if slug in slugs and name == slugs[slug]:
            yield f"Two variants share the name {name!r}: give each a name of its own."
        elif slug in slugs:
            yield f"The variants {slugs[slug]!r} and {name!r} would share a directory: give each a name of its own."
        if slug == LOCK or slug.startswith(f"{LOCK}."):
            yield f"The variant's name {name!r} is a file of the study's own: choose another."
        elif slug.endswith(SUFFIXES):
            yield f"The variant's name {name!r} ends like a file of the study's own ({', '.join(SUFFIXES)}): change it."
        slugs[slug] = name


def _check_validation(config: StudyConfig) -> None:
    try:
        open_split(config.data, config.data.val_split)
    except NoSplitError as error:
        known = str(error).partition(").")[0]
        raise DataError(
            f"{known}), and every run is validated: name one of them with data.val_split=, or prepare the pictures"
            " anew with val_fraction=0.1."
        ) from error


def _plan_variant(
    config: StudyConfig, launcher: Launcher, variant: Variant, num_classes: int, num_samples: int
) -> Planned:
    """Return a variant that can be trained here.

    Args:
        config: Of the study.
        launcher: Where the ranks run.
        variant: As the study's file has it.
        num_classes: Classes of the shards.
        num_samples: Pictures of the training split.
    """
    for override in (*config.study.overrides, *variant.overrides):
        _require_free(split_override(override)[0])
    groups = {"data": asdict(config.data), "cluster": {**asdict(config.cluster), "devices": launcher.devices}}
    common = {key: f"{key}={literal(value)}" for key, value in flat(groups).items()}
    told = {split_override(override)[0]: override for override in (*config.study.overrides, *variant.overrides)}
    overrides = ("tracking=disabled", *common.values(), *told.values())
    where = [
        f"{key}={literal(value)}" for key, value in _where(config, f"{config.name}/{slug_of(variant.name)}").items()
    ]
    train = compose("train", TrainConfig, [*overrides, *where, "trainer.max_steps=1"])
    validate_name(train.name)
    require(train.comm.meter, "comm.meter=false leaves nothing to count: leave it out.")
    require(
        train.trainer.validate_every_steps != 0,
        "trainer.validate_every_steps=0 would validate nothing: leave it out, which is once per epoch and at the end.",
    )
    require(
        train.model.num_classes in (None, num_classes),
        f"model.num_classes={train.model.num_classes}, but the shards have {num_classes} classes: leave it out.",
    )
    per_rank = train.batch.split(launcher.num_ranks).per_rank
    if num_samples < train.batch.global_size:
        raise DataError(
            f"batch.global_size={train.batch.global_size} is more than the {num_samples} training pictures."
        )
    side = train.input.size
    zoo.check_pictures(train.model, side, per_rank=per_rank)
    try_apart(train.model, num_classes, side=side, per_rank=per_rank)
    facts = _facts(train, num_classes, per_rank)
    available = available_memory(choose_accelerator(config.cluster.accelerator))
    said = refusal(facts.memory_of_rank_bytes, launcher.ranks_per_machine, available)
    require(not said, said)
    return Planned(variant, slug_of(variant.name), overrides, facts)


def _require_free(key: str) -> None:
    group, _, rest = key.partition(".")
    require(
        key not in RESERVED,
        f"{key} is the study's own, and the same for all that is compared: set"
        f" {'study.seeds' if key == 'seed' else 'study.budget' if rest else key}.",
    )
    require(
        group not in RESERVED_GROUPS,
        f"{key} would differ between variants that are compared: set it for the whole study, beside `study` in its file"
        " or on the command line.",
    )


def _facts(train: TrainConfig, num_classes: int, per_rank: int) -> Facts:
    told = train.model

    def shapes(classes: int) -> Any:
        return zoo.build_shapes(told.name, classes, allow_code=told.allow_code, **told.metaparameters)

    model = shapes(num_classes)
    return Facts(
        config=train,
        of_one=cost(model, train.input.size),
        of_batch=cost(model, train.input.size, per_rank),
        num_parameters_of_1000_classes=sum(one.numel() for one in shapes(IMAGENET_CLASSES).parameters()),
    )


def _where(config: StudyConfig, name: str) -> dict[str, str]:
    return {"name": name, "run_root": config.run_root}


def where_of(config: StudyConfig, name: str) -> list[str]:
    """Return name and run_root of a run, as overrides."""
    return [f"{key}={literal(value)}" for key, value in _where(config, name).items()]


def _of_steps(plan: Plan, planned: Planned) -> Iterator[str]:
    """Yield what is wrong with a variant's number of steps."""
    comm, num_steps = planned.facts.config.comm, plan.num_steps(planned)
    if comm.hook == "powersgd" and num_steps is not None and comm.powersgd_start_step >= num_steps:
        yield (
            f"{planned.variant.name}: comm.powersgd_start_step={comm.powersgd_start_step}, but its runs have"
            f" {num_steps} steps, so that none would be compressed: lower it, or raise study.budget."
        )
    budget = plan.config.study.budget
    if comm.period is not None and budget.is_measured:
        yield (
            f"{planned.variant.name}: with comm.period={comm.period} a few steps do not tell how many a budget of"
            f" {budget.kind} pays for: set study.budget.steps or .epochs instead."
        )
    if comm.period is not None and num_steps is not None and comm.local_start_step + comm.period > num_steps:
        yield (
            f"{planned.variant.name}: comm.period={comm.period} is longer than what its runs have of their {num_steps}"
            " steps: lower it, or raise study.budget."
        )


# --- what is there already ---


def _of_earlier_runs(plan: Plan, planned: Planned) -> Iterator[str]:
    """Yield a sentence for each run that is there and cannot be gone on with, or stand beside what is made now."""
    num_steps = plan.num_steps(planned)
    for seed in plan.config.study.seeds:
        run = f"seed{seed}"
        directory = plan.config.directory / planned.place(run)
        record = read_record(directory)
        if record is None:
            if record_path(directory).exists():
                yield (
                    f"{record_path(directory)} says nothing of what the run was told: choose another name=, or remove"
                    f" {directory.parent}."
                )
            elif directory.exists():
                yield f"{directory} exists and was not made by a study: choose another name=."
            continue
        steps = {} if num_steps is None else {"trainer.max_steps": num_steps}
        differing = differing_keys(record, plan.overrides(planned, run, {"seed": seed, **steps}), plan.conditions)
        if num_steps is None:
            differing = [key for key in differing if key != "trainer.max_steps"]
        if differing:
            yield (
                f"{directory} was begun with other values of {', '.join(differing)}: choose another name=, set them"
                f" back, or remove {directory.parent}."
            )
        elif earlier_shards(directory) not in (None, plan.shards_sha256):
            yield (
                f"{directory} was trained on other pictures than are at {plan.config.data.root} now: choose another"
                f" name=, put them back, or remove {directory.parent}."
            )
