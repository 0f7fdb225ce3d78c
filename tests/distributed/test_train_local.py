"""Local SGD: ranks that train by themselves meet when planned, owe nothing in between, and survive a kill."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.forecasting.methods import exchange_calls
from pipeline.forecasting.source import architecture_of, shapes_of
from pipeline.reporting.runs import read_run
from tests.commands import SMALL, Ended, fired, rows, run, train, train_recorded
from tests.comparing import assert_same, differences, load
from tests.making.pairs import Pair, make_pair

HERE = Path(__file__).parent
# BatchNorm has running statistics, which are averaged too. Compared at every synchronisation: else exit code 7.
BATCH_NORM = ("model.metaparameters.norm=batch", "recipe.lr=0.01", "trainer.compare_weights_every_steps=1")
LOCAL = ("comm=local", "comm.period=4", "comm.bucket_megabytes=0.5", *BATCH_NORM)


DILOCO = ("comm=diloco", "comm.bucket_megabytes=0.5", "comm.fragments=2", *BATCH_NORM)
CODED = (*DILOCO, "comm.period=4", "comm.delay=1", "comm.codec=int8")
"""In rounds of 4 steps, a fragment leaves after every second step, and arrives with the next one."""


def ledger_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "ledger.json").read_text())


def assert_forecast(directory: Path, codec: str) -> None:
    """What `plan methods=` takes for a round is what each of the three did exchange."""
    forecast = exchange_calls(shapes_of(architecture_of(read_run(directory))), codec, 0.5, 2)
    expected, carried = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for call, count in forecast.items():
        expected[call.op, call.origin, "calls"] += 3 * count
        expected[call.op, call.origin, "bytes"] += 3 * count * call.payload_bytes
    for row in ledger_of(directory)["collectives"]:
        if row["phase"] == "train" and row["committed"]:
            carried[row["op"], row["origin"], "calls"] += row["num_calls"]
            carried[row["op"], row["origin"], "bytes"] += row["payload_bytes"]
    assert carried == expected


def meetings(directory: Path) -> list[int]:
    """The steps in which anything was exchanged; each row says what it must."""
    met = []
    for row in rows(directory):
        assert row["comm/residual_bytes"] == 0
        is_alone = row["comm/payload_bytes"] == 0
        assert is_alone == (row["comm/transport_bytes"] == 0) == ("train/loss" not in row)
        met += [] if is_alone else [row["trainer/step"]]
    return met


@pytest.fixture(scope="module")
def pair(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Rounds of 4 in a run of 11 steps, saved after 3, 6 and 9; killed in step 8, in the second round."""
    return make_pair(tmp_path_factory.mktemp("local"), shards, 2, "1 7 0 rank", *LOCAL)


def test_killed_within_a_round_it_ends_as_the_unbroken_run(pair: Pair) -> None:
    assert_same(pair)
    assert len(fired(pair.root / "resumed.fed")) == 1
    states = load(pair.resumed)["squeezewire"]["rank_states"]
    assert set(states) == {"momentum_buffer"} and not torch.equal(*states["momentum_buffer"])
    within = torch.load(pair.resumed / "checkpoints/step=000000009.ckpt", weights_only=True)
    states = within["squeezewire"]["rank_states"]
    assert set(states) == {"momentum_buffer", "parameters", "buffers", "sums"}
    assert not torch.equal(*states["parameters"]) and not torch.equal(*states["buffers"])
    # What others read of it is the mean.
    head = torch.cat([within["state_dict"][f"model.classifier.1.{name}"].flatten() for name in ("weight", "bias")])
    torch.testing.assert_close(head, states["parameters"].mean(0)[-len(head) :])


def test_a_local_step_sends_nothing_and_the_ledger_closes(pair: Pair) -> None:
    assert meetings(pair.resumed) == [4, 8, 11]
    validated = [row["trainer/step"] for row in rows(pair.resumed) if "val/loss" in row]
    assert validated == [4, 8, 11]
    ledger = ledger_of(pair.resumed)
    assert ledger["closed"] is True and ledger["transport"]["residual_bytes_per_rank"] == [0, 0]
    trained = [row for row in ledger["collectives"] if row["phase"] == "train" and row["committed"]]
    carried = dict.fromkeys(("parameters", "buffers", "metrics"), 0)
    for row in trained:
        carried[row["origin"]] += row["payload_bytes"]
    assert carried["parameters"] == 3 * ledger["gradient_bytes"] and carried["metrics"] == 3 * 13 * 8
    assert carried["buffers"] > 0
    assert_forecast(pair.resumed, "fp32")


