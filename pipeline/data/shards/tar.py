"""Where the samples of one tar lie: a scan of its headers that reads no picture.

Understands what tar writers of this field produce: ustar, GNU long names, pax `path` and `size`. Only regular files
count. A member that could reach outside the archive (links, devices, absolute names, `..`) condemns the shard, because
no honest writer of shards makes one. Nothing is ever extracted.

WebDataset's convention: the name up to the first dot of its last component is the key, the rest the extension. Members
of other extensions (`.pth`, `.txt`, ...) are counted and never read.
"""

import os
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.data.shards.labels import (
    JSON_EXTENSION,
    JSON_FIELD,
    LABEL_EXTENSION,
    MAX_JSON_BYTES,
    MAX_LABEL_BYTES,
    LabelError,
    label_of_cls,
    label_of_json,
)

IMAGE_EXTENSIONS = frozenset({b"jpg", b"jpeg", b"png"})

MAX_IMAGE_BYTES = 256 * 2**20
MAX_KEY_BYTES = 255
MAX_EXTENDED_BYTES = 64 * 1024  # a long name or a pax record
MAX_SAMPLES = 2**20
"""Samples of one shard. The scan takes memory per sample, and a tar of nothing but headers can hold very many."""
MAX_ZERO_BYTES = 2**20
"""Zeros after the last member. Writers fill up to 10 KiB; a download that got its whole length and then died leaves
more."""
NUM_EXTENSIONS_COUNTED = 32
ANEW = "prepare the shards again into an empty out="
"""What to do about shards that are wrong from the start: `prepare` leaves whole ones of the same request alone."""

_BLOCK_BYTES = 512
_NO_LABEL, _GOOD_LABEL, _BAD_LABEL = range(3)
_ZERO_BLOCK = bytes(_BLOCK_BYTES)
# A label's header, its content and the next picture's header fit into one read.
_WINDOW_BYTES = 4096
_ADLER_MODULUS = 65521
_REGULAR, _DIRECTORY = frozenset({b"0", b"\0", b"7"}), b"5"
_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_EXTENDED = frozenset({_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL})
_FORBIDDEN = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}
_NOT_A_TAR = {
    b"\x1f\x8b": "is compressed with gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it",
    b"\xfd7zXZ": "is compressed with xz: unpack it",
    b"BZh": "is compressed with bzip2: unpack it",
    b"version https://git-lfs": "is a Git LFS pointer: fetch what it points to",
    b"<": "is a web page or XML, perhaps a server's complaint: fetch the shard again",
}


@dataclass(frozen=True)
class ShardSamples:
    """The samples of one shard in the order of their first members. All arrays have shape (num_samples,)."""

    keys: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    """Bytes from the start of the tar to the picture's first byte."""
    lengths: NDArray[np.int32]
    """Bytes of the picture."""
    labels: NDArray[np.int64]
    ignored: dict[str, int] = field(default_factory=dict)
    """Number of members that were not read, by extension; beyond NUM_EXTENSIONS_COUNTED of them under `...`."""


Complain = Callable[[DataError], None]
"""What is done about a sample that cannot be used. Unless it raises, the sample is left out and the scan goes on."""


def raise_it(error: DataError) -> None:
    """The strict way: one bad sample condemns the shard."""
    raise error


