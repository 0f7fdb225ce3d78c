"""What a two-rank training leaves behind: its ledger, its mirror, and nothing changed once it is finished."""

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from pipeline.comm.wire import gloo
from pipeline.config.model import InputConfig
from pipeline.core.schemas.validation import ValidationJson
from pipeline.data.index import ShardIndex
from pipeline.data.pixels import eval_view
from pipeline.reporting import dashboards
from tests.commands import TIMES, rows, train_recorded
from tests.json_shape import mismatches
from tests.making.pairs import PAIR_OPTIONS, Pair
from tests.making.shards import CLASSES, NUM_VALIDATION
from tests.wandb_file import records

GRADIENT_BYTES = 4_941_984  # 1,235,496 parameters of squeezenet1_1, 4 bytes each
KEYS = """schema closed run model backend algorithm hook world_size num_servers server_of_rank placement num_steps
global_batch gradient_bytes layers collectives transport servers per_step time meter_overhead_fraction null_reasons"""
KEYS_OF = {
    "transport": "predicted_bytes_per_rank measured_bytes_per_rank retransmitted_bytes_per_rank"
    " residual_bytes_per_rank",
    "servers": "predicted_egress_bytes measured_egress_bytes counter interface residual_fraction",
    "per_step": "payload_bytes transport_bytes_per_rank server_egress_bytes",
    "time": "step_seconds communication_seconds exposed_seconds data_wait_seconds bus_bandwidth_bytes_per_second"
    " forward_seconds backward_seconds overlapped_seconds",
}
METRICS = (
    *(f"train/{name}" for name in ("loss", "top1")),
    *(f"perf/{name}" for name in ("images_per_second", "step_seconds", "data_wait_seconds", "data_wait_share")),
    *(f"comm/{name}_bytes" for name in ("gradient", "payload", "transport", "server_egress")),
    *("comm/total_gigabytes", "comm/residual_bytes", "lr"),
    *TIMES,
)
VALIDATION = {"val/loss", "val/top1", "val/top5"}


@pytest.fixture
def ledger(two_ranks: Pair) -> dict[str, Any]:
    return json.loads((two_ranks.unbroken / "ledger.json").read_text())


def issued(ledger: dict[str, Any], origin: str, phase: str) -> tuple[int, int]:
    """(calls, payload bytes)."""
    found = [row for row in ledger["collectives"] if (row["origin"], row["phase"]) == (origin, phase)]
    return sum(row["num_calls"] for row in found), sum(row["payload_bytes"] for row in found)


def test_the_ledger_has_every_key_of_its_schema(ledger: dict[str, Any]) -> None:
    assert set(KEYS.split()) <= ledger.keys()
    for part, keys in KEYS_OF.items():
        assert set(keys.split()) <= ledger[part].keys(), part
    for row in ledger["collectives"]:
        assert {"op", "origin", "phase", "attempt", "num_calls", "payload_bytes"} <= row.keys()
        assert row["origin"] in {"gradients", "buffers", "parameters", "metrics", "lightning", "other"}
        assert row["phase"] in {"startup", "train", "validation", "checkpoint"}
    assert (ledger["schema"], ledger["run"], ledger["model"]) == (1, "unbroken", "squeezenet1_1")
    assert (ledger["backend"], ledger["algorithm"], ledger["hook"]) == ("gloo", "ring", "none")
    assert (ledger["world_size"], ledger["num_servers"], ledger["server_of_rank"]) == (2, 2, [0, 1])
    assert (ledger["placement"], ledger["num_steps"], ledger["global_batch"]) == ("assumed", 11, 12)
    assert ledger["closed"] is True
    assert sum(layer["share"] for layer in ledger["layers"]) == pytest.approx(1)
    assert sum(layer["bytes"] for layer in ledger["layers"]) == GRADIENT_BYTES


