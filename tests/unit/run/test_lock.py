"""Who owns a run: processes that start together, and records of owners on hosts that cannot be asked."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ConfigError, ExitCode, Preempted
from pipeline.run import lock
from pipeline.run.lock import RunLock, this_process

pytestmark = pytest.mark.not_quick

RACER = """
import sys, time
from pathlib import Path
from pipeline.core.errors import ConfigError
from pipeline.run.directory import RunDirectory
directory = RunDirectory(sys.argv[1], "first")
print("ready", flush=True)
sys.stdin.readline()
try:
    directory.open()
except ConfigError as error:
    print(error)
    sys.exit(2)
print("open", flush=True)
sys.stdin.readline()
"""


def test_of_several_that_start_at_the_same_instant_one_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for racer in racers:
            assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = {racer.pid: racer.stdout.readline() for racer in racers if racer.stdout is not None}
        (owner,) = [pid for pid, line in said.items() if line == "open\n"]
        for racer in racers:
            if racer.pid != owner:
                assert racer.wait(30) == 2
                # Who looks before the winner has written its name is told none.
                assert f"pid {owner})" in said[racer.pid] or "(unknown)" in said[racer.pid]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of silence that a test can wait for."""
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 3.0)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "RACE_SECONDS", 0.2)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def leave(path: Path, **record: Any) -> None:
    """What an owner on another host, whose locks do not reach this one, wrote last."""
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": 7, "ended": False, **record}))


def acquire(path: Path) -> None:
    """And give it back."""
    mine = RunLock(path, "first")
    mine.acquire()
    mine.release()


@pytest.fixture
def alive(path: Path) -> Iterator[None]:
    """An owner elsewhere that goes on to write."""
    ends = threading.Event()

    def beat() -> None:
        beats = 7
        while not ends.wait(0.2):
            beats += 1
            leave(path, beat=beats, job="77")

    leave(path, job="77")
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    ends.set()
    thread.join()


@pytest.mark.usefixtures("alive")
def test_an_owner_elsewhere_that_beats_is_alive_whatever_the_lock_says(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"another process \(host elsewhere, pid 1, job 77\)"):
        acquire(path)


