"""The table of what `export` wrote: a row per file, as JSON and as sentences."""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.core.files import write_bytes_atomic
from pipeline.core.missing import Missing, known, to_json
from pipeline.core.schemas.artefacts import ArtefactsJson
from pipeline.core.units import format_bytes
from pipeline.exporting.fits import alexnet_bytes, fp32_bytes, memory, memory_sentences
from pipeline.exporting.judging import Judgement
from pipeline.exporting.onnx_run import OnnxRun
from pipeline.models.coded_layers import coded_layers
from pipeline.models.sqz.delta import base_sha256
from pipeline.run.provenance import describe_cpu
from pipeline.training.trained import Trained

FILES = {
    "safetensors": "model.safetensors",
    "safetensors_fp16": "model_fp16.safetensors",
    "onnx": "model.onnx",
    "onnx_int8": "model_int8.onnx",
    "package": "model.sqz",
    "delta": "model.sqd",
}
FAST_BITS_PER_SECOND, SLOW_BITS_PER_SECOND = 1e6, 60e3
NUM_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One file that was written."""

    kind: str
    file: str
    num_bytes: int
    sha256: str
    bytes_by_part: dict[str, int]
    judged: Judgement | None = None
    calibrated: Judgement | None = None
    onnx_run: OnnxRun | None = None

    @classmethod
    def write(cls, directory: Path, kind: str, content: bytes, parts: dict[str, int]) -> "Artefact":
        """Write a file.

        Args:
            directory: Where it goes.
            kind: A key of FILES.
            content: Of the file.
            parts: Where its bytes are.
        """
        assert sum(parts.values()) == len(content), (parts, len(content))
        write_bytes_atomic(directory / FILES[kind], content)
        digest = hashlib.sha256(content).hexdigest()
        return cls(kind=kind, file=FILES[kind], num_bytes=len(content), sha256=digest, bytes_by_part=parts)


def lossless_bytes(model: torch.nn.Module) -> int:
    """Return what the coded weights would take as they are: the entropy of each layer's values, and a table of them."""
    num_bits = 0.0
    for _, layer in coded_layers(model):
        _, counts = np.unique(layer.weight.detach().cpu().numpy(), return_counts=True)
        shares = counts / counts.sum()
        coded = float(-(counts * np.log2(shares)).sum()) + 8 * NUM_FLOAT_BYTES * len(counts)
        num_bits += min(coded, 8 * NUM_FLOAT_BYTES * layer.weight.numel())  # where no two are alike, a table is no help
    return math.ceil(num_bits / 8)


def as_json(trained: Trained, artefacts: list[Artefact], *, judged_on_calibration: bool) -> ArtefactsJson:
    """Return artefacts.json.

    Args:
        trained: What was shipped.
        artefacts: The files.
        judged_on_calibration: Whether the pictures that judged are those of the calibration.
    """
    own, weights = fp32_bytes(trained.model), [layer.weight for _, layer in coded_layers(trained.model)]
    num_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    package = next((artefact for artefact in artefacts if artefact.kind == "package"), None)
    cpu = describe_cpu()
    tree = {
        "schema": 1,
        "checkpoint": trained.origin,
        "model": trained.name,
        "num_parameters": num_parameters,
        "num_zeros": sum(int((weight == 0).sum()) for weight in weights),
        "fp32_bytes": own,
        "bits_per_weight": known(
            None if package is None else package.num_bytes * 8 / num_parameters, "No package was made."
        ),
        "lossless_bytes": lossless_bytes(trained.model),
        "judged_on_calibration": judged_on_calibration,
        "memory": memory(trained),
        "cpu_model": cpu["model"],
        "cpu_flags": cpu["flags"],
        "artefacts": [_row(artefact, own, judged_on_calibration) for artefact in artefacts],
    }
    content, reasons = to_json(tree)
    return {**content, "null_reasons": reasons}  # type: ignore[typeddict-item]


def offer(directory: Path, artefacts: list[Artefact]) -> dict[str, Any]:
    """Return latest.json, by which a device finds what is new (pipeline.models.sqz.update).

    Args:
        directory: Of the files.
        artefacts: The files.
    """
    rows: dict[str, dict[str, Any]] = {}
    for artefact in artefacts:
        rows[artefact.kind] = {name: getattr(artefact, name) for name in ("file", "num_bytes", "sha256")}
        if artefact.kind == "delta":
            rows["delta"]["base_sha256"] = base_sha256((directory / artefact.file).read_bytes())
    return {"schema": 1, "files": rows}