def nulls(value: Any, path: str = "") -> Iterator[str]:
    if value is None:
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from nulls(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from nulls(inner, f"{path}.{index}")


@pytest.mark.parametrize("name", ["unbroken", "resumed"])
def test_every_null_has_its_reason(two_ranks: Pair, name: str) -> None:
    ledger = json.loads((two_ranks.root / name / "ledger.json").read_text())
    unexplained = set(nulls(ledger)) - ledger["null_reasons"].keys()
    assert not unexplained
    assert all(reason.endswith(".") for reason in ledger["null_reasons"].values())
    assert not ledger["null_reasons"].keys() - set(nulls(ledger))


def test_gradients_are_metered_to_the_byte(ledger: dict[str, Any]) -> None:
    assert ledger["gradient_bytes"] == GRADIENT_BYTES
    calls, payload_bytes = issued(ledger, "gradients", "train")
    assert payload_bytes == 11 * GRADIENT_BYTES  # once a step, though a step has two micro-batches
    assert calls == 11 * len(ledger["buckets"])  # the hook ran for every bucket of every step
    assert sum(bucket["bytes"] for bucket in ledger["buckets"]) == GRADIENT_BYTES


def test_a_step_sends_what_the_ring_of_its_buckets_sends(two_ranks: Pair, ledger: dict[str, Any]) -> None:
    rings = [gloo.gloo_ring_all_reduce(bucket["bytes"], 4, 2) for bucket in ledger["buckets"]]
    sent = [sum(gloo.sent_bytes_per_rank(ring, 2)[rank] for ring in rings) for rank in range(2)]
    assert sent == [4_943_136, 4_943_136]
    per_rank = ledger["per_step"]["transport_bytes_per_rank"]
    assert all(0 < rank_bytes - 4_943_136 < 1000 for rank_bytes in per_rank)  # metrics and Lightning's broadcast
    assert ledger["transport"]["predicted_bytes_per_rank"] == [11 * rank_bytes for rank_bytes in per_rank]
    assert ledger["servers"]["predicted_egress_bytes"] == ledger["transport"]["predicted_bytes_per_rank"]
    last = rows(two_ranks.unbroken)[-1]
    assert last["comm/gradient_bytes"] == GRADIENT_BYTES
    assert last["comm/payload_bytes"] == ledger["per_step"]["payload_bytes"]
    assert last["comm/transport_bytes"] == sum(per_rank) / 2
    assert last["comm/server_egress_bytes"] == max(ledger["per_step"]["server_egress_bytes"])
    assert last["comm/total_gigabytes"] == pytest.approx(sum(ledger["servers"]["predicted_egress_bytes"]) / 1e9)


def test_lightnings_own_broadcast_is_under_its_name(ledger: dict[str, Any]) -> None:
    # One int64 before every micro-batch.
    assert issued(ledger, "lightning", "train") == (11 * 2, 11 * 2 * 8)
    assert issued(ledger, "other", "train") == (0, 0)


def test_nothing_that_trains_hides_outside_training(ledger: dict[str, Any]) -> None:
    assert issued(ledger, "gradients", "startup")[1] > 0  # the passes that settle the buckets
    for phase in ("validation", "checkpoint"):
        assert issued(ledger, "gradients", phase) == (0, 0)
    # Three validations: a sum, what was said of each picture, and the worst of them as small pictures.
    assert issued(ledger, "metrics", "validation")[0] == 3 * 3


def test_a_killed_attempt_is_listed_with_what_is_not_known_of_it(two_ranks: Pair) -> None:
    ledger = json.loads((two_ranks.resumed / "ledger.json").read_text())
    first, second = ledger["attempts"]
    assert first["lost_payload_bytes"] is None  # killed: nobody could say
    assert "attempts.0.lost_payload_bytes" in ledger["null_reasons"]
    assert second["lost_payload_bytes"] == 0
    for attempt in (1, 2):
        startup = [row for row in ledger["collectives"] if (row["attempt"], row["phase"]) == (attempt, "startup")]
        assert sum(row["payload_bytes"] for row in startup) > GRADIENT_BYTES


# --- the record and its mirror ---


def test_every_metric_of_the_record_is_filled(two_ranks: Pair) -> None:
    lines = [json.loads(line) for line in (two_ranks.resumed / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        assert all(isinstance(row[name], int | float) for name in METRICS)
        assert (row.keys() >= VALIDATION) == (row["trainer/step"] in (4, 8, 11))
    assert [row["samples"] for row in lines] == [12 * step for step in range(1, 12)]


def mirrored(run: Path) -> tuple[list[str], list[dict[str, float]]]:
    """(run id of each attempt, rows of all attempts)."""
    ids, history = [], []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "run" and record.run.run_id not in ids[-1:]:
                ids.append(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return ids, history


def test_the_mirror_of_an_unbroken_run_holds_every_row(two_ranks: Pair) -> None:
    ids, history = mirrored(two_ranks.unbroken)
    assert len(ids) == 1
    assert [row["trainer/step"] for row in history] == list(range(1, 12))
    for row, written in zip(history, rows(two_ranks.unbroken), strict=True):
        assert set(METRICS) <= row.keys()
        assert (row.keys() >= VALIDATION) == (row["trainer/step"] in (4, 8, 11))
        assert row["train/loss"] == written["train/loss"] and row["samples"] == written["samples"]


def test_every_metric_of_the_dashboards_is_in_a_real_run(two_ranks: Pair) -> None:
    """So that a metric that is renamed or dropped cannot leave an empty panel behind."""
    logged: set[str] = set()
    for path in two_ranks.unbroken.glob("wandb/offline-run-*/*.wandb"):
        for record in records(path):
            updates = [*record.history.item, *record.summary.update]
            logged |= {"/".join(item.nested_key) or item.key for item in updates}
    assert dashboards.metric_names() <= logged, dashboards.metric_names() - logged


def test_the_mirror_knows_what_the_run_was_and_what_came_of_it(two_ranks: Pair, shards: Path) -> None:
    """The second attempt at a run that was killed: other values than the first one's do not end the mirror."""
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    kept: dict[str, list[str]] = {}
    told = ""
    for record in records(sorted(two_ranks.resumed.glob("wandb/offline-run-*/*.wandb"))[-1]):
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        summary |= {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
        told += record.output_logger.line
        if record.WhichOneof("record_type") == "artifact":
            kept[record.artifact.type] = [entry.path for entry in record.artifact.manifest.contents]
    assert {"world_size": 2, "num_nodes": 1, "ranks_per_node": 2, "num_classes": 1000}.items() <= config.items()
    assert config["num_parameters"] == config["num_trained_parameters"] == GRADIENT_BYTES // 4
    assert config["dataset_sha256"] == ShardIndex.open(shards, "train").index_hash
    assert config["became"]["precision"] in ("fp32", "bf16") and config["became"]["max_steps"] == 11
    environment = json.loads((two_ranks.resumed / "environment.json").read_text())
    assert (config["commit"], config["versions"]["torch"]) == (
        environment["git"]["commit"],
        environment["packages"]["torch"],
    )
    ledger = json.loads((two_ranks.resumed / "ledger.json").read_text())
    transport = ledger["transport"]
    sent = transport["measured_bytes_per_rank"] or transport["predicted_bytes_per_rank"]
    assert summary["ledger_closed"] is ledger["closed"] and summary["total_bytes"] == sum(sent)
    assert summary["communication_seconds_p50"] == ledger["time"]["communication_seconds"]
    assert summary["exposed_seconds_p50"] == ledger["time"]["exposed_seconds"]
    assert kept == {
        "ledger": ["ledger.json"],
        "config": ["config.yaml"],
        "report": ["report.html"],
        "best": ["best.ckpt"],
    }
    for line in ("resumed from step=", "resumed: step 8 of 11: validation loss", "resumed: 11 steps done", "the wire "):
        assert line in told, told


def test_a_restarted_run_goes_on_in_the_same_mirrored_run(two_ranks: Pair) -> None:
    assert len(list(two_ranks.resumed.glob("wandb/offline-run-*"))) == 2
    ids, history = mirrored(two_ranks.resumed)
    assert len(set(ids)) == 1
    # What the killed attempt had still in its buffers is lost to the mirror; the second begins at step 7 in any case.
    assert [row["trainer/step"] for row in history][-5:] == list(range(7, 12))
    assert set(ids) != set(mirrored(two_ranks.unbroken)[0])


def test_what_was_said_of_each_picture_is_what_was_counted(two_ranks: Pair, shards: Path) -> None:
    validation = json.loads((two_ranks.unbroken / "validation.json").read_text())
    assert mismatches(validation, ValidationJson) == []
    last = rows(two_ranks.unbroken)[-1]
    assert (validation["step"], validation["num_samples"]) == (11, NUM_VALIDATION)
    assert validation["num_correct"] == round(last["val/top1"] * NUM_VALIDATION)
    losses = [picture["loss"] for picture in validation["worst"]]
    assert losses == sorted(losses, reverse=True) and losses[0] >= last["val/loss"]
    index = ShardIndex.open(shards, "val")
    for picture in validation["worst"]:  # each rank's own came to rank 0
        jpeg = base64.b64decode(picture["jpeg_base64"])
        assert index.label(picture["sample_id"]) == picture["label"]
        whole = eval_view(index.read(picture["sample_id"]), InputConfig(size=32))
        shown = simplejpeg.decode_jpeg(jpeg)
        assert shown.shape == (96, 96, 3) and np.abs(shown.mean((0, 1)) - whole.mean((0, 1))).max() < 12  # JPEG twice


def test_the_report_shows_both_attempts(two_ranks: Pair) -> None:
    page = (two_ranks.resumed / "report.html").read_text()
    assert page.count('data-label="changed"') == 2


# --- afterwards ---


def contents(run: Path) -> dict[str, str]:
    """Hash of every file of a run but its lock, which names the last process that held it."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_a_finished_run_ends_at_once_and_changes_nothing(two_ranks: Pair, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(two_ranks.unbroken, tmp_path / "unbroken")
    before = contents(tmp_path / "unbroken")
    ended = train_recorded(tmp_path, shards, "unbroken", 2, *PAIR_OPTIONS)
    assert "unbroken is finished: 11 of 11 steps are done. Nothing to do." in ended.output
    assert contents(tmp_path / "unbroken") == before


def test_what_the_run_is_made_of_is_written_down(two_ranks: Pair) -> None:
    environment = json.loads((two_ranks.unbroken / "environment.json").read_text())
    assert environment["shards"]["classes"] == list(CLASSES) and len(environment["shards"]["sha256"]) == 64
    config = (two_ranks.unbroken / "config.yaml").read_text()
    assert "global_size: 12" in config and "ema_decay: 0.9" in config
    page = (two_ranks.unbroken / "report.html").read_text()
    assert "4,941,984" in page and page.count("<img ") == min(12, NUM_VALIDATION)
    best = json.loads((two_ranks.unbroken / "checkpoints" / "best.ckpt.json").read_text())
    assert best["metric"] == "val/top1" and round(best["score"] * NUM_VALIDATION) == pytest.approx(
        best["score"] * NUM_VALIDATION
    )
