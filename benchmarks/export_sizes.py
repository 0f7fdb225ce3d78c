"""Packages of SqueezeNet v1.0's published weights at five sizes, and int8 ONNX, judged on real pictures.

    python -m benchmarks.export_sizes --folder imagenet-sample --classes wnids.txt --weights squeezenet_v1_0.npz

`--folder` holds a directory per class, `--classes` the 1000 class names in index order. Each size is made six times:
from sensitivities of all pictures, judged on the same, which flatters; and in five folds from those of four fifths,
judged on the fifth that nothing was calibrated on, the five pooled. Both are in the result.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.registry import preset_input
from pipeline.data.index import open_split
from pipeline.exporting import onnx_files
from pipeline.exporting.judging import Judgement, Pictures, judge, logits_of
from pipeline.exporting.package import PackageMaker
from pipeline.exporting.sensitivity import Sensitivity, measure, pooled
from pipeline.models.sqz.decoder import decode
from pipeline.training.trained import Trained, load_trained

MODEL, NUM_FOLDS = "squeezenet1_0_caffe", 5
BARS = {470_000: (0.01, 3), 430_000: (0.03, 3), 400_000: (0.03, 5), 350_000: (0.03, 5), 300_000: (0.05, None)}
"""Bytes of the whole file -> by how much the loss may rise, and how many pictures may be lost of those right."""
INT8_BYTES, INT8_POINTS, INT8_AGREEMENT = 1_350_000, 0.5, 0.95


def in_fifths(pictures: Pictures) -> list[tuple[Pictures, list[int]]]:
    """Each fifth of the pictures, and their places among all."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
    made = []
    for fold in range(NUM_FOLDS):
        places = sorted(order[fold::NUM_FOLDS])
        sample_ids = tuple(pictures.sample_ids[place] for place in places)
        made.append((dataclasses.replace(pictures, sample_ids=sample_ids), places))
    return made


def row_of(judgement: Judgement) -> dict[str, float | int]:
    """What is published of a judgement."""
    return {
        "top1": judgement.num_correct_top1,
        "top1_change": judgement.num_correct_top1 - judgement.reference_num_correct_top1,
        "agreement": judgement.agreement,
        "loss_change": judgement.loss_change,
        "loss_change_standard_error": judgement.loss_change_standard_error,
        "kl_divergence": judgement.kl_divergence,
        "mcnemar_p": judgement.mcnemar_p,
    }


def packages(
    trained: Trained,
    everything: Pictures,
    fifths: list[tuple[Pictures, list[int]]],
    measured: list[tuple[dict[str, Sensitivity], int]],
    reference_NK: Tensor,
    labels_N: Tensor,
) -> dict[str, dict[str, object]]:
    """Every size, calibrated on all and judged on all, and in folds."""
    found: dict[str, dict[str, object]] = {}
    maker = PackageMaker(trained, pooled(measured))
    for max_bytes in BARS:
        started = time.monotonic()
        made = maker.within(max_bytes)
        content = made.encoded.content
        seconds, decoding = time.monotonic() - started, time.monotonic()
        decode(content)
        found[str(max_bytes)] = {
            "num_bytes": len(content),
            "bytes_by_part": made.encoded.bytes_by_part,
            "seconds_to_make": seconds,
            "seconds_to_decode": time.monotonic() - decoding,
            "calibrated_on_the_same": row_of(judge(logits_of(made.network, everything), reference_NK, labels_N)),
        }
        common.show(f"{max_bytes:,}", found[str(max_bytes)]["calibrated_on_the_same"])  # type: ignore[arg-type]
    answers = {max_bytes: torch.empty_like(reference_NK) for max_bytes in BARS}
    for number, (held, places) in enumerate(fifths, 1):
        others = [part for place, part in enumerate(measured, 1) if place != number]
        maker = PackageMaker(trained, pooled(others))
        for max_bytes in BARS:
            answers[max_bytes][places] = logits_of(maker.within(max_bytes).network, held)
        print(f"  fold {number} of {NUM_FOLDS}", flush=True)
    for max_bytes, logits_NK in answers.items():
        found[str(max_bytes)]["left_out"] = row_of(judge(logits_NK, reference_NK, labels_N))
        common.show(f"{max_bytes:,} left out", found[str(max_bytes)]["left_out"])  # type: ignore[arg-type]
    return found


def main(arguments: Sequence[str]) -> int:
    """Shards, packages, int8, the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="class folders of JPEGs")
    parser.add_argument("--classes", type=Path, required=True, help="1000 class names, one per line, in index order")
    parser.add_argument("--weights", type=Path, required=True, help="v1.0's published weights, as .npz")
    options = parser.parse_args(arguments)
    common.print_conditions()
    root = common.SHARDS / "export_sizes"
    common.run("prepare", f"source={options.folder}", f"classes={options.classes}", "split=val", f"out={root}")
    trained = load_trained(options.weights, ModelConfig(name=MODEL, input=preset_input(MODEL)))
    index = open_split(DataConfig(root=str(root)), "val")
    everything = Pictures(trained, index, tuple(range(index.num_samples)))
    reference_NK, labels_N = logits_of(trained.model, everything), everything.labels()
    fifths = in_fifths(everything)
    measured = [(measure(trained.model, part), len(part)) for part, _ in fifths]
    print("  sensitivities measured", flush=True)
    result = common.Result("export_sizes", {**vars(options), "folds": NUM_FOLDS})
    result.figures["num_pictures"] = len(everything)
    result.figures["packages"] = found = packages(trained, everything, fifths, measured, reference_NK, labels_N)
    model = onnx_files.to_onnx(trained)
    content, network, parts = onnx_files.to_int8(model, trained, everything, pooled(measured))
    int8 = {"num_bytes": len(content), "bytes_by_part": parts}
    int8 |= row_of(judge(logits_of(network, everything), reference_NK, labels_N))
    result.figures["onnx_int8"] = int8
    common.show("int8 ONNX", int8)
    for max_bytes, (loss, lost) in BARS.items():
        row = found[str(max_bytes)]["left_out"]
        assert isinstance(row, dict)
        name = f"{max_bytes:,} bytes, pictures left out: "
        result.floors.append(common.Floor(f"{name}rise of the loss", row["loss_change"], at_most=loss))
        if lost is not None:
            result.floors.append(common.Floor(f"{name}change of top-1", row["top1_change"], at_least=-lost))
    points = 100 * abs(int(int8["top1_change"])) / len(everything)  # type: ignore[call-overload]
    result.floors += [
        common.Floor("int8 ONNX, bytes", len(content), at_most=INT8_BYTES),
        common.Floor("int8 ONNX, points of top-1 away from fp32", points, at_most=INT8_POINTS),
        common.Floor("int8 ONNX, agreement with fp32", float(int8["agreement"]), at_least=INT8_AGREEMENT),  # type: ignore[arg-type]
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