def _row(artefact: Artefact, own_bytes: int, judged_on_calibration: bool) -> dict[str, object]:
    no_pictures = "There were no pictures to judge by: data.root was not set."
    same = "The pictures of the calibration are those that judged."
    return {
        "artefact": artefact.kind,
        "file": artefact.file,
        "num_bytes": artefact.num_bytes,
        "sha256": artefact.sha256,
        "times_smaller_than_fp32": own_bytes / artefact.num_bytes,
        "times_smaller_than_alexnet_fp32": alexnet_bytes() / artefact.num_bytes,
        "seconds_at_1_mbit": artefact.num_bytes * 8 / FAST_BITS_PER_SECOND,
        "seconds_at_60_kbit": artefact.num_bytes * 8 / SLOW_BITS_PER_SECOND,
        "bytes_by_part": artefact.bytes_by_part,
        "judged": _judgement(artefact.judged, no_pictures),
        "calibrated": _judgement(artefact.calibrated, same if judged_on_calibration else no_pictures),
        "onnx_run": _onnx_run(artefact.onnx_run),
    }


def _judgement(judgement: Judgement | None, reason: str) -> object:
    if judgement is None:
        return Missing(reason)
    tree = asdict(judgement)
    if not math.isfinite(judgement.loss_change_standard_error):
        tree["loss_change_standard_error"] = Missing("There was one picture.")
    return tree


def _onnx_run(run: OnnxRun | None) -> object:
    if run is None:
        return Missing("Only ONNX files are run by ONNX Runtime.")
    tree = asdict(run)
    return {name: known(value, "latency.num_windows=0 leaves it out.") for name, value in tree.items()}


def row_sentence(artefact: Artefact, trained: Trained) -> str:
    """Tell of one file in a line of 110 characters at most."""
    own = fp32_bytes(trained.model)
    line = f"{artefact.file:<24}{artefact.num_bytes:>12,} B {own / artefact.num_bytes:>6.2f}x under fp32"
    if artefact.judged is None:
        return line
    judged = artefact.judged
    more_right = judged.num_correct_top1 - judged.reference_num_correct_top1
    return (
        f"{line}  top-1 {more_right:+d} of {judged.num_images}, same answer {judged.agreement:.1%},"
        f" loss {judged.loss_change:+.4f} +- {judged.loss_change_standard_error:.4f}"
    )


def sentences(trained: Trained, content: ArtefactsJson) -> list[str]:
    """Tell what was made, and what is to be kept in mind."""
    zeros = content["num_zeros"] / max(1, content["num_parameters"])
    told = [
        f"{trained.name} from {trained.origin}: {content['num_parameters']:,} parameters, {zeros:.0%} of them pruned,"
        f" {content['fp32_bytes']:,} bytes in fp32, about {content['lossless_bytes']:,} without rounding."
    ]
    for row in content["artefacts"]:
        if row["artefact"] in ("package", "delta"):
            parts = ", ".join(f"{name} {count:,}" for name, count in row["bytes_by_part"].items())
            told.append(
                f"{row['artefact']}: {row['times_smaller_than_fp32']:.1f}x under fp32,"
                f" {row['times_smaller_than_alexnet_fp32']:.0f}x under AlexNet's fp32;"
                f" {row['seconds_at_1_mbit']:.2f} s at 1 Mbit/s, {row['seconds_at_60_kbit']:.0f} s at 60 kbit/s"
                f" (calculated). Bytes: {parts}."
            )
    told += [*memory_sentences(content), *_of_onnx_runtime(content)]
    judged = next((row["judged"] for row in content["artefacts"] if row["judged"] is not None), None)
    if judged is not None:
        told.append(
            f"{judged['num_images']} pictures judged: one of them is {1 / judged['num_images']:.2%}, so small changes"
            " of top-1 say little; the loss says more."
        )
    return told


def _of_onnx_runtime(content: ArtefactsJson) -> list[str]:
    told: list[str] = []
    for row in content["artefacts"]:
        run = row["onnx_run"]
        if run is None:
            continue
        latency = ""
        if run["p50_seconds"] is not None and run["p90_seconds"] is not None:
            latency = f", {run['p50_seconds'] * 1e3:.2f} ms a picture (p90 {run['p90_seconds'] * 1e3:.2f})"
        told.append(
            f"{row['file']} in ONNX Runtime, one thread: activations {format_bytes(run['activation_peak_bytes'])}, the"
            f" process grew by {format_bytes(run['process_peak_bytes'])}{latency}."
        )
    return told
