"""Every model of the zoo as fp32 ONNX in ONNX Runtime: how far its logits are from torch's.

    python -m benchmarks.onnx_zoo

Weights are as they are drawn, with BatchNorm's statistics of some pictures; SqueezeNet v1.0 at 227 and 224 and v1.1 at
224, whose poolings do and do not divide their pictures, the others at a small size. A difference is the largest of all
logits of 32 pictures, relative to the largest logit. Beside it stands how far either is from the same network in
float64: in a deep one the roundings of fp32 alone may be further apart than the bound, torch's from the truth as well.
"""

import dataclasses
import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from pipeline.config.registry import MODELS, preset_input
from pipeline.exporting import onnx_files
from pipeline.models import zoo
from pipeline.models.normalizer import Normalizer
from pipeline.models.onnx_network import OnnxNetwork, session_of
from pipeline.training.trained import Trained

SIZES = (("squeezenet1_0", 227), ("squeezenet1_0", 224), ("squeezenet1_0_caffe", 227), ("squeezenet1_1", 224))
SMALL_SIDE, NUM_PICTURES, NUM_CLASSES = 64, 32, 100
MOST_DIFFERENCE = 1e-4


def pictures(trained: Trained) -> Tensor:
    """Normalised pictures of coarse colours with some noise, each of another."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(NUM_PICTURES, 3, 4, 4, generator=generator) * 255
    side = trained.input.size
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noisy = smooth + 20 * torch.randn(smooth.shape, generator=generator)
    return Normalizer(trained.input)(noisy.clamp(0, 255).to(torch.uint8), torch.contiguous_format)


def drawn(name: str, side: int) -> Trained:
    """A model with drawn weights that has seen pictures."""
    torch.manual_seed(0)
    model = zoo.build(name, NUM_CLASSES)
    seen = dataclasses.replace(preset_input(name), size=side)
    trained = Trained(model, name, NUM_CLASSES, seen, None, {}, "drawn")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of all that was seen
    with torch.no_grad():
        model.train()(pictures(trained))
    model.eval()
    return trained


def difference(logits_BK: Tensor, reference_BK: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((logits_BK - reference_BK).abs().max() / reference_BK.abs().max())


def measure(name: str, side: int) -> dict[str, Any]:
    """One model at one size."""
    trained = drawn(name, side)
    started = time.monotonic()
    content = onnx_files.to_onnx(trained).SerializeToString()
    network = OnnxNetwork(session_of(content))
    seconds, images_BCHW = time.monotonic() - started, pictures(trained)
    with torch.inference_mode():
        expected_BK, found_BK = trained.model(images_BCHW), network(images_BCHW)
        exact_BK = trained.model.double()(images_BCHW.double())
    said_B = expected_BK.argmax(1)
    return {
        "side": side,
        "num_bytes": len(content),
        "relative_difference": difference(found_BK, expected_BK),
        "onnx_from_float64": difference(found_BK, exact_BK),
        "torch_from_float64": difference(expected_BK, exact_BK),
        "agreement": float((found_BK.argmax(1) == said_B).float().mean()),
        "num_different_answers": len(said_B.unique()),
        "export_seconds": seconds,
    }


def main(arguments: Sequence[str]) -> int:
    """Every model, the worst of them."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", nargs="+", help="these alone")
    options = parser.parse_args(arguments)
    common.print_conditions()
    torch.set_num_threads(1)
    sides = [*SIZES, *((name, max(SMALL_SIDE, MODELS[name].min_side)) for name in zoo.names())]
    result = common.Result("onnx_zoo", {"models": options.models})
    rows: dict[str, dict[str, Any]] = {}
    for name, side in sides:
        if options.models and name not in options.models:
            continue
        rows[f"{name} at {side}"] = row = measure(name, side)
        common.show(name, row)
        gc.collect()
    result.figures["rows"] = rows
    worst = max(row["relative_difference"] for row in rows.values())
    beyond = [row for row in rows.values() if row["relative_difference"] > MOST_DIFFERENCE]
    times = max((row["onnx_from_float64"] / row["torch_from_float64"] for row in beyond), default=0.0)
    agreement = min(row["agreement"] for row in rows.values())
    result.floors = [
        common.Floor("largest relative difference of a logit", worst, at_most=MOST_DIFFERENCE),
        common.Floor("beyond that: distance from float64, as a multiple of torch's own in fp32", times, at_most=1.0),
        common.Floor("lowest agreement", agreement, at_least=1.0),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
