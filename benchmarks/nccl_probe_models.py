"""SqueezeNet 1.1 and ResNet-18 with torch alone: torchvision's tensors, in its order and of its shapes, untrained.

torchvision may be missing where the probe runs, and our own SqueezeNet is made from a configuration that wants Hydra.
"""

import torch
from torch import Tensor, nn

CLASSES = 1000
FIRES = (  # input channels, squeeze, expand of each half
    (64, 16, 64),
    (128, 16, 64),
    (128, 32, 128),
    (256, 32, 128),
    (256, 48, 192),
    (384, 48, 192),
    (384, 64, 256),
    (512, 64, 256),
)
POOL_BEFORE_FIRES = (0, 2, 4)


class Fire(nn.Module):
    def __init__(self, num_inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(num_inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.squeeze(x).relu()
        return torch.cat((self.expand1x1(squeezed).relu(), self.expand3x3(squeezed).relu()), dim=1)


def squeezenet1_1() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 2), nn.ReLU()]
    for index, widths in enumerate(FIRES):
        layers += [nn.MaxPool2d(3, 2, ceil_mode=True)] if index in POOL_BEFORE_FIRES else []
        layers += [Fire(*widths)]
    return nn.Sequential(*layers, nn.Conv2d(512, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class BasicBlock(nn.Module):
    def __init__(self, num_inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if num_inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(num_inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)).relu()


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2, 1)]
    for num_inputs, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        layers += [BasicBlock(num_inputs, width, 1 if num_inputs == width else 2), BasicBlock(width, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


MODELS = {"squeezenet1_1": squeezenet1_1, "resnet18": resnet18}
