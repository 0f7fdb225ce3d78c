"""The layers whose weights are coded in a package, and so worth pruning: what the others take hardly counts."""

from collections.abc import Iterator

from torch import nn

Layer = nn.Conv2d | nn.Linear


def coded_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield the layers whose weights are coded, by name: plain convolutions without groups, and linear layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and _is_plain(module)):
            yield name, module


def _is_plain(layer: nn.Conv2d) -> bool:
    """Whether `unfold` gives the inputs of each output. Other convolutions are stored as they are."""
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
