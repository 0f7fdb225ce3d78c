"""The steps of `evaluate.py`: open a split, load weights of any origin, score every picture once, write the result."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.files import write_json_atomic
from pipeline.data.index import ShardIndex
from pipeline.data.loader import evaluation_loader
from pipeline.data.quarantine import NUM_BAD_SHOWN, BadSample
from pipeline.models import zoo
from pipeline.models.caffe import load_npz
from pipeline.models.normalizer import Normalizer
from pipeline.models.scoring import ExactMetrics
from pipeline.run import checkpoint as checkpoints
from pipeline.run.directory import RunDirectory
from pipeline.run.wrappers import unwrap
from pipeline.training.drift import checksums
from pipeline.training.world import World

if TYPE_CHECKING:
    from pipeline.config.evaluate import EvaluateConfig


NUM_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Weights:
    """A model and where its weights come from."""

    model: nn.Module
    num_outputs: int
    origin: str
    """In words."""
    unwrapped: str = ""
    """What the weights were taken out of, as a clause in brackets."""
    label_of_class: tuple[int, ...] | None = None
    """The output that stands for each class of the split; None: the outputs are in the order of the split's classes."""


def load_weights(config: "EvaluateConfig", index: ShardIndex) -> Weights:
    """The model with its weights. Its outputs: as configured, as saved, else as many as there are classes.

    Raises:
        CheckpointError: no such file, damaged, or of another model.
        ConfigError: fewer outputs than classes, or classes that the checkpoint does not name.
    """
    num_classes = index.num_classes
    path = Path(config.checkpoint)
    if path.is_dir():
        path = _checkpoint_of_run(path)
    is_caffe = path.suffix == ".npz"
    content = {} if is_caffe else _read(path)
    section = checkpoints.section_of(content, path) if checkpoints.SECTION in content else {}
    label_of_class = match_labels(section.get("classes"), index.classes)
    num_outputs = config.model.num_classes or section.get("num_classes") or num_classes
    if num_outputs < num_classes:
        raise ConfigError(
            f"The model has {num_outputs} outputs and the split has {num_classes} classes: set model.num_classes to the"
            " number the weights were trained with, or evaluate on the shards they belong to."
        )
    metaparameters = {**section.get("metaparameters", {}), **config.model.metaparameters}
    zoo.check_pictures(replace(config.model, metaparameters=metaparameters), config.input.size)
    model = zoo.build(config.model.name, num_outputs, **metaparameters)
    if is_caffe:
        load_npz(path, model)
        return Weights(model, num_outputs, str(path))
    with checkpoints.taking("the weights", path):
        state, said = _state_dict(content)
        checkpoints.require_same_model(
            model.state_dict(), state, path=path, model=config.model.name, found_model=section.get("model")
        )
        model.load_state_dict(state)
    origin = f"{path} (step {section['step']})" if "step" in section else str(path)
    return Weights(model, num_outputs, origin, f" ({'; '.join(said)})" if said else "", label_of_class)


def facts_of_content(weights: Weights, index: ShardIndex) -> dict[str, str]:
    """List what lies at the paths of this rank, which must be the same on all: the split and the weights."""
    return {
        "the hash of the split": index.index_hash,
        "the outputs of the classes": str(weights.label_of_class),
        **{f"the checksum of {name}": value for name, value in checksums(weights.model.state_dict()).items()},
    }


def match_labels(of_model: Sequence[str] | None, of_split: Sequence[str] | None) -> tuple[int, ...] | None:
    """Match the classes of a split to a model's outputs by name.

    Args:
        of_model: Class names in the order of the outputs; None: not known.
        of_split: Class names in the order of the labels; None: not known.

    Returns:
        For each label the output of the same name. None: the same order, or names that one of them lacks.

    Raises:
        ConfigError: the split has classes that the model does not know.
    """
    if of_model is None or of_split is None or list(of_model) == list(of_split):
        return None
    output_of = {name: output for output, name in enumerate(of_model)}
    unknown = [name for name in of_split if name not in output_of]
    if unknown:
        raise ConfigError(
            f"{len(unknown)} of the split's {len(of_split)} classes are not the model's: {_few(unknown)}. The model was"
            f" trained on {len(of_model)}: {_few(of_model)}. Give as data.root the shards of its classes."
        )
    return tuple(output_of[name] for name in of_split)


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:NUM_NAMES_SHOWN])) + (", ..." if len(names) > NUM_NAMES_SHOWN else "")


