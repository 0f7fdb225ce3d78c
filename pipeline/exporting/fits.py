"""Whether the network fits small hardware: what weights and activations take, beside three classes of memory."""

import dataclasses
import functools

import torch
from torch import nn

from pipeline.core.missing import known
from pipeline.core.schemas.artefacts import ArtefactsJson
from pipeline.models import zoo
from pipeline.models.activations import Peak, Peaks, peaks
from pipeline.training.trained import NUM_IMAGENET_CLASSES, Trained

NUM_BYTES = {"fp32": 4, "int8": 1}
"""Of one weight or activation, by number format."""
HARDWARE = (
    ("10 MB on the chip", 10_000_000, True),
    ("2 MB of RAM", 2_000_000, False),
    ("512 kB of RAM", 512_000, False),
)
"""Class, bytes, and whether weights have to fit too: small controllers read them from flash."""
PLANS = ("copied", "in_place", "streamed")
"""The plans of pipeline.models.activations, from the one that asks least of whoever writes the code."""
ALEXNET_SIDE = 224


def fp32_bytes(model: nn.Module) -> int:
    """Return what all floating-point tensors of a network take in fp32."""
    return sum(value.numel() * NUM_BYTES["fp32"] for value in model.state_dict().values() if value.is_floating_point())


@functools.cache
def alexnet_bytes() -> int:
    """Return the bytes of AlexNet's weights in fp32, the paper's yardstick."""
    return fp32_bytes(_alexnet())


def _alexnet() -> nn.Module:
    with torch.device("meta"):
        return zoo.build("alexnet", NUM_IMAGENET_CLASSES)


def memory(trained: Trained) -> dict[str, object]:
    """Return `memory` of artefacts.json."""
    found = peaks(trained.model, trained.input.size)
    num_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    return {
        "image_size": trained.input.size,
        "activations": _as_tree(found),
        "alexnet_activations": _as_tree(peaks(_alexnet(), ALEXNET_SIDE)),
        "fits": [
            {
                "hardware": name,
                "memory_bytes": memory_bytes,
                "number_format": number_format,
                "weights_bytes": num_parameters * size,
                "are_weights_in_it": with_weights,
                "plan": known(
                    _first_that_fits(found, memory_bytes // size - with_weights * num_parameters),
                    "It does not fit by any plan.",
                ),
            }
            for name, memory_bytes, with_weights in HARDWARE
            for number_format, size in NUM_BYTES.items()
        ],
    }


def memory_sentences(content: ArtefactsJson) -> list[str]:
    """Tell what of `memory` is to be kept in mind, the side on which the claim fails too."""
    found, yardstick = content["memory"]["activations"], content["memory"]["alexnet_activations"]
    in_place = found["in_place"]["num_elements"]
    streamed = (
        "" if found["streamed"] is None else f", {found['streamed']['num_elements']:,} with the first pooling by rows"
    )
    fits = ", ".join(
        f"{row['hardware']} {row['number_format']} {'no' if row['plan'] is None else 'yes'}"
        for row in content["memory"]["fits"]
    )
    return [
        f"At most {in_place:,} activations at once ({found['in_place']['module']}),"
        f" {found['copied']['num_elements']:,} where Concats copy{streamed}:"
        f" {in_place / yardstick['in_place']['num_elements']:.1f}x AlexNet's, though it has"
        f" {content['num_parameters'] * NUM_BYTES['fp32'] / alexnet_bytes():.3f}x its weights.",
        f"Fits (calculated): {fits}.",
    ]


def _as_tree(found: Peaks) -> dict[str, object]:
    why = "The first convolution does not end in a pooling."
    return {name: dataclasses.asdict(value) if value else known(None, why) for name, value in _plans(found).items()}


def _plans(found: Peaks) -> dict[str, Peak | None]:
    return {name: getattr(found, name) for name in PLANS}


def _first_that_fits(found: Peaks, num_elements: int) -> str | None:
    plans = _plans(found).items()
    return next((name for name, peak in plans if peak is not None and peak.num_elements <= num_elements), None)
