"""The ranks' store as torch takes it: a connection to the server that rank 0 keeps."""

import contextlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from typing_extensions import override

from pipeline.training.store_server import (
    GREETING,
    HANDSHAKE_SECONDS,
    HEADER_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    ProtocolError,
    Session,
    length_of,
    proof_of,
)

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.001, 0.25
FAILED_KEY = "failed"
"""Set by a rank that ends by its own error: what others wait for may never come."""


class UnknownServer(OSError):
    """Who listens there does not know the job's secret."""


class RankStore(Store):
    """torch's Store by way of an authenticated connection; from any thread, one question at a time.

    Args:
        place: Host name or address, and port, of the server.
        secret: Of the job.
        patience_seconds: Longest wait for a key or an answer; `set_timeout` changes it.

    Raises:
        UnknownServer: Who listens there knows no secret, or another one.
        OSError: There is no connection.
    """

    def __init__(self, place: tuple[str, int], secret: str, patience_seconds: float) -> None:
        super().__init__()
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._socket = socket.create_connection(place, timeout=HANDSHAKE_SECONDS)
        try:
            self._session = self._greet(secret)
        except BaseException:
            self._socket.close()
            raise

    def _greet(self, secret: str) -> Session:
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            deadline = time.monotonic() + HANDSHAKE_SECONDS
            greeting = self._receive(len(GREETING) + NONCE_BYTES, deadline)
            if not greeting.startswith(GREETING):
                raise ProtocolError("another program's greeting")
            nonces = greeting[len(GREETING) :] + (own := secrets.token_bytes(NONCE_BYTES))
            self._socket.sendall(own + proof_of("client", secret, nonces))
            if not hmac.compare_digest(proof_of("server", secret, nonces), self._receive(PROOF_BYTES, deadline)):
                raise ProtocolError("another secret")
        except (ConnectionError, EOFError, TimeoutError, ProtocolError) as error:
            raise UnknownServer("who listens there does not know this job's secret") from error
        return Session(proof_of("session", secret, nonces))

    def _receive(self, num_bytes: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < num_bytes:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._socket.recv(num_bytes - len(received))
            if not part:
                raise EOFError
            received += part
        return bytes(received)

    def _ask(self, op: str, **arguments: Any) -> Any:
        with self._lock:
            try:
                deadline = time.monotonic() + self._patience_seconds
                self._socket.settimeout(self._patience_seconds)
                self._socket.sendall(self._session.seal({"op": op, **arguments}, to_server=True))
                header = self._receive(HEADER_BYTES, deadline)
                text = self._receive(length_of(header), deadline)
                return self._session.open(header, text, to_server=False)
            except (OSError, EOFError, ProtocolError) as error:
                with contextlib.suppress(OSError):
                    self._socket.close()  # half an answer may be under way
                why = f"no answer in {self._patience_seconds:g} s" if isinstance(error, TimeoutError) else "it is gone"
                raise dist.DistNetworkError(f"the ranks' store, which rank 0 keeps: {why}") from error

    # --- what torch asks; those without `override` are not in the declaration of its base class ---

    @property
    def timeout(self) -> timedelta:
        """Longest wait for a key or an answer."""
        return timedelta(seconds=self._patience_seconds)

    @override
    def set_timeout(self, timeout: timedelta) -> None:
        self._patience_seconds = timeout.total_seconds()

    @override
    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", key=key, value=_text(value))

    @override
    def get(self, key: str) -> bytes:
        self.wait([key])
        value = self._ask("get", key=key)
        if value is None:
            raise dist.DistStoreError(f"the ranks' store: {key} was there, and is gone")
        return value.encode("latin-1")

    @override
    def check(self, keys: Sequence[str]) -> bool:
        return self._ask("has", keys=list(keys))

    @override
    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        seconds = self._patience_seconds if timeout is None else timeout.total_seconds()
        deadline, pause = time.monotonic() + seconds, SHORTEST_PAUSE_SECONDS
        while not self.check(keys):
            if self.check([FAILED_KEY]):
                raise dist.DistStoreError(f"the ranks' store: a rank has failed, and none said {keys[0]}")
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"the ranks' store: no rank said {keys[0]} in {seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    @override
    def add(self, key: str, value: int) -> int:
        return self._ask("add", key=key, value=value)

    def append(self, key: str, value: str | bytes) -> None:
        """Append to the value of a key."""
        self._ask("append", key=key, value=_text(value))

    @override
    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        told = self._ask("compare_set", key=key, expected=_text(expected_value), desired=_text(desired_value))
        return told.encode("latin-1")

    @override
    def delete_key(self, key: str) -> bool:
        return self._ask("delete", key=key)

    @override
    def num_keys(self) -> int:
        return self._ask("count")

    def leave_will(self, key: str) -> None:
        """Have the server set a key when this connection has ended, however it does."""
        self._ask("will", key=key)

    # By these names torch's C++ looks for the two above.
    deleteKey, getNumKeys = delete_key, num_keys

    @override
    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        """Set several keys."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        """Say that there is `append`, `multi_get` and `multi_set`."""
        return True

    @override
    def clone(self) -> Store:
        return self


def _text(value: str | bytes) -> str:
    """As JSON can say it: a character per byte."""
    return (value.encode() if isinstance(value, str) else bytes(value)).decode("latin-1")
