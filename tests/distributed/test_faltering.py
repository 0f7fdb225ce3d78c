"""Servers whose network falters (faltering_link.py): time alone is lost; or all ranks end, and come back.

`python -m benchmarks.faltering_network` measures the same and publishes the table of docs/survival.md.
"""

from pathlib import Path

import pytest

from tests.distributed.faltering import NETWORKS, measure, measure_cut_for_ever, measure_large_frames
from tests.distributed.test_lab import possible

__all__ = ["possible"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what two and three undisturbed ranks learn is kept."""
    return tmp_path_factory.mktemp("faltering")


def test_a_network_that_spoils_frames_and_then_is_gone(shards: Path, root: Path) -> None:
    """One frame in a hundred is lost, doubled, damaged or late; in step 5 all are lost; then the same command again."""
    spoilt = {"loss": 0.01, "duplicate": 0.01, "corrupt": 0.01, "reorder": 0.01}
    measure_cut_for_ever(shards, root / "spoilt", spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_what_comes_late_costs_time_alone(name: str, shards: Path, root: Path) -> None:
    measure(name, shards, root / str(list(NETWORKS).index(name)))


@pytest.mark.slow
def test_a_network_that_loses_all_large_frames_ends_the_run_before_its_first_step(shards: Path, root: Path) -> None:
    measure_large_frames(shards, root / "large")
