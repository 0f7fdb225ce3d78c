"""What a durable checkpoint of SqueezeNet 1.0 costs: the whole protocol, and torch.save alone beside it.

    python -m benchmarks.checkpoint_save                      on the disk that holds runs/
    python -m benchmarks.checkpoint_save --directory /scratch

A save writes weights, momentum and our section, 1000 classes: to a temporary file, hashed on the way, fsync, read back
from the disk and compared, sidecar, rename, fsync of the directory, pointer, retention. Saves of both kinds alternate.
"""

import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import common

NAME = "checkpoint_save"


def make_state(model_name: str) -> dict[str, Any]:
    """As a training leaves it after a step: random gradients will do."""
    import torch

    from pipeline.models import zoo

    model = zoo.build(model_name, 1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    section = {"step": 0, "world_size": 1, "model": model_name, "num_parameters": num_parameters}
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "squeezewire": section}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = common.parser(__doc__)
    parser.add_argument("--directory", type=Path, default=common.RUNS, help="a place on the disk to measure")
    parser.add_argument("--model", default="squeezenet1_0")
    parser.add_argument("--saves", type=int, default=100)
    options = parser.parse_args(arguments)
    import torch

    from pipeline.run.checkpoint import AtomicCheckpointIO, checkpoint_path

    common.print_conditions()
    directory = options.directory / NAME
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    state, io, path = make_state(options.model), AtomicCheckpointIO(), checkpoint_path(directory, 0)
    seconds: dict[str, list[float]] = {"durable": [], "torch.save": []}
    for step in range(options.saves + 2):
        state["squeezewire"]["step"] = step
        path = checkpoint_path(directory, step)
        began = time.perf_counter()
        io.save_checkpoint(state, path)
        between = time.perf_counter()
        torch.save(state, directory / "plain.pt")
        ended = time.perf_counter()
        if step >= 2:  # the first two meet a cold disk and an empty directory
            seconds["durable"].append(between - began)
            seconds["torch.save"].append(ended - between)
    num_bytes = path.stat().st_size
    shutil.rmtree(directory)
    figures = {
        kind: {"p50": statistics.median(times), "p90": statistics.quantiles(times, n=10)[8], "max": max(times)}
        for kind, times in seconds.items()
    }
    for kind, row in figures.items():
        common.show(kind, {f"{name}_seconds": value for name, value in row.items()} | {"bytes": num_bytes})
    settings = {"model": options.model, "saves": options.saves}
    return common.Result(NAME, settings, {"checkpoint_bytes": num_bytes, "seconds": figures}).finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
