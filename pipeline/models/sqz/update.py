"""Keep a device's model up to date over HTTP: standard library, numpy, constriction.

    python -m pipeline.models.sqz.update http://models.example/first /var/lib/model

The server offers a directory of `export`: `latest.json` says what there is. A delta is taken where it belongs to the
package that the device has. A transfer that was cut goes on where it ended, in a later call too. Nothing takes the
place of the model before its size, SHA-256 and tensors were found right; until then the older one stays.
"""

import hashlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.models.sqz.decoder import decode
from pipeline.models.sqz.delta import apply_delta

OFFER = "latest.json"
MODEL = "model"
"""The file that is in use, in the device's directory."""
MAX_OFFER_BYTES, MAX_FILE_BYTES = 1 << 16, 1 << 30
_CHUNK_BYTES = 1 << 14
_FIRST_WAIT_SECONDS, _MAX_WAIT_SECONDS = 0.1, 10.0


class UpdateError(Exception):
    """The newer model was not had; the older one is in its place."""


@dataclass(frozen=True)
class Offered:
    """One file of the server."""

    file: str
    num_bytes: int
    sha256: str
    base_sha256: str | None = None
    """Of the package that a delta belongs to."""


class Update(NamedTuple):
    """What `update` did."""

    file: str | None
    """What was fetched; None: the newest was there."""
    received_bytes: int
    """Of its content, in this call."""


def update(url: str, directory: Path, kind: str = "package", *, seconds: float = 3600.0, stall: float = 30.0) -> Update:
    """Have the file of one kind that a server offers in `directory / MODEL`.

    Args:
        url: Of the directory that `export` wrote.
        directory: The device's, for the model and for what has come of a newer one.
        kind: `package`, for which a delta may be taken, or another kind of file, which is compared by its SHA-256.
        seconds: After which it is given up; what has come is kept for the next call.
        stall: Seconds of silence after which a connection is given up, and a new one tried.

    Raises:
        UpdateError: The server, its offer or a file is not as it must be; or the time was over.
    """
    deadline = time.monotonic() + seconds
    offered = _offer(_fetch(f"{url}/{OFFER}", b"", MAX_OFFER_BYTES, deadline, stall))
    if kind not in offered:
        raise UpdateError(f"{url} offers no {kind}, but {', '.join(sorted(offered)) or 'nothing'}")
    wanted, model = offered[kind], directory / MODEL
    current = model.read_bytes() if model.exists() else b""
    if hashlib.sha256(current).hexdigest() == wanted.sha256:
        return Update(None, 0)
    delta = offered.get("delta")
    if kind == "package" and delta is not None and delta.base_sha256 == hashlib.sha256(current).hexdigest():
        content, received_bytes = _fetch_file(url, directory, delta, deadline, stall)
        made, taken = _applied(current, content), delta
    else:
        made, received_bytes = _fetch_file(url, directory, wanted, deadline, stall)
        taken = wanted
    _check(made, wanted, kind)
    _replace(model, made)
    (directory / f"{taken.sha256}.part").unlink(missing_ok=True)
    return Update(taken.file, received_bytes)


