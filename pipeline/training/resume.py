"""What changed between a checkpoint and the attempt that resumes from it: refused, or reported.

A field that decides which pictures meet which weights must match. Every other field takes its new value, and the change
is said and kept in `attempts.jsonl`: a learning rate that was edited, a package that was upgraded, other ranks.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.privacy import published
from pipeline.config.training import TrainConfig
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.trees import flat, plain
from pipeline.models.external import source_sha256
from pipeline.run.checkpoint_files import SectionJson
from pipeline.run.provenance import versions

NO_PART_OF_THE_RESULT = (
    "cluster.",
    "tracking.",
    "trainer.report_",
    "data.root",
    "data.cache_",
    "data.num_workers",
    "data.fetch_",
    "data.verify",
)
# The directory that holds the checkpoint is where it is; what is allowed is no part of a run.
NOT_WORTH_SAYING = ("name", "run_root", "privacy", "model.allow_code")


def free_fields(config: TrainConfig) -> dict[str, object]:
    """What a resumed run may change: plain values by dotted key, as a checkpoint keeps them."""
    fixed = {*must_match(config, ""), *NOT_WORTH_SAYING}
    leaves = flat(published(config))
    return {key: plain(value) for key, value in leaves.items() if key not in fixed and value != {}}


def at_its_rate(config: TrainConfig, section: SectionJson) -> TrainConfig:
    """Return the configuration of a run that goes on: at the rate that it began with, unless another one is given.

    What is derived from the batch where nothing is given has not always been the same.
    """
    lr = (section.get("free_fields") or {}).get("recipe.lr")
    if config.has_given_lr or not isinstance(lr, float):
        return config
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, lr=lr))


def refuse_drift(
    config: TrainConfig, shards_hash: str, classes: Sequence[str] | None, section: SectionJson, path: Path
) -> None:
    """Compare what must match.

    Args:
        config: of the attempt that resumes.
        shards_hash: hash of the training split's index.
        classes: class names in the order of the labels; None: the shards do not name them.
        section: our part of the checkpoint at `path`.
        path: of the checkpoint.

    Raises:
        CheckpointError: a field differs; all that do are named, with both values.
    """
    saved = {**BEFORE_IT_WAS_A_FIELD, **section["must_match"]}
    different = _differences(saved, {k: v for k, v in must_match(config, shards_hash).items() if k in saved})
    named = section.get("classes")
    if named is not None and classes is not None and named != list(classes):
        first = next(label for label, pair in enumerate(itertools.zip_longest(named, classes)) if pair[0] != pair[1])
        was, now = (repr(names[first]) if first < len(names) else "not there" for names in (named, classes))
        different.append(f"the name of class {first} was {was} and is {now}")
    if different:
        raise CheckpointError(
            f"{path} was made by another configuration ({'; '.join(different)}): set it back to resume, or give another"
            " name= for a new run."
        )


def changes(config: TrainConfig, world_size: int, section: SectionJson, made_with: Mapping[str, str]) -> list[str]:
    """A clause for each free field, package and number of ranks that differs from the checkpoint's.

    Args:
        config: of the attempt that resumes.
        world_size: its number of ranks.
        section: our part of the checkpoint. What an older one does not tell is not compared.
        made_with: package versions of the checkpoint.
    """
    saved = section.get("free_fields")
    fields = [] if saved is None else _differences(saved, free_fields(config))
    ranks = _differences({"the number of ranks": section["world_size"]}, {"the number of ranks": world_size})
    now = versions()
    packages = _differences(made_with, {name: now.get(name) for name in made_with})
    return [*fields, *ranks, *packages]


def refuse_without_effect(config: TrainConfig, section: SectionJson) -> None:
    """Refuse what a command changes of a finished run: nothing of it would have an effect.

    Where it runs, how it is watched and where its shards lie may be anything.

    Args:
        config: Of the command.
        section: Our part of the run's last checkpoint. What an older one does not tell is not compared.

    Raises:
        ConfigError: Something is changed.
    """
    now = free_fields(config)
    saved = {
        key: value
        for key, value in (section.get("free_fields") or {}).items()
        if key in now and not key.startswith(NO_PART_OF_THE_RESULT)
    }
    if different := _differences(saved, {key: now[key] for key in saved}):
        raise ConfigError(
            f"{config.name} is finished, and what the command changes would have no effect ({'; '.join(different)}):"
            " give another name= for a new run, or raise trainer.max_steps or trainer.max_epochs to go on with it."
        )


def _differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """`key was 1 and is 2`, for keys of both and of one alone; a list and a tuple of the same values are the same."""
    return [
        f"{key} was {_shown(old, key)} and is {_shown(new, key)}"
        for key in [*old, *(key for key in new if key not in old)]
        if key not in old or key not in new or plain(old[key]) != plain(new[key])
    ]


def _shown(values: Mapping[str, object], key: str) -> str:
    return repr(plain(values[key])) if key in values else "not there"


BEFORE_IT_WAS_A_FIELD = {
    "data.shuffle_groups": 1,
    "data.tail": "drop",
    "recipe.optimizer": "sgd",
    "recipe.prune.density": 1.0,
}
"""What checkpoints of versions without these fields were made with."""


def must_match(config: TrainConfig, shards_hash: str) -> dict[str, object]:
    """The fields a checkpoint carries and a resumed run must not change, with their values.

    `shards_hash` is the hash of the training split's index.
    """
    source = source_sha256(config.model.name, allow_code=config.model.allow_code)
    return {
        "model.name": config.model.name,
        **({} if source is None else {"model.source_sha256": source}),
        "seed": config.seed,
        "batch.global_size": config.batch.global_size,
        "data.shuffle_block": config.data.shuffle_block,
        "data.shuffle_groups": config.data.shuffle_groups,
        "data.tail": config.data.tail,
        "data.shards_sha256": shards_hash,
        "recipe.optimizer": config.recipe.optimizer,
        **{f"recipe.prune.{key}": value for key, value in dataclasses.asdict(config.recipe.prune).items()},
    }
