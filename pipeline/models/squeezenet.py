"""SqueezeNet, as Iandola et al. describe it (arXiv 1602.07360), with its metaparameters left open.

Layers are counted as in the paper: 1 is conv1, 2 to 9 are fire2 to fire9, 10 is conv10. The paper's network has no
BatchNorm; with `norm="batch"` conv1 and the convolutions of fire modules are followed by one, which `folded` takes out
again. conv10 and the convolution of a complex bypass have none.

Parameter names equal torchvision's (`features.3.squeeze.weight`), so state dicts load strictly in both directions;
with `init="torchvision"` the same torch seed also gives the same initial weights.

Shape suffixes: B pictures, C channels, H height, W width, K classes.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.config.squeezenet import FIRE_LAYERS, STEMS, FireWidths, SqueezeNetConfig
from pipeline.models.initial import standardize_outputs

ABOVE_THE_RELU = 4.0
"""conv10's first bias under `init="standardized"`. The loss does not see what all classes have in common, and an output
that falls to 0 is pushed up no more: from 1, batches of 32 at lr 0.04 ended near ln(classes) or in a dead network."""


class Fire(nn.Module):
    """Squeeze to few channels with 1x1 filters, then expand with 1x1 and 3x3 filters side by side.

    Strategy 1: most filters are 1x1. Strategy 2: the 3x3 filters see only `s1x1` input channels.

    With `bypass="simple"` the input is added to the output where both have the same number of channels; with
    `"complex"` a 1x1 convolution makes the numbers equal where they differ (section 6 of the paper).
    """

    def __init__(self, num_inputs: int, widths: FireWidths, bypass: str = "none", norm: str = "none") -> None:
        super().__init__()
        has_bias = norm == "none"
        self.squeeze = nn.Conv2d(num_inputs, widths.s1x1, kernel_size=1, bias=has_bias)
        self.squeeze_activation = _activation(widths.s1x1, norm)
        self.expand1x1 = nn.Conv2d(widths.s1x1, widths.e1x1, kernel_size=1, bias=has_bias)
        self.expand1x1_activation = _activation(widths.e1x1, norm)
        self.expand3x3 = nn.Conv2d(widths.s1x1, widths.e3x3, kernel_size=3, padding=1, bias=has_bias)
        self.expand3x3_activation = _activation(widths.e3x3, norm)
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
        self.config = config
        conv1 = STEMS[config.stem]
        has_bias = config.norm == "none"
        layers: list[nn.Module] = [
            nn.Conv2d(3, conv1.num_filters, conv1.kernel_size, conv1.stride, conv1.padding, bias=has_bias),
            _activation(conv1.num_filters, config.norm),
        ]
        # Where each layer of the paper lies in `features`: torchvision's numbering counts ReLU and poolings too.
        self._index_of_layer = {1: 0}
        num_channels = conv1.num_filters
        if 1 in config.pool_after:
            layers.append(_max_pool())
        for layer in FIRE_LAYERS:
            widths = config.fire_widths(layer)
            self._index_of_layer[layer] = len(layers)
            layers.append(Fire(num_channels, widths, config.bypass, config.norm))
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

    def reset_parameters(self, init: str) -> None:
        """Draw new weights from torch's generator, as `SqueezeNetConfig.init` says. conv10 is N(0, 0.01) always."""
        for name, conv in self.named_convolutions():
            if name == "conv10":
                nn.init.normal_(conv.weight, mean=0.0, std=0.01)
            elif init == "caffe":
                bound = math.sqrt(3.0 / conv.weight[0].numel())
                nn.init.uniform_(conv.weight, -bound, bound)
            else:
                nn.init.kaiming_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        if init == "standardized":
            if self.config.norm == "none":
                standardize_outputs(self.features, self.config.min_side)
            if self.config.final_relu:
                nn.init.constant_(self.get_parameter("classifier.1.bias"), ABOVE_THE_RELU)

    def folded(self) -> "SqueezeNet":
        """Return the network without BatchNorm that gives the same logits in evaluation, up to rounding.

        Each convolution takes the statistics of its BatchNorm into its weights and a bias.
        """
        assert not self.training, "statistics of a training still change"
        with torch.device("meta"):
            plain = SqueezeNet(self.num_classes, replace(self.config, norm="none")).eval()
        norms = self._norms()
        for (name, own), (_, target) in zip(self.named_convolutions(), plain.named_convolutions(), strict=True):
            fused = fuse_conv_bn_eval(own, norms[name]) if name in norms else own
            target.load_state_dict(fused.state_dict(), assign=True)
        return plain

    def _norms(self) -> dict[str, nn.BatchNorm2d]:
        """Each BatchNorm by the name of its convolution."""
        activations = {"conv1": self.features[1]}
        for name, layer in self.named_layers():
            if isinstance(layer, Fire):
                activations[f"{name}/squeeze1x1"] = layer.squeeze_activation
                activations[f"{name}/expand1x1"] = layer.expand1x1_activation
                activations[f"{name}/expand3x3"] = layer.expand3x3_activation
        norms = {name: next(activation.children(), None) for name, activation in activations.items()}
        return {name: norm for name, norm in norms.items() if isinstance(norm, nn.BatchNorm2d)}

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


def _activation(num_channels: int, norm: str) -> nn.Module:
    """Return what follows a convolution. Names of the other layers are the same whether it has weights or not."""
    relu = nn.ReLU(inplace=True)
    return relu if norm == "none" else nn.Sequential(nn.BatchNorm2d(num_channels), relu)


def _max_pool() -> nn.MaxPool2d:
    """Return a 3x3 max-pool of stride 2. Caffe rounds the output side up, hence `ceil_mode`."""
    return nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
