"""Transfers end whole and proven, or with one sentence in time, whatever the server does. The server is a real one."""

import hashlib
import io
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from pipeline.core.errors import DataError
from pipeline.data.remote.opening import open_store
from pipeline.data.remote.store import retry_after
from pipeline.data.remote.transfer import Expected, FetchBudget, fetch, head
from tests.shard_server import Rule, ShardServer, serving

pytestmark = pytest.mark.not_quick

NAME = "train-000000.tar"
CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WHOLE = Expected(len(CONTENT), SHA256)
SHORT = FetchBudget(4.0)  # a second for a connection, for a silence, and to find a server too slow
SHORTER = FetchBudget(2.0)
SCHEDULING_SECONDS = 30.0  # what a loaded machine may add

Serve = Callable[..., ShardServer]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardServer]:
    root = tmp_path_factory.mktemp("served")
    (root / NAME).write_bytes(CONTENT)
    (root / "a b%c.tar").write_bytes(CONTENT[:1000])
    with serving(root, root.parent / "requests.jsonl") as server:
        yield server


@pytest.fixture
def serve(running: ShardServer) -> Serve:
    """Set the rules, and forget what was logged."""

    def set_rules(*rules: Rule) -> ShardServer:
        running.requests()  # what a former test broke off is logged now
        running.set_rules(*rules)
        running._log.write_text("")
        return running

    return set_rules


def got(server: ShardServer, name: str = NAME, *, expected: Expected = WHOLE, budget: FetchBudget = SHORT) -> bytes:
    file = io.BytesIO()
    fetch(open_store(server.url, budget.timeouts), name, file, expected=expected, budget=budget)
    return file.getvalue()


