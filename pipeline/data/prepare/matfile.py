"""Just enough of MATLAB's level-5 MAT format to read one struct array, which is all that ILSVRC2012's devkit needs.

scipy reads these files, but would cost every user 140 MB for a table of a thousand names. The format is MathWorks'
"MAT-File Format" (R2020 edition, chapter 1): 128 bytes of header, then data elements, each a tag and a payload.
"""

import math
import struct
import zlib
from collections.abc import Iterator

from pipeline.core.errors import DataError

HEADER_BYTES = 128
MI_INT8, MI_MATRIX, MI_COMPRESSED = 1, 14, 15
MX_STRUCT, MX_CHAR = 2, 4
NUMBER_FORMATS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
TEXT_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
Value = str | list[float] | None


def read_struct_array(content: bytes, name: str, fields: tuple[str, ...]) -> list[dict[str, Value]]:
    """The struct array `name` of a MAT file: one dictionary per element, with the given fields only.

    A field is a string, a flat list of numbers, or None for what is neither (cells, nested structs).

    Raises:
        DataError: this is no level-5 MAT file, it is damaged, or it holds no such array or field.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise DataError("This is not a level-5 MAT file: the byte-order mark at byte 126 is missing.")
    try:
        for kind, payload in _elements(content[HEADER_BYTES:], order):
            if kind == MI_COMPRESSED:
                (kind, payload), *_ = _elements(zlib.decompress(payload), order)
            if kind == MI_MATRIX and (rows := _struct_rows(payload, order, name, fields)) is not None:
                return rows
    except (struct.error, zlib.error, KeyError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The MAT file is damaged ({type(error).__name__}: {error}).") from error
    raise DataError(f"The MAT file holds no struct array {name!r}.")


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each data element, the small format and the padding to 8 bytes understood."""
    position = 0
    while position + 8 <= len(content):
        (word,) = struct.unpack_from(f"{order}I", content, position)
        if word >> 16:  # small format: length and type share a word, the payload lies in the tag
            kind, num_bytes, start, end = word & 0xFFFF, word >> 16, position + 4, position + 8
        else:
            kind, num_bytes = struct.unpack_from(f"{order}II", content, position)
            start = position + 8
            # Everything but compressed elements is padded to 8 bytes.
            end = start + (num_bytes if kind == MI_COMPRESSED else -(-num_bytes // 8) * 8)
        if start + num_bytes > len(content):
            raise DataError(f"The MAT file ends within an element of {num_bytes} bytes.")
        yield kind, content[start : start + num_bytes]
        position = end


def _struct_rows(payload: bytes, order: str, name: str, fields: tuple[str, ...]) -> list[dict[str, Value]] | None:
    """The rows of a matrix element, or None if it is another array."""
    parts = _elements(payload, order)
    (_, flags), (_, dimensions), (_, own_name) = (next(parts) for _ in range(3))
    if _matrix_class(flags, order) != MX_STRUCT or own_name.decode("latin-1") != name:
        return None
    num_rows = math.prod(struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions))
    (_, length_bytes), (_, names) = next(parts), next(parts)
    (length,) = struct.unpack_from(f"{order}i", length_bytes)
    known = [names[i : i + length].split(b"\0")[0].decode("latin-1") for i in range(0, len(names), length)]
    if missing := [field for field in fields if field not in known]:
        raise DataError(f"The struct array {name!r} of the MAT file has no field {missing[0]!r} (it has {known}).")
    rows: list[dict[str, Value]] = []
    for _ in range(num_rows):
        # Every field must be consumed, wanted or not: elements follow one another row by row.
        row = {field: next(parts)[1] for field in known}
        rows.append({field: _value(row[field], order) for field in fields})
    return rows


def _matrix_class(flags: bytes, order: str) -> int:
    return struct.unpack_from(f"{order}I", flags)[0] & 0xFF


def _value(payload: bytes, order: str) -> Value:
    """Text or numbers of a matrix element."""
    if not payload:
        return []
    parts = list(_elements(payload, order))
    matrix_class = _matrix_class(parts[0][1], order)
    if matrix_class < MX_CHAR or len(parts) < 4:
        return None
    kind, content = parts[3]
    if matrix_class == MX_CHAR:
        encoding = TEXT_ENCODINGS[kind]
        suffix = {"<": "-le", ">": "-be"}[order] if encoding in ("utf-16", "utf-32") else ""
        return content.decode(encoding + suffix)
    number_format = NUMBER_FORMATS[kind]  # numbers are stored in the smallest type that holds them
    return list(struct.unpack(f"{order}{len(content) // struct.calcsize(number_format)}{number_format}", content))
