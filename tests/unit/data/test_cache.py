"""One fetch per server, whoever asks and whoever dies; never more than the bound; never a part taken for the whole."""

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from pipeline.config.data import DataConfig
from pipeline.core.errors import DataError
from pipeline.data.remote.cache import PART, Cache, CacheEntry, CacheSettings, Produce
from pipeline.data.remote.transfer import FetchBudget
from tests.shard_server import Rule, ShardServer, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.not_quick

SIZE = 100_000
NAMES = [f"train-{number:06d}.tar" for number in range(8)]
CONTENTS = {name: np.random.default_rng(number).bytes(SIZE) for number, name in enumerate(NAMES)}
ENTRIES = {name: CacheEntry(hashlib.sha256(content).hexdigest(), name, SIZE) for name, content in CONTENTS.items()}
DEADLINE_SECONDS = 60.0

READER = """
import hashlib, os, sys
from pathlib import Path
from pipeline.data.remote.cache import Cache, CacheSettings, CacheEntry
from pipeline.data.remote.opening import open_store
from pipeline.data.remote.transfer import Expected, FetchBudget, fetch
from pipeline.core.errors import DataError

url, directory, bound, seconds, *wanted = sys.argv[1:]
budget = FetchBudget(float(seconds))
cache = Cache(CacheSettings(Path(directory), int(bound), budget), url)
store = open_store(url, budget.timeouts)
cache.prepare()
print("ready", flush=True)
sys.stdin.readline()
for item in wanted:
    name, size, sha256 = item.split(":")
    entry = CacheEntry(sha256, name, int(size))
    def produce(file, part):
        fetch(store, name, file, expected=Expected(entry.num_bytes, sha256), budget=budget)
    try:
        with cache.open(entry, produce) as descriptor:
            content = os.pread(descriptor, 2**30, 0)
        print("got", name, hashlib.sha256(content).hexdigest() == sha256, flush=True)
    except DataError as error:
        print("error", error, flush=True)
"""


class Reader:
    """A process that opens objects through the cache, one after another, once told to begin."""

    def __init__(
        self, server: ShardServer, directory: Path, *names: str, bound: int = 10**9, seconds: float = 20
    ) -> None:
        wanted = [f"{name}:{SIZE}:{ENTRIES[name].key}" for name in names]
        arguments = [server.url, str(directory), str(bound), str(seconds), *wanted]
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> list[str]:
        with self.process:
            output, _ = self.process.communicate(timeout=DEADLINE_SECONDS)
        return output.splitlines()

    def kill(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardServer]:
    root = tmp_path_factory.mktemp("served")
    for name, content in CONTENTS.items():
        (root / name).write_bytes(content)
    with serving(root, root.parent / "requests.jsonl") as server:
        yield server


@pytest.fixture
def server(running: ShardServer) -> ShardServer:
    running.requests()
    running.set_rules()
    running._log.write_text("")
    return running


def make(directory: Path, *, bound: int = 10**9, seconds: float = 20.0, origin: str = "here") -> Cache:
    cache = Cache(CacheSettings(directory, bound, FetchBudget(seconds)), origin)
    cache.prepare()
    return cache


def writes(name: str) -> Produce:
    def produce(file: BinaryIO, part: Path) -> None:
        assert part.exists()
        file.write(CONTENTS[name])

    return produce


def put(cache: Cache, *names: str) -> None:
    """Have these in the cache, each used later than the one before."""
    for name in names:
        with cache.open(ENTRIES[name], writes(name)) as descriptor:
            assert os.pread(descriptor, SIZE + 1, 0) == CONTENTS[name]
        time.sleep(0.01)


def held(cache: Cache) -> list[str]:
    return [name for name in NAMES if cache.has(ENTRIES[name])]


def parts(directory: Path) -> list[Path]:
    return list(directory.glob(f"*{PART}"))


def num_growing(directory: Path) -> int:
    """How many objects are on their way: some of each has been written, which shows in blocks that are not zero."""
    return sum(any(part.read_bytes()[:1000]) for part in parts(directory))


# --- once per server ---


def test_processes_that_want_the_same_fetch_it_once(server: ShardServer, tmp_path: Path) -> None:
    server.set_rules(Rule("slow", bytes_per_second=400_000))  # a quarter of a second: all of them come meanwhile
    readers = [Reader(server, tmp_path / "cache", *NAMES[:2]) for _ in range(3)]
    for reader in readers:
        reader.begin()
    assert [reader.end() for reader in readers] == [[f"got {name} True" for name in NAMES[:2]]] * 3
    assert sorted(r.path for r in server.requests()) == [f"/{name}" for name in NAMES[:2]]
    assert server.sent_bytes() == 2 * SIZE
    assert not parts(tmp_path / "cache")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir() if path.name != "lock"} == {0o400}


