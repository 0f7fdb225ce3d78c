"""Run directories written by hand, as `train` leaves them: real models' layers, chosen times."""

import base64
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import simplejpeg
import torch
import yaml

from pipeline.comm.ddp import gradient_bytes_by_parameter
from pipeline.comparison.rows import KEYS
from pipeline.core.schemas.comparison import ComparisonJson, ModelRowJson
from pipeline.core.schemas.validation import ConfusionJson, ValidationJson
from pipeline.models import zoo

MakeRun = Callable[..., Path]


@dataclasses.dataclass
class HandmadeRun:
    """The files of a run, to be changed before they are written."""

    ledger: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "ledger.json").write_text(json.dumps(self.ledger))
        (directory / "config.yaml").write_text(yaml.safe_dump(self.config))
        (directory / "environment.json").write_text(json.dumps(self.environment))
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return directory


def layers_of(model: str, num_classes: int = 1000, **metaparameters: Any) -> list[dict[str, Any]]:
    return [dict(layer) for layer in _layers(model, num_classes, **metaparameters)]


@functools.cache
def _layers(model: str, num_classes: int, **metaparameters: Any) -> list[dict[str, Any]]:
    with torch.device("meta"):
        network = zoo.build(model, num_classes, **metaparameters)
    by_layer: dict[str, int] = {}
    for name, size in gradient_bytes_by_parameter(network).items():
        layer = name.rpartition(".")[0]
        by_layer[layer] = by_layer.get(layer, 0) + size
    total = sum(by_layer.values())
    return [{"name": name, "bytes": size, "share": size / total} for name, size in by_layer.items()]


def handmade_run(
    model: str = "squeezenet1_0",
    *,
    run: str = "handmade",
    num_steps: int = 8,
    global_batch: int = 16,
    num_classes: int = 1000,
    validated: bool = False,
    seconds: float = 0.25,
    **metaparameters: Any,
) -> HandmadeRun:
    layers = layers_of(model, num_classes, **metaparameters)
    size = sum(layer["bytes"] for layer in layers)
    sent = size + 1152 + 104

    def collective(op: str, origin: str, phase: str, num_calls: int, payload_bytes: int) -> dict[str, Any]:
        return {
            "op": op,
            "origin": origin,
            "phase": phase,
            "attempt": 1,
            "num_calls": num_calls,
            "payload_bytes": payload_bytes,
            "committed": True,
        }

    ledger = {
        "schema": 1,
        "closed": None,
        "run": run,
        "model": model,
        "backend": "gloo",
        "algorithm": "ring",
        "hook": "none",
        "world_size": 2,
        "num_servers": 2,
        "server_of_rank": [0, 1],
        "placement": "assumed",
        "num_steps": num_steps,
        "global_batch": global_batch,
        "gradient_bytes": size,
        "layers": layers,
        "buckets": [
            {"index": 0, "bytes": layers[-1]["bytes"], "num_parameters": 2},
            {"index": 1, "bytes": size - layers[-1]["bytes"], "num_parameters": 2 * len(layers) - 2},
        ],
        "collectives": [
            collective("broadcast", "parameters", "startup", 1, size),
            collective("all_reduce", "gradients", "startup", 4, 2 * size),
            collective("all_reduce", "gradients", "train", 2 * num_steps, size * num_steps),
            collective("broadcast", "lightning", "train", num_steps, 8 * num_steps),
        ],
        "attempts": [{"attempt": 1, "first_step": 0, "complete": True}],
        "transport": {
            "predicted_bytes_per_rank": [sent * num_steps, sent * num_steps],
            "measured_bytes_per_rank": None,
            "retransmitted_bytes_per_rank": None,
            "residual_bytes_per_rank": None,
        },
        "servers": {
            "predicted_egress_bytes": [sent * num_steps, sent * num_steps],
            "measured_egress_bytes": None,
            "counter": None,
            "interface": None,
            "residual_fraction": None,
        },
        "per_step": {
            "payload_bytes": size + 8,
            "transport_bytes_per_rank": [sent, sent],
            "server_egress_bytes": [sent, sent - 56],
        },
        "time": {
            "step_seconds": {"p50": seconds, "p90": seconds * 1.2},
            "communication_seconds": None,
            "exposed_seconds": None,
            "data_wait_seconds": 0.001,
            "bus_bandwidth_bytes_per_second": None,
        },
        "meter_overhead_fraction": None,
        "null_reasons": {
            "closed": "Bytes on the wire are predicted in this run, not read from the kernel's counters.",
            "time.exposed_seconds": "Communication was not timed in this run.",
        },
    }
    config = {
        "name": run,
        "seed": 0,
        "data": {"root": "shards", "size": 64},
        "model": {"name": model, "num_classes": num_classes, "metaparameters": metaparameters, "input": {"size": 224}},
        "batch": {"global_size": global_batch, "max_per_rank": 256},
        "trainer": {"precision": "fp32", "memory_format": "auto"},
        "comm": {"bucket_megabytes": 25.0, "hook": "none"},
    }
    environment = {
        "schema": 1,
        "git": {"commit": "0123456789", "dirty": False},
        "packages": {"torch": "2.14.1"},
        "hosts": ["node1", "node1"],
        "cpu": {"model": "A CPU of two cores", "num_cores": 2, "flags": []},
        "devices": [],
        "num_threads_per_rank": 1,
    }
    rows = []
    for step in range(1, num_steps + 1):
        row = {
            "trainer/step": step,
            "samples": step * global_batch,
            "train/loss": 2.3 * 0.97**step + 0.1,
            "train/top1": 1 - 0.9 * 0.97**step,
            "lr": 0.04 * (1 - step / num_steps),
            "perf/step_seconds": seconds,
            "perf/data_wait_share": 0.01,
            "comm/total_gigabytes": step * (2 * sent - 56) / 1e9,
        }
        if validated and (step % 25 == 0 or step == num_steps):
            row |= {"val/loss": 2.4 * 0.97**step + 0.12, "val/top1": 1 - 0.92 * 0.97**step, "val/top5": 0.99}
        rows.append(row)
    return HandmadeRun(ledger, config, environment, rows)


