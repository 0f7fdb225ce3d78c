"""From pixels to what a network is fed.

Shape suffixes: B pictures of a micro-batch, C channels, H W pixels.
"""

import torch
from torch import Tensor, nn

from pipeline.config.model import InputConfig


class Normalizer(nn.Module):
    """uint8 RGB pixels to what a network expects, on the device."""

    def __init__(self, config: InputConfig) -> None:
        super().__init__()
        self.reverse_channels = config.channel_order == "bgr"
        # Plain attributes: DDP would broadcast registered buffers before every forward pass.
        self.mean_CHW = torch.tensor(config.mean).view(3, 1, 1)
        self.scale_CHW = 1 / torch.tensor(config.std).view(3, 1, 1)

    def forward(self, images_BCHW: Tensor, memory_format: torch.memory_format) -> Tensor:
        """float32 in `memory_format`."""
        if self.reverse_channels:
            images_BCHW = images_BCHW.flip(1)
        if self.mean_CHW.device != images_BCHW.device:
            self.mean_CHW, self.scale_CHW = self.mean_CHW.to(images_BCHW.device), self.scale_CHW.to(images_BCHW.device)
        pixels_BCHW = images_BCHW.to(torch.float32, memory_format=memory_format)
        return pixels_BCHW.sub_(self.mean_CHW).mul_(self.scale_CHW)
