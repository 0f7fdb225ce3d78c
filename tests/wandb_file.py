"""Read back what wandb wrote offline."""

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log format (blocks of 32 KiB; a record's header
    is checksum, length and type, of which 1 is a whole record, 2, 3 and 4 its first, middle and last part)."""
    record_type: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    content, position, payload = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left_in_block = 32_768 - position % 32_768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        payload += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = record_type()
            record.ParseFromString(payload)
            yield record
            payload = b""


def histories(directory: Path) -> list[dict[str, Any]]:
    """The rows of the one offline run that W&B would upload."""
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    history = [record.history for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in history
    ]


def tables(directory: Path, key: str) -> list[list[dict[str, Any]]]:
    """The table logged under `key` in every offline run that W&B would upload, by row."""
    found: list[list[dict[str, Any]]] = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        history = [record.history for record in records(path) if record.WhichOneof("record_type") == "history"]
        items = {tuple(item.nested_key): json.loads(item.value_json) for row in history for item in row.item}
        table = json.loads((path.parent / "files" / items[key, "path"]).read_text())
        found.append([dict(zip(table["columns"], row, strict=True)) for row in table["data"]])
        assert items[key, "nrows"] == len(found[-1])
    return found
