"""SqueezeNet, as Iandola et al. describe it (arXiv 1602.07360), with its metaparameters left open.

Layers are counted as in the paper: 1 is conv1, 2 to 9 are fire2 to fire9, 10 is conv10. There is no BatchNorm.

Parameter names equal torchvision's (`features.3.squeeze.weight`), so state dicts load strictly in both directions;
with `init="torchvision"` the same torch seed also gives the same initial weights.

Shape suffixes: B pictures, C channels, H height, W width, K classes.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.config.squeezenet import FIRE_LAYERS, STEMS, FireWidths, SqueezeNetConfig


class Fire(nn.Module):
    """Squeeze to few channels with 1x1 filters, then expand with 1x1 and 3x3 filters side by side.

    Strategy 1: most filters are 1x1. Strategy 2: the 3x3 filters see only `s1x1` input channels.

    With `bypass="simple"` the input is added to the output where both have the same number of channels; with
    `"complex"` a 1x1 convolution makes the numbers equal where they differ (section 6 of the paper).
    """

    def __init__(self, num_inputs: int, widths: FireWidths, bypass: str = "none") -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(num_inputs, widths.s1x1, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(widths.s1x1, widths.e1x1, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(widths.s1x1, widths.e3x3, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)
        self.bypass: nn.Module | None = None
        if bypass != "none" and num_inputs == widths.e:
            self.bypass = nn.Identity()
        elif bypass == "complex":
            self.bypass = nn.Conv2d(num_inputs, widths.e, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, num_inputs, H, W) to (B, e1x1 + e3x3, H, W)."""
        s_BCHW = self.squeeze_activation(self.squeeze(x_BCHW))
        e1x1_BCHW = self.expand1x1_activation(self.expand1x1(s_BCHW))
        e3x3_BCHW = self.expand3x3_activation(self.expand3x3(s_BCHW))
        e_BCHW = torch.cat((e1x1_BCHW, e3x3_BCHW), dim=1)
        return e_BCHW if self.bypass is None else e_BCHW + self.bypass(x_BCHW)


class SqueezeNet(nn.Module):
    """SqueezeNet as one `SqueezeNetConfig` describes it."""

    def __init__(self, num_classes: int, config: SqueezeNetConfig) -> None:
        super().__init__()
        conv1 = STEMS[config.stem]
        layers: list[nn.Module] = [
            nn.Conv2d(3, conv1.num_filters, conv1.kernel_size, conv1.stride, conv1.padding),
            nn.ReLU(inplace=True),
        ]
        # Where each layer of the paper lies in `features`: torchvision's numbering counts ReLU and poolings too.
        self._index_of_layer = {1: 0}
        num_channels = conv1.num_filters
        if 1 in config.pool_after:
            layers.append(_max_pool())
        for layer in FIRE_LAYERS:
            widths = config.fire_widths(layer)
            self._index_of_layer[layer] = len(layers)
            layers.append(Fire(num_channels, widths, config.bypass))
            num_channels = widths.e
            if layer in config.pool_after:
                layers.append(_max_pool())
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Conv2d(num_channels, num_classes, kernel_size=1, padding=config.conv10_pad),
            nn.ReLU(inplace=True) if config.final_relu else nn.Identity(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.num_classes = num_classes
        self.reset_parameters(config.init)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map normalised pictures (B, 3, H, W) to logits (B, K)."""
        return self.classifier(self.features(images_BCHW)).flatten(1)

    def reset_parameters(self, init: str = "torchvision") -> None:
        """Draw new weights from torch's generator. conv10 is N(0, 0.01) under both schemes, biases are 0."""
        for name, conv in self.named_convolutions():
            if name == "conv10":
                nn.init.normal_(conv.weight, mean=0.0, std=0.01)
            elif init == "caffe":
                bound = math.sqrt(3.0 / conv.weight[0].numel())
                nn.init.uniform_(conv.weight, -bound, bound)
            else:
                nn.init.kaiming_uniform_(conv.weight)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the ten layers of the paper's Table 1 that own parameters: conv1, fire2 to fire9, conv10."""
        for layer, index in self._index_of_layer.items():
            yield (f"fire{layer}" if layer in FIRE_LAYERS else "conv1"), self.features[index]
        yield "conv10", self.classifier[1]

    def named_convolutions(self) -> Iterator[tuple[str, nn.Conv2d]]:
        """Yield each convolution by Caffe name: conv1, fire2/squeeze1x1, fire2/expand1x1, fire2/expand3x3, ..., conv10.

        The convolution of a complex bypass is called fire2/bypass.
        """
        for name, layer in self.named_layers():
            if isinstance(layer, Fire):
                yield f"{name}/squeeze1x1", layer.squeeze
                yield f"{name}/expand1x1", layer.expand1x1
                yield f"{name}/expand3x3", layer.expand3x3
                if isinstance(layer.bypass, nn.Conv2d):
                    yield f"{name}/bypass", layer.bypass
            else:
                assert isinstance(layer, nn.Conv2d)
                yield name, layer


def _max_pool() -> nn.MaxPool2d:
    """Return a 3x3 max-pool of stride 2. Caffe rounds the output side up, hence `ceil_mode`."""
    return nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
