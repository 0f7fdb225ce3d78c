"""The models of a comparison before their runs: known, accepted, and the overrides each training gets."""

import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.comparison.launcher import Launcher, choose_launcher
from pipeline.comparison.result import choose_baseline, label_with_hook
from pipeline.config.compare import CompareConfig
from pipeline.config.lab import LabConfig
from pipeline.config.model import ModelConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import DataError
from pipeline.core.overrides import literal
from pipeline.core.processes import our_module
from pipeline.core.trees import flat
from pipeline.core.typed import require
from pipeline.data.root import check_root
from pipeline.models import zoo
from pipeline.models.facts import ModelFacts, model_facts
from pipeline.models.trial import try_apart
from pipeline.run.directory import validate_name

# Fewest plain steps before PowerSGD's first that torch's hook takes.
_FEWEST_PLAIN_STEPS = 2


@dataclass(frozen=True)
class Candidate:
    """A row of the comparison before its run."""

    model: str
    hook: str
    label: str
    facts: ModelFacts
    overrides: tuple[str, ...]
    """Overrides of `pipeline.train`, without the shards."""
    alone_overrides: tuple[str, ...]
    """Overrides for the plain model on one rank with the same batch per rank, without the number of threads."""

    @property
    def slug(self) -> str:
        """Directory of the run below the comparison's: the label in the characters a run's name may have."""
        return slug_of(self.label)

    @property
    def alone_slug(self) -> str:
        """Directory of the run on one rank, which all compressions of the model share."""
        return f"alone/{slug_of(self.model)}"


def slug_of(label: str) -> str:
    """Return a label as a directory's name: `alexnet+bf16` of `alexnet + bf16`, `net@sr=0.5` of `net:sr=0.5`."""
    spec = label.replace(" ", "").replace(":", "@", 1)
    return "".join(character if character.isalnum() or character in "._-=,@+" else "_" for character in spec)


# --- checks before the first run ---


def check_candidates(config: CompareConfig) -> list[Candidate]:
    """Return every model with every hook, known to exist, to accept its metaparameters and to be trainable here.

    Raises:
        ConfigError: unknown model or metaparameter, impossible conditions, or a directory that is already in use.
    """
    choose_baseline(config.baseline, config.models)
    launcher = choose_launcher(config)
    config.batch.split(launcher.num_ranks)
    candidates = [candidate for spec in config.models for candidate in _of_model(config, launcher, spec)]
    slugs = [candidate.slug for candidate in candidates]
    require(
        len(set(slugs)) == len(slugs), f"Two of models={list(config.models)} would share a directory: leave one out."
    )
    for slug in (*slugs, *(candidate.alone_slug for candidate in candidates)):
        directory = config.directory / slug
        require(
            not directory.exists() or log_path(directory).exists(),
            f"{directory} exists and was not made by a comparison: choose another name=.",
        )
    return candidates


def log_path(directory: Path) -> Path:
    """Return where a run's output goes: beside its directory, which the training command makes."""
    return directory.with_name(f"{directory.name}.log")


def _of_model(config: CompareConfig, launcher: Launcher, spec: str) -> list[Candidate]:
    """Return the model once per hook."""
    model = zoo.format_spec(*zoo.parse_spec(spec))
    alone = _alone_overrides(config, launcher, model)
    facts: ModelFacts | None = None
    candidates = []
    for hook in config.all_hooks:
        label = label_with_hook(model, hook, config.hooks)
        overrides = _overrides(config, launcher, f"{config.name}/{slug_of(label)}", model, hook)
        train = _check_overrides(config, launcher, overrides)
        batch = train.batch.split(launcher.num_ranks)
        facts = facts or _facts(config, model, train.input.size, batch.per_rank)
        candidates.append(Candidate(model, hook, label, facts, tuple(overrides), tuple(alone)))
    return candidates


def _facts(config: CompareConfig, model: str, side: int, per_rank: int) -> ModelFacts:
    """Return what a model costs; one that others wrote is tried first."""
    name, metaparameters = zoo.parse_spec(model)
    told = ModelConfig(name=name, allow_code=config.allow_code, metaparameters=metaparameters)
    try_apart(told, config.num_classes, side=side, per_rank=per_rank)
    return model_facts(model, config.num_classes, side, per_rank, allow_code=config.allow_code)


