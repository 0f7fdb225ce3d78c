"""Torchvision's networks for small pictures: they halve a picture three times, not five.

32x32 pixels then end as 4x4, where the networks as published would have one pixel left.
"""

from torch import nn
from torchvision.models import MobileNetV2, ResNet


def make_small(model: nn.Module) -> None:
    """Take the first two halvings from a network, in place, before anything is trained.

    A ResNet's first convolution becomes 3x3 without stride, drawn as torchvision draws it, and the pooling behind it
    goes, as in the ResNets for CIFAR-10 (arXiv 1512.03385, section 4.2). MobileNetV2 keeps its weights' shapes: its
    first convolution and the first block that halves have no stride.
    """
    if isinstance(model, ResNet):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue] - any module does
        return
    assert isinstance(model, MobileNetV2)
    strided = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    for convolution in strided[:2]:
        convolution.stride = (1, 1)