def _read(path: Path) -> checkpoints.Content:
    """One of our checkpoints, proven by its sidecar, or a file of any origin; nothing in it is executed."""
    return checkpoints.load(path) if checkpoints.sidecar_path(path).exists() else checkpoints.load_foreign(path)


def _state_dict(content: checkpoints.Content) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under the model's own names, and out of what they were taken where the file is not ours.

    A run with averaged weights validates, and so is judged by, the average.
    """
    if checkpoints.SECTION not in content:
        return unwrap(content)
    average = content[checkpoints.SECTION].get("learner", {}).get("average")
    return unwrap(average or content["state_dict"])[0], []


def _checkpoint_of_run(run: Path) -> Path:
    """Its best checkpoint, else its newest sound one."""
    directory = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    info = checkpoints.find_best(directory) or checkpoints.find_latest(directory)
    if info is None:
        raise CheckpointError(f"There is no checkpoint in {directory}: train first, or give the path of a file.")
    return info.path


@torch.inference_mode()
def score(config: "EvaluateConfig", world: World, weights: Weights, index: ShardIndex) -> dict[str, float | int]:
    """Sums over all ranks. Collective.

    Raises:
        DataError: some picture was not scored. A result that leaves pictures out would be another split's.
    """
    model = weights.model.eval().to(world.device, memory_format=world.compute.memory_format)  # type: ignore[call-overload]
    normalizer, metrics = Normalizer(config.input), ExactMetrics(weights.num_outputs).to(world.device)
    matched = weights.label_of_class
    label_of_class_K = None if matched is None else torch.tensor(matched, device=world.device)
    loader = evaluation_loader(
        index, config.input, world.reader(config.data.num_workers), batch_size=config.batch_per_rank
    )
    bad: list[BadSample] = []
    for loaded in track(loader, "evaluating", disable=not world.is_rank_zero, transient=True):
        bad.extend(loaded.bad)
        batch = loaded.to(world.device)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=world.compute.precision == "bf16"):
            logits_BK = model(normalizer(batch.images_BCHW, world.compute.memory_format))
        labels_B = batch.labels_B if label_of_class_K is None else label_of_class_K[batch.labels_B]
        metrics.update(logits_BK, labels_B, batch.sample_ids_B)
    with world.meter.origin("metrics"):
        results = metrics.compute()
    world.agree(lambda: _refuse(bad, f"{results['num_samples']} of {index.num_samples} pictures were scored"))
    assert results["num_samples"] == index.num_samples
    return results


def _refuse(bad: list[BadSample], how_many: str) -> None:
    """Raise `DataError` naming them, if there are any: the split without them is another one."""
    if bad:
        named = "; ".join(sample.reason for sample in bad[:NUM_BAD_SHOWN])
        raise DataError(f"{how_many}; others cannot be used: {named}. Prepare the split again without them.")


def write(config: "EvaluateConfig", weights: Weights, results: dict[str, float | int]) -> None:
    """evaluation.json, and what made it. Rank 0 only."""
    directory = RunDirectory(config.run_root, config.name)
    directory.open()
    try:
        content = {"schema": 1, "checkpoint": weights.origin, **results, "model": config.model.name}
        write_json_atomic(directory.path / "evaluation.json", content)
    finally:
        directory.close()


def sentence(config: "EvaluateConfig", weights: Weights, results: dict[str, float | int]) -> str:
    """For people."""
    return (
        f"{config.model.name} from {weights.origin}{weights.unwrapped}: top-1 {results['top1']:.4f}"
        f" ({results['num_correct_top1']} of {results['num_samples']}), top-5 {results['top5']:.4f}"
        f" ({results['num_correct_top5']}), loss {results['loss']:.4f}"
    )
