"""Programs of others that are told apart by one function each: two ranks of one process tree, forked for each of them.

    python foreign_scenarios.py ROOT SCENARIO...      PYTHONPATH has the meter's folder

Each ends on all ranks with 0 and leaves ROOT/SCENARIO, or this script ends with the names of those that did not.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what optimisers import when they first step: once, not in each fork
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

NUM_RANKS = 2
DEADLINE_SECONDS = 200
ROOT = sys.argv[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def init(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_RANKS)


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, num_inputs: int, num_steps: int = 4) -> None:
    for _ in range(num_steps):
        model(torch.randn(4, num_inputs)).sum().backward()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                dist.all_reduce(parameter.grad)
        optimizer.step()
        model.zero_grad()


def ddp_and_sgd() -> tuple[nn.Module, torch.optim.Optimizer]:
    ddp = DistributedDataParallel(nn.Linear(100, 100))
    return ddp, torch.optim.SGD(ddp.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 100)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def once(rank: int, port: int, num_steps: int) -> None:
    init(rank, port)
    model = nn.Linear(100, 100)
    by_hand(model, torch.optim.SGD(model.parameters(), lr=0.1), 100, num_steps)
    dist.barrier()
    dist.destroy_process_group()


def thrice_at_one_port(rank: int, port: int) -> None:
    for num_steps in (4, 5, 6):
        once(rank, port, num_steps)


def two_models_of_the_same_names(rank: int, port: int) -> None:
    init(rank, port)
    first = DistributedDataParallel(nn.Sequential(nn.Linear(100, 200), nn.Linear(200, 10)))
    second = DistributedDataParallel(nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 10)))
    one = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    two = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second)]
    for optimizers in ([one], two):
        for _ in range(3):
            (first(torch.randn(8, 100)).sum() + second(torch.randn(8, 50)).sum()).backward()
            for optimizer in optimizers:
                optimizer.step()
    dist.destroy_process_group()


def what_is_stepped_changes(rank: int, port: int) -> None:
    init(rank, port)
    body, head = nn.Linear(1000, 100), nn.Linear(100, 10)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    by_hand(nn.Sequential(body, head), optimizer, 1000)
    optimizer.add_param_group({"params": body.parameters()})
    by_hand(nn.Sequential(body, head), optimizer, 1000)
    for fold in range(1, 4):
        model = nn.Linear(100 * fold, 10)
        by_hand(model, torch.optim.SGD(model.parameters(), lr=0.1), 100 * fold)
    dist.destroy_process_group()


def a_step_that_raises(rank: int, port: int) -> None:
    init(rank, port)
    ddp, optimizer = ddp_and_sgd()

    def closure() -> float:
        raise FloatingPointError

    with contextlib.suppress(FloatingPointError):
        torch.optim.LBFGS(ddp.parameters()).step(closure)
    original, seen = torch.autograd.backward, list[int]()

    def counting(*arguments: Any, **more: Any) -> Any:  # as profilers do
        seen.append(1)
        return original(*arguments, **more)

    torch.autograd.backward = counting
    for _ in range(5):
        step(ddp, optimizer)
    assert len(seen) == 5, seen
    dist.destroy_process_group()


def something_under_way(rank: int, port: int) -> None:
    init(rank, port)
    ddp, optimizer = ddp_and_sgd()
    work: Any = None
    for _ in range(8):
        ddp(torch.randn(4, 100)).sum().backward()
        if work is not None:
            work.wait()
        work = dist.all_reduce(torch.ones(1_000_000), async_op=True)
        optimizer.step()
    work.wait()
    dist.destroy_process_group()


def a_store_and_a_barrier_of_its_own(rank: int, port: int) -> None:
    init(rank, port)
    told = torch.tensor([free_port()])
    dist.broadcast(told, 0)
    store = dist.TCPStore("127.0.0.1", int(told), NUM_RANKS, rank == 0)  # pyright: ignore[reportPrivateImportUsage]
    ddp, optimizer = ddp_and_sgd()
    for number in range(5):
        store.set(f"{rank}/{number}", "x" * 50)
        store.get(f"{1 - rank}/{number}")
        step(ddp, optimizer)
    dist.barrier()
    dist.destroy_process_group()


def a_monitored_barrier(rank: int, port: int) -> None:
    init(rank, port)
    ddp, optimizer = ddp_and_sgd()
    for _ in range(3):
        step(ddp, optimizer)
        dist.monitored_barrier()
    dist.destroy_process_group()


def a_pipeline_of_its_own(rank: int, port: int) -> None:
    source = Path(ROOT) / f"source{rank}"
    source.mkdir()
    (source / "pipeline.py").write_text("ran = True\n")
    init(rank, port)
    assert "pipeline" not in sys.modules
    sys.path.insert(0, str(source))
    assert importlib.import_module("pipeline").ran
    step(*ddp_and_sgd())
    dist.destroy_process_group()


def a_block_of_its_own(rank: int, port: int) -> None:
    sys.path.append(str(Path(__file__).parents[2]))
    meter = importlib.import_module("pipeline.meter")
    init(rank, port)
    ddp, optimizer = ddp_and_sgd()
    with meter.attach("inner", run_root=ROOT) as ledger:
        for _ in range(3):
            step(ddp, optimizer)
        with ledger.phase("validation"):
            dist.all_reduce(torch.ones(100))
    dist.destroy_process_group()


def a_run_of_its_own_in_wandb(rank: int, port: int) -> None:
    """Which begins after the first step, and logs every second one."""
    init(rank, port)
    ddp, optimizer = ddp_and_sgd()
    step(ddp, optimizer)
    wandb = importlib.import_module("wandb")
    run = wandb.init(mode="offline", dir=ROOT, project="mine") if rank == 0 else None
    for number in range(4):
        step(ddp, optimizer)
        if run is not None and number % 2:
            run.log({"loss": number})
    dist.destroy_process_group()
    if run is not None:
        run.finish()


def start(name: str, rank: int, port: int) -> None:
    settings = {"name": name, "run_root": ROOT, "placement": "rank", "command": ["x"], "notes": ""}
    os.environ["SQUEEZEWIRE_METER"] = json.dumps(settings)
    globals()[name](rank, port)


if __name__ == "__main__":
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    failed: list[str] = []
    for name in sys.argv[2:]:
        port = free_port()
        ranks = [context.Process(target=start, args=(name, rank, port)) for rank in range(NUM_RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(DEADLINE_SECONDS)
            if process.exitcode != 0:
                failed.append(f"{name}: {process.exitcode}")
                process.kill()
                process.join()
    sys.exit("; ".join(failed) or 0)
