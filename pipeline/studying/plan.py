"""The trainings of a study before the first of them: known, possible on these ranks, alike in what is not compared."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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
from pipeline.models import zoo
from pipeline.models.cost import ModelCost, cost
from pipeline.models.trial import try_apart
from pipeline.run.directory import validate_name
from pipeline.run.memory import available_memory, refusal

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
    variants: tuple[Planned, ...]

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
    plan = Plan(config, launcher, index.num_samples, tuple(planned))
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
        """Collect the error that the block raises, with the variant's name before it."""
        try:
            yield
        except UserError as error:
            self.add(f"{name}: {error}")

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
        slug = slug_of(variant.name)
        if slug in slugs:
            said = f"the name {variant.name!r}" if variant.name == slugs[slug] else f"the directory {slug!r}"
            yield f"Two variants share {said}: give each a name of its own."
        slugs[slug] = variant.name


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
    if comm.period is not None and plan.config.study.budget.gigabytes is not None:
        yield (
            f"{planned.variant.name}: with comm.period={comm.period} a few steps do not tell how many a budget of"
            " gigabytes pays for: set study.budget.steps, .epochs or .seconds instead."
        )
    if comm.period is not None and num_steps is not None and comm.local_start_step + comm.period > num_steps:
        yield (
            f"{planned.variant.name}: comm.period={comm.period} is longer than what its runs have of their {num_steps}"
            " steps: lower it, or raise study.budget."
        )


# --- what is there already ---


def record_path(plan: Plan, planned: Planned, run: str) -> Path:
    """Return where the study keeps what a run was told and how it ended: beside the run's directory."""
    return plan.config.directory / planned.slug / f"{run}.json"


def read_record(path: Path) -> dict[str, Any]:
    """Return what `write_record` of the runs left; empty where none was begun, or nothing can be read."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def differing_keys(told: Sequence[str], now: Sequence[str]) -> list[str]:
    """Return the keys of which two lists of overrides say different things."""
    one, other = (dict(map(split_override, overrides)) for overrides in (told, now))
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _of_earlier_runs(plan: Plan, planned: Planned) -> Iterator[str]:
    """Yield a sentence for each run that is there and was told something else than it would be now."""
    num_steps = plan.num_steps(planned)
    for seed in plan.config.study.seeds:
        run = f"seed{seed}"
        directory, record = plan.config.directory / planned.place(run), read_record(record_path(plan, planned, run))
        if not record:
            if directory.exists():
                yield f"{directory} exists and was not made by a study: choose another name=."
            continue
        steps = {} if num_steps is None else {"trainer.max_steps": num_steps}
        differing = differing_keys(record["overrides"], plan.overrides(planned, run, {"seed": seed, **steps}))
        if num_steps is None:
            differing = [key for key in differing if key != "trainer.max_steps"]
        if differing:
            yield (
                f"{directory} was begun with other values of {', '.join(differing)}: choose another name=, set them"
                f" back, or remove {directory.parent}."
            )
