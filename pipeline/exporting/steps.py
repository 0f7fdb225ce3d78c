"""The steps of `export.py`: load the weights, find pictures, write each file and judge it, tell."""

import contextlib
import csv
import dataclasses
import functools
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pipeline.config.export import ExportConfig
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.files import fsync_directory, write_json_atomic, write_text_atomic
from pipeline.core.schemas.artefacts import ArtefactsJson
from pipeline.data.index import open_split
from pipeline.exporting import files, onnx_run
from pipeline.exporting.artefacts import FILES, Artefact, as_json, offer, row_sentence, sentences
from pipeline.exporting.judging import Judgement, Pictures, judge, logits_of, split_pictures
from pipeline.exporting.package import Made, PackageMaker, read_package
from pipeline.exporting.sensitivity import Sensitivity, measure
from pipeline.exporting.tracking import ID_FILE, flat_rows
from pipeline.models.squeezenet import SqueezeNet
from pipeline.models.sqz.update import OFFER
from pipeline.reporting.shipping import write_artefacts_report
from pipeline.run.directory import RunDirectory
from pipeline.run.record.wandb_variables import check_variables
from pipeline.training.scoring import match_outputs
from pipeline.training.trained import Trained, load_trained

DEFAULT_MAX_LOSS = 0.01
REPORT = "report.html"
UNFINISHED = "unfinished"
"""Folder of the files that are being made, beside those of the export before."""