def test_a_second_job_takes_what_the_first_has_left(server: ShardServer, tmp_path: Path) -> None:
    for _ in range(2):
        reader = Reader(server, tmp_path / "cache", *NAMES[:3])
        reader.begin()
        assert reader.end() == [f"got {name} True" for name in NAMES[:3]]
    assert server.sent_bytes() == 3 * SIZE


def test_a_failure_is_shared_by_those_who_wait_for_it(server: ShardServer, tmp_path: Path) -> None:
    """Each of them would otherwise spend the whole budget, one after another."""
    server.set_rules(Rule("status", status=503))
    readers = [Reader(server, tmp_path / "cache", NAMES[0], seconds=2) for _ in range(3)]
    for reader in readers:
        reader.begin()
    said = [line for reader in readers for line in reader.end()]
    assert len(said) == 3 and len(set(said)) == 1
    assert f"HTTP 503 ({len(server.requests())} times)" in said[0]
    assert not list((tmp_path / "cache").glob("[!l]*"))


def test_the_failure_of_another_job_is_not_shared(tmp_path: Path) -> None:
    first, second = make(tmp_path, origin="here"), make(tmp_path, origin="elsewhere")
    is_under_way, may_fail = threading.Event(), threading.Event()

    def fails(file: BinaryIO, part: Path) -> None:
        is_under_way.set()
        may_fail.wait(DEADLINE_SECONDS)
        raise DataError("only of the first")

    def fail() -> None:
        with pytest.raises(DataError, match="only of the first"), first.open(ENTRIES[NAMES[0]], fails):
            pass

    thread = threading.Thread(target=fail)
    thread.start()
    is_under_way.wait(DEADLINE_SECONDS)
    threading.Timer(0.2, may_fail.set).start()
    put(second, NAMES[0])
    thread.join()


def test_an_object_that_is_evicted_before_who_waited_for_it_could_look_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.core.files.LOCK_POLL_SECONDS", 0.3)
    first, second = make(tmp_path), make(tmp_path)
    entry, is_under_way, may_end = ENTRIES[NAMES[0]], threading.Event(), threading.Event()

    def slowly(file: BinaryIO, part: Path) -> None:
        is_under_way.set()
        may_end.wait(DEADLINE_SECONDS)
        file.write(CONTENTS[NAMES[0]])

    threads = [threading.Thread(target=first.fetch_ahead, args=(entry, slowly))]
    threads.append(threading.Thread(target=put, args=(second, NAMES[0])))
    threads[0].start()
    is_under_way.wait(DEADLINE_SECONDS)
    threads[1].start()
    time.sleep(0.1)  # it has found the object locked, and looks again after 0.3 s
    may_end.set()
    threads[0].join()
    first.remove(entry)
    threads[1].join()
    assert held(second) == [NAMES[0]]


# --- who is killed ---


def test_who_is_killed_while_fetching_leaves_nothing_that_is_taken_for_whole(
    server: ShardServer, tmp_path: Path
) -> None:
    directory = tmp_path / "cache"
    server.set_rules(Rule("slow", bytes_per_second=50_000, times=1))
    victim, heir = (Reader(server, directory, NAMES[0]) for _ in range(2))
    victim.begin()
    wait_until(lambda: num_growing(directory))
    heir.begin()  # waits for the victim
    time.sleep(0.1)
    victim.kill()
    assert heir.end() == [f"got {NAMES[0]} True"]
    assert not parts(directory)
    assert [r.fault for r in server.requests()] == ["slow", None]


