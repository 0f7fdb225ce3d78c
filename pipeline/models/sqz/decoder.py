"""Reference decoder of over-the-air packages (.sqz, docs/package.md): standard library, numpy, constriction."""

import hashlib
import itertools
import json
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]

HEAD = struct.Struct("<4s32s32s4I")  # magic, SHA-256 of all that follows it, SHA-256 of the tensors, lengths of parts
MAGIC, GRID = b"SQZ\x01", struct.Struct("<fiI")
PLAIN_DTYPES = {"float32": "<f4", "float16": "<f2", "int64": "<i8"}
SELF_TEST = np.dtype([("label", "<u4"), ("logit", "<f4")])
MAX_VALUES, MAX_INFLATED_BYTES, MAX_CODE = 1 << 28, 1 << 24, 200


class PackageError(ValueError):
    """The file is no package, or is damaged."""


class Grid(NamedTuple):
    """How a tensor became symbols (value = symbol x step), and how often each symbol from `lowest` on is expected."""

    step: float
    lowest: int
    codes: bytes

    def model(self) -> Any:
        """Return the entropy model: code c means a frequency of (8 + c % 8) 2^(c // 8); the coder adds 1 to weights."""
        codes = np.frombuffer(self.codes, np.uint8).astype(np.int64)
        if not 0 < len(codes) < 1 << 20 or codes.max() > MAX_CODE:
            raise PackageError("a table of frequencies is empty or out of range")
        frequencies, room = (8 + codes % 8) << (codes // 8), (1 << 24) - len(codes)
        weights = frequencies * room // frequencies.sum()
        weights[np.argmax(frequencies)] += room - weights.sum()
        return stream.model.Categorical(weights.astype(np.float32), perfect=False)


class Package(NamedTuple):
    """What a file holds: its description, the tensors as symbols or as they are, and what a test picture gives."""

    meta: dict[str, Any]
    grids: dict[str, Grid]
    symbols: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]
    self_test: np.ndarray

    def tensors(self) -> dict[str, np.ndarray]:
        """Return every tensor by name, in the model's order: float32, or what it was stored plainly as."""
        decoded = {name: self.symbols[name].astype("f4") * np.float32(grid.step) for name, grid in self.grids.items()}
        return {name: {**self.plain, **decoded}[name] for name, _, _ in self.meta["tensors"]}


def digest(tensors: dict[str, np.ndarray]) -> bytes:
    """Return the SHA-256 of names and contents, in order."""
    sha256 = hashlib.sha256()
    for name, values in tensors.items():
        sha256.update(name.encode() + b"\0")
        sha256.update(np.ascontiguousarray(values).ravel().data)  # the array itself, no copy of it
    return sha256.digest()


def decode(content: bytes) -> Package:
    """Return what a package holds. Nothing in it is used before its SHA-256 was found right."""
    magic, sha256, sha256_of_tensors, *lengths = HEAD.unpack_from(content.ljust(HEAD.size, b"\0"))
    if magic != MAGIC or hashlib.sha256(content[36:]).digest() != sha256:
        raise PackageError("it is no .sqz package of schema 1, or its SHA-256 shows that it was cut or changed")
    ends = np.cumsum([HEAD.size, *lengths]).tolist()
    description, tables, test, values = (content[a:b] for a, b in itertools.pairwise(ends))
    meta, tables = json.loads(inflate(description)), inflate(tables)
    package = Package(meta, {}, {}, {}, np.frombuffer(test, SELF_TEST))
    coder = stream.queue.RangeDecoder(np.frombuffer(content[ends[-1] :], "<u4").astype(np.uint32))
    num_left, at, at_plain = MAX_VALUES, 0, 0
    for name, shape, kind in meta["tensors"]:
        num_left -= (count := int(np.prod(np.array(shape, object))))
        if num_left < 0 or min([*shape, 0]) < 0:
            raise PackageError("a shape is impossible, or needs too much memory")
        if kind == "coded":
            step, lowest, num_codes = GRID.unpack_from(tables, at)
            at += GRID.size + num_codes
            package.grids[name] = grid = Grid(step, lowest, tables[at - num_codes : at])
            coded = coder.decode(grid.model(), count) if num_codes > 1 else np.zeros(count, np.int32)
            package.symbols[name] = (coded + lowest).astype(np.int32, copy=False).reshape(shape)
        else:
            package.plain[name] = plain = np.frombuffer(values, PLAIN_DTYPES[kind], count, at_plain).reshape(shape)
            at_plain += plain.nbytes
    if digest(package.tensors()) != sha256_of_tensors:
        raise PackageError("its tensors are not those it was made from")
    return package


def inflate(content: bytes) -> bytes:
    """Decompress, up to a bound."""
    inflated = (decompressor := zlib.decompressobj()).decompress(content, MAX_INFLATED_BYTES)
    if not decompressor.eof:
        raise PackageError("a part is too large, or cut")
    return inflated
