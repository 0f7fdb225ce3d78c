"""Who may write a metered run."""

import os
from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError
from pipeline.metering.record import Record
from pipeline.metering.settings import Settings


def test_workers_that_outlive_a_killed_program_do_not_keep_its_next_start_out(tmp_path: Path) -> None:
    settings = Settings("mine", str(tmp_path))
    first = Record(settings)
    with pytest.raises(ConfigError, match="being written by another program"):
        Record(settings)
    ended, end = os.pipe()
    is_there, say_there = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(end)
        os.write(say_there, b".")
        os.read(ended, 1)
        os._exit(0)
    try:
        os.read(is_there, 1)  # what a fork does in the child has been done
        first.close()  # as the kernel does
        Record(settings).close()
    finally:
        os.close(end)
        os.waitpid(worker, 0)
        for one in (ended, is_there, say_there):
            os.close(one)
