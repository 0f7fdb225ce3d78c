"""Tests beside one another: what a worker of pytest-xdist takes at once, and what all workers share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling


class FileScheduling(LoadScopeScheduling):
    """Keeps each file's tests on one worker, and all tests of the Slurm cluster, which there is once."""

    def _split_scope(self, nodeid: str) -> str:
        """Return what stays together. (xdist's own groups are lost on pytest 9.2, which keeps node ids elsewhere.)"""
        file = nodeid.partition("::")[0]
        return "cluster" if "tests/cluster/" in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    """Take this scheduler whatever `--dist` says."""
    return FileScheduling(config, log)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a directory that the first worker to need it makes, and that nobody changes.

    Args:
        tmp_path_factory: Of the session.
        name: What it is called below the temporary directory of all workers.
        make: Fills the empty directory.
    """
    own = tmp_path_factory.getbasetemp()
    of_all = own.parent if own.name.startswith("popen-") else own
    directory, done = of_all / name, of_all / f"{name}.done"
    with FileLock(of_all / f"{name}.lock"):
        if not done.exists():
            directory.mkdir()
            make(directory)
            done.touch()
    return directory
