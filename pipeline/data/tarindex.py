"""Where the samples of one tar lie: a scan of its headers that reads no picture.

Understands what tar writers of this field produce: ustar, GNU long names, pax `path` and `size`. Only regular files
count. A member that could reach outside the archive (links, devices, absolute names, `..`) condemns the shard, because
no honest writer of shards makes one. Nothing is ever extracted.

WebDataset's convention: the name up to the first dot of its last component is the key, the rest the extension.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

IMAGE_EXTENSIONS = frozenset({b"jpg", b"jpeg", b"png"})
LABEL_EXTENSION = b"cls"

MAX_IMAGE_BYTES = 256 * 2**20
MAX_LABEL_BYTES = 32
MAX_KEY_BYTES = 255
MAX_EXTENDED_BYTES = 64 * 1024  # a long name or a pax record

_BLOCK_BYTES = 512
# A label's header, its content and the next picture's header fit into one read.
_WINDOW_BYTES = 4096
_REGULAR, _DIRECTORY = frozenset({b"0", b"\0", b"7"}), b"5"
_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_FORBIDDEN = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}


@dataclass(frozen=True)
class ShardSamples:
    """The samples of one shard in the order of their first members. All arrays have shape (num_samples,)."""

    keys: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    """Bytes from the start of the tar to the picture's first byte."""
    lengths: NDArray[np.int32]
    """Bytes of the picture."""
    labels: NDArray[np.int64]


@dataclass
class _Sample:
    offset: int = -1
    length: int = -1
    label: int | None = None


def index_shard(path: Path) -> ShardSamples:
    """Scan the tar at `path`.

    Raises:
        DataError: the tar is cut short, damaged, has forbidden members, or a sample lacks its picture or its label.
    """
    samples: dict[bytes, _Sample] = {}
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        tar = _Tar(descriptor, path.name)
        for name, offset, length in tar.regular_files():
            _add(samples, tar, name, offset, length)
    finally:
        os.close(descriptor)
    for key, sample in samples.items():
        missing = (
            "label (.cls)" if sample.label is None else "picture (.jpg, .jpeg or .png)" if sample.offset < 0 else None
        )
        if missing:
            raise DataError(f"Sample {_text(key)} of shard {path.name} has no {missing}: prepare the shards again.")
    return ShardSamples(
        keys=np.array(list(samples), dtype=np.bytes_) if samples else np.empty(0, "S1"),
        offsets=np.fromiter((sample.offset for sample in samples.values()), np.int64, len(samples)),
        lengths=np.fromiter((sample.length for sample in samples.values()), np.int32, len(samples)),
        labels=np.fromiter((sample.label for sample in samples.values()), np.int64, len(samples)),
    )


def _add(samples: dict[bytes, _Sample], tar: "_Tar", name: bytes, offset: int, length: int) -> None:
    """Note one regular file, if it is a picture or a label."""
    directory, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    extension = extension.lower()
    is_image = extension in IMAGE_EXTENSIONS
    if not stem or not (is_image or extension == LABEL_EXTENSION):
        return
    key = directory + slash + stem
    if len(key) > MAX_KEY_BYTES:
        raise tar.error(f"has a key of {len(key)} bytes, and {MAX_KEY_BYTES} are allowed: shorten the names")
    sample = samples.setdefault(key, _Sample())
    if (sample.offset >= 0) if is_image else (sample.label is not None):
        raise tar.error(f"holds sample {_text(key)} twice")
    if not is_image:
        sample.label = _read_label(tar, key, offset, length)
        return
    if length > MAX_IMAGE_BYTES:
        raise tar.error(f"holds {_text(name)} with {length} bytes, and a picture may have {MAX_IMAGE_BYTES}")
    sample.offset, sample.length = offset, length


