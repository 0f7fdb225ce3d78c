"""What holds for every test: no deadline by the clock, and in CI nothing skips that its machine could run."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tests.commands import train_recorded
from tests.making.pairs import PAIR_OPTIONS, Pair, make_pair
from tests.making.shards import write_shards
from tests.sharing import made_once, pytest_xdist_make_scheduler
from tests.skips import pytest_make_collect_report, pytest_runtest_makereport

__all__ = [
    "pytest_make_collect_report",
    "pytest_runtest_makereport",
    "pytest_xdist_make_scheduler",
]  # pytest finds its hooks here

settings.register_profile("no deadline", deadline=None)  # a loaded machine is no failure
if not os.environ.get(
    "CI"
):  # there hypothesis's own profile holds: no deadline either, and the same examples each time
    settings.load_profile("no deadline")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts its background jobs so, and what a test starts would inherit it: Ctrl-C could not be tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound ones. Nobody changes them."""
    return made_once(tmp_path_factory, "small", lambda root: write_shards(root / "shards")) / "shards"


@pytest.fixture(scope="session")
def two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Everything at once: two ranks, two micro-batches a step, averaged weights, a pruning, 1000 classes, W&B.

    The supervisor is killed when rank 1 is fed the second half of step 7, in the second epoch.
    """
    root = made_once(
        tmp_path_factory, "two", lambda root: make_pair(root, shards, 2, "1 7 1 supervisor", *PAIR_OPTIONS)
    )
    return Pair(root, 2)


@pytest.fixture(scope="session")
def three_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where three ranks trained as `unbroken`, in one go. Nobody changes it."""
    return made_once(tmp_path_factory, "three", lambda root: train_recorded(root, shards, "unbroken", 3))
