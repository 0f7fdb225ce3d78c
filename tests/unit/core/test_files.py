"""Locks on files, writes that follow no link, and files that somebody else has laid there."""

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.core import files
from pipeline.core.errors import CheckpointError, DataError
from pipeline.core.files import open_regular, read_regular, sweep_temporaries, try_lock, write_bytes_atomic
from pipeline.data.shards.foreign import find_split
from pipeline.data.shards.manifest import Manifest
from pipeline.run.checkpoint_files import load_foreign, sidecar_path, verify


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_one_owner_or_many_readers(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as first, opened(tmp_path / "a") as second:
        assert try_lock(first) and not try_lock(second) and not try_lock(second, shared=True)
        assert try_lock(first, shared=True, seconds=math.inf) and try_lock(second, shared=True)
        assert not try_lock(first)
    with opened(tmp_path / "a") as third:
        assert try_lock(third)


def test_waits_for_an_owner_that_lets_go_and_longer_for_one_that_writes(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as waiting:
        owner = os.open(tmp_path / "a", os.O_RDWR)
        assert try_lock(owner)

        def write_then_let_go() -> None:
            for number in range(5):
                os.utime(owner, ns=(number, number))
                time.sleep(0.2)
            os.close(owner)

        thread = threading.Thread(target=write_then_let_go)
        thread.start()
        assert try_lock(waiting, seconds=0.8, while_changing=True)
        thread.join()


# --- writing where others can write ---


def test_a_write_opens_nothing_that_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link with the very name of the temporary file, were it known; another in place of the file itself."""
    other = tmp_path / "another users"
    other.write_bytes(b"theirs")
    (tmp_path / "a.json").symlink_to(other)
    write_bytes_atomic(tmp_path / "a.json", b"ours")
    assert not (tmp_path / "a.json").is_symlink() and (tmp_path / "a.json").read_bytes() == b"ours"
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    link = tmp_path / f"a.json.tmp.guessed.{os.getpid()}"
    link.symlink_to(other)
    with pytest.raises(FileExistsError):
        write_bytes_atomic(tmp_path / "a.json", b"again")
    assert link.is_symlink() and other.read_bytes() == b"theirs" and (tmp_path / "a.json").read_bytes() == b"ours"


def test_temporary_names_are_never_the_same_and_are_swept_by_their_writer(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            files.write_atomic(tmp_path / "a", lambda file: names.append(file.name) or 1 / 0)
    assert len(set(names)) == 3 and not list(tmp_path.iterdir())
    dead, alive = 2**22 + 1, os.getpid()
    left = [tmp_path / f"a.tmp.{owner}" for owner in (f"0f.{dead}", f"1f.{alive}", dead, "note")]
    for path in left:
        path.touch()
    assert set(sweep_temporaries(tmp_path)) == {left[0], left[2]}
    assert sweep_temporaries(tmp_path, is_guarded=True) == [left[1]]


# --- reading what others have laid there ---


def lay(kind: str, path: Path) -> None:
    """A FIFO would be waited for, a device read without end."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_refused_wherever_a_file_is_read(kind: str, tmp_path: Path) -> None:
    names = ("a", "manifest.json", "_info.json", "step=000000001.ckpt")
    for name in names:
        lay(kind, tmp_path / name)
    with pytest.raises(OSError, match="Not a regular file"):
        open_regular(tmp_path / "a")
    with pytest.raises(DataError, match="Not a regular file"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train-000000.tar").touch()
    with pytest.raises(DataError, match="Not a regular file"):
        find_split(tmp_path, "train")
    checkpoint = tmp_path / names[-1]
    with pytest.raises(CheckpointError, match="Not a regular file"):
        load_foreign(checkpoint)
    sidecar_path(checkpoint).write_text('{"step": 1, "num_bytes": 0, "sha256": "0"}')
    with pytest.raises(CheckpointError, match="Not a regular file"):
        verify(checkpoint)
    lay(kind, sidecar_path(checkpoint))
    with pytest.raises(CheckpointError, match="Not a regular file"):
        verify(checkpoint)


def test_what_is_read_whole_is_bounded(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="1,099,511,627,776 bytes, where at most 1,000 are read"):
        read_regular(tmp_path / "a", 1000)
    (tmp_path / "b").write_bytes(b"b" * 1000)
    assert len(read_regular(tmp_path / "b", 1000)) == 1000
