"""The ranks' store: torch's own ways of asking it, and strangers, who are neither heard nor waited for."""

import json
import os
import pickle
import random
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.core.errors import ConfigError
from pipeline.run.launch.ranks import RankInfo
from pipeline.run.launch.secret import SECRET_VARIABLE, SecretFile, given_secret, new_secret
from pipeline.training import store_server
from pipeline.training.store import RankStore, UnknownServer
from pipeline.training.store_server import GREETING, NONCE_BYTES, PROOF_BYTES, StoreServer

SECRET = new_secret()
Place = tuple[str, int]
RANKS = RankInfo(0, 2, 0, 1, 0, 2, "10.0.0.1", 29500, "torchrun")


@pytest.fixture(scope="module")
def place() -> Place:
    """Where a server listens until the tests end."""
    listener = socket.create_server(("127.0.0.1", 0))
    place = listener.getsockname()
    StoreServer(listener, SECRET)
    return place


@pytest.fixture
def store(place: Place) -> Iterator[RankStore]:
    store = RankStore(place, SECRET, 5.0)
    yield store
    store._socket.close()


@pytest.mark.parametrize("by", ["Python", "C++"])
def test_everything_that_torch_asks_a_store(by: str, store: RankStore) -> None:
    asked = store if by == "Python" else dist.PrefixStore("of", store)  # pyright: ignore[reportPrivateImportUsage]
    asked.set("text", "é")
    asked.set("bytes", bytes(range(256)))  # type: ignore[arg-type]  # torch's declaration knows texts alone
    assert (asked.get("text").decode(), asked.get("bytes")) == ("é", bytes(range(256)))
    assert (asked.add("n", 2), asked.add("n", -3), asked.get("n")) == (2, -1, b"-1")
    assert asked.check(["text", "n"]) and not asked.check(["text", "none"])
    asked.append("list", "a")  # type: ignore[attr-defined]
    asked.append("list", "b")  # type: ignore[attr-defined]
    assert asked.get("list") == b"ab"
    assert (asked.compare_set("c", "x", "y"), asked.compare_set("c", "", "y")) == (b"x", b"y")
    assert (asked.compare_set("c", "no", "z"), asked.compare_set("c", "y", "z")) == (b"y", b"z")
    before = asked.num_keys()
    assert asked.delete_key("c") and not asked.delete_key("c") and asked.num_keys() == before - 1
    asked.multi_set(["k", "l"], ["1", "2"])  # type: ignore[attr-defined]
    assert asked.multi_get(["k", "l"]) == [b"1", b"2"] and asked.has_extended_api()  # type: ignore[attr-defined]
    asked.wait(["k", "l"], timedelta(seconds=1))
    assert asked.clone().get("k") == b"1"  # type: ignore[attr-defined]


def test_a_key_that_does_not_come_is_said_in_time(store: RankStore) -> None:
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(dist.DistStoreError, match=r"no rank said never in 0\.2 s"):
        store.get("never")
    threading.Timer(0.1, lambda: store.set("late", "1")).start()
    store.set_timeout(timedelta(seconds=5))
    assert store.get("late") == b"1"


def test_a_will_is_done_when_its_connection_ends(place: Place, store: RankStore) -> None:
    other = RankStore(place, SECRET, 5.0)
    other.leave_will("gone")
    other.set("here", "")
    assert not store.check(["gone"])
    other._socket.close()
    store.wait(["gone"], timedelta(seconds=5))


def connect(place: Place) -> socket.socket:
    return socket.create_connection(place, timeout=5)


def garbage(number: int) -> Callable[[Place], object]:
    def attempt(place: Place) -> None:
        with connect(place) as stranger:
            stranger.sendall(random.Random(number).randbytes(5000))
            assert stranger.recv(1000).startswith(GREETING)
            with suppress(ConnectionError):
                assert stranger.recv(1000) == b""  # closed without another word

    return attempt


def other_secret(place: Place) -> None:
    with pytest.raises(UnknownServer, match="does not know this job's secret"):
        RankStore(place, new_secret(), 5.0)


