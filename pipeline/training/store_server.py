"""The store of the ranks: what keeps it, and how it is spoken to. Only who knows the job's secret is heard.

torch's TCPStore serves whoever connects: a stranger reads, changes and deletes keys, and lists their names. Here both
sides prove first that they know the secret, and each later message carries a proof of its own:

1. the server sends a nonce; the client answers with a nonce of its own and HMAC(secret, both);
2. the server answers with another HMAC of both. Without its proof the client says nothing;
3. a key for this connection follows from the secret and both nonces. Every message is its length, its HMAC under that
   key (over direction, number and text), and its text, which is JSON.

Nothing is kept secret: who can read the network reads along, but cannot take part. Questions are answered at once, and
who waits for a key asks again. So a stranger costs a socket for a few seconds, and there are at most so many of them.
"""

import asyncio
import hmac
import json
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GREETING = b"squeezewire 1 "
NONCE_BYTES = PROOF_BYTES = 32
HANDSHAKE_SECONDS = 10.0
MOST_STRANGERS = 64
"""Connections that have proven nothing yet; of more the oldest is closed, for a rank needs no time for its proof."""
MOST_MESSAGE_BYTES = 64 * 2**20
HEADER_BYTES = 4 + PROOF_BYTES


class ProtocolError(Exception):
    """What came is no rank's word."""


# --- what both sides know ---


@dataclass
class Session:
    """A connection whose two sides know one another."""

    key: bytes
    num_sent: int = 0
    num_received: int = 0

    def seal(self, message: Any, *, to_server: bool) -> bytes:
        """Return the next message of this side as bytes."""
        text = json.dumps(message).encode()
        proof = self._proof(to_server, self.num_sent, text)
        self.num_sent += 1
        return struct.pack(">I", len(text)) + proof + text

    def open(self, header: bytes, text: bytes, *, to_server: bool) -> Any:
        """Return the next message of the other side.

        Raises:
            ProtocolError: It is not the next of who greeted.
        """
        expected = self._proof(to_server, self.num_received, text)
        if not hmac.compare_digest(expected, header[4:]):
            raise ProtocolError("a message without proof")
        self.num_received += 1
        return json.loads(text)

    def _proof(self, to_server: bool, number: int, text: bytes) -> bytes:
        return hmac.digest(self.key, struct.pack(">?Q", to_server, number) + text, "sha256")


def length_of(header: bytes) -> int:
    """Return how many bytes of text follow a header.

    Raises:
        ProtocolError: More than anybody sends.
    """
    (num_bytes,) = struct.unpack(">I", header[:4])
    if num_bytes > MOST_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {num_bytes} bytes")
    return num_bytes


def proof_of(side: str, secret: str, nonces: bytes) -> bytes:
    """Return what a side, `client` or `server`, proves itself with; of `session`: the connection's key."""
    return hmac.digest(secret.encode(), side.encode() + nonces, "sha256")


# --- the server ---


class StoreServer:
    """Keeps the values in memory and answers, in a thread of its own, until its process ends.

    Args:
        listener: A bound socket, which becomes the server's.
        secret: What a client must know.
    """

    def __init__(self, listener: socket.socket, secret: str) -> None:
        self._secret = secret
        self._values: dict[str, str] = {}
        self._strangers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=listener))
        threading.Thread(target=self._loop.run_forever, name="store", daemon=True).start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        will: str | None = None
        self._strangers.append(writer)
        if len(self._strangers) > MOST_STRANGERS:
            self._strangers[0].transport.abort()
        try:
            try:
                async with asyncio.timeout(HANDSHAKE_SECONDS):
                    session = await self._greet(reader, writer)
            finally:
                self._strangers.remove(writer)
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                text = await reader.readexactly(length_of(header))
                question = session.open(header, text, to_server=True)
                will = question["key"] if question["op"] == "will" else will
                writer.write(session.seal(self._answer(**question), to_server=False))
                await writer.drain()
        except (OSError, EOFError, TimeoutError, ProtocolError):
            pass  # a stranger, or a rank that has ended: others see to that
        finally:
            writer.transport.abort()
            if will is not None:
                self._set(will, "")

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Session:
        own = secrets.token_bytes(NONCE_BYTES)
        writer.write(GREETING + own)
        answer = await reader.readexactly(NONCE_BYTES + PROOF_BYTES)
        nonces = own + answer[:NONCE_BYTES]
        if not hmac.compare_digest(proof_of("client", self._secret, nonces), answer[NONCE_BYTES:]):
            raise ProtocolError("a stranger")
        writer.write(proof_of("server", self._secret, nonces))
        await writer.drain()
        return Session(proof_of("session", self._secret, nonces))

    # --- what can be asked ---

    def _answer(self, op: str, **arguments: Any) -> Any:
        answers: dict[str, Callable[..., Any]] = {
            "set": self._set,
            "get": self._values.get,
            "has": lambda keys: all(key in self._values for key in keys),
            "add": self._add,
            "append": lambda key, value: self._set(key, self._values.get(key, "") + value),
            "compare_set": self._compare_set,
            "delete": lambda key: self._values.pop(key, None) is not None,
            "count": lambda: len(self._values),
            "will": lambda key: None,  # `_serve` sees to it
        }
        return answers[op](*arguments.values())

    def _set(self, key: str, value: str) -> None:
        self._values[key] = value

    def _add(self, key: str, value: int) -> int:
        total = int(self._values.get(key, "0")) + value
        self._values[key] = str(total)
        return total

    def _compare_set(self, key: str, expected: str, desired: str) -> str:
        if self._values.get(key, "") == expected:
            self._values[key] = desired
        return self._values.get(key, expected)
