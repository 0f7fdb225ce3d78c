"""The models of the registry as a list: what each has, owes and is published to reach."""

import json
from dataclasses import asdict, dataclass

from pipeline.models import zoo

NUM_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One model with its default metaparameters and ImageNet's 1000 classes."""

    model: str
    num_parameters: int
    gradient_bytes: int
    """What they owe per optimiser step, in fp32."""
    published_top1: float | None
    published_top5: float | None
    published_source: str | None
    """Who reports the accuracy; None: nobody does."""


def list_models() -> list[Listed]:
    """Return every model in the order of the registry, built without memory."""
    return [_listed(name) for name in zoo.names()]


def _listed(name: str) -> Listed:
    from pipeline.models.cost import gradient_bytes

    model, published = zoo.build_shapes(name, NUM_CLASSES), zoo.published_accuracy(name)
    return Listed(
        model=name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        gradient_bytes=gradient_bytes(model),
        published_top1=None if published is None else published.top1,
        published_top5=None if published is None else published.top5,
        published_source=None if published is None else published.source,
    )


def as_json(models: list[Listed]) -> str:
    """Return a list of objects."""
    return json.dumps([asdict(model) for model in models], indent=2)


def as_table(models: list[Listed]) -> str:
    """Return lines of at most 80 characters."""
    lines = [f"{'model':<31}{'parameters':>12}{'bytes a step':>14}{'top-1':>9}{'top-5':>9}"]
    for model in models:
        top1, top5 = (
            "-" if share is None else f"{share:.2%}" for share in (model.published_top1, model.published_top5)
        )
        lines.append(f"{model.model:<31}{model.num_parameters:>12,}{model.gradient_bytes:>14,}{top1:>9}{top5:>9}")
    return "\n".join(
        [
            *lines,
            "",
            f"With {NUM_CLASSES} classes; bytes are those of all gradients in fp32. Accuracy is on",
            "ImageNet, as others publish it (--json says who), not measured here. Further",
            "models: timm:NAME, torchvision:NAME, and your own (docs/own-model.md).",
        ]
    )
