"""The steps of `evaluate.py`: match classes to outputs, score every picture once, write the result."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.progress import track

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import write_json_atomic
from pipeline.data.index import ShardIndex
from pipeline.data.loader import evaluation_loader
from pipeline.data.quarantine import NUM_BAD_SHOWN, BadSample
from pipeline.models.normalizer import Normalizer
from pipeline.models.scoring import ExactMetrics
from pipeline.run.directory import RunDirectory
from pipeline.run.launch.limits import check_pictures
from pipeline.training.drift import checksums
from pipeline.training.trained import Trained
from pipeline.training.world import World

if TYPE_CHECKING:
    from pipeline.config.evaluate import EvaluateConfig


NUM_NAMES_SHOWN = 10


def check_batch(config: "EvaluateConfig", trained: Trained, local_world_size: int) -> None:
    """Raise `ConfigError` for more pictures at once than the ranks of a machine can hold, at the size they are fed."""
    side = max(trained.input.size, trained.input.resize_side)
    check_pictures("batch_per_rank", config.batch_per_rank, side, num_ranks=local_world_size)


def match_outputs(trained: Trained, index: ShardIndex) -> tuple[int, ...] | None:
    """Find the output that stands for each class of a split.

    Returns:
        See `match_labels`.

    Raises:
        ConfigError: the model has fewer outputs than the split has classes, or does not know some of them by name.
    """
    label_of_class = match_labels(trained.classes, index.classes)
    if trained.num_outputs < index.num_classes:
        raise ConfigError(
            f"The model has {trained.num_outputs} outputs and the split has {index.num_classes} classes: evaluate on"
            " the shards that the weights belong to."
        )
    return label_of_class


def facts_of_content(trained: Trained, index: ShardIndex, label_of_class: tuple[int, ...] | None) -> dict[str, str]:
    """List what lies at the paths of this rank, which must be the same on all: the split and the weights."""
    return {
        "the hash of the split": index.index_hash,
        "the model and its input": f"{trained.name}, {trained.input}",
        "the code of the model": str(trained.source_sha256),
        "the outputs of the classes": str(label_of_class),
        **{f"the checksum of {name}": value for name, value in checksums(trained.model.state_dict()).items()},
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


@torch.inference_mode()
def score(
    config: "EvaluateConfig",
    world: World,
    trained: Trained,
    index: ShardIndex,
    label_of_class: tuple[int, ...] | None = None,
) -> dict[str, float | int]:
    """Sums over all ranks. Collective.

    Args:
        config: Of the command.
        world: The ranks.
        trained: What is scored.
        index: The split.
        label_of_class: The output that stands for each class of the split; None: they are in the same order.

    Raises:
        DataError: some picture was not scored. A result that leaves pictures out would be another split's.
    """
    model = trained.model.to(world.device, memory_format=world.compute.memory_format)  # type: ignore[call-overload]
    normalizer, metrics = Normalizer(trained.input), ExactMetrics(trained.num_outputs).to(world.device)
    label_of_class_K = None if label_of_class is None else torch.tensor(label_of_class, device=world.device)
    loader = evaluation_loader(
        index, trained.input, world.reader(config.data.num_workers), batch_size=config.batch_per_rank
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
        raise DataError(
            f"{how_many}; others cannot be used: {named}. Prepare the shards again into an empty out=, without them."
        )


def write(config: "EvaluateConfig", trained: Trained, results: dict[str, float | int]) -> None:
    """evaluation.json, and what made it. Rank 0 only."""
    directory = RunDirectory(config.run_root, config.name)
    directory.open()
    try:
        content = {"schema": 1, "checkpoint": trained.origin, **results, "model": trained.name}
        write_json_atomic(directory.path / "evaluation.json", content)
    finally:
        directory.close()


def sentence(trained: Trained, results: dict[str, float | int]) -> str:
    """For people."""
    return (
        f"{trained.name} from {trained.origin}{trained.unwrapped}: top-1 {results['top1']:.4f}"
        f" ({results['num_correct_top1']} of {results['num_samples']}), top-5 {results['top5']:.4f}"
        f" ({results['num_correct_top5']}), loss {results['loss']:.4f}"
    )