def handmade_validation(num_classes: int = 10, names: Sequence[str] = (), step: int = 8) -> ValidationJson:
    """validation.json of three pictures a class, of which one is taken for the next class."""
    is_complete = num_classes <= 40
    named = [str(number) for number in range(num_classes if is_complete else 40)]
    wrong: list[ConfusionJson] = [
        {"label": label, "predicted": (label + 1) % num_classes, "num_pictures": 1, "num_of_label": 3}
        for label in range(min(num_classes, 40))
    ]
    right: list[ConfusionJson] = [
        {"label": label, "predicted": label, "num_pictures": 2, "num_of_label": 3} for label in range(num_classes)
    ]
    pixels = np.full((96, 96, 3), (200, 120, 40), np.uint8)
    jpeg = base64.b64encode(simplejpeg.encode_jpeg(pixels, colorspace="RGB")).decode()
    return {
        "schema": 1,
        "step": step,
        "num_samples": 3 * num_classes,
        "num_correct": 2 * num_classes,
        "num_classes": num_classes,
        "class_names": dict(zip(named, names or [f"kind {number}" for number in named], strict=False)),
        "is_complete": is_complete,
        "confusions": [*right, *wrong] if is_complete else wrong,
        "worst": [
            {"sample_id": number, "key": f"picture{number}", "shard": "val-000000.tar", "label": number, "predicted":
             (number + 1) % num_classes, "loss": 9.0 - number, "jpeg_base64": jpeg}
            for number in range(min(12, num_classes))
        ],
    }  # fmt: skip


def timed_run(model: str = "squeezenet1_0", bandwidth: float | None = 1e9, **changes: Any) -> HandmadeRun:
    """A run of two servers in a lab, its buckets timed."""
    run = handmade_run(model)
    size = run.ledger["gradient_bytes"]
    run.ledger["buckets"] = [
        {"index": 0, "bytes": 2_048_000, "num_parameters": 2, "ready_seconds": 0.02, "sent_seconds": 0.02,
         "done_seconds": 0.04},
        {"index": 1, "bytes": size - 2_048_000, "num_parameters": 50, "ready_seconds": 0.10, "sent_seconds": 0.10,
         "done_seconds": 0.14},
    ]  # fmt: skip
    run.ledger["time"] |= {
        "forward_seconds": 0.06, "backward_seconds": 0.10, "exposed_seconds": 0.045, "communication_seconds": 0.065,
        "data_wait_seconds": 0.01,
    }  # fmt: skip
    run.ledger["per_step"]["calls"] = [
        {"op": "all_reduce", "origin": "gradients", "payload_bytes": 2_048_000, "itemsize": 4, "root": -1,
         "num_calls": 1},
        {"op": "all_reduce", "origin": "gradients", "payload_bytes": size - 2_048_000, "itemsize": 4, "root": -1,
         "num_calls": 1},
        {"op": "broadcast", "origin": "lightning", "payload_bytes": 8, "itemsize": 8, "root": 0, "num_calls": 1},
    ]  # fmt: skip
    run.ledger |= {"placement": "measured", "num_servers": 2, "server_of_rank": [0, 1]}
    run.environment["lab"] = {"bandwidth_bits_per_second": bandwidth, "offloads": False}
    run.ledger |= changes
    return run


def handmade_row(model: str = "squeezenet1_0", **values: Any) -> ModelRowJson:
    """Return a row of comparison.json: null but for what is given."""
    row = dict.fromkeys(KEYS) | {"model": model, "hook": "none", "label": model, "num_parameters": 0} | values
    return cast(ModelRowJson, row)


def handmade_comparison(*rows: ModelRowJson, baseline: str = "squeezenet1_0") -> ComparisonJson:
    """Return comparison.json with these rows and nothing said about them."""
    return {"schema": 1, "baseline": baseline, "conditions": {}, "models": [*rows], "runs": {}, "null_reasons": {}}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run("first", model=..., **changes)` writes a run directory and returns it."""

    def make(name: str, **arguments: Any) -> Path:
        return handmade_run(run=name, **arguments).write(tmp_path / name)

    return make
