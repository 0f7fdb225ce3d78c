"""The maker of over-the-air packages, whose format is docs/package.md."""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]

from pipeline.models.sqz.decoder import GRID, HEAD, MAGIC, PLAIN_DTYPES, SELF_TEST, Grid, Package, digest

PARTS = ("head", "description", "tables", "self_test", "plain", "symbols")


@dataclass(frozen=True)
class Encoded:
    """A package as a file, and where its bytes are."""

    content: bytes
    bytes_by_part: dict[str, int]
    """For each of PARTS; they sum to the file."""


def make_grid(symbols: np.ndarray, step: float) -> Grid:
    """Return the grid of a tensor: its step as float32 has it, and how often each symbol occurs.

    Args:
        symbols: Integers, any shape.
        step: Distance of neighbouring values.
    """
    lowest = int(symbols.min(initial=0))
    counts = np.bincount((symbols.ravel() - lowest).astype(np.int64), minlength=1)
    return Grid(float(np.float32(step)), lowest, _codes(counts).tobytes())


def _codes(counts: np.ndarray) -> np.ndarray:
    """Return the codes whose frequencies are nearest to eight times the counts; what never occurs counts as once."""
    wanted = 8 * np.maximum(counts, 1).astype(np.int64)
    exponent = np.floor(np.log2(wanted / 8)).astype(np.int64)
    return (8 * exponent + np.rint(wanted / (1 << exponent)).astype(np.int64) - 8).astype(np.uint8)


def pack(
    meta: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    grids: Mapping[str, Grid],
    self_test: Sequence[tuple[int, float]],
) -> Package:
    """Assemble a package.

    Args:
        meta: What the file says besides its tensors: model, input, classes.
        tensors: All of them in the model's order: integer symbols where there is a grid, else float32, float16, int64.
        grids: Of the tensors that are coded.
        self_test: Label and logit of the test picture's most probable classes.
    """
    kinds = {name: "coded" if name in grids else values.dtype.name for name, values in tensors.items()}
    assert set(kinds.values()) <= {"coded", *PLAIN_DTYPES}, kinds
    described = {**meta, "tensors": [[name, list(values.shape), kinds[name]] for name, values in tensors.items()]}
    symbols = {name: values.astype(np.int32) for name, values in tensors.items() if name in grids}
    plain = {name: values for name, values in tensors.items() if name not in grids}
    return Package(described, dict(grids), symbols, plain, np.array(self_test, SELF_TEST))


def encode(package: Package) -> Encoded:
    """Write a package. The same package gives the same bytes wherever zlib is the same."""
    coder = stream.queue.RangeEncoder()
    tables, plain = bytearray(), bytearray()
    for name, _, kind in package.meta["tensors"]:
        if kind == "coded":
            grid = package.grids[name]
            tables += GRID.pack(grid.step, grid.lowest, len(grid.codes)) + grid.codes
            write_symbols(coder, package.symbols[name], grid)
        else:
            plain += package.plain[name].astype(PLAIN_DTYPES[kind]).tobytes()
    description = json.dumps(package.meta, separators=(",", ":"), sort_keys=True).encode()
    parts = [zlib.compress(description, 9), zlib.compress(bytes(tables), 9), package.self_test.tobytes(), bytes(plain)]
    return assemble(digest(package.tensors()), parts, coder.get_compressed())


def write_symbols(coder: Any, symbols: np.ndarray, grid: Grid) -> None:
    """Append symbols to a stream. Where the grid has one code, there is nothing to say."""
    if len(grid.codes) > 1:
        coder.encode((symbols.ravel() - grid.lowest).astype(np.int32), grid.model())


def assemble(sha256_of_tensors: bytes, parts: Sequence[bytes], words: np.ndarray) -> Encoded:
    """Put the parts of a file together.

    Args:
        sha256_of_tensors: As `digest` gives it.
        parts: Description, tables, self-test and plain tensors.
        words: The range coder's.
    """
    symbols = words.astype("<u4").tobytes()
    head = HEAD.pack(MAGIC, bytes(32), sha256_of_tensors, *map(len, parts))
    content = b"".join([head, *parts, symbols])
    content = content[:4] + hashlib.sha256(content[36:]).digest() + content[36:]
    return Encoded(content, dict(zip(PARTS, map(len, (head, *parts, symbols)), strict=True)))