def test_what_dead_processes_left_is_swept_and_what_living_ones_do_is_not(server: ShardServer, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    server.set_rules(Rule("slow", bytes_per_second=50_000))
    victim, living = (Reader(server, directory, name) for name in NAMES[:2])
    for reader in (victim, living):
        reader.begin()
    wait_until(lambda: num_growing(directory) == 2)
    victim.kill()
    assert make(directory).used_bytes() == SIZE
    assert [part.name for part in parts(directory)] == [ENTRIES[NAMES[1]].key + PART]
    assert living.end() == [f"got {NAMES[1]} True"]


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment(server: ShardServer, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    moments = np.random.default_rng(0).uniform(0, 0.6, 20)
    for moment in moments:
        server.set_rules(Rule("slow", bytes_per_second=400_000))
        victims = [Reader(server, directory, *NAMES[:4]) for _ in range(2)]
        for victim in victims:
            victim.begin()
        time.sleep(float(moment))
        for victim in victims:
            victim.kill()
        for name in NAMES[:4]:
            if make(directory).has(ENTRIES[name]):
                assert (directory / ENTRIES[name].key).read_bytes() == CONTENTS[name]
    server.set_rules()
    last = Reader(server, directory, *NAMES[:4])
    last.begin()
    assert last.end() == [f"got {name} True" for name in NAMES[:4]] and not parts(directory)


# --- room ---


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = make(tmp_path, bound=3 * SIZE)
    put(cache, *NAMES[:3])
    put(cache, NAMES[0], NAMES[3])
    assert held(cache) == [NAMES[0], NAMES[2], NAMES[3]] and cache.used_bytes() == 3 * SIZE


def test_what_is_released_goes_before_what_waits_for_its_use(tmp_path: Path) -> None:
    cache = make(tmp_path, bound=3 * SIZE)
    put(cache, *NAMES[:3])
    cache.release(ENTRIES[NAMES[2]])
    cache.release(ENTRIES[NAMES[4]])  # it is not here
    put(cache, NAMES[3])
    assert held(cache) == [NAMES[0], NAMES[1], NAMES[3]]
    cache.release(ENTRIES[NAMES[0]])
    put(cache, NAMES[0], NAMES[4])  # read again, it is used again
    assert held(cache) == [NAMES[0], NAMES[3], NAMES[4]]


def test_what_is_being_read_stays_whoever_reads_it(tmp_path: Path) -> None:
    cache, other = make(tmp_path, bound=2 * SIZE), make(tmp_path, bound=2 * SIZE)
    put(cache, NAMES[0], NAMES[1])
    with other.open(ENTRIES[NAMES[0]], writes(NAMES[0])) as descriptor:
        os.utime(tmp_path / ENTRIES[NAMES[0]].key, (1, 1))  # unused for longest, and in use
        put(cache, NAMES[2])
        assert held(cache) == [NAMES[0], NAMES[2]]
        assert os.pread(descriptor, SIZE, 0) == CONTENTS[NAMES[0]]


def test_where_everything_is_in_use_it_is_waited_for_and_then_said(tmp_path: Path) -> None:
    cache, other = make(tmp_path, bound=SIZE, seconds=0.5), make(tmp_path, bound=SIZE)
    put(other, NAMES[0])
    with (
        other.open(ENTRIES[NAMES[0]], writes(NAMES[0])),
        pytest.raises(DataError, match=rf"no room for {NAMES[1]} .*data\.cache_bytes={SIZE}\. Raise it"),
    ):
        put(cache, NAMES[1])
    assert not parts(tmp_path)
    put(cache, NAMES[1])
    assert held(cache) == [NAMES[1]]


def test_an_object_larger_than_the_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.cache_bytes={SIZE - 1} holds not even {NAMES[0]}"):
        put(make(tmp_path, bound=SIZE - 1), NAMES[0])


def test_the_bound_holds_for_many_processes_with_little_room(server: ShardServer, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    readers = [Reader(server, directory, *np.roll(NAMES, 3 * n).tolist(), bound=3 * SIZE) for n in range(3)]
    for reader in readers:
        reader.begin()
    most = 0
    cache = make(directory)
    while any(reader.process.poll() is None for reader in readers):
        most = max(most, cache.used_bytes())
        time.sleep(0.002)
    assert [sorted(reader.end()) for reader in readers] == [[f"got {name} True" for name in NAMES]] * 3
    assert SIZE <= most <= 3 * SIZE


def test_what_is_fetched_ahead_waits_for_nobody(tmp_path: Path) -> None:
    cache, other = make(tmp_path, bound=2 * SIZE), make(tmp_path, bound=2 * SIZE)
    assert cache.fetch_ahead(ENTRIES[NAMES[0]], writes(NAMES[0])) and held(cache) == [NAMES[0]]
    part = tmp_path / f"{ENTRIES[NAMES[1]].key}{PART}"
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process fetches it
        assert not cache.fetch_ahead(ENTRIES[NAMES[1]], writes(NAMES[1]))
    put(cache, NAMES[2])
    with other.open(ENTRIES[NAMES[0]], writes(NAMES[0])), other.open(ENTRIES[NAMES[2]], writes(NAMES[2])):
        assert not cache.fetch_ahead(ENTRIES[NAMES[3]], writes(NAMES[3]))
    assert not held(cache)[2:]


def test_an_old_object_is_fetched_anew_where_age_matters(tmp_path: Path) -> None:
    cache = make(tmp_path)
    entry = CacheEntry("0" * 64, "the listing")

    def read(told: bytes) -> bytes:
        with cache.open(entry, lambda file, part: file.write(told), max_age_seconds=30) as descriptor:
            return os.pread(descriptor, 100, 0)

    assert [read(b"first"), read(b"second")] == [b"first", b"first"]
    for changed_at in (time.time() - 31, time.time() + 31):  # a clock may have been set back
        os.utime(tmp_path / entry.key, (changed_at, changed_at))
        assert read(b"at %d" % changed_at) == b"at %d" % changed_at


def test_an_object_of_the_wrong_size_is_fetched_anew(tmp_path: Path) -> None:
    cache = make(tmp_path)
    put(cache, NAMES[0])
    path = tmp_path / ENTRIES[NAMES[0]].key
    path.chmod(0o600)
    path.write_bytes(b"cut")
    put(cache, NAMES[0])


# --- what is not the cache's own ---


def test_whatever_else_lies_in_the_directory_is_left_alone(tmp_path: Path) -> None:
    """A directory that people keep other things in: not swept, not evicted, not counted, not opened."""
    foreign = {"thesis.tex": b"years", "download.part": b"half", f"{'a' * 63}.part": b"short", f"{'b' * 64}.txt": b"?"}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (1, 1))  # unused for longest
    (tmp_path / "elsewhere").write_bytes(b"precious")
    os.utime(tmp_path / "elsewhere", (1, 1))
    (tmp_path / "directory").mkdir()
    (tmp_path / f"{'c' * 64}{PART}").mkdir()
    for name in ("link", "link.part", "d" * 64, f"{'d' * 64}{PART}"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    for name in ("fifo", "fifo.part", "e" * 64, f"{'e' * 64}{PART}"):  # to open one waits for who writes
        os.mkfifo(tmp_path / name)
        os.utime(tmp_path / name, (1, 1))
    before = {path.name: path.lstat()[:4] for path in tmp_path.iterdir()}

    cache = make(tmp_path, bound=2 * SIZE)
    assert cache.used_bytes() == 0
    put(cache, *NAMES[:4])
    assert held(cache) == NAMES[2:4] and cache.used_bytes() == 2 * SIZE
    kept = set(before) | {"lock", *(ENTRIES[name].key for name in NAMES[2:4])}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert {name: (tmp_path / name).lstat()[:4] for name in before} == before
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == foreign
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_has_the_name_of_an_object_and_is_none_is_replaced_and_never_followed(tmp_path: Path, kind: str) -> None:
    cache, path = make(tmp_path / "cache"), tmp_path / "cache" / ENTRIES[NAMES[0]].key
    target = tmp_path / "precious"
    target.write_bytes(CONTENTS[NAMES[0]])
    os.utime(target, (1, 1))
    path.symlink_to(target) if kind == "link" else os.mkfifo(path)
    assert not cache.has(ENTRIES[NAMES[0]])
    cache.release(ENTRIES[NAMES[0]])
    put(cache, NAMES[0])
    assert path.is_file() and not path.is_symlink() and target.stat().st_mtime == 1


def test_a_fifo_in_the_place_of_a_part_is_a_sentence(tmp_path: Path) -> None:
    cache, part = make(tmp_path), tmp_path / f"{ENTRIES[NAMES[0]].key}{PART}"
    os.mkfifo(part)
    with pytest.raises(DataError, match=rf"{part.name} .*remove it"):
        put(cache, NAMES[0])
    assert part.is_fifo()


def test_the_cache_has_a_directory_of_its_own_below_the_one_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "download.part").write_text("half")
    settings = CacheSettings.of(DataConfig(cache_dir=str(tmp_path)))
    cache = Cache(settings, "here")
    cache.prepare()
    put(cache, NAMES[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download.part", "squeezewire"]
    assert (tmp_path / "squeezewire" / ENTRIES[NAMES[0]].key).is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CacheSettings.of(DataConfig()).directory == settings.directory


# --- disks ---

FULL_DISK = """
import os, sys
from pathlib import Path
from pipeline.data.remote.cache import Cache, CacheSettings, CacheEntry
from pipeline.data.remote.transfer import FetchBudget
from pipeline.core.errors import DataError

cache = Cache(CacheSettings(Path(sys.argv[1]), 10**9, FetchBudget(5.0)), "here")
cache.prepare()
entries = [CacheEntry(str(n) * 64, f"shard {n}", 600_000) for n in range(3)]
def produce(file, part):
    file.write(b"x" * 600_000)
for entry in entries:  # the disk has room for one
    with cache.open(entry, produce) as descriptor:
        assert os.fstat(descriptor).st_size == 600_000
print([cache.has(entry) for entry in entries])
with cache.open(entries[2], produce):
    try:
        with cache.open(entries[0], produce):
            print("there was room")
    except DataError as error:
        print(error)
print(sorted(path.name[:3] + path.suffix for path in cache.directory.iterdir()))
"""


def test_a_disk_that_is_full_before_the_bound_is_made_the_most_of_and_then_said(tmp_path: Path) -> None:
    """A disk of a mebibyte, mounted for one process alone."""
    script = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", FULL_DISK, str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    if "unshare" in ended.stderr or "mount" in ended.stderr:
        pytest.skip(f"needs root, to mount a small disk: {ended.stderr}")
    assert ended.returncode == 0, ended.stderr
    kept, sentence, left = ended.stdout.splitlines()
    assert kept == "[False, False, True]" and left == "['222', 'loc']"
    assert "data.cache_dir" in sentence and os.strerror(errno.ENOSPC) in sentence and "free space" in sentence


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc"])
def test_a_directory_that_cannot_be_used(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    directory = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "/proc": Path("/proc/x")}[place]
    with pytest.raises(
        DataError, match=rf"^The cache {directory} cannot be used \(.+\): give as data\.cache_dir a directory"
    ):
        make(directory)


def test_a_directory_of_somebody_else(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    if os.geteuid() == 0:
        directory.mkdir()
        os.chown(directory, 12345, 12345)
    else:
        directory = Path("/")
    with pytest.raises(DataError, match=r"belongs to user .*give a data\.cache_dir of your own"):
        make(directory)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_directory_that_others_may_write_to(tmp_path: Path, mode: int) -> None:
    """Who may write there may put other pictures in the place of ours."""
    directory = tmp_path / "cache"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(DataError, match=rf"^Others may write to the cache .*chmod go-w {directory}"):
        make(directory)
    directory.chmod(0o755)
    make(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_what_somebody_else_left_is_neither_read_nor_counted_nor_evicted(tmp_path: Path) -> None:
    cache, path = make(tmp_path, bound=SIZE), tmp_path / ENTRIES[NAMES[0]].key
    path.write_bytes(bytes(SIZE))
    os.chown(path, 12345, 12345)
    assert not cache.has(ENTRIES[NAMES[0]]) and cache.used_bytes() == 0
    put(cache, NAMES[1])
    assert path.read_bytes() == bytes(SIZE)
    put(cache, NAMES[0])
    assert path.read_bytes() == CONTENTS[NAMES[0]] and path.stat().st_uid == os.geteuid()


def test_what_is_looked_at_is_not_evicted_meanwhile(tmp_path: Path) -> None:
    cache, other = make(tmp_path, bound=2 * SIZE), make(tmp_path, bound=2 * SIZE)
    put(cache, NAMES[0], NAMES[1])
    with cache.look(ENTRIES[NAMES[2]]) as descriptor:
        assert descriptor is None
    with cache.look(ENTRIES[NAMES[0]]) as descriptor:
        assert descriptor is not None
        os.utime(tmp_path / ENTRIES[NAMES[0]].key, (1, 1))
        put(other, NAMES[2])
        assert held(cache) == [NAMES[0], NAMES[2]]
        assert os.pread(descriptor, SIZE, 0) == CONTENTS[NAMES[0]]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / "cache" / f"{ENTRIES[NAMES[0]].key}{PART}").symlink_to(target)
    with pytest.raises(DataError, match="cannot be used"):
        put(cache, NAMES[0])
    assert target.read_text() == "precious"


def test_a_process_that_is_stopped_while_fetching_is_not_waited_for_for_ever(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.remote.cache.GRACE_SECONDS", 0.5)
    directory = tmp_path / "cache"
    server.set_rules(Rule("slow", bytes_per_second=50_000))
    victim = Reader(server, directory, NAMES[0])
    victim.begin()
    wait_until(lambda: num_growing(directory))
    victim.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DataError, match=rf"Another process has been fetching {NAMES[0]} .* without a byte"):
            put(make(directory, seconds=0.25), NAMES[0])
    finally:
        victim.kill()
