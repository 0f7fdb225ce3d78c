"""First weights that tell pictures apart, drawn without looking at any.

Under He's initialisation the outputs of a deep ReLU network without BatchNorm are nearly the same for all pictures: the
mean of every layer's outputs outgrows their differences. The loss then stays at ln(classes) until training has
undone that, or for good. Salimans and Kingma (arXiv 1602.07868, section 3) set each filter's scale and bias by a first
batch, so that its outputs have mean 0 and variance 1 over it; Mishkin and Matas (arXiv 1511.06422) do the same for
the scale. Here that batch is noise, so that the weights depend on nothing but the seed.
"""

import torch
from torch import Tensor, nn

SIDE = 64
NUM_PICTURES = 8


@torch.no_grad()
def standardize_outputs(features: nn.Module, min_side: int = 1) -> None:
    """Scale and shift each convolution, in place, so that over noise each filter's output has mean 0 and variance 1.

    The convolutions are taken in the order in which `features` calls them, each with what those before it now give.

    Args:
        features: Maps pictures (B, 3, H, W) to feature maps; its convolutions have biases.
        min_side: Side in pixels of the smallest picture that it takes.
    """
    convolutions = [module for module in features.modules() if isinstance(module, nn.Conv2d)]
    if any(convolution.weight.is_meta for convolution in convolutions):
        return  # a shape without weights
    side = max(SIDE, min_side)
    hooks = [convolution.register_forward_hook(_standardize) for convolution in convolutions]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would add in another order, and one rank and two begin with other weights
    try:
        noise_BCHW = _noise_BCHW(max(2, NUM_PICTURES * SIDE**2 // side**2), side)
        features(noise_BCHW.to(convolutions[0].weight))
    finally:
        torch.set_num_threads(num_threads)
        for hook in hooks:
            hook.remove()


def _standardize(convolution: nn.Module, _inputs: tuple[Tensor, ...], outputs_BCHW: Tensor) -> Tensor:
    """Make a convolution give standardised outputs, and return those for this call."""
    assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
    std_C, mean_C = torch.std_mean(outputs_BCHW, dim=(0, 2, 3))
    std_C = std_C.clamp_min(1e-6)
    convolution.weight /= std_C[:, None, None, None]
    convolution.bias -= mean_C
    convolution.bias /= std_C
    return (outputs_BCHW - mean_C[:, None, None]) / std_C[:, None, None]


def _noise_BCHW(num_pictures: int, side: int) -> Tensor:
    """Return noise (num_pictures, 3, side, side) of mean 0 and variance 1, always the same.

    Its amplitude falls with the frequency as 1 / f, as that of photographs does (Field, J. Opt. Soc. Am. A 4, 1987).
    """
    white = torch.randn(num_pictures, 3, side, side, generator=torch.Generator().manual_seed(0))
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)).clamp_min(1 / side)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(side, side))
    return (noise - noise.mean()) / noise.std()
