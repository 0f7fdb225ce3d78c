"""Whether exposed time is what a step really loses to communication: against paired steps, two servers at 1 Gbit/s.

    python -m benchmarks.exposed_time

Servers are network namespaces (`pipeline.lab`), one rank with one thread on each; packets are cut into frames after
they leave a server (`offloads=true`), as network cards do it, which costs no processor. Three kinds of step take turns,
each begun together by both ranks, each one forward and one backward pass:

    alone     gradients stay where they are (DDP's `no_sync`)
    hidden    every bucket's bytes travel when it is ready, and nobody waits for them
    synced    DDP as it is

What a step loses by waiting is `synced - hidden`: two times of whole steps, which know nothing of the timeline. The
timeline's exposed time must agree with it within 10 % of it or 2 % of the step. `hidden - alone` is how much
communication slows computing down, for gloo works on the same cores: it is no waiting, and has a line of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.synthetic import make_training, whole_group

if TYPE_CHECKING:
    import torch

TRIPLES = {"squeezenet1_0": 150, "alexnet": 30}
SHARE_OF_EXPOSED, SHARE_OF_STEP = 0.10, 0.02
KINDS = ("alone", "hidden", "synced")


# --- a rank ---


class HidingHook:
    """DDP's all-reduce, or one of the same size that nobody waits for."""

    def __init__(self) -> None:
        self.hides = False
        self._shadows: dict[int, torch.Tensor] = {}
        self._pending: list[Any] = []

    def reduce(self, state: object, bucket: Any) -> Any:
        """A communication hook."""
        import torch
        import torch.distributed as dist

        from pipeline.comm.hooks import average

        if not self.hides:
            return average(state, bucket)
        buffer = bucket.buffer()
        buffer.mul_(1.0 / dist.get_world_size())  # as `average` does
        shadow = self._shadows.setdefault(bucket.index(), torch.zeros_like(buffer))
        self._pending.append(dist.all_reduce(shadow, async_op=True))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(buffer)
        return future

    def finish(self) -> None:
        """Wait for what was hidden, outside the time of any step."""
        for work in self._pending:
            work.wait()
        self._pending.clear()


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of each triple on this rank: of every kind of step, and what the timeline says of the synced one."""
    import torch.distributed as dist

    from pipeline.comm.collectives import CollectiveMeter
    from pipeline.comm.ddp import MeteredDDP, rebuild_buckets
    from pipeline.comm.hooks import HOOKS
    from pipeline.comm.timeline import Timeline

    aside = whole_group()
    timeline, hook = Timeline(dist.get_world_size()), HidingHook()
    meter = CollectiveMeter(observers=[timeline])
    meter.attach()
    HOOKS["hiding"] = hook.reduce
    training = make_training(
        options.worker,
        options.batch,
        options.size,
        lambda module: MeteredDDP(
            module, meter=meter, timeline=timeline, hook="hiding", gradient_as_bucket_view=True
        ),
    )  # fmt: skip
    rebuild_buckets(training.ddp, training.loss, meter)
    meter.set_phase("train")

    def step(kind: str) -> dict[str, float]:
        hook.hides = kind == "hidden"
        timeline.restart()
        dist.barrier(group=aside)
        started = time.perf_counter()
        with training.ddp.no_sync() if kind == "alone" else nullcontext():
            with timeline.forward():
                loss = training.loss()
            with timeline.backward():
                loss.backward()
        seconds = {kind: time.perf_counter() - started}
        times = timeline.take_step()
        if kind == "synced":
            assert times is not None
            seconds |= {"exposed": times.exposed_seconds, "communication": times.communication_seconds}
        hook.finish()
        training.ddp.zero_grad()
        return seconds

    triples = []
    for number in range(-3, options.triples):
        kinds = [KINDS[(number + turn) % len(KINDS)] for turn in range(len(KINDS))]
        triple = {key: value for kind in kinds for key, value in step(kind).items()}
        if number >= 0:
            triples.append(triple)
    return triples


def be_rank(options: argparse.Namespace) -> int:
    """Measure, and leave the triples for the one who started the ranks."""
    import torch.distributed as dist

    from pipeline.core.compute import keep_freed_memory, set_threads

    keep_freed_memory()
    set_threads(1, int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group("gloo")
    triples = measure(options)
    _triples_path(options.worker, dist.get_rank()).write_text(json.dumps(triples))
    dist.destroy_process_group()
    return 0


# --- the judge ---


def _triples_path(model: str, rank: int) -> Path:
    return common.RUNS / f"exposed-{model}" / f"triples-{rank}.json"


def judge(triples: Sequence[dict[str, float]]) -> dict[str, float]:
    """One rank's medians, in seconds; differences are taken within a triple."""

    def middle(key: str) -> float:
        return statistics.median(triple[key] for triple in triples)

    def lost(more: str, less: str) -> float:
        return statistics.median(triple[more] - triple[less] for triple in triples)

    row = {f"{key}_seconds": middle(key) for key in (*KINDS, "communication", "exposed")}
    row["waited_seconds"] = lost("synced", "hidden")
    row["slowed_seconds"] = lost("hidden", "alone")
    row["synced_less_alone_seconds"] = lost("synced", "alone")
    allowed = max(SHARE_OF_EXPOSED * row["waited_seconds"], SHARE_OF_STEP * row["synced_seconds"])
    row["error_seconds"] = row["exposed_seconds"] - row["waited_seconds"]
    row["error_of_allowed"] = abs(row["error_seconds"]) / allowed
    return row


def main(arguments: Sequence[str]) -> int:
    """Start the lab for each model, or be one of its ranks."""
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=int, default=224, help="crop side in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pictures per rank (%(default)s)")
    parser.add_argument("--bandwidth", default="1gbit")
    parser.add_argument("--triples", type=int, help="of steps (default: 150 of SqueezeNet, 30 of AlexNet)")
    parser.add_argument("--worker", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return be_rank(options)
    common.print_conditions()
    result = common.Result("exposed_time", vars(options))
    rows = []
    for model, usual in TRIPLES.items():
        name, triples = f"exposed-{model}", options.triples or usual
        shutil.rmtree(common.RUNS / name, ignore_errors=True)
        (common.RUNS / name).mkdir(parents=True)
        lab = [f"name={name}", f"run_root={common.RUNS}", "servers=2", f"bandwidth={options.bandwidth}"]
        sizes = ["--size", str(options.size), "--batch", str(options.batch), "--triples", str(triples)]
        worker = ["python", "-m", "benchmarks.exposed_time", "--worker", model, *sizes]
        common.run("lab", *lab, "offloads=true", "num_threads=1", "--", *worker)
        for rank in (0, 1):
            row = judge(json.loads(_triples_path(model, rank).read_text()))
            common.show(f"{model}, rank {rank}", row)
            rows.append({"model": model, "rank": rank, "triples": triples, **row})
        worst = max(row["error_of_allowed"] for row in rows if row["model"] == model)
        result.floors.append(common.Floor(f"{model}: error of exposed time over what is allowed", worst, at_most=1))
    result.figures["ranks"] = rows
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
