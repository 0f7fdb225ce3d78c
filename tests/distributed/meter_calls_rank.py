"""One rank of a DDP training that three recorders watch: the meter, torch's flight recorder and its profiler."""

import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.comm.collectives import Call, CollectiveMeter, MeterObserver
from pipeline.comm.ddp import MeteredDDP
from tests.distributed.meter_ddp_rank import SmallNet, make_batch, recorded
from tests.distributed.meter_ranks import leave

NUM_STEPS = 3
SIZES = {  # bytes per element, as the flight recorder and the profiler call the types
    **dict.fromkeys(("Float", "float", "Int", "int"), 4),
    **dict.fromkeys(("Long", "long int"), 8),
    **dict.fromkeys(("Half", "c10::Half"), 2),
    **dict.fromkeys(("Byte", "unsigned char"), 1),
}


def train(meter: CollectiveMeter) -> None:
    """Buffers, a bitmap of used parameters, gradients in halves, micro-batches that reduce nothing, a barrier."""
    torch.manual_seed(7)
    model = SmallNet(batch_norm=True, unused=True)
    ddp = MeteredDDP(model, meter=meter, hook="fp16", find_unused_parameters=True, bucket_cap_mb=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(NUM_STEPS):
        with meter.phase("train"):
            images_BCHW, labels_B = make_batch(step)
            with ddp.no_sync():
                nn.functional.cross_entropy(ddp(images_BCHW), labels_B).backward()
            nn.functional.cross_entropy(ddp(images_BCHW), labels_B).backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()


def flight_recorder_calls(after: int) -> list[tuple[str, int]]:
    """[operation, input bytes] in the order of their records."""
    entries = sorted((entry for entry in recorded() if entry["record_id"] > after), key=lambda e: e["record_id"])
    return [
        (entry["profiling_name"].removeprefix("gloo:"), num_bytes(entry["input_sizes"], entry["input_dtypes"]))
        for entry in entries
    ]


def profiler_calls(trace: Path) -> list[list[tuple[str, int]]]:
    """The same by each of gloo's threads, which run what they are given in order, but beside one another."""
    by_thread: dict[int, list[Any]] = defaultdict(list)
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("name", "").startswith("gloo:"):
            by_thread[event["tid"]].append(event)
    return [
        [
            (
                event["name"].removeprefix("gloo:"),
                num_bytes(event["args"].get("Input Dims", []), event["args"].get("Input type", [])),
            )
            for event in sorted(events, key=lambda event: event["ts"])
        ]
        for events in by_thread.values()
    ]


def num_bytes(shapes: list[list[int]], dtypes: list[str]) -> int:
    return sum(math.prod(shape) * SIZES[dtype] for shape, dtype in zip(shapes, dtypes, strict=True))


def sparse_call(meter: CollectiveMeter) -> Call:
    """What the meter makes of an all-reduce of sparse gradients."""
    meter.take()
    dist.all_reduce(torch.eye(3).to_sparse())
    (call,) = meter.take().calls
    return call


class Calls(MeterObserver):
    """Every call in order, while it listens."""

    def __init__(self) -> None:
        self.seen: list[Call] = []
        self.listens = False

    def issued(self, call: Call) -> None:
        if self.listens:
            self.seen.append(call)


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    trace = out / f"trace{dist.get_rank()}.json"
    calls = Calls()
    meter = CollectiveMeter(observers=[calls])
    meter.attach()
    dist.barrier()
    before = max(entry["record_id"] for entry in recorded())
    calls.listens = True
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        train(meter)
    calls.listens = False
    profiler.export_chrome_trace(str(trace))
    found = {
        "meter": [(call.op, call.payload_bytes) for call in calls.seen],
        "origins": [call.origin for call in calls.seen],
        "flight recorder": flight_recorder_calls(before),
        "profiler": profiler_calls(trace),
        "counted": sum(meter.take().calls.values()),
        "sparse": sparse_call(meter),
    }
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(Path(sys.argv[1]))
