"""MAT files of level 5: a small writer of struct arrays, and one file that scipy wrote."""

import base64
import struct
import zlib

MI_INT8, MI_INT32, MI_UINT32, MI_DOUBLE, MI_MATRIX, MI_COMPRESSED, MI_UTF8 = 1, 5, 6, 9, 14, 15, 16
MX_STRUCT, MX_CHAR, MX_DOUBLE = 2, 4, 6


def mat_file(name: str, rows: list[dict[str, float | str]], *, compressed: bool) -> bytes:
    """A MAT file with the struct array `name` of shape (rows, 1); fields are strings or single numbers."""
    fields = list(rows[0])
    length = max(map(len, fields)) + 1
    body = b"".join(_value(value) for row in rows for value in row.values())
    names = b"".join(field.encode().ljust(length, b"\0") for field in fields)
    head = struct.pack("<HHi", MI_INT32, 4, length)  # the small format: type and length in one word
    array = _matrix(MX_STRUCT, (len(rows), 1), name, head + _element(MI_INT8, names) + body)
    if compressed:
        packed = zlib.compress(array)
        array = struct.pack("<II", MI_COMPRESSED, len(packed)) + packed  # the one element without padding
    header = b"MATLAB 5.0 MAT-file, for a test".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    other = _matrix(MX_DOUBLE, (1, 1), "other", _element(MI_DOUBLE, struct.pack("<d", 1)))
    return header + other + array


def _element(kind: int, payload: bytes) -> bytes:
    return struct.pack("<II", kind, len(payload)) + payload + bytes(-len(payload) % 8)


def _matrix(matrix_class: int, shape: tuple[int, int], name: str, content: bytes) -> bytes:
    flags = _element(MI_UINT32, struct.pack("<II", matrix_class, 0))
    return _element(
        MI_MATRIX, flags + _element(MI_INT32, struct.pack("<ii", *shape)) + _element(MI_INT8, name.encode()) + content
    )


def _value(value: float | str) -> bytes:
    if isinstance(value, str):
        return _matrix(MX_CHAR, (1, len(value)), "", _element(MI_UTF8, value.encode()))
    return _matrix(MX_DOUBLE, (1, 1), "", _element(MI_DOUBLE, struct.pack("<d", value)))


# scipy 1.17.1, savemat(..., do_compression=True): an array `other`, and `synsets` with the fields of the real meta.mat.
WRITTEN_BY_SCIPY = base64.b64decode(
    "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFR1ZSBOb3YgMjQgMTk6NDc6MzMgMjAyNgAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAAMgAAAHic42NgYAgAYjYg5gBi"
    "PgYIYIXyGYGYGUqDxPJLMlKLgDQPEEswIAAjlGaC0gCB7QLbDwAAAIgBAAB4nK2U0UrDMBSGz7ZurghD0Ytd9gG8aKey7cqCChuI"
    "iMK8LGXL2mCbSpOhewPvvPElvPMRBF/IRzDp2pnFYke30NPknPD9yclJ2wKAjwYAf6DJrQqLVk/9GrdKajvc6JxQxCif12A/jb9w"
    "G17djW7PO6bVcYYXQuD+etEv21MUT6gc8IKIrgTILHTGPg4mMSJJYMXJNAhijo+w57MUYbGLiYND10MUWjxowm8+upJPRTJI8q0k"
    "Y8HZEqflcLrE7aU+MTuW1e/2+mlc6AwKdNqKjvAfMDOm0fORMZoFj4gaoTuOI4bpOvtqKXrCp6EbBIYXo7mQhVLnkuUjc40cDqQ+"
    "093WersFnMbJw3q59aqwWd1Ns3t8KuVbpJNXp0viBZj6Bv+oGIr/5qHqZE3WyTu3bdVXXW8b9e39s57K6fI+bt7sjfjBq12+3rxZ"
    "3RNTyr9XoNNQdISPCMNsvh6vKbyYG7vTr/dNzxGatvqfyuNrCt9e8t9n6cBO3p+xXeY+HED5e/QDJHVSxw=="
)
