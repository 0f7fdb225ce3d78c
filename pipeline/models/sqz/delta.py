"""Differences between two packages on the same grid: what has to travel when a device has the older one.

A delta holds the differences of symbols, coded by how large the older symbol is, and verbatim what else has changed.
Applied, it gives the newer package's file, byte for byte. docs/package.md says every byte.
"""

import hashlib
import itertools
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]

from pipeline.models.sqz.decoder import GRID, HEAD, Grid, Package, PackageError, decode, inflate
from pipeline.models.sqz.encoder import assemble, make_grid, write_symbols

MAGIC = b"SQD\x01"
DELTA_HEAD = struct.Struct("<4s32s32s32s32s5I")
"""Magic, SHA-256 of all that follows it, of the older file, of the newer file, of the newer tensors; lengths of: a
description and tables (0: the older file's), self-test, plain tensors, tables of differences."""
CLASS_ENDS = (0, 2)
"""Differences are coded apart where the older symbol's magnitude is at most the first, at most the second, or more."""


class WrongBaseError(PackageError):
    """The delta belongs to another older package."""


def make_delta(base: bytes, new: bytes) -> bytes:
    """Return what makes the older file the newer one.

    Args:
        base: The older package's file.
        new: The newer one's, with the same tensors on the same grids.

    Raises:
        PackageError: One is no package, or their tensors or steps are not alike.
    """
    older, newer = decode(base), decode(new)
    _require_alike(older, newer)
    coder, tables = stream.queue.RangeEncoder(), bytearray()
    for name, values in newer.symbols.items():
        for where in _classes(older.symbols[name]):
            differences = (values - older.symbols[name])[where]
            grid = make_grid(differences, 1)
            tables += GRID.pack(1, grid.lowest, len(grid.codes)) + grid.codes
            write_symbols(coder, differences, grid)
    theirs, ours = _parts(base), _parts(new)
    parts = [b"" if part == other else part for part, other in zip(ours[:2], theirs[:2], strict=True)]
    parts += [*ours[2:4], zlib.compress(bytes(tables), 9)]
    head = DELTA_HEAD.pack(MAGIC, bytes(32), _sha256(base), _sha256(new), new[36:68], *map(len, parts))
    content = b"".join([head, *parts, coder.get_compressed().astype("<u4").tobytes()])
    return content[:4] + _sha256(content[36:]) + content[36:]


def apply_delta(base: bytes, delta: bytes) -> bytes:
    """Return the newer package's file, byte for byte as it was made.

    Args:
        base: The older package's file.
        delta: What `make_delta` gave.

    Raises:
        WrongBaseError: It belongs to another older file.
        PackageError: It is no delta, or is damaged.
    """
    if len(delta) < DELTA_HEAD.size or delta[:4] != MAGIC or _sha256(delta[36:]) != delta[4:36]:
        raise PackageError("it is no delta of schema 1, or its SHA-256 shows that it was cut or changed")
    _, _, of_base, of_new, of_tensors, *lengths = DELTA_HEAD.unpack_from(delta)
    if of_base != _sha256(base):
        raise WrongBaseError("it was made for another older package: get the whole package")
    older = decode(base)
    ends = np.cumsum([DELTA_HEAD.size, *lengths]).tolist()
    parts = [delta[a:b] for a, b in itertools.pairwise(ends)]
    parts[:2] = [part or other for part, other in zip(parts[:2], _parts(base)[:2], strict=True)]
    tables, at = inflate(parts.pop()), 0
    differences = stream.queue.RangeDecoder(np.frombuffer(delta[ends[-1] :], "<u4").astype(np.uint32))
    grids = _grids(inflate(parts[1]), older)
    coder = stream.queue.RangeEncoder()
    for name, symbols in older.symbols.items():
        new = symbols.copy()
        for where in _classes(symbols):
            _, lowest, num_codes = GRID.unpack_from(tables, at)
            at += GRID.size + num_codes
            grid = Grid(1, lowest, tables[at - num_codes : at])
            new[where] += lowest if num_codes == 1 else differences.decode(grid.model(), int(where.sum())) + lowest
        write_symbols(coder, new, grids[name])
    made = assemble(of_tensors, parts, coder.get_compressed()).content
    if _sha256(made) != of_new:
        raise PackageError("applied, it does not give the package it was made for")
    return made


def base_sha256(delta: bytes) -> str:
    """Return the SHA-256 of the older package that a delta belongs to, in hexadecimal."""
    return DELTA_HEAD.unpack_from(delta)[2].hex()


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _classes(symbols: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a mask of the values of each class that are coded together."""
    magnitudes = np.abs(symbols)
    low, high = CLASS_ENDS
    yield from (magnitudes <= low, (magnitudes > low) & (magnitudes <= high), magnitudes > high)


def _parts(content: bytes) -> list[bytes]:
    """Return description, tables, self-test and plain tensors of a package's file."""
    ends = np.cumsum([HEAD.size, *HEAD.unpack_from(content)[3:]]).tolist()
    return [content[a:b] for a, b in itertools.pairwise(ends)]


def _grids(tables: bytes, package: Package) -> dict[str, Grid]:
    grids, at = dict[str, Grid](), 0
    for name in package.symbols:
        step, lowest, num_codes = GRID.unpack_from(tables, at)
        at += GRID.size + num_codes
        grids[name] = Grid(step, lowest, tables[at - num_codes : at])
    return grids


def _require_alike(older: Package, newer: Package) -> None:
    if older.meta["tensors"] != newer.meta["tensors"]:
        raise PackageError("the packages are of different models, or have other tensors")
    if any(grid.step != newer.grids[name].step for name, grid in older.grids.items()):
        raise PackageError("the packages are on different grids: export the newer one with base= the older one")
