"""The state after a kill at every kind of place, on one, two and three ranks: bit for bit that of the unbroken run.

`comparing.assert_same` compares weights, optimiser, averages, the record, the ledger, and of every micro-batch the
sample ids, the pixels and the state of every global generator.
"""

from pathlib import Path

import pytest

from tests.commands import train_recorded
from tests.comparing import assert_same
from tests.making.pairs import Pair

# A checkpoint after every step, so that the next attempt begins right where this one was killed. 5 steps are an epoch.
OPTIONS = (
    "trainer.checkpoint_every_steps=1",
    "recipe.ema_decay=0.9",
    "batch.max_per_rank=2",
    "comm.bucket_megabytes=1",
)
PLACES = {
    "first step of an epoch": ["5 0"],
    "amid a backward pass": ["7 backward"],
    "last step of an epoch": ["9 1"],
    "inside validation": ["8 validation"],
    "three times": ["2 0", "4 validation", "9 backward"],
}


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["one rank", "two ranks", "three ranks"])
def unbroken(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("unbroken")
    train_recorded(root, shards, "unbroken", request.param, *OPTIONS)
    return Pair(root, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first rank", "last rank", "supervisor"])
@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere(place: str, victim: str, unbroken: Pair, shards: Path) -> None:
    pair = Pair(unbroken.root, unbroken.devices, f"{place}-{victim}".replace(" ", "_"))
    rank = unbroken.devices - 1 if victim == "last rank" else 0
    for where in PLACES[place]:
        kill_at = f"{rank} {where} {'supervisor' if victim == 'supervisor' else 'rank'}"
        train_recorded(pair.root, shards, pair.name, pair.devices, *OPTIONS, kill_at=kill_at)
    train_recorded(pair.root, shards, pair.name, pair.devices, *OPTIONS)
    assert_same(pair)