def test_one_that_is_silent_is_dead_and_its_place_is_taken_aloud(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(path)
    began = time.monotonic()
    acquire(path)
    assert time.monotonic() - began >= 3
    said = capsys.readouterr().err
    assert "host elsewhere, pid 1; waiting 3 s" in said
    assert "taken over from host elsewhere, pid 1" in said


def test_one_that_ended_by_itself_is_not_waited_for(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(path, ended=True)
    acquire(path)
    assert capsys.readouterr().err == ""


def test_an_earlier_start_of_the_same_slurm_job_is_over(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(path, job="77", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    acquire(path)
    assert capsys.readouterr().err == ""
    leave(path, job="77", restart="1")  # another step of this very start
    acquire(path)
    assert "waiting" in capsys.readouterr().err


def test_the_owner_beats_and_says_when_it_ends(path: Path) -> None:
    mine = RunLock(path, "first")
    mine.acquire()
    first = later = json.loads(path.read_text())
    deadline = time.monotonic() + 30
    while later["beat"] == first["beat"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        later = json.loads(path.read_text())
    mine.release()
    assert later["beat"] > first["beat"] and later["ended"] is False
    assert (later["host"], later["pid"]) == (this_process()["host"], this_process()["pid"])
    assert json.loads(path.read_text())["ended"] is True
    assert not path.stat().st_mode & 0o022


def test_without_locks_the_record_decides(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a file system that has none."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    first, second = RunLock(path, "first"), RunLock(path, "first")
    first.acquire()
    first.release()
    leave(path, host=this_process()["host"], pid=1)  # a process of this host that lives
    with pytest.raises(ConfigError, match="pid 1"):
        second.acquire()
    leave(path, host=this_process()["host"], pid=2**22 + 1)  # and one that does not
    second.acquire()
    second.release()


# --- after the loss of a node: the kernel's lock outlives its owner ---

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """By another process, under whatever name the file holds: a server that waits for the lease of a lost host."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is of job 77, which Slurm has started anew."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


@pytest.mark.usefixtures("requeued")
def test_the_lock_of_an_earlier_start_of_the_same_job_is_waited_for(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(path, job="77", restart="0")
    with held(path) as holder:
        release = threading.Timer(1.0, holder.kill)
        release.start()
        acquire(path)
        release.join()
        assert holder.wait(30) == -signal.SIGKILL, "it was not there until it was killed"
    (said,) = capsys.readouterr().err.splitlines()
    assert "(host elsewhere, pid 1, job 77); waiting up to 180 s" in said


@pytest.mark.usefixtures("requeued")
def test_the_job_comes_back_later_if_its_earlier_start_keeps_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "EARLIER_START_SECONDS", 1.0)
    leave(path, job="77", restart="0")
    with held(path) as holder:
        with pytest.raises(Preempted, match=r"locked by an earlier start of this job \(host elsewhere") as raised:
            acquire(path)
        assert raised.value.exit_code == ExitCode.PREEMPTED and holder.poll() is None
    assert json.loads(path.read_text())["host"] == "elsewhere"


@pytest.mark.usefixtures("requeued")
@pytest.mark.parametrize("owner", [{}, {"job": "78", "restart": "0"}, {"job": "77", "restart": "2"}])
def test_any_other_owner_elsewhere_that_has_the_lock_refuses_at_once(owner: dict[str, str], path: Path) -> None:
    """A later start of the same job is no earlier one: what is left of the one before must not wait for its place."""
    leave(path, **owner)
    with held(path) as holder:
        with pytest.raises(ConfigError, match="being written by another process"):
            acquire(path)
        assert holder.poll() is None


# --- an owner that was suspended until another process had taken its place ---

OWNER = """
import fcntl, signal, socket, sys
from pathlib import Path
from pipeline.core.errors import CheckpointError
from pipeline.run import lock
socket.gethostname = lambda: "elsewhere"
fcntl.flock = lambda *_: None  # granted here, and unknown to every other host: a mount with `localflock`
lock.BEAT_SECONDS = float(sys.argv[2])
mine = lock.RunLock(Path(sys.argv[1]), "first")
mine.acquire()
print("open", flush=True)
sys.stdin.readline()
try:
    mine.check_owned()
except CheckpointError as error:
    print(error, flush=True)
mine.release()
sys.exit(7)
"""


@contextlib.contextmanager
def suspended(path: Path, beat_seconds: float) -> Iterator[subprocess.Popen[str]]:
    """An owner on another host, whose locks do not reach this one, stopped."""
    command = [sys.executable, "-c", OWNER, str(path), str(beat_seconds)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as owner:
        try:
            assert owner.stdout is not None and owner.stdout.readline() == "open\n"
            owner.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(owner.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), "it was not stopped"
            yield owner
        finally:
            owner.kill()


def test_a_suspended_owner_that_was_taken_over_leaves_when_it_wakes(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with suspended(path, beat_seconds=0.2) as owner:
        mine = RunLock(path, "first")
        mine.acquire()
        assert "taken over from host elsewhere" in capsys.readouterr().err
        owner.send_signal(signal.SIGCONT)
        assert owner.wait(30) == ExitCode.CHECKPOINT
        assert owner.stderr is not None
        said = owner.stderr.read()
    assert said.count("\n") == 1 and said.startswith("error: Run 'first' was taken over by another process (host ")
    assert f"host {this_process()['host']}, pid {os.getpid()})" in said
    time.sleep(1)  # beats of ours
    mine.check_owned()
    found = json.loads(path.read_text())
    assert (found["host"], found["pid"], found["ended"]) == (this_process()["host"], os.getpid(), False)
    mine.release()
    assert json.loads(path.read_text())["ended"] is True


def test_nor_does_it_save_or_say_that_the_run_has_ended(path: Path) -> None:
    """Between two beats: the save asks for itself."""
    with suspended(path, beat_seconds=1000) as owner:
        mine = RunLock(path, "first")
        mine.acquire()
        owner.send_signal(signal.SIGCONT)
        said, _ = owner.communicate("save\n", timeout=30)
        assert owner.returncode == 7
    assert f"Run 'first' was taken over by another process (host {this_process()['host']}, pid {os.getpid()})" in said
    found = json.loads(path.read_text())
    assert (found["pid"], found["ended"]) == (os.getpid(), False)
    mine.release()


def test_a_beat_that_was_on_its_way_for_long_does_not_end_the_new_owner(path: Path) -> None:
    """What a suspended owner was writing may still arrive, over the name of its successor."""
    leave(path, ended=True, term=4)
    mine = RunLock(path, "first")
    mine.acquire()
    leave(path, term=4)
    mine.check_owned()
    deadline = time.monotonic() + 30
    while json.loads(path.read_text())["pid"] != os.getpid():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mine.release()
