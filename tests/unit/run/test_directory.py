"""The run directory: names, places that cannot be written, one owner at a time."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.run.directory import RunDirectory, validate_name


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory(tmp_path, "first")
    directory.open()
    yield directory
    directory.close()


@pytest.mark.parametrize("name", ["first", "sweep/lr=0.1", "2026", "a.b-c_d+e@f,g", "compare/demo/squeezenet1_1"])
def test_plain_names_are_taken(name: str, tmp_path: Path) -> None:
    assert RunDirectory(tmp_path, name).path == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../b", "/etc", "a//b", "a/", ".hidden", "a b", "10:30", "a\0b", "a\nb", "-x", "wandb"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a run") as raised:
        validate_name(name)
    validate_name(str(raised.value).rpartition("such as name=")[2])


@given(st.text())
def test_no_name_leads_out_of_the_root(name: str) -> None:
    try:
        directory = RunDirectory("/root/of/runs", name)
    except ConfigError:
        return
    assert os.path.normpath(directory.path) == str(directory.path)
    assert directory.path.is_relative_to("/root/of/runs") and directory.path != Path("/root/of/runs")


def test_making_the_object_touches_nothing(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "runs", "first")
    assert list(tmp_path.iterdir()) == []


def test_open_makes_the_directory_and_leaves_no_probe(run: RunDirectory) -> None:
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "lock"]
    assert not any(path.stat().st_mode & 0o002 for path in run.path.rglob("*"))


@pytest.mark.not_quick
def test_half_written_checkpoints_are_swept_whoever_has_their_pid_now(tmp_path: Path) -> None:
    """In containers every rank 0 has the same small pid, and that of a host is another process elsewhere."""
    checkpoints = tmp_path / "first" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        stale = [checkpoints / f"step=000000001.ckpt.tmp.{pid}" for pid in (other.pid, os.getpid(), 2**22 + 1)]
        for path in stale:
            path.touch()
        directory = RunDirectory(tmp_path, "first")
        directory.open()
        assert other.poll() is None and list(checkpoints.iterdir()) == []
        stale[0].touch()
        with pytest.raises(ConfigError):
            RunDirectory(tmp_path, "first").open()
        assert stale[0].exists(), "somebody without the lock swept it"
        directory.close()
        other.kill()


def test_beside_them_only_what_dead_writers_left_is_swept(tmp_path: Path) -> None:
    """Reports are written there without the lock."""
    (tmp_path / "first").mkdir()
    dead, alive = (tmp_path / "first" / f"report.html.tmp.{pid}" for pid in (2**22 + 1, os.getppid()))
    dead.touch()
    alive.touch()
    directory = RunDirectory(tmp_path, "first")
    directory.open()
    directory.close()
    assert alive.exists() and not dead.exists()


@pytest.mark.not_quick
def test_a_disk_that_leftovers_fill_is_swept_before_it_is_tried(tmp_path: Path) -> None:
    place = mount(tmp_path, "size=1500k")
    try:
        checkpoints = place / "first" / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / f"step=000000001.ckpt.tmp.{os.getppid()}").write_bytes(bytes(1 << 20))
        directory = RunDirectory(place, "first")
        directory.open()
        directory.close()
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_file_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(ConfigError, match=r"is a file: set run_root="):
        RunDirectory(tmp_path / "runs", "first").open()


def mount(tmp_path: Path, options: str) -> Path:
    """A small tmpfs, or a skip where mounting is not allowed."""
    place = tmp_path / "mounted"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    return place


@pytest.mark.not_quick
@pytest.mark.parametrize(("options", "message"), [("ro", "read-only"), ("size=64k", "disk is full")])
def test_a_disk_that_cannot_be_written_is_a_sentence(options: str, message: str, tmp_path: Path) -> None:
    place = mount(tmp_path, options)
    try:
        with pytest.raises(ConfigError, match=message):
            RunDirectory(place, "first").open()
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("number", "file", "words"),
    [
        (errno.ESTALE, None, "network file system has lost it"),
        (errno.EDQUOT, None, "quota is used up"),
        (errno.EIO, None, "check the disk"),
        (errno.ENOENT, "metrics.jsonl", "check the disk"),
    ],
)
def test_a_disk_that_fails_later_is_a_sentence_too(
    number: int, file: str | None, words: str, run: RunDirectory
) -> None:
    """As the system says it; a stale handle of NFS needs a server that forgets."""
    with pytest.raises(CheckpointError, match=words), run.writing():
        raise OSError(number, os.strerror(number), *([run.path / file] if file else []))


def test_a_file_missing_elsewhere_is_no_failing_disk(run: RunDirectory) -> None:
    with pytest.raises(FileNotFoundError), run.writing():
        Path("/no/such/file").read_text()


def test_a_second_owner_is_refused_with_the_first_ones_name(run: RunDirectory) -> None:
    second = RunDirectory(run.path.parent, "first")
    with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        second.open()
    run.close()
    second.open()
    second.close()


@pytest.mark.not_quick
def test_ranks_of_another_process_are_refused(run: RunDirectory) -> None:
    program = (
        "from pipeline.run.directory import RunDirectory\n"
        f"RunDirectory({str(run.path.parent)!r}, 'first').open()\nprint('open')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "is being written by another process" in done.stderr


OWNER_WITH_WORKER = """
import multiprocessing, signal, sys
from pipeline.run.directory import RunDirectory
directory = RunDirectory(sys.argv[1], "first")
directory.open()
worker = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
worker.start()
print(worker.pid, flush=True)
signal.pause()
"""


@pytest.mark.not_quick
def test_a_killed_owner_leaves_no_lock_even_with_an_orphaned_worker(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER_WITH_WORKER, tmp_path], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    orphan = int(owner.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=f"pid {owner.pid}"):
            RunDirectory(tmp_path, "first").open()
        owner.kill()
        owner.wait(60)
        os.kill(orphan, 0)  # the worker is still there
        directory = RunDirectory(tmp_path, "first")
        directory.open()
        directory.close()
    finally:
        owner.kill()
        os.kill(orphan, signal.SIGKILL)
        owner.stdout.close()


def test_attempts_are_counted(run: RunDirectory) -> None:
    assert run.begin_attempt(world_size=2, start_step=0) == 1
    assert run.begin_attempt(world_size=3, start_step=7) == 2
    records = [json.loads(line) for line in run.attempts.read_text().splitlines()]
    assert [(record["attempt"], record["world_size"], record["start_step"]) for record in records] == [
        (1, 2, 0),
        (2, 3, 7),
    ]
    assert records[0]["pid"] == os.getpid()


def test_a_torn_record_counts_as_a_start(run: RunDirectory) -> None:
    run.begin_attempt(world_size=1, start_step=0)
    with run.attempts.open("a") as file:
        file.write('{"attempt": 2, "sta')
    assert run.begin_attempt(world_size=1, start_step=0) == 3
    assert json.loads(run.attempts.read_text().splitlines()[-1])["attempt"] == 3


def test_config_and_environment_are_written_whole(run: RunDirectory) -> None:
    run.write_config("seed: 0\n")
    run.write_environment({"schema": 1})
    assert run.config.read_text() == "seed: 0\n"
    assert json.loads(run.environment.read_text()) == {"schema": 1}
