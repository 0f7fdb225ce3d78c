"""The steps of `predict.py`: find pictures, load weights and the names of classes, tell each picture's classes."""

import csv
import dataclasses
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.predict import PredictConfig
from pipeline.core.compute import choose_accelerator
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.progress import progress_bar
from pipeline.core.streams import as_it_is
from pipeline.core.text import one_line
from pipeline.data.prepare.listing import IMAGE_SUFFIXES, list_folder
from pipeline.training.trained import NUM_IMAGENET_CLASSES, Prediction, Trained, load_trained


def find_pictures(source: str) -> list[str]:
    """Return the paths that a source stands for, sorted; those on stdin as they come.

    Raises:
        DataError: There is nothing of that name, or no picture in it.
    """
    if source == "-":
        paths = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    elif os.path.isdir(source):  # noqa: PTH112 - as typed: a Path would change what is shown
        paths = _below(source)
    elif os.path.lexists(source):
        paths = [source]
    else:
        paths = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - as typed
    if not paths:
        raise DataError(
            f"source={source}: there is no such file or folder, and no picture in it: give a picture, a folder with"
            f" pictures ({', '.join(IMAGE_SUFFIXES)}), a pattern in quotes, or - and paths on stdin."
        )
    return paths


def _below(folder: str) -> list[str]:
    """Everything below a folder that is called like a picture; what is not is counted on stderr."""
    listed = [item for item in list_folder(Path(folder)) if not item.is_folder]
    pictures = [str(Path(folder, item.name)) for item in listed if item.is_picture]
    num_others = len(listed) - len(pictures)
    if num_others:
        print(f"{num_others} others below {folder} are not called {', '.join(IMAGE_SUFFIXES)}, or hidden: left out.",
              file=sys.stderr)  # fmt: skip
    return pictures


def load(config: PredictConfig) -> Trained:
    """Return the network with the names of its classes, on its device.

    Raises:
        CheckpointError, ConfigError: As `load_trained`.
        ConfigError: `classes=` cannot be read, or names another number of classes than there are outputs.
    """
    trained = load_trained(Path(config.checkpoint), config.model, size=config.size)
    for difference in trained.differences:
        print(f"not as trained: {difference}.", file=sys.stderr)
    accelerator = choose_accelerator(config.accelerator, key="accelerator")
    trained.model.to("cuda" if accelerator == "gpu" else "cpu")
    return trained if config.classes is None else dataclasses.replace(trained, classes=_named(config.classes, trained))


def _named(classes: str, trained: Trained) -> tuple[str, ...]:
    names = _imagenet() if classes == "imagenet" else _lines(Path(classes))
    if len(names) != trained.num_outputs:
        raise ConfigError(
            f"classes={classes} names {len(names)} classes and the model has {trained.num_outputs} outputs: give the"
            " list that the weights were trained with, one name a line in the order of the outputs."
        )
    if trained.classes not in (None, names):
        raise ConfigError(f"classes={classes} is not what the checkpoint says its classes are: leave classes= out.")
    return names


def _imagenet() -> tuple[str, ...]:
    from torchvision.models import SqueezeNet1_1_Weights

    names = tuple(SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"])
    assert len(names) == NUM_IMAGENET_CLASSES
    return names


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"classes={path} cannot be read as text ({error}): give a file with one name a line."
        ) from None


def tell(trained: Trained, paths: Sequence[str], config: PredictConfig) -> int:
    """Print what is in each picture, in the order of `paths`; returns how many could not be read.

    Each of those is named on stderr. One picture at a time: what is told of it does not depend on its neighbours.
    """
    # A program reads names as they are; a terminal would obey what is in them.
    writer = csv.writer(sys.stdout if sys.stdout.isatty() else as_it_is(sys.stdout), lineterminator="\n")
    if config.format == "csv":
        writer.writerow(("path", "rank", "class", "label", "probability"))
    num_bad = 0
    with progress_bar("predicting", len(paths)) as bar:
        for number, path in enumerate(paths, 1):
            try:
                (predictions,) = trained.predict(path, top=config.top)
            except DataError as error:
                num_bad += 1
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:
                if config.format == "csv":
                    writer.writerows((path, rank, *_cells(told)) for rank, told in enumerate(predictions, 1))
                else:
                    print(_as_json(path, predictions) if config.format == "jsonl" else _as_line(path, predictions))
            bar.update(number)
    if num_bad:
        print(f"{num_bad} of {len(paths)} could not be read.", file=sys.stderr)
    return num_bad


def _cells(told: Prediction) -> tuple[str, int, str]:
    return told.name or "", told.label, f"{told.probability:.6f}"


def _as_line(path: str, predictions: Sequence[Prediction]) -> str:
    """Path, and each class with its probability: `a.jpg  cat 0.93, dog 0.05`."""
    classes = ", ".join(f"{told.name or f'output {told.label}'} {told.probability:.3f}" for told in predictions)
    return f"{one_line(path)}  {one_line(classes)}"


def _as_json(path: str, predictions: Sequence[Prediction]) -> str:
    told = [{"class": name, "label": label, "probability": probability} for label, name, probability in predictions]
    return json.dumps({"path": path, "predictions": told})