def index_shard(
    path: Path, complain: Complain = raise_it, tell_whole: Callable[[int], None] = lambda _: None
) -> ShardSamples:
    """Scan the tar at `path`.

    Args:
        path: The tar.
        complain: Called with what is wrong with single samples. What is wrong with the tar itself is always raised.
        tell_whole: Called before that is raised, with the number of samples found before that have picture and label.

    Raises:
        DataError: the tar is cut short, damaged or has forbidden members; with the default `complain` also if a sample
            lacks its picture or its label, or comes twice.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        tar = _Tar(descriptor, path.name)
        samples = _Samples(tar, complain)
        try:
            for name, offset, length in tar.regular_files():
                samples.add(name, offset, length)
        except DataError:
            tell_whole(samples.num_whole())
            raise
        return samples.finish()
    finally:
        os.close(descriptor)


class _Samples:
    """What has been found so far: arrays rather than objects, because a shard can hold a million samples."""

    def __init__(self, tar: "_Tar", complain: Complain) -> None:
        self._tar, self._complain = tar, complain
        self._numbers: dict[bytes, int] = {}
        # Offset and length -1: not seen yet.
        self._offsets, self._lengths, self._labels = array("q"), array("q"), array("q")
        self._label_state = bytearray()
        self._json_offsets, self._json_lengths = array("q"), array("q")
        self._ignored: dict[str, int] = {}

    def add(self, name: bytes, offset: int, length: int) -> None:
        """Note one regular file, if it belongs to a sample."""
        directory, slash, base = name.rpartition(b"/")
        stem, _, extension = base.partition(b".")
        extension = extension.lower()
        if not stem or (
            extension not in IMAGE_EXTENSIONS and extension != LABEL_EXTENSION and extension != JSON_EXTENSION
        ):
            text = extension.decode(errors="backslashreplace")
            self._ignore("hidden" if not stem else f".{text}" if text else "none")
            return
        key = directory + slash + stem
        number = self._numbers.get(key)
        if number is None and (number := self._new(key)) is None:
            return
        if extension in IMAGE_EXTENSIONS:
            self._add_picture(number, name, key, offset, length)
        elif extension == LABEL_EXTENSION:
            self._add_label(number, key, offset, length)
        elif self._json_offsets[number] < 0:
            # Read at the end, where there is no .cls: most shards have both.
            self._json_offsets[number], self._json_lengths[number] = offset, length

    def _new(self, key: bytes) -> int | None:
        if len(key) > MAX_KEY_BYTES:
            what = f"has a key of {len(key)} bytes, and {MAX_KEY_BYTES} are allowed: shorten the names"
            self._complain(self._tar.error(what))
            return None
        number = self._numbers[key] = len(self._numbers)
        if number >= MAX_SAMPLES:
            raise self._tar.error(f"holds more than {MAX_SAMPLES:,} samples: make more and smaller shards")
        for column in (self._offsets, self._lengths, self._labels, self._json_offsets, self._json_lengths):
            column.append(-1)
        self._label_state.append(_NO_LABEL)
        return number

    def _add_picture(self, number: int, name: bytes, key: bytes, offset: int, length: int) -> None:
        if self._offsets[number] >= 0:
            what = f"holds sample {_text(key)} twice: {_text(name)} is a second picture. Rename it, if it is a mask"
            self._complain(self._tar.error(what))
        elif length > MAX_IMAGE_BYTES:
            what = f"holds {_text(name)} with {length} bytes, and a picture may have {MAX_IMAGE_BYTES}"
            self._complain(self._tar.error(what))
        else:
            self._offsets[number], self._lengths[number] = offset, length

    def _add_label(self, number: int, key: bytes, offset: int, length: int) -> None:
        if self._label_state[number] != _NO_LABEL:
            self._complain(self._tar.error(f"holds sample {_text(key)} twice"))
            return
        try:
            self._labels[number] = label_of_cls(self._tar.read(offset, min(length, MAX_LABEL_BYTES + 1)))
        except LabelError as error:
            self._refuse_label(number, key, error)
        else:
            self._label_state[number] = _GOOD_LABEL

    def _add_json_label(self, number: int, key: bytes) -> None:
        """For a sample without `.cls`: what its `.json` says."""
        offset, length = self._json_offsets[number], self._json_lengths[number]
        try:
            if length > MAX_JSON_BYTES:
                raise LabelError(f"is a .json of {length} bytes, and {MAX_JSON_BYTES} are read")
            self._labels[number] = label_of_json(self._tar.read(offset, length))
        except LabelError as error:
            self._refuse_label(number, key, error)
        else:
            self._label_state[number] = _GOOD_LABEL

    def _refuse_label(self, number: int, key: bytes, error: LabelError) -> None:
        self._label_state[number] = _BAD_LABEL
        self._complain(DataError(f"The label of sample {_text(key)} of shard {self._tar.name} {error}: {ANEW}."))

    def _ignore(self, name: str) -> None:
        if name not in self._ignored and len(self._ignored) >= NUM_EXTENSIONS_COUNTED:
            name = "..."
        self._ignored[name] = self._ignored.get(name, 0) + 1

    def num_whole(self) -> int:
        """Samples so far with a picture and what may be a label."""
        labelled = (state == _GOOD_LABEL for state in self._label_state)
        columns = zip(self._offsets, labelled, self._json_offsets, strict=True)
        return sum(offset >= 0 and (has_cls or json >= 0) for offset, has_cls, json in columns)

    def finish(self) -> ShardSamples:
        """Check that every sample is whole; the arrays hold those that are."""
        whole: list[bytes] = []
        numbers: list[int] = []
        for key, number in self._numbers.items():
            if self._is_whole(key, number):
                whole.append(key)
                numbers.append(number)
        chosen = np.array(numbers, np.int64)
        return ShardSamples(
            keys=np.array(whole, dtype=np.bytes_) if whole else np.empty(0, "S1"),
            offsets=np.frombuffer(self._offsets, np.int64)[chosen],
            lengths=np.frombuffer(self._lengths, np.int64)[chosen].astype(np.int32),
            labels=np.frombuffer(self._labels, np.int64)[chosen],
            ignored=dict(sorted(self._ignored.items())),
        )

    def _is_whole(self, key: bytes, number: int) -> bool:
        """Whether it has a picture and a good label; complains where it has not."""
        has_picture, has_json = self._offsets[number] >= 0, self._json_offsets[number] >= 0
        if not has_picture and self._label_state[number] == _NO_LABEL:
            # A lone .json is metadata of the shard, or of a sample whose picture has another extension.
            self._ignored[".json"] = self._ignored.get(".json", 0) + has_json
        elif not has_picture:
            self._complain(self._missing(key, f"picture (.jpg, .jpeg or .png){self._others()}"))
        elif self._label_state[number] == _NO_LABEL and has_json:
            self._add_json_label(number, key)
        elif self._label_state[number] == _NO_LABEL:
            self._complain(self._missing(key, f"label (.cls, or {JSON_FIELD!r} in a .json)"))
        return has_picture and self._label_state[number] == _GOOD_LABEL

    def _missing(self, key: bytes, what: str) -> DataError:
        return DataError(f"Sample {_text(key)} of shard {self._tar.name} has no {what}: {ANEW}.")

    def _others(self) -> str:
        """What else the shard holds, which may be the pictures in a format that is not read."""
        return f"; {', '.join(self._ignored)} are not read" if self._ignored else ""


class _Tar:
    """One open tar file, read through a small window by offset."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor = descriptor
        self._num_bytes = os.fstat(descriptor).st_size
        self._window, self._window_start = b"", 0
        # The headers lie a picture apart: reading ahead would read the whole shard.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def error(self, complaint: str) -> DataError:
        """A sentence about this shard with the remedy."""
        return DataError(
            f"Shard {self.name} {complaint}. Copy it again from its source, or remove it and prepare the shards again."
        )

    def read(self, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` at `offset`; fewer only at the end of the file."""
        start = offset - self._window_start
        if start < 0 or start + num_bytes > len(self._window):
            self._window = os.pread(self._descriptor, max(num_bytes, _WINDOW_BYTES), offset)
            self._window_start, start = offset, 0
        return self._window[start : start + num_bytes]

    def regular_files(self) -> Iterator[tuple[bytes, int, int]]:
        """(name, offset of the content, bytes of the content) of each regular file, up to the end mark."""
        position = 0
        extended: dict[bytes, bytes] = {}
        while True:
            header = self.read(position, _BLOCK_BYTES)
            if len(header) < _BLOCK_BYTES:
                raise self.error(
                    f"is cut short: it ends after {self._num_bytes} bytes"
                    + (" inside a header" if header else " without the end mark of a tar")
                )
            if header == _ZERO_BLOCK:
                self._check_end(position)
                return
            self._check_sum(header, position)
            kind = header[156:157]
            length = self._size(extended.get(b"size"), header[124:136], position)
            name = extended.get(b"path") or self._name(header)
            content = position + _BLOCK_BYTES
            # A directory has no content, whatever its size field says (POSIX.1-2017, pax, ustar).
            position = content + (0 if kind == _DIRECTORY else -(-length // _BLOCK_BYTES) * _BLOCK_BYTES)
            if content + length > self._num_bytes and kind != _DIRECTORY:
                raise self.error(
                    f"is cut short: {_text(name)} needs {content + length} bytes, and the file has {self._num_bytes}"
                )
            if kind in _EXTENDED:
                extended.update(self._extended(kind, content, length))
                continue
            extended = {}
            self._check_member(kind, name)
            if kind in _REGULAR:
                yield name, content, length

    def _check_sum(self, header: bytes, position: int) -> None:
        """The header's own checksum: the sum of its bytes, the field itself counted as blanks.

        Adler-32's low half is 1 + the sum of the bytes, modulo 65521, and much faster than a sum in Python.
        """
        digits = header[148:156]
        found = (zlib.adler32(header) & 0xFFFF) - 1 - sum(digits) + 8 * ord(" ")
        said = digits.strip(b" \0")
        if not said.isdigit() or b"8" in said or b"9" in said or (found - int(said, 8)) % _ADLER_MODULUS:
            if position == 0 and (what := next((w for m, w in _NOT_A_TAR.items() if header.startswith(m)), None)):
                raise DataError(f"Shard {self.name} is no tar: it {what}.")
            raise self.error(f"has a damaged tar header at byte {position}")

    def _size(self, decimal: bytes | None, digits: bytes, position: int) -> int:
        """Bytes of the content: pax says it in decimal, ustar in octal, GNU in base 256 if the first bit is set."""
        if decimal is None and digits[0] & 0x80:
            return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
        said, base = (digits.strip(b" \0") or b"0", 8) if decimal is None else (decimal, 10)
        try:
            # `isdigit` keeps out what int() would take beside digits: signs, underscores, white space.
            value = int(said, base) if said.isdigit() else -1
        except ValueError:
            value = -1
        if value < 0:
            raise self.error(f"has a damaged tar header at byte {position}: the size cannot be read")
        return value

    def _name(self, header: bytes) -> bytes:
        name = header[:100].split(b"\0", 1)[0]
        if header[345] and header[257:263] == b"ustar\0":  # GNU's magic differs, and its prefix holds other things
            return header[345:500].split(b"\0", 1)[0] + b"/" + name
        return name

    def _extended(self, kind: bytes, offset: int, length: int) -> dict[bytes, bytes]:
        """{path, size} of the next member, as far as a GNU long name or a pax record gives them."""
        if length > MAX_EXTENDED_BYTES:
            raise self.error(f"has an extended tar header of {length} bytes, and {MAX_EXTENDED_BYTES} are allowed")
        content = self.read(offset, length)
        if kind == _GNU_LONG_NAME:
            return {b"path": content.split(b"\0", 1)[0]}
        if kind == _GNU_LONG_LINK:
            return {}
        found, start = {}, 0
        while start < length:  # records of the form b"<length> <key>=<value>\n"
            digits = content[start : start + 20].split(b" ", 1)[0]
            end = start + int(digits) if digits.isdigit() else 0
            key, equals, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
            if end <= start or end > length or not equals:
                raise self.error(f"has a damaged pax record at byte {offset + start}")
            if key.startswith(b"GNU.sparse."):
                raise self.error(f"holds a sparse file at byte {offset}, and only whole files are read")
            if key in (b"path", b"size"):
                found[key] = value
            start = end
        if kind == _PAX_GLOBAL and found:
            raise self.error(f"gives all its members one {' and '.join(map(_text, found))} (byte {offset})")
        return found

    def _check_member(self, kind: bytes, name: bytes) -> None:
        if kind not in _REGULAR and kind != _DIRECTORY:
            what = _FORBIDDEN.get(kind, f"a member of type {kind!r}")
            raise self.error(f"holds {what}, {_text(name)}, and only regular files are read")
        if name.startswith(b"/") or (b".." in name and b".." in name.split(b"/")) or b"\0" in name:
            raise self.error(f"holds {_text(name)}, a name that leaves the archive")

    def _check_end(self, position: int) -> None:
        """After the end mark only zeros may follow, and few: what else came there would be lost without a word."""
        num_zeros = self._num_bytes - position
        while rest := os.pread(self._descriptor, 2**20, position):
            if rest.strip(b"\0"):
                raise self.error(f"goes on after the end mark at byte {position}, like several tars joined into one")
            position += len(rest)
        if num_zeros > MAX_ZERO_BYTES:
            raise self.error(f"ends with {num_zeros} bytes of zeros, as a download leaves that died on its way")


def _text(name: bytes) -> str:
    """A member's name for a message."""
    return repr(name[:MAX_KEY_BYTES].decode(errors="backslashreplace"))
