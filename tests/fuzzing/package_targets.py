"""Over-the-air packages and deltas: damaged as transfers and disks do it, and made to harm with the right hash."""

import functools
import hashlib
import http.server
import json
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np

from pipeline.core.errors import CheckpointError, ExitCode
from pipeline.models.sqz.decoder import HEAD, Package, PackageError, decode
from pipeline.models.sqz.delta import DELTA_HEAD, apply_delta, make_delta
from pipeline.models.sqz.encoder import encode, make_grid, pack
from pipeline.models.sqz.update import MODEL, UpdateError, update
from pipeline.training.shipped import read_package
from tests.fuzzing.damage import damage_bytes, damage_json
from tests.fuzzing.pool import Target, WrongResultError

REFUSED = frozenset({int(ExitCode.CHECKPOINT)})
PEAK_BYTES = 100_000_000
FULL, SMALL = (1248, 1000), (24, 16, 3, 3)
"""Weights of the one coded layer: as many as SqueezeNet v1.0 has; and few, where most cases are decoded."""


def package_targets() -> list[Target]:
    """Files damaged by chance, which are all refused; and files made to harm, which leave a sound model."""
    base, new, delta = _pair(FULL)
    other = make_delta(base, base)
    small_base, small_new, small_delta = _pair(SMALL)

    def damaged(sound: bytes, twin: bytes, read: Callable[[bytes, Path], object]) -> Target:
        def damage(random: Random, case: Path) -> Callable[[], object]:
            content = _damaged(random, sound, twin)

            def use() -> None:
                read(content, case)
                if content not in (sound, twin):
                    raise WrongResultError("damage was taken for a sound file")

            return use

        return Target("package" if sound is new else "delta", damage, REFUSED, PEAK_BYTES)

    def harmful(random: Random, case: Path) -> Callable[[], object]:
        is_delta = random.random() < 0.5
        content = _harmful(random, small_delta if is_delta else small_new, 5 if is_delta else 4)
        return functools.partial(_offer_to_device, case, small_base, small_new, content, is_delta)

    def evaluated(random: Random, case: Path) -> Callable[[], object]:
        return functools.partial(_evaluated, _harmful(random, small_new, 4), case)

    return [
        damaged(new, base, _evaluated),
        damaged(delta, other, lambda content, _: _applied(base, content)),
        Target("device", harmful, REFUSED),
        Target("harmful", evaluated, REFUSED),
    ]


def _pair(shape: Sequence[int]) -> tuple[bytes, bytes, bytes]:
    """An older package, a newer one on its grid, and the delta between them."""
    generator = np.random.default_rng(0)
    symbols = np.rint(generator.laplace(size=shape) * 9 * (generator.random(shape) < 0.33)).astype(np.int32)
    bias = np.linspace(-1, 1, shape[0]).astype(np.float16)
    grids = {"weight": make_grid(symbols, 0.013)}
    change = (generator.random(shape) < 0.05) * (symbols != 0) * (symbols < symbols.max())

    def packed(values: np.ndarray) -> bytes:
        tensors = {"weight": values, "bias": bias, "count": np.array(7, np.int64)}
        meta = {"model": "squeezenet1_0", "classes": ["ant", "bee"], "metaparameters": {"dropout": 0.5}}
        package: Package = pack(meta, tensors, grids, [(1, 2.5), (0, -1.25)])
        return encode(package).content

    base, new = packed(symbols), packed(symbols + change.astype(np.int32))
    return base, new, make_delta(base, new)


def _damaged(random: Random, sound: bytes, twin: bytes) -> bytes:
    """Bits, cuts and the like; or the head of another file of the same kind."""
    if random.random() < 0.7:
        return damage_bytes(random, sound)
    end = random.randrange(5, 200)
    return sound[:4] + twin[4:end] + sound[end:]


def _harmful(random: Random, sound: bytes, num_parts: int) -> bytes:
    """One part of the file changed so that it still is one, lengths made up, and the hash over all of it right."""
    head = HEAD if num_parts == 4 else DELTA_HEAD
    lengths = list(struct.unpack_from(f"<{num_parts}I", sound, head.size - 4 * num_parts))
    parts, at = [], head.size
    for length in lengths:
        parts.append(sound[at : at + length])
        at += length
    parts.append(sound[at:])
    number = random.choice([number for number, part in enumerate(parts) if part])
    is_zlib = number < 2 or (num_parts == 5 and number == 4)
    if is_zlib and random.random() < 0.8:
        inflated = zlib.decompress(parts[number])
        changed = (damage_json if number == 0 else damage_bytes)(random, inflated)
        parts[number] = zlib.compress(changed)
    else:
        parts[number] = damage_bytes(random, parts[number])
    lengths = [len(part) for part in parts[:-1]]
    if random.random() < 0.2:
        lengths[random.randrange(num_parts)] = random.choice((0, 1, 83, 2**31, 2**32 - 1, random.randrange(5000)))
    body = sound[36 : head.size - 4 * num_parts] + struct.pack(f"<{num_parts}I", *lengths) + b"".join(parts)
    return sound[:4] + hashlib.sha256(body).digest() + body


def _evaluated(content: bytes, case: Path) -> None:
    """As `evaluate` and `predict` read a package."""
    path = case / "model.sqz"
    path.write_bytes(content)
    read_package(path)


def _applied(base: bytes, content: bytes) -> None:
    try:
        apply_delta(base, content)
    except PackageError as error:
        raise CheckpointError(str(error)) from error


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing of it."""


def _offer_to_device(case: Path, base: bytes, new: bytes, content: bytes, is_delta: bool) -> None:
    """A device updates from a server that offers the file and means harm."""
    served, device = case / "served", case / "device"
    served.mkdir()
    device.mkdir()
    (device / MODEL).write_bytes(base)
    whole = new if is_delta else content
    rows = {"package": _row(served, "model.sqz", whole)}
    if is_delta:
        rows["delta"] = {**_row(served, "model.sqd", content), "base_sha256": hashlib.sha256(base).hexdigest()}
    (served / "latest.json").write_text(json.dumps({"schema": 1, "files": rows}))
    handler = functools.partial(_Handler, directory=str(served))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            update(f"http://127.0.0.1:{server.server_port}", device, seconds=20)
        except UpdateError as error:
            if (device / MODEL).read_bytes() != base:
                raise WrongResultError("the older model is gone") from error
            raise CheckpointError(str(error)) from error
        finally:
            server.shutdown()
    decode((device / MODEL).read_bytes())


def _row(served: Path, name: str, content: bytes) -> dict[str, object]:
    (served / name).write_bytes(content)
    return {"file": name, "num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
