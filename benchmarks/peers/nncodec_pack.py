"""Weights through NNCodec and back, in an environment of its own (numpy < 2).

    python benchmarks/peers/nncodec_pack.py weights.npz decoded.npz QP

Prints the bytes of the bitstream. `QP` is NNCodec's quantisation parameter of weights; biases keep its default.
"""

import sys

import numpy as np
from nncodec import nnc  # pyright: ignore[reportMissingImports]


def main(source: str, target: str, qp: str) -> None:
    """Encode with dependent quantisation, its default, and decode."""
    with np.load(source) as arrays:
        weights = {name: arrays[name] for name in arrays.files}
    bitstream = nnc.compress(weights, qp=int(qp), bitstream_path=f"{target}.nnc", return_bitstream=True)
    np.savez(target, **nnc.decompress(bitstream))
    print(len(bitstream))


if __name__ == "__main__":
    main(*sys.argv[1:])