def _check_overrides(config: CompareConfig, launcher: Launcher, overrides: Sequence[str]) -> TrainConfig:
    """Return the training's configuration, if it and the lab's are possible."""
    train = compose("train", TrainConfig, [*overrides, "data.root=checked-later"])
    validate_name(train.name)
    if launcher.kind == "lab":
        compose("lab", LabConfig, [*where_of(config, train.name), *launcher.lab])
    return train


def where_of(config: CompareConfig, name: str) -> list[str]:
    """Return name and run_root of a run, as overrides."""
    return [f"name={literal(name)}", f"run_root={literal(config.run_root)}"]


def _overrides(config: CompareConfig, launcher: Launcher, run: str, model: str, hook: str) -> list[str]:
    """Return the training command's overrides: the comparison's conditions, nothing left to a default that may differ.

    Args:
        config: Conditions of the comparison.
        launcher: How the training is started.
        run: Name of the run.
        model: Name of the model, with its metaparameters.
        hook: Compression of the run.
    """
    groups = {key: asdict(getattr(config, key)) for key in ("data", "batch", "cluster", "comm")}
    groups["data"].pop("root")
    groups["cluster"]["devices"] = launcher.devices
    groups["comm"]["hook"] = hook
    if hook == "powersgd":
        groups["comm"]["powersgd_start_step"] = powersgd_start_step(config)
    groups["tracking"] = asdict(config.tracking)
    is_tracked, mode = groups["tracking"].pop("trainings"), groups["tracking"].pop("mode")
    name, metaparameters = zoo.parse_spec(model)
    values = {
        "name": run,
        "run_root": config.run_root,
        "seed": config.seed,
        "model.num_classes": config.num_classes,
        "model.allow_code": config.allow_code,
        **{f"model.metaparameters.{key}": value for key, value in metaparameters.items()},
        **flat(groups),
        "trainer.max_steps": config.steps,
        "trainer.validate_every_steps": 0,
        "trainer.checkpoint_every_steps": 0,
        "trainer.precision": config.precision,
    }
    tracking = f"tracking={mode if is_tracked else 'disabled'}"
    return [f"model={literal(name)}", tracking, *(f"{key}={literal(value)}" for key, value in values.items())]


def _alone_overrides(config: CompareConfig, launcher: Launcher, model: str) -> list[str]:
    """Return the overrides for the plain model on one rank, with what each rank has in the comparison."""
    per_rank = config.batch.global_size // launcher.num_ranks
    single = replace(
        config, batch=replace(config.batch, global_size=per_rank), data=replace(config.data, shuffle_groups=1)
    )
    run = f"{config.name}/alone/{slug_of(model)}"
    overrides = _overrides(single, replace(launcher, kind="local", num_ranks=1), run, model, "none")
    return [override for override in overrides if not override.startswith("cluster.num_threads=")]


def powersgd_start_step(config: CompareConfig) -> int:
    """Return the plain steps before PowerSGD's first: as asked, or the fewest possible if none would be compressed.

    Raises:
        ConfigError: the steps do not suffice even so.
    """
    require(
        config.steps > _FEWEST_PLAIN_STEPS,
        f"steps={config.steps} leaves PowerSGD none to compress: its first {_FEWEST_PLAIN_STEPS} are plain, so set"
        f" steps to at least {_FEWEST_PLAIN_STEPS + 1}.",
    )
    asked = config.comm.powersgd_start_step
    return asked if asked < config.steps else _FEWEST_PLAIN_STEPS


# --- the command line, the shards ---


def shards_for(config: CompareConfig) -> str:
    """Return where the shards are: those asked for; without any, the built-in ones, made once under run_root.

    Raises:
        DataError: they are not there, or could not be made.
    """
    if config.data.root is not None:
        check_root(config.data, config.data.train_split)
        return config.data.root
    root = Path(config.run_root) / "builtin-shards"
    if not (root / "manifest.json").is_file():
        print(f"No data.root given: making the built-in shards in {root}", flush=True)
        made = subprocess.run([*our_module("pipeline.prepare"), "source=builtin", f"out={literal(str(root))}"])
        if made.returncode:
            raise DataError(f"`pipeline.prepare source=builtin` ended with exit code {made.returncode}; see above.")
    return str(root)