def _read_label(tar: "_Tar", key: bytes, offset: int, length: int) -> int:
    content = tar.read(offset, min(length, MAX_LABEL_BYTES + 1))
    try:
        label = int(content.decode("ascii")) if length <= MAX_LABEL_BYTES else None
    except ValueError:
        label = None
    if label is None or not -(2**63) <= label < 2**63:
        shown = content[:MAX_LABEL_BYTES]
        raise DataError(
            f"The label of sample {_text(key)} of shard {tar.name} is {shown!r}, and must be a class index as ASCII"
            " digits: prepare the shards again."
        )
    return label


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
        return DataError(f"Shard {self.name} {complaint}. Copy it again from its source, or prepare the shards again.")

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
            if not header.strip(b"\0"):
                self._check_end(position)
                return
            self._check_sum(header, position)
            kind = header[156:157]
            length = self._number(extended.get(b"size"), header[124:136], position)
            name = extended.get(b"path") or self._name(header)
            content = position + _BLOCK_BYTES
            position = content + -(-length // _BLOCK_BYTES) * _BLOCK_BYTES
            if content + length > self._num_bytes:
                raise self.error(
                    f"is cut short: {_text(name)} needs {content + length} bytes, and the file has {self._num_bytes}"
                )
            if kind in (_GNU_LONG_NAME, _PAX):
                extended.update(self._extended(kind, content, length))
                continue
            if kind in (_GNU_LONG_LINK, _PAX_GLOBAL):
                continue
            extended = {}
            self._check_member(kind, name)
            if kind in _REGULAR:
                yield name, content, length

    def _check_sum(self, header: bytes, position: int) -> None:
        """The header's own checksum: the sum of its bytes, the field itself counted as blanks."""
        try:
            expected = int(header[148:156].split(b"\0")[0].strip() or b"x", 8)
        except ValueError:
            expected = -1
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected:
            raise self.error(f"has a damaged tar header at byte {position}")

    def _number(self, decimal: bytes | None, field: bytes, position: int) -> int:
        """A size: pax says it in decimal, ustar in octal, GNU in base 256 if the first bit is set."""
        try:
            if decimal is not None:
                value = int(decimal)
            elif field[0] & 0x80:
                value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
            else:
                value = int(field.split(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            value = -1
        if value < 0:
            raise self.error(f"has a damaged tar header at byte {position}: the size cannot be read")
        return value

    def _name(self, header: bytes) -> bytes:
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0":  # GNU's magic differs, and its prefix field holds other things
            prefix = header[345:500].split(b"\0", 1)[0]
            return prefix + b"/" + name if prefix else name
        return name

    def _extended(self, kind: bytes, offset: int, length: int) -> dict[bytes, bytes]:
        """{path, size} as far as a GNU long name or a pax record gives them."""
        if length > MAX_EXTENDED_BYTES:
            raise self.error(f"has an extended tar header of {length} bytes, and {MAX_EXTENDED_BYTES} are allowed")
        content = self.read(offset, length)
        if kind == _GNU_LONG_NAME:
            return {b"path": content.split(b"\0", 1)[0]}
        found, start = {}, 0
        while start < length:  # records of the form b"<length> <key>=<value>\n"
            digits = content[start : start + 20].split(b" ", 1)[0]
            end = start + int(digits) if digits.isdigit() else 0
            key, equals, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
            if end <= start or end > length or not equals:
                raise self.error(f"has a damaged pax record at byte {offset + start}")
            if key in (b"path", b"size"):
                found[key] = value
            start = end
        return found

    def _check_member(self, kind: bytes, name: bytes) -> None:
        if kind not in _REGULAR and kind != _DIRECTORY:
            what = _FORBIDDEN.get(kind, f"a member of type {kind!r}")
            raise self.error(f"holds {what}, {_text(name)}, and only regular files are read")
        if name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
            raise self.error(f"holds {_text(name)}, a name that leaves the archive")

    def _check_end(self, position: int) -> None:
        """After the end mark only zeros may follow: what else came there would be lost without a word."""
        while rest := os.pread(self._descriptor, 2**20, position):
            if rest.strip(b"\0"):
                raise self.error(f"goes on after the end mark at byte {position}, like several tars joined into one")
            position += len(rest)


def _text(name: bytes) -> str:
    """A member's name for a message."""
    return repr(name[:MAX_KEY_BYTES].decode(errors="backslashreplace"))