def _offer(content: bytes) -> dict[str, Offered]:
    try:
        tree = json.loads(content)
        offered = {kind: Offered(**row) for kind, row in tree["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UpdateError(f"{OFFER} is none ({error})") from error
    for row in offered.values():
        hexadecimal = isinstance(row.sha256, str) and len(row.sha256) == 64 and set(row.sha256) <= {*"0123456789abcdef"}
        sound = isinstance(row.num_bytes, int) and 0 < row.num_bytes <= MAX_FILE_BYTES and isinstance(row.file, str)
        if not (hexadecimal and sound and Path(row.file).name == row.file):
            raise UpdateError(f"{OFFER} offers {row}, which cannot be")
    return offered


def _fetch_file(url: str, directory: Path, wanted: Offered, deadline: float, stall: float) -> tuple[bytes, int]:
    """(content, bytes received in this call), from where an earlier call ended."""
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f"{wanted.sha256}.part"
    begun = part.read_bytes()[: wanted.num_bytes] if part.exists() else b""
    with part.open("wb") as sink:
        sink.write(begun)
        sink.flush()
        content = _fetch(f"{url}/{wanted.file}", begun, wanted.num_bytes, deadline, stall, sink)
    if len(content) < wanted.num_bytes or hashlib.sha256(content).hexdigest() != wanted.sha256:
        part.unlink()
        raise UpdateError(f"{wanted.file} of {url} is not the file that {OFFER} offers: its size or SHA-256 is another")
    return content, len(content) - len(begun)


def _fetch(url: str, begun: bytes, max_bytes: int, deadline: float, stall: float, sink: Any = None) -> bytes:
    """Return what lies at an address, at most `max_bytes`, each connection going on where the last one ended."""
    content, wait = bytearray(begun), _FIRST_WAIT_SECONDS
    while len(content) < max_bytes:
        before = len(content)
        try:
            if _receive(url, content, max_bytes, deadline, stall, sink):
                break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise UpdateError(f"{url}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > deadline:
                raise UpdateError(f"{url}: {error}; {len(content):,} bytes have come, and are kept") from error
        if time.monotonic() > deadline:
            raise UpdateError(f"{url}: the time is over; {len(content):,} bytes have come, and are kept")
        if len(content) == before:
            time.sleep(min(wait, max(0.0, deadline - time.monotonic())))
            wait = min(2 * wait, _MAX_WAIT_SECONDS)
        else:
            wait = _FIRST_WAIT_SECONDS
    return bytes(content)


def _receive(url: str, content: bytearray, max_bytes: int, deadline: float, stall: float, sink: Any) -> bool:
    """Add to `content`, and say whether the server ended it of itself.

    Raises:
        OSError, http.client.HTTPException: The connection was refused, cut, or silent.
    """
    headers = {"Range": f"bytes={len(content)}-"} if content else {}
    timeout = min(stall, max(0.001, deadline - time.monotonic()))
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
        if content and answer.status != http.client.PARTIAL_CONTENT:
            content.clear()  # a server without ranges gives all of it
            if sink is not None:
                sink.truncate(0)
                sink.seek(0)
        while len(content) < max_bytes and time.monotonic() <= deadline:
            chunk = answer.read1(min(_CHUNK_BYTES, max_bytes - len(content)))
            if not chunk:
                if answer.length:
                    raise http.client.IncompleteRead(b"", answer.length)
                return True
            content += chunk
            if sink is not None:
                sink.write(chunk)
                sink.flush()
    return False


def _applied(current: bytes, delta: bytes) -> bytes:
    try:
        return apply_delta(current, delta)
    except Exception as error:  # whatever it stumbles over in a file made to harm
        raise UpdateError(f"the delta cannot be applied: {error}") from error


def _check(content: bytes, wanted: Offered, kind: str) -> None:
    if len(content) != wanted.num_bytes or hashlib.sha256(content).hexdigest() != wanted.sha256:
        raise UpdateError(f"what was made is not the {kind} that {OFFER} offers")
    if kind == "package":
        try:
            decode(content)
        except Exception as error:  # as above
            raise UpdateError(f"the package cannot be decoded: {error}") from error


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all, also when the power fails."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as sink:
        sink.write(content)
        sink.flush()
        os.fsync(sink.fileno())
    new.replace(path)


if __name__ == "__main__":
    server, own = sys.argv[1:]
    try:
        done = update(server, Path(own))
    except UpdateError as error:
        print(f"error: {error}. The older model stays in use.", file=sys.stderr)
        raise SystemExit(3) from None
    print(
        "The newest model is there." if done.file is None else f"Updated by {done.file}: {done.received_bytes:,} bytes."
    )
