"""Locks on files: one owner, waiting, and an owner that shows life."""

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.files import try_lock


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