def test_killed_with_a_fragment_under_way_it_ends_as_the_unbroken_run(shards: Path, tmp_path: Path) -> None:
    """In int8, killed in step 8 and resumed from step 6, at whose end a fragment has left."""
    pair = make_pair(tmp_path, shards, 2, "1 7 0 rank", *CODED, "trainer.keep_checkpoints=9")
    assert_same(pair, under_way=(2, 4, 6, 8))
    assert len(fired(pair.root / "resumed.fed")) == 1
    quiet = [row["trainer/step"] for row in rows(pair.resumed) if row["comm/payload_bytes"] == 0]
    assert quiet == [1, 10] and [row["trainer/step"] for row in rows(pair.resumed) if "val/loss" in row] == [4, 8, 11]
    section = load(pair.resumed)["squeezewire"]
    assert set(section["rank_states"]) == {"momentum_buffer", "errors"}  # at the end all is one
    assert not torch.equal(*section["rank_states"]["errors"]) and section["outer"]["under_way"] is None
    within = torch.load(pair.resumed / "checkpoints/step=000000006.ckpt", weights_only=True)
    states, outer = (within["squeezewire"][name] for name in ("rank_states", "outer"))
    weights = {"momentum_buffer", "parameters", "buffers", "sums", "errors"}
    assert set(states) == {*weights, "left_with"} and outer["under_way"]["has_turned"] is False
    assert len(outer["under_way"]["values"]) == states["left_with"].shape[1] < states["parameters"].shape[1]
    assert not torch.equal(*states["parameters"]) and outer["momentum"].any()
    ops = {(row["op"], row["origin"]) for row in ledger_of(pair.resumed)["collectives"] if row["phase"] == "train"}
    exchanged = {("all_to_all", "parameters"), ("all_gather", "parameters")}
    assert ops == {*exchanged, ("all_reduce", "buffers"), ("all_reduce", "metrics")}
    assert_forecast(pair.resumed, "int8")