def refused(server: ShardServer, **arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        got(server, **arguments)
    return str(caught.value)


def test_a_sound_server_is_asked_once(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve()
    assert got(server) == CONTENT
    assert [(r.status, r.sent_bytes) for r in server.requests()] == [(200, len(CONTENT))]
    assert got(server, "a b%c.tar", expected=Expected()) == CONTENT[:1000]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("status", [429, 500, 503])
def test_twice_not_now_then_well_is_well_and_is_counted(
    serve: Serve, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(Rule("status", status=status, times=2))
    assert got(server) == CONTENT
    assert [r.status for r in server.requests()] == [status, status, 200]
    assert f"{NAME} of {server.url} came after 2 failed attempts: HTTP {status} (twice)" in capsys.readouterr().err


def test_never_well_ends_within_the_budget(serve: Serve) -> None:
    server = serve(Rule("status", status=503))
    began = time.monotonic()
    sentence = refused(server, budget=SHORTER)
    assert time.monotonic() - began < SHORTER.seconds + SCHEDULING_SECONDS
    found = re.search(r"data\.fetch_timeout_seconds=2: HTTP 503 \((\d+) times\)\. Look after the server", sentence)
    assert found and int(found[1]) == len(server.requests()) >= 3
    begun = [r.began for r in server.requests()]
    pauses = np.diff(begun)
    assert pauses[1] > pauses[0] * 0.9 and pauses[-1] < SHORTER.seconds  # longer each time, up to the jitter


def test_the_server_says_how_long_to_wait(serve: Serve) -> None:
    server = serve(Rule("status", status=429, retry_after="1", times=1))
    assert got(server) == CONTENT
    first, second = (r.began for r in server.requests())
    assert second - first >= 1.0


def test_a_server_that_wants_longer_than_the_patience_ends_it_at_once(serve: Serve) -> None:
    server = serve(Rule("status", status=503, retry_after="3600"))
    began = time.monotonic()
    assert "the server asks to wait 3600 s more" in refused(server)
    assert time.monotonic() - began < SCHEDULING_SECONDS and len(server.requests()) == 1


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("7", 7, 7), (" 7 ", 7, 7), (formatdate(time.time() + 1000, usegmt=True), 0, 1001), (formatdate(0), 0, 0)],
    ids=["seconds", "spaced seconds", "a date to come", "a date gone by"],  # no clock: all workers must collect alike
)
def test_retry_after_is_a_number_or_a_date(value: str, low: int, high: int) -> None:
    seconds = retry_after(value)
    assert seconds is not None and low <= seconds <= high


@pytest.mark.parametrize("value", [None, "", "soon", "-"])
def test_retry_after_that_says_nothing_is_none(value: str | None) -> None:
    assert retry_after(value) is None


@pytest.mark.parametrize("fault", ["stall", "reset", "short"])
def test_a_transfer_that_breaks_off_goes_on_where_it_was(serve: Serve, fault: str) -> None:
    server = serve(Rule(fault, times=2, after_bytes=100_000))
    assert got(server) == CONTENT
    requests = server.requests()
    assert [r.fault for r in requests] == [fault, fault, None]
    starts = [int((r.asked_range or "bytes=0-")[6:-1]) for r in requests]
    assert starts[0] == 0 and starts == sorted(starts) and starts[2] > 0
    if fault != "reset":  # a reset throws away what is on its way
        assert starts == [0, 100_000, 200_000] and server.sent_bytes() == len(CONTENT)


def test_a_server_without_ranges_begins_anew(serve: Serve) -> None:
    server = serve(Rule("short", times=1, after_bytes=100_000), Rule("no_ranges"))
    assert got(server) == CONTENT
    assert [(r.status, r.sent_bytes) for r in server.requests()] == [(200, 100_000), (200, len(CONTENT))]


@pytest.mark.parametrize(
    "fault", [pytest.param("stall", marks=pytest.mark.slow), "short", pytest.param("reset", marks=pytest.mark.slow)]
)
def test_a_transfer_that_never_gets_further_ends(serve: Serve, fault: str) -> None:
    server = serve(Rule(fault, after_bytes=0))
    began = time.monotonic()
    sentence = refused(server, budget=SHORTER)
    assert time.monotonic() - began < SHORTER.seconds + SCHEDULING_SECONDS
    words = {"stall": "silence in the middle", "short": "cut short", "reset": "connection broken"}
    assert words[fault] in sentence and len(server.requests(r"\.tar$")) >= 2


def test_a_server_of_a_kilobyte_per_second_is_too_slow(serve: Serve) -> None:
    server = serve(Rule("slow", bytes_per_second=1000))
    began = time.monotonic()
    assert re.search(r"slower than 10 kB/s \(\w+( times)?\)", refused(server, budget=SHORTER))
    assert time.monotonic() - began < SHORTER.seconds + SCHEDULING_SECONDS


def test_a_server_that_is_slow_for_a_while_is_left_and_asked_again(serve: Serve) -> None:
    server = serve(Rule("slow", bytes_per_second=1000, times=1))
    assert got(server) == CONTENT
    assert server.requests()[-1].asked_range is not None  # what had come is kept


def test_wrong_bytes_are_noticed_and_fetched_again(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(Rule("wrong", times=1))
    assert got(server) == CONTENT
    assert [r.asked_range for r in server.requests()] == [None, None]  # nothing of them is kept
    assert "wrong content, SHA-256" in capsys.readouterr().err


def test_wrong_bytes_each_time_are_refused(serve: Serve) -> None:
    server = serve(Rule("wrong"))
    sentence = refused(server)
    assert "came 3 times with the wrong content" in sentence and SHA256[:16] in sentence
    assert len(server.requests()) == 3


def test_another_length_is_refused_before_it_is_fetched(serve: Serve) -> None:
    server = serve()
    sentence = refused(server, expected=Expected(len(CONTENT) - 1, SHA256))
    assert f"{len(CONTENT)} bytes instead of {len(CONTENT) - 1} bytes" in sentence


def test_content_that_changes_while_it_is_fetched(tmp_path: Path) -> None:
    """With a hash the whole is fetched anew; without one the object must stay what it was."""
    (tmp_path / NAME).write_bytes(CONTENT[::-1])
    with serving(tmp_path, tmp_path.parent / "changing.jsonl", Rule("stall", times=1, after_bytes=1000)) as server:
        store = open_store(server.url, SHORT.timeouts)
        stat = head(store, NAME, SHORT)
        assert stat is not None and stat.num_bytes == len(CONTENT)
        file = io.BytesIO()

        def pulse() -> None:
            (tmp_path / NAME).write_bytes(CONTENT)

        fetch(store, NAME, file, expected=WHOLE, budget=SHORT, pulse=pulse)
        assert file.getvalue() == CONTENT
        assert [(r.status, r.asked_range) for r in server.requests()] == [(200, None), (200, "bytes=1000-")]
        sentence = refused(server, expected=Expected(len(CONTENT), None, stat.validator))
        assert "no longer the one it was when the run began" in sentence


def test_redirects_are_followed_and_loops_are_not(serve: Serve) -> None:
    server = serve(Rule("redirect", path="^/moved", location=f"/{NAME}"))
    assert got(server, "moved.tar") == CONTENT
    server = serve(Rule("redirect"))
    assert "more than 5 redirects" in refused(server)
    assert len(server.requests()) == 6


def test_a_redirect_to_a_file_of_this_machine_is_refused(serve: Serve) -> None:
    server = serve(Rule("redirect", location="file:///etc/passwd"))
    assert "a redirect to something that is not HTTP" in refused(server)


def certificate(directory: Path) -> Path:
    """A file with a key and a certificate of its own for 127.0.0.1."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "server.pem"
    plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(plain + made.public_bytes(Encoding.PEM))
    return path


def test_a_redirect_from_https_to_http_is_refused_before_a_password_is_sent_in_clear(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    told: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(self.headers["Authorization"])
            self.send_response(302)
            self.send_header("Location", f"{server.url}/{NAME}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret-of-mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    pem = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with HTTPServer(("127.0.0.1", 0), Handler) as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        thread = threading.Thread(target=secure.serve_forever)
        thread.start()
        try:
            store = open_store(f"https://127.0.0.1:{secure.server_port}", SHORT.timeouts)
            with pytest.raises(DataError, match="is refused: a redirect from HTTPS to HTTP"):
                fetch(store, NAME, io.BytesIO(), expected=WHOLE, budget=SHORT)
        finally:
            secure.shutdown()
            thread.join()
    assert len(told) == 1 and str(told[0]).startswith("Basic ")  # the login was meant for this host
    assert not server.requests()


def test_what_is_larger_than_it_may_be_is_broken_off(serve: Serve) -> None:
    expected = Expected(most_bytes=len(CONTENT) - 1)
    server = serve()
    assert f"{NAME} at {server.url} is larger than {len(CONTENT) - 1} bytes" in refused(server, expected=expected)
    assert len(server.requests()) == 1
    assert got(server, expected=Expected(most_bytes=len(CONTENT))) == CONTENT


@pytest.mark.parametrize(("status", "words"), [(403, "is refused: HTTP 403"), (404, f"{NAME} is missing at")])
def test_what_will_not_get_better_is_not_tried_again(serve: Serve, status: int, words: str) -> None:
    server = serve(Rule("status", status=status))
    assert words in refused(server)
    assert len(server.requests()) == 1


def test_nobody_listens(serve: Serve) -> None:
    with serving(Path("/nonexistent"), Path("/dev/null")) as server:
        pass
    began = time.monotonic()
    assert "no connection (Connection refused)" in refused(server, budget=FetchBudget(1.0))
    assert time.monotonic() - began < 1.0 + SCHEDULING_SECONDS


def test_a_name_that_no_host_has(serve: Serve) -> None:
    store = open_store("http://nobody.invalid/shards", SHORT.timeouts)
    with pytest.raises(DataError, match="the host's name cannot be resolved"):
        fetch(store, NAME, io.BytesIO(), budget=FetchBudget(1.0))


def test_where_head_is_not_allowed_the_size_is_found_all_the_same(serve: Serve) -> None:
    server = serve(Rule("status", status=405, method="HEAD"))
    stat = head(open_store(server.url, SHORT.timeouts), NAME, SHORT)
    assert stat is not None and stat.num_bytes == len(CONTENT)
    assert head(open_store(server.url, SHORT.timeouts), "nothing.tar", SHORT) is None


def test_a_login_is_of_its_host_alone(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    login = tmp_path / "netrc"
    login.write_text("machine 127.0.0.1 login me password secret-of-mine\n")
    monkeypatch.setenv("NETRC", str(login))
    server = serve(Rule("redirect", path="^/moved"))
    server.set_rules(Rule("redirect", path="^/moved", location=f"{server.url_at('127.0.0.2')}/{NAME}"))
    assert got(server, "moved.tar") == CONTENT
    here, there = server.requests()
    assert here.authorization is not None and here.authorization.startswith("Basic ") and there.authorization is None
    login.write_text("machine 127.0.0.1 nonsense secret-of-mine\n")
    sentence = refused(server)
    assert "netrc cannot be read" in sentence and "secret-of-mine" not in sentence


@pytest.mark.parametrize("form", ["http://{}", "{}", "http://me:word@{}"])
def test_a_proxy_of_the_environment_is_used(form: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setenv("http_proxy", form.format(server.url.removeprefix("http://")))
    store = open_store("http://shards.invalid", SHORT.timeouts)
    file = io.BytesIO()
    fetch(store, NAME, file, expected=WHOLE, budget=SHORT)
    assert file.getvalue() == CONTENT
    assert [r.path for r in server.requests()] == [f"http://shards.invalid/{NAME}"]


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:x", "http://"])
def test_what_is_no_proxy_is_said_and_tried_once(proxy: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setenv("http_proxy", proxy)
    sentence = refused(server)
    assert f"http_proxy={proxy} is no proxy of the form http://HOST:PORT, and no_proxy names" in sentence
    assert not server.requests()


def test_a_proxy_that_does_not_answer_is_named_by_its_variable(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")
    sentence = refused(server)
    assert "no way through the proxy that http_proxy names (Connection refused); no_proxy names the hosts" in sentence


@pytest.mark.parametrize("url", ["ftp://host/x", "http://", "s3:///x", "gs://bucket/x", "pipe:cat x://y"])
def test_a_url_that_means_nothing(url: str) -> None:
    with pytest.raises(DataError, match="must be a directory, http"):
        open_store(url, SHORT.timeouts)
