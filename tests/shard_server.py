"""A web server that fails by script, in a process of its own, and counts in its own log what it sent.

As a program: `shard_server.py ROOT LOG [UPSTREAM]` serves a directory, or passes requests on to another server; it
prints its port, takes rules (`Rule`, as JSON) by `POST /rules`, and ends with its standard input.
"""

import contextlib
import hashlib
import http.client
import json
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

READY_SECONDS = 60.0
SETTLE_SECONDS = 2.0


@dataclass
class Rule:
    """A fault, and the requests that it meets."""

    fault: str
    """status, stall, reset, short, wrong, slow, redirect, or no_ranges."""
    path: str = r"\.tar$"
    """Searched for in the path."""
    times: int | None = None
    """How many requests; None: all."""
    method: str = "GET"
    status: int = 503
    retry_after: str | None = None
    after_bytes: int = 700
    """stall, reset, short: of the body, before it happens."""
    bytes_per_second: int = 1000
    location: str = ""
    """redirect: where to; empty: to the same address."""


@dataclass(frozen=True)
class Request:
    """A line of the log."""

    method: str
    path: str
    host: str
    asked_range: str | None
    status: int
    sent_bytes: int
    """Of the body."""
    fault: str | None
    began: float
    """Seconds of the monotonic clock."""
    authorization: str | None


class ShardServer:
    """The handle of a running server."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process, self.port, self._log = process, port, log

    @property
    def url(self) -> str:
        """Of what it serves."""
        return self.url_at("127.0.0.1")

    def url_at(self, address: str) -> str:
        """The same under another address of this machine; the log tells them apart."""
        return f"http://{address}:{self.port}"

    def set_rules(self, *rules: Rule) -> None:
        """In place of all former ones; the first that matches a request holds."""
        body = json.dumps([asdict(rule) for rule in rules]).encode()
        with urllib.request.urlopen(f"{self.url}/rules", body, timeout=READY_SECONDS) as answer:
            assert answer.status == 204

    def requests(self, pattern: str = "", *, method: str = "GET") -> list[Request]:
        """What was asked for, in order; what is not answered yet is waited for, a moment long."""
        with urllib.request.urlopen(f"{self.url}/settled", b"", timeout=READY_SECONDS) as answer:
            assert answer.status == 204
        lines = self._log.read_text().splitlines()
        found = sorted((Request(**json.loads(line)) for line in lines), key=lambda request: request.began)
        return [request for request in found if request.method == method and re.search(pattern, request.path)]

    def sent_bytes(self, pattern: str = r"\.tar$", *, host: str = "") -> int:
        """Bytes of bodies."""
        return sum(r.sent_bytes for r in self.requests(pattern) if r.host.startswith(host))


@contextlib.contextmanager
def serving(root: Path, log: Path, *rules: Rule, upstream: str = "") -> Iterator[ShardServer]:
    """Serve `root` (or what `upstream` serves) until the end of the block."""
    log.write_text("")
    command = [sys.executable, __file__, str(root), str(log), upstream]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdin is not None
            server = ShardServer(process, int(process.stdout.readline()), log)
            server.set_rules(*rules)
            yield server
        finally:
            process.kill()


# --- the server's own process ---


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path, log: Path, upstream: str) -> None:
        super().__init__(("0.0.0.0", 0), _Handler)
        self.root, self.upstream = root, upstream
        self.log = log.open("a")
        self.rules: list[Rule] = []
        self.lock = threading.Lock()
        self.num_unanswered = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to report."""

    def rule_for(self, method: str, path: str) -> Rule | None:
        with self.lock:
            for rule in self.rules:
                if rule.method == method and re.search(rule.path, path) and rule.times != 0:
                    rule.times = rule.times if rule.times is None else rule.times - 1
                    return rule
        return None

    def write(self, request: Request) -> None:
        with self.lock:
            self.num_unanswered -= 1
            self.log.write(json.dumps(asdict(request)) + "\n")
            self.log.flush()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *arguments: Any) -> None:
        """The log is ours."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/settled":
            deadline = time.monotonic() + SETTLE_SECONDS
            while self.server.num_unanswered and time.monotonic() < deadline:
                time.sleep(0.01)
        else:
            with self.server.lock:
                self.server.rules = [Rule(**rule) for rule in json.loads(content)]
        self.send_response(204)
        self.end_headers()

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        began, self.sent_bytes, self.status = time.monotonic(), 0, 0
        rule = self.server.rule_for(self.command, urlsplit(self.path).path)
        with self.server.lock:
            self.server.num_unanswered += 1
        try:
            self._answer_by(rule)
        finally:
            self.server.write(
                Request(
                    method=self.command,
                    path=self.path,
                    host=self.headers.get("Host", ""),
                    asked_range=self.headers.get("Range"),
                    status=self.status,
                    sent_bytes=self.sent_bytes,
                    fault=rule.fault if rule else None,
                    began=began,
                    authorization=self.headers.get("Authorization"),
                )
            )

    def _answer_by(self, rule: Rule | None) -> None:
        fault = rule.fault if rule else None
        if rule and fault == "status":
            more = {"Retry-After": rule.retry_after} if rule.retry_after else {}
            self._send_head(rule.status, {"Content-Length": "0", **more})
            return
        if rule and fault == "redirect":
            self._send_head(302, {"Content-Length": "0", "Location": rule.location or self.path})
            return
        if rule and fault == "no_ranges":
            del self.headers["Range"]
        status, headers, body = self._forwarded() if self.server.upstream else self._from_disk()
        if fault == "wrong" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self._send_head(status, headers)
        if self.command == "HEAD":
            return
        if rule and fault in ("stall", "reset", "short"):
            self._send(body[: rule.after_bytes])
            self._break_off(rule)
        elif rule and fault == "slow":
            step = max(1, rule.bytes_per_second // 10)
            for start in range(0, len(body), step):
                self._send(body[start : start + step])
                time.sleep(0.1)
        else:
            self._send(body)

    def _break_off(self, rule: Rule) -> None:
        self.close_connection = True
        if rule.fault == "stall":
            select.select([self.connection], [], [], 600.0)  # until the client goes away
        elif rule.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, content: bytes) -> None:
        for start in range(0, len(content), 2**16):
            piece = content[start : start + 2**16]
            self.wfile.write(piece)
            self.sent_bytes += len(piece)

    def _from_disk(self) -> tuple[int, dict[str, str], bytes]:
        path = self.server.root / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            return 404, {"Content-Length": "0"}, b""
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {"ETag": tag, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.headers.get("If-Range", tag) == tag:
            start = int(asked[1])
            rest = content[start:]
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return 206, {**headers, "Content-Range": span, "Content-Length": str(len(rest))}, rest
        return 200, {**headers, "Content-Length": str(len(content))}, content

    def _forwarded(self) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(urlsplit(self.server.upstream).netloc, timeout=60)
        try:
            upstream.request(self.command, self.path, headers=dict(self.headers.items()))
            answer = upstream.getresponse()
            body = answer.read()
        finally:
            upstream.close()
        dropped = {"connection", "transfer-encoding", "content-length", "date", "server"}
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
        headers["Content-Length"] = answer.getheader("Content-Length") or str(len(body))
        return answer.status, headers, body


def _main() -> None:
    root, log, upstream = sys.argv[1:]
    server = _Server(Path(root), Path(log), upstream)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    _main()