def as_torch(place: Place) -> None:
    with pytest.raises(dist.DistError):
        patience = timedelta(seconds=2)
        client = dist.TCPStore(*place, 2, False, patience, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
        client.set("rank", "1")


def replayed(place: Place) -> None:
    """What a rank said in its handshake is worth nothing in another one."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: suppress_unknown(listener.getsockname()))
        thread.start()
        rank, _ = listener.accept()
        with rank, connect(place) as stranger:
            rank.sendall(stranger.recv(len(GREETING) + NONCE_BYTES))
            heard.append(rank.recv(NONCE_BYTES + PROOF_BYTES))
        thread.join()
    with connect(place) as stranger:
        stranger.recv(len(GREETING) + NONCE_BYTES)
        stranger.sendall(heard[0])
        with suppress(ConnectionError):
            assert stranger.recv(1000) == b""


def suppress_unknown(place: Place) -> None:
    with suppress(UnknownServer):
        RankStore(place, SECRET, 5.0)


@pytest.mark.not_quick
@pytest.mark.parametrize("attempt", [garbage(1), garbage(2), other_secret, as_torch, replayed])
def test_a_stranger_is_not_heard(attempt: Callable[[Place], object], place: Place, store: RankStore) -> None:
    before = store.num_keys()
    attempt(place)
    store.set("still", "1")
    assert store.get("still") == b"1" and store.num_keys() - before <= 1


def test_a_message_that_is_changed_said_twice_or_too_long_ends_the_connection(place: Place) -> None:
    for spoil in (
        lambda message: message[:-1] + bytes([message[-1] ^ 1]),
        lambda message: message + message,
        lambda message: b"\xff\xff\xff\xff" + message[4:],
        lambda message: pickle.dumps(message).ljust(len(message)),
    ):
        store = RankStore(place, SECRET, 5.0)
        seal = store._session.seal
        store._session.seal = lambda *args, seal=seal, spoil=spoil, **more: spoil(seal(*args, **more))  # type: ignore[method-assign]
        with pytest.raises(dist.DistNetworkError):
            for _ in range(2):
                store.set("spoilt", "1")
        store._socket.close()


def test_silent_strangers_leave_and_keep_no_rank_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_server, "HANDSHAKE_SECONDS", 1.0)
    silent = [connect(place) for _ in range(3 * store_server.MOST_STRANGERS)]
    began = time.monotonic()
    store = RankStore(place, SECRET, 5.0)
    store.set("rank", "1")
    assert time.monotonic() - began < 5
    for stranger in silent:
        with suppress(ConnectionError):
            while stranger.recv(1000):
                pass
        stranger.close()
    store._socket.close()


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\n\r\n" * 10, GREETING + bytes(NONCE_BYTES + PROOF_BYTES)])
def test_a_stranger_who_listens_is_not_taken_for_rank_0(says: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            rank, _ = listener.accept()
            with rank, suppress(OSError):  # once the rank has gone it may be ENOTCONN too
                rank.sendall(says)
                rank.shutdown(socket.SHUT_WR)
                while rank.recv(1000):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UnknownServer):
            RankStore(listener.getsockname(), SECRET, 5.0)
        thread.join()


# --- where the secret comes from ---


def test_a_secret_that_is_given_must_be_one() -> None:
    assert given_secret({}) is None and given_secret({SECRET_VARIABLE: SECRET}) == SECRET
    with pytest.raises(ConfigError, match="has 5 characters, and 16 are the least"):
        given_secret({SECRET_VARIABLE: "short"})


def test_a_secret_in_a_file_is_its_owners_alone_and_goes_with_its_folder(tmp_path: Path) -> None:
    rank_0, rank_1 = (SecretFile(tmp_path / "runs", RANKS) for _ in range(2))
    assert rank_1.read() is None
    secret = rank_0.make()
    assert rank_1.read() == secret and stat.S_IMODE(rank_0.path.stat().st_mode) == 0o600
    assert rank_0.make() != secret, "that of an earlier start is not used again"
    rank_0.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lies", ["readable", "link", "fifo"])
def test_a_file_that_somebody_else_laid_is_no_secret(lies: str, tmp_path: Path) -> None:
    file = SecretFile(tmp_path, RANKS)
    other = tmp_path / "other"
    other.write_text(SECRET)
    if lies == "link":
        other.chmod(0o600)
        file.path.symlink_to(other)
        assert file.read() is None
    else:
        file.path.write_text(SECRET) if lies == "readable" else os.mkfifo(file.path)
        file.path.chmod(0o644)
        with pytest.raises(ConfigError, match="is not a file of yours that you alone may read"):
            file.read()
    assert json.dumps(file.make()) and other.read_text() == SECRET
