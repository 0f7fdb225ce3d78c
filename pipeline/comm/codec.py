"""What travels in place of fp32 values: fewer bits, in blocks that each have a scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
"""Values that share a scale, an fp32 number: 1/8 of a bit for each."""
SCALE_BYTES = 4


@dataclass(frozen=True)
class Codec:
    """Values as bytes and back. What is lost is known to whoever encodes, who may send it later.

    An integer codec sends a block as its largest absolute value over `largest`, and each value as the nearest whole
    number of these. A block that holds an infinity or no number comes back without any number.
    """

    name: str
    bits: int
    """Of a value, without its share of the scale."""
    largest: int | None = None
    """Of the whole numbers that stand for values; None: values are rounded to bf16."""

    def num_bytes(self, num_values: int) -> int:
        """Return the bytes of so many values, a multiple of BLOCK."""
        scales = 0 if self.largest is None else num_values // BLOCK * SCALE_BYTES
        return num_values * self.bits // 8 + scales

    def encode(self, rows: Tensor) -> Tensor:
        """Return the bytes of each row of fp32 values, whose number is a multiple of BLOCK."""
        if self.largest is None:
            return rows.to(torch.bfloat16).view(torch.uint8)
        blocks = rows.view(len(rows), -1, BLOCK)
        scales = blocks.abs().amax(-1, keepdim=True) / self.largest
        # Not a number: 0 / 0 in a block of zeros, or whatever is not finite, where the scale tells.
        whole = (blocks / scales).round_().nan_to_num_(0, 0, 0).clamp_(-self.largest, self.largest).to(torch.int8)
        flat = whole.view(len(rows), -1)
        if self.bits == 4:
            flat = (flat[:, ::2] & 15) | (flat[:, 1::2] << 4)
        return torch.cat([flat.view(torch.uint8), scales.view(len(rows), -1).view(torch.uint8)], 1)

    def decode(self, encoded: Tensor) -> Tensor:
        """Return the values of what `encode` returned."""
        if self.largest is None:
            return encoded.view(torch.bfloat16).float()
        num_blocks = encoded.shape[1] // (BLOCK * self.bits // 8 + SCALE_BYTES)
        split = num_blocks * BLOCK * self.bits // 8
        flat = encoded[:, :split].view(torch.int8)
        if self.bits == 4:  # shifted up and down again, a nibble gets its sign back
            flat = torch.stack([(flat << 4) >> 4, flat >> 4], -1)
        scales = encoded[:, split:].contiguous().view(torch.float32).view(len(encoded), num_blocks, 1)
        return (flat.reshape(len(encoded), num_blocks, BLOCK) * scales).view(len(encoded), -1)


CODECS = {
    "bf16": Codec("bf16", 16),
    "int8": Codec("int8", 8, 127),
    "int4": Codec("int4", 4, 7),
}
"""By comm.codec; fp32, which is not here, loses nothing."""


def shard_values(num_values: int, num_ranks: int) -> int:
    """Return how many of so many values each rank reduces: whole blocks, of which the last may be padded with zeros."""
    return -(-num_values // (num_ranks * BLOCK)) * BLOCK
