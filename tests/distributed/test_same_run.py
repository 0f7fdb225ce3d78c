"""Ranks that are not the same run are refused before the first step, and ranks that drift apart later end the run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.commands import SMALL, Ended, by_hand, sentences, train_recorded
from tests.making.pairs import Pair
from tests.making.shards import NUM_VALIDATION

EVALUATE = ("data.size=32", "data.num_workers=0", "cluster.num_threads=1", "batch_per_rank=4")


def assert_all_refuse(ended: Sequence[Ended], *words: str) -> None:
    for rank in ended:
        assert rank.code == 2, rank.output
        (sentence,) = sentences(rank.output)
        assert "The ranks are not the same run" in sentence and all(word in sentence for word in words), sentence


def test_unequal_commands_of_three_ranks_are_refused(shards: Path, tmp_path: Path) -> None:
    where = [f"run_root={tmp_path}/runs", f"data.root={shards}", "tracking=disabled", *SMALL]
    other = ["recipe.lr=0.5", "name=second", "trainer.precision=bf16", "data.num_workers=1"]
    ended = by_hand(["-m", "pipeline.train"], [["name=first", *where], ["name=first", *where], [*where, *other]])
    assert_all_refuse(
        ended, 'name is "first" on ranks 0, 1, "second" on rank 2', "recipe.lr is 0.0009375", "0.5 on rank 2"
    )
    assert all("num_workers" not in rank.output for rank in ended)
    assert not (tmp_path / "runs").exists()


def test_weights_and_shards_are_compared_where_paths_may_differ(two_ranks: Pair, shards: Path, tmp_path: Path) -> None:
    """The same content below other paths is fine; one other bit in a weight is not."""
    for name in ("here", "there", "changed"):
        shutil.copytree(shards, tmp_path / name)
        saved = torch.load(next((two_ranks.unbroken / "checkpoints").glob("step=*11.ckpt")), weights_only=True)
        if name == "changed":
            weight = next(iter(saved["state_dict"].values()))
            torch.as_strided(weight, (weight.numel(),), (1,)).view(torch.int32)[3] ^= 1  # whatever its layout
        torch.save(saved["state_dict"], tmp_path / f"{name}.pt")

    def words(name: str) -> list[str]:
        paths = ["model=squeezenet1_1", f"data.root={tmp_path / name}", f"checkpoint={tmp_path / name}.pt"]
        return ["name=check", f"run_root={tmp_path}", "model.num_classes=1000", *paths, *EVALUATE]

    for rank in (ended := by_hand(["-m", "pipeline.evaluate"], [words("here"), words("there")])):
        assert rank.code == 0, rank.output
    assert f"of {NUM_VALIDATION})" in ended[0].output
    assert_all_refuse(
        by_hand(["-m", "pipeline.evaluate"], [words("here"), words("changed")]), "checksum of", "on rank 1"
    )


def test_one_bit_of_one_weight_of_one_rank_ends_the_run_within_the_interval(shards: Path, tmp_path: Path) -> None:
    """Flipped on rank 1 when it is fed step 4 (from 0): compared after steps 3, 6, ...; found in the sums of step 6."""
    options = ("trainer.compare_weights_every_steps=3", "trainer.checkpoint_every_steps=2")
    options += ("trainer.validate_every_steps=0", "recipe.weight_decay=0")
    ended = train_recorded(tmp_path, shards, "drifts", 2, *options, kill_at="1 4 0 bit", expect=7)
    said = sentences(ended.output)
    assert said and all("After step 6 the ranks' weights are not the same" in sentence for sentence in said), said
    assert all("on rank 0" in sentence and "on rank 1" in sentence for sentence in said)
    run = tmp_path / "drifts"
    rows = [json.loads(line)["trainer/step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5]
    assert json.loads((run / "checkpoints" / "last.json").read_text())["step"] == 4  # sound: before the flip
    again = train_recorded(tmp_path, shards, "drifts", 2, *options)
    assert "resumed from step=000000004.ckpt" in again.output
    assert json.loads((run / "ledger.json").read_text())["closed"] is True