@dataclass(frozen=True)
class Material:
    """Pictures to calibrate on and to judge by, with what the weights as they are say of them."""

    calibration: Pictures
    judged: Pictures
    is_the_same: bool
    """Whether there were too few pictures to keep the two apart."""

    @functools.cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Logits of the weights as they are, on the pictures that judge and on those of the calibration."""
        network = self.judged.trained.model
        judged_NK = logits_of(network, self.judged)
        return judged_NK, judged_NK if self.is_the_same else logits_of(network, self.calibration)

    @functools.cached_property
    def sensitivities(self) -> dict[str, Sensitivity]:
        """How much the loss minds an error in each weight, by layer."""
        return measure(self.calibration.trained.model, self.calibration)

    def judge(self, network: Callable[[Tensor], Tensor]) -> Judgement:
        """Compare a network with the weights as they are, on the pictures that judge."""
        return judge(logits_of(network, self.judged), self.reference[0], self.judged.labels())

    def judge_on_calibration(self, network: Callable[[Tensor], Tensor]) -> Judgement:
        """Compare them on the pictures of the calibration."""
        return judge(logits_of(network, self.calibration), self.reference[1], self.calibration.labels())


def load(config: ExportConfig) -> Trained:
    """Return the network to ship.

    Raises:
        CheckpointError, ConfigError: As `load_trained`; or a weight is not finite.
    """
    trained = load_trained(Path(config.checkpoint), config.model, size=config.data.size)
    for name, value in trained.model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"{trained.origin}: {name} holds values that are not finite: give an earlier one.")
    for difference in trained.differences:
        print(f"not as trained: {difference}.")
    if isinstance(trained.model, SqueezeNet) and trained.model.config.norm != "none":
        print("BatchNorm is folded into the convolutions: what is written is the same network without, norm=none.")
        metaparameters = {**trained.metaparameters, "norm": "none"}
        return dataclasses.replace(trained, model=trained.model.folded(), metaparameters=metaparameters)
    return trained


def find_pictures(config: ExportConfig, trained: Trained) -> Material | None:
    """Return the pictures of the split in two parts; None: there is no data.root.

    Raises:
        ConfigError: Its classes are not the model's.
        DataError: The split cannot be read.
    """
    if config.data.root is None:
        return None
    index = open_split(config.data, config.data.split or config.data.val_split)
    everything = Pictures(trained, index, tuple(range(index.num_samples)), match_outputs(trained, index))
    wanted = config.calibration.num_images
    if wanted >= len(everything):
        print(
            f"All {len(everything)} pictures calibrate, and the same judge, which flatters: lower"
            " calibration.num_images to keep some apart."
        )
        return Material(everything, everything, is_the_same=True)
    calibration, judged = split_pictures(everything, wanted, seed=config.calibration.seed)
    return Material(calibration, judged, is_the_same=False)


@contextlib.contextmanager
def open_directory(config: ExportConfig) -> Iterator[RunDirectory]:
    """Make the directory of the files, and take its lock.

    Yields:
        The directory.

    Raises:
        ConfigError: It cannot be written, or another process has it; or W&B's variables contradict tracking.
    """
    directory = RunDirectory(config.run_root, config.name)
    check_variables(config.tracking, directory.path / ID_FILE, os.environ)
    directory.open()
    try:
        with contextlib.suppress(OSError):
            directory.checkpoints.rmdir()
        yield directory
    finally:
        directory.close()


@contextlib.contextmanager
def unfinished(config: ExportConfig, directory: Path) -> Iterator[Path]:
    """Make a folder for the files until all are made, so that an export that is broken off changes nothing.

    At the end they replace those of the export before in a row of renames, latest.json last: what it names is there.
    Of that export's own files, those that were not made now go then, for neither latest.json nor artefacts.json names
    them any more.

    Args:
        config: Of the command.
        directory: Where the files belong; this process has its lock.

    Yields:
        The folder. It is removed, with what is in it where the block fails.

    Raises:
        ConfigError: Something else has its name.
    """
    folder = directory / UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise ConfigError(
            f"{folder} is in the way: files are made in a folder of that name. Move it away, or give another name=."
        ) from error
    try:
        try:
            yield folder
        except KeyboardInterrupt:
            print(f"{directory} is as it was: its files are exchanged when all are made.", file=sys.stderr)
            raise
        made = _exchange(folder, directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _remove_earlier(config, directory, made)


def _exchange(folder: Path, directory: Path) -> list[str]:
    """Rename the files of a folder into another, latest.json once the others are durable; returns the others."""
    names = sorted(path.name for path in folder.iterdir() if path.name != OFFER)
    for name in names:
        (folder / name).replace(directory / name)
    fsync_directory(directory)
    (folder / OFFER).replace(directory / OFFER)
    fsync_directory(directory)
    return names


def _remove_earlier(config: ExportConfig, directory: Path, made: Sequence[str]) -> None:
    """Remove the files that an earlier export of the same name left and this one did not make, but for what it read."""
    read = {Path(path).resolve() for path in (config.checkpoint, config.base) if path is not None}
    others = (directory / name for name in FILES.values() if name not in made)
    stale = [path for path in others if path.is_file() and path.resolve() not in read]
    for path in stale:
        path.unlink()
    if stale:
        print(f"Removed, of an earlier export of this name: {', '.join(path.name for path in stale)}.")


def write_artefacts(config: ExportConfig, trained: Trained, material: Material | None, folder: Path) -> list[Artefact]:
    """Write every file that was asked for, read it back, and judge it.

    Args:
        config: Of the command.
        trained: The network.
        material: Pictures; None: nothing is calibrated or judged.
        folder: For the files.

    Raises:
        ConfigError: A bound cannot be reached, or the network cannot be written in a format.
        CheckpointError: base= is no package, or another model's.
    """
    made: list[Artefact] = []

    def keep(kind: str, content: bytes, network: nn.Module, parts: dict[str, int]) -> None:
        artefact = Artefact.write(folder, kind, content, parts)
        if material is not None:
            own = None if material.is_the_same else material.judge_on_calibration(network)
            artefact = dataclasses.replace(artefact, judged=material.judge(network), calibrated=own)
        if kind.startswith("onnx"):
            artefact = dataclasses.replace(artefact, onnx_run=onnx_run.measure(folder / artefact.file, config.latency))
        made.append(artefact)
        print(row_sentence(artefact, trained), flush=True)

    for kind in ("safetensors", "safetensors_fp16"):
        if kind in config.formats:
            keep(kind, *files.safetensors(trained, is_half=kind.endswith("fp16")))
    if {"onnx", "onnx_int8"} & set(config.formats):
        from pipeline.exporting import onnx_files

        model = onnx_files.to_onnx(trained)
        if "onnx" in config.formats:
            keep("onnx", *onnx_files.checked(model, trained, material and material.judged))
        if "onnx_int8" in config.formats:
            assert material is not None
            print("model_int8.onnx: ranges from the pictures, then every weight is rounded; some minutes", flush=True)
            keep("onnx_int8", *onnx_files.to_int8(model, trained, material.calibration, material.sensitivities))
    if "package" in config.formats:
        print("model.sqz: packages of several sizes are tried; some minutes where nothing was pruned", flush=True)
        package, delta = _make_package(config, trained, material)
        keep("package", package.encoded.content, package.network, package.encoded.bytes_by_part)
        if delta is not None:
            keep("delta", delta, package.network, {"delta": len(delta)})
    return made


def _make_package(config: ExportConfig, trained: Trained, material: Material | None) -> tuple[Made, bytes | None]:
    """Return the package, and what makes the older one it; None: no base was given, or the whole is smaller."""
    older = None if config.base is None else files.read(Path(config.base))
    base = None if older is None else read_package(str(config.base), older)
    maker = PackageMaker(trained, None if material is None else material.sensitivities)
    if older is not None and base is not None:
        made = maker.make_on(base)
        delta = files.delta(older, made.encoded.content)
        if len(delta) >= len(made.encoded.content):
            print(f"The delta would have {len(delta):,} bytes, no fewer than the whole package: ship that.")
            return made, None
        return made, delta
    if config.max_bytes is not None:
        return maker.within(config.max_bytes), None
    if material is None:
        raise ConfigError("max_loss needs pictures to judge by: set data.root.")
    return maker.losing(config.max_loss or DEFAULT_MAX_LOSS, material.judge), None


def write_tables(
    config: ExportConfig, trained: Trained, material: Material | None, artefacts: list[Artefact], folder: Path
) -> ArtefactsJson:
    """Write artefacts.json and .csv, the report, and latest.json for devices.

    Args:
        config: Of the command.
        trained: The network.
        material: Pictures; None: there were none.
        artefacts: What was written.
        folder: Where the files are.

    Returns:
        What is in artefacts.json.
    """
    content = as_json(trained, artefacts, judged_on_calibration=material is not None and material.is_the_same)
    write_json_atomic(folder / "artefacts.json", content)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    rows = flat_rows(content)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table.writerow(columns)
    table.writerows([row.get(column) for column in columns] for row in rows)
    write_text_atomic(folder / "artefacts.csv", text.getvalue())
    write_artefacts_report(content, folder / REPORT, title=Path(config.name).name)
    write_json_atomic(folder / OFFER, offer(folder, artefacts))
    return content


def tell(trained: Trained, content: ArtefactsJson, directory: Path) -> None:
    """Tell what was made, and where it is."""
    for sentence in sentences(trained, content):
        print(sentence)
    print(f"Files, artefacts.json and artefacts.csv are in {directory}. Report: {directory / REPORT}")
