"""Start a script on n real ranks of one machine and collect what each wrote. Shared by the meter's tests."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ledger.ledger import Ledger
from pipeline.comm.ledger.traffic import Placement
from tests.forking import started

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
DEADLINE_SECONDS = 240


def run_ranks(script: str, num_ranks: int, out: Path, *arguments: str, env: dict[str, str] | None = None) -> list[Any]:
    """Run `script` (beside this file) on `num_ranks` ranks; returns what each rank wrote to `rank<r>.json` in `out`.

    Every rank is killed at the deadline or as soon as one fails; the failed rank's output is in the error.
    """
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "ignore",
        **(env or {}),
    }
    processes = [
        started(
            HERE / script,
            [out, *arguments],
            {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=out / f"rank{rank}.log",
            cwd=out,
        )
        for rank in range(num_ranks)
    ]
    _wait(processes, out)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


def run_scenarios(scenarios: Sequence[Callable[[Path], Any]]) -> None:
    """On a rank, as the whole of its script: each scenario's result, under its name, to the rank's JSON file."""
    import torch
    import torch.distributed as dist

    out = Path(sys.argv[1])
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    results = {scenario.__name__: scenario(out) for scenario in scenarios}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    leave(out)


def leave(out: Path) -> NoReturn:
    """End a rank without tearing the interpreter down, once every rank's results are written.

    A thread of gloo that drops the last callback of a future meanwhile aborts the process: seen once in some hundred
    starts of two ranks, and nothing that these scripts are about. A rank that went sooner could take from another one
    what it has not read yet.
    """
    deadline = time.monotonic() + DEADLINE_SECONDS
    expected = [out / f"rank{rank}.json" for rank in range(int(os.environ["WORLD_SIZE"]))]
    while not all(path.exists() for path in expected) and time.monotonic() < deadline:
        time.sleep(0.02)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _wait(processes: list[BaseProcess], out: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while any(process.exitcode != 0 for process in processes):
            for rank, process in enumerate(processes):
                said = (out / f"rank{rank}.log").read_text()[-4000:] if process.exitcode else ""
                assert process.exitcode in (None, 0), f"rank {rank} ended with {process.exitcode}:\n{said}"
            assert time.monotonic() < deadline, f"ranks still running after {DEADLINE_SECONDS} s"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()


def unreconciled(meter: CollectiveMeter, gradient_bytes_by_parameter: dict[str, int]) -> Ledger:
    """The ledger of a first attempt whose bytes nobody measures; `meter` is attached."""
    return Ledger(
        meter,
        gradient_bytes_by_parameter,
        placement=Placement.assumed(meter.world_size),
        attempt=1,
        rank=dist.get_rank(),
        reconciler=None,
    )