def test_on_three_ranks_killed_between_the_ways_there_and_back(shards: Path, tmp_path: Path) -> None:
    """In int4, saved after step 7, when what left after step 6 has been sent back and has not arrived."""
    options = ("comm.period=6", "comm.delay=2", "comm.codec=int4", "trainer.checkpoint_every_steps=7")
    pair = make_pair(tmp_path, shards, 3, "2 10 0 rank", *DILOCO, *options, "trainer.keep_checkpoints=9")
    assert_same(pair, under_way=(3, 4, 6, 7))
    within = torch.load(pair.resumed / "checkpoints/step=000000007.ckpt", weights_only=True)
    assert within["squeezewire"]["outer"]["under_way"]["has_turned"] is True


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("num_fragments", "num_ranks"), [(1, 3), (4, 2)])
def test_the_ledger_closes_whatever_travels(
    codec: str, num_fragments: int, num_ranks: int, shards: Path, tmp_path: Path
) -> None:
    """In rounds of 8 steps, of which the run of 11 has one and a half; ranks have the same weights at the end."""
    options = ("comm.period=8", "comm.delay=1", f"comm.codec={codec}", f"comm.fragments={num_fragments}")
    train(tmp_path, shards, "run", num_ranks, *DILOCO, *options)
    ledger = ledger_of(tmp_path / "run")
    assert ledger["closed"] is True and ledger["transport"]["residual_bytes_per_rank"] == [0] * num_ranks
    left = [8 * (number + 1) // num_fragments for number in range(num_fragments)]
    has_turn = codec != "fp32"
    busy = sorted({*left, 11} | ({step + 1 for step in left} if has_turn else set()))
    assert [row["trainer/step"] for row in rows(tmp_path / "run") if row["comm/transport_bytes"]] == busy
    assert set(load(tmp_path / "run")["squeezewire"]["rank_states"]) == {"momentum_buffer", *["errors"] * has_turn}


@pytest.mark.slow
@pytest.mark.parametrize("options", [LOCAL, CODED], ids=["local", "diloco"])
def test_on_other_ranks_it_goes_on_from_the_mean(options: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    """From two ranks within a round, with a fragment under way, to three, to one, and to gradients in every step."""
    train_recorded(tmp_path, shards, "run", 2, *options, kill_at="0 7 0 supervisor")
    first = train_recorded(tmp_path, shards, "run", 3, *options, kill_at="0 10 0 supervisor")
    assert "the mean of those of 2 ranks" in first.output and "the number of ranks was 2 and is 3" in first.output
    last = train(tmp_path, shards, "run", 1, *BATCH_NORM)
    assert ("the outer momentum is dropped" in last.output) == (options is CODED)
    assert "the mean of those of 3 ranks" in last.output and "comm.period was 4 and is None" in last.output
    assert [row["trainer/step"] for row in rows(tmp_path / "run")] == list(range(1, 12))


def test_synchronous_until_a_step_on_three_ranks(shards: Path, tmp_path: Path) -> None:
    """Four steps exchange gradients, and ranks have nothing of their own after them."""
    options = (*BATCH_NORM, "trainer.max_steps=9", "trainer.validate_every_steps=0", "trainer.checkpoint_every_steps=4")
    local = ("comm=local", "comm.period=2", "comm.rule=post_local", "comm.local_start_step=4", "recipe.decay=none")
    options = (*options, "trainer.keep_checkpoints=3")
    ended = train(tmp_path, shards, "run", 3, *options, *local, "cluster.preempt_grace_seconds=0.001")
    assert ended.output.count("warning: a round takes") == 1
    assert meetings(tmp_path / "run") == [1, 2, 3, 4, 6, 8, 9]
    ledger = ledger_of(tmp_path / "run")
    assert ledger["closed"] is True and ledger["transport"]["residual_bytes_per_rank"] == [0, 0, 0]
    gradients = [row["comm/gradient_bytes"] for row in rows(tmp_path / "run")]
    assert gradients == [ledger["gradient_bytes"]] * 4 + [0] * 5
    synchronous = torch.load(tmp_path / "run/checkpoints/step=000000004.ckpt", weights_only=True)
    assert synchronous["squeezewire"]["rank_states"] == {}


@pytest.mark.slow
def test_rounds_of_one_step_are_gradients_in_every_step_but_for_rounding(shards: Path, tmp_path: Path) -> None:
    # From weights that tell pictures apart, 11 steps make more of a rounding than can be told from a fault.
    model = ("model.metaparameters.norm=none", "model.metaparameters.init=torchvision")
    options = (*BATCH_NORM, "trainer.precision=fp32", "recipe.grad_clip_norm=0", *model)
    train(tmp_path, shards, "gradients", 2, *options)
    train(tmp_path, shards, "weights", 2, *options, "comm=local", "comm.period=1")
    weights = [load(tmp_path / name)["state_dict"] for name in ("gradients", "weights")]
    assert differences(*weights)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_asked_to_stop_within_a_round_it_ends_it_and_goes_on_by_another_plan(shards: Path, tmp_path: Path) -> None:
    """SIGTERM in step 6; two micro-batches a step. What has left after step 8 arrives when the next attempt begins."""
    options = (*CODED, "batch.max_per_rank=3")
    train_recorded(tmp_path, shards, "run", 2, *options, kill_at="0 5 0 asked", expect=75)
    saved = load(tmp_path / "run")["squeezewire"]
    assert saved["step"] == 8 and saved["outer"]["under_way"]["has_turned"] is False
    changed = ("comm.period=3", "comm.fragments=1", "comm.delay=0", "comm.codec=bf16")
    ended = train_recorded(tmp_path, shards, "run", 2, *options, *changed)
    assert "comm.period was 4 and is 3" in ended.output and "comm.codec was 'int8' and is 'bf16'" in ended.output
    sent = [row["trainer/step"] for row in rows(tmp_path / "run") if row["comm/payload_bytes"]]
    assert sent == [*range(2, 10), 11] and len(rows(tmp_path / "run")) == 11
    ledger = ledger_of(tmp_path / "run")
    assert ledger["closed"] is True and ledger["transport"]["residual_bytes_per_rank"] == [0, 0]


def train_with(fault: str, root: Path, shards: Path, *more: str, expect: int) -> Ended:
    where = [f"run_root={root}", f"data.root={shards}", "name=run", "cluster.devices=2", "tracking=disabled"]
    script = str(HERE / "train_unmetered.py")
    return run([script, *where, *SMALL, *more], expect=expect, environment={"FAULT": fault})


def test_a_collective_in_a_local_step_fails_the_run(shards: Path, tmp_path: Path) -> None:
    ended = train_with("collective", tmp_path, shards, "comm=local", "comm.period=5", expect=6)
    assert "the fault fired" in ended.output and "Traceback" not in ended.output
    assert "Step 4 owes no collective, but issued 1 all_reduce of 4,000 bytes (other) too many" in ended.output
    # Lost is nothing: what was saved before is there.
    assert json.loads((tmp_path / "run" / "checkpoints" / "last.json").read_text())["step"] == 3
