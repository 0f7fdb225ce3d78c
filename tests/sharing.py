"""Tests beside one another: what a worker of pytest-xdist takes at once, and what all workers share."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent


def group(items: Iterable[pytest.Item]) -> None:
    """Keep each file's tests on one worker, and all tests of the Slurm cluster, which there is once."""
    for item in items:
        where = item.path.relative_to(HERE)
        name = "cluster" if where.parts[0] == "cluster" else str(where)
        item.add_marker(pytest.mark.xdist_group(name))


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
