"""From the bytes of a label member to a class index.

`<key>.cls` holds ASCII digits. Public shards of ImageNet also carry `<key>.json`, an object whose field `label` is the
index; it is read where there is no `.cls`.
"""

import json
import re

LABEL_EXTENSION, JSON_EXTENSION = b"cls", b"json"
JSON_FIELD = "label"
MAX_LABEL_BYTES = 32
MAX_JSON_BYTES = 2**20
"""Sidecars of public sets hold captions and EXIF too; beyond this it is no label."""

_SHOWN_BYTES = 60
_INTEGER = re.compile(rb"\s*[+-]?[0-9]+\s*")  # int() would also take 1_000


class LabelError(ValueError):
    """Not a class index; the message is a clause that says what was found."""


def label_of_cls(content: bytes) -> int:
    """The class index in a `.cls` member.

    Raises:
        LabelError: not an integer of 64 bits in ASCII digits, white space around it allowed.
    """
    if len(content) > MAX_LABEL_BYTES or not _INTEGER.fullmatch(content):
        raise LabelError(f"is {_shown(content)}, and must be a class index as ASCII digits")
    return _checked(int(content))


def label_of_json(content: bytes) -> int:
    """The class index in the field `label` of a `.json` member.

    Raises:
        LabelError: not JSON, no such field, or not an integer of 64 bits.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # nested a thousand levels deep
        raise LabelError(f"is not JSON: {_shown(content)}") from None
    label = value.get(JSON_FIELD) if isinstance(value, dict) else None
    if type(label) is not int:  # a bool is an int to Python
        found = f"{JSON_FIELD!r} is {_shown(repr(label).encode())}" if label is not None else f"has no {JSON_FIELD!r}"
        raise LabelError(f"{found}, and must be an integer")
    return _checked(label)


def _checked(label: int) -> int:
    if not -(2**63) <= label < 2**63:
        raise LabelError(f"is {_shown(str(label).encode())}, which no set of classes reaches")
    return label


def _shown(content: bytes) -> str:
    more = " ..." if len(content) > _SHOWN_BYTES else ""
    return f"{content[:_SHOWN_BYTES].decode(errors='backslashreplace')!r}{more}"
