"""One rank of benchmarks.nccl_probe: issues collectives or trains, and writes what its sockets sent for each of them.

Forked by the probe after torch is imported and before CUDA is touched. Needs torch and nothing else.
"""

import ctypes
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.nccl_probe_models import MODELS
from benchmarks.nccl_probe_plan import ELEMENT_BYTES, Call, Launch, cases, environment
from pipeline.comm.kernel.sockets import own_connections

ADDRESS = "127.0.0.1"
QUIET_SECONDS = 0.02
"""Connections that sent nothing for so long are done: an empty send of NCCL's LL may leave after its kernel ended."""
SETTLED_SECONDS = 5.0
NUM_WARM_UP_STEPS = 3  # DDP rebuilds its buckets after the first


class MeasureError(Exception):
    """The kernel does not say what was asked."""


def run_rank(launch: Launch, rank: int, port: int, folder: Path, probe: int) -> None:
    """Measure and leave the process: records are lines of `rank<rank>.jsonl`, what else is said is in `rank<rank>.log`.

    Args:
        launch: What to do.
        rank: This rank.
        port: Of the TCPStore, which rank 0 opens.
        folder: Of the launch.
        probe: Process that started this one.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the probe
    if os.getppid() != probe:
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    said = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(said, sys.stdout.fileno())
    os.dup2(said, sys.stderr.fileno())
    log = folder / f"rank{rank}.nccl.log"
    os.environ.update(environment(launch, rank, log))
    with (folder / f"rank{rank}.jsonl").open("w") as file:
        _Rank(launch, rank, port, file, log).run()
    os._exit(0)  # nothing is torn down: it takes seconds, and a library that hangs in it would cost a launch


class _Rank:
    def __init__(self, launch: Launch, rank: int, port: int, file: TextIO, log: Path) -> None:
        self.launch, self.rank, self.port, self.file, self.log = launch, rank, port, file, log
        self.is_gpu = launch.backend == "nccl"
        if self.is_gpu:
            torch.cuda.set_device(0)
        else:
            torch.set_num_threads(1)
        self.device = torch.device("cuda:0" if self.is_gpu else "cpu")
        patience = datetime.timedelta(seconds=60)
        made = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        self.store = made(ADDRESS, port, launch.num_ranks, rank == 0, timeout=patience)
        self.meetings = 0
        self.log_at = 0
        dist.init_process_group(
            launch.backend, store=self.store, rank=rank, world_size=launch.num_ranks, timeout=patience
        )

    def run(self) -> None:
        device = torch.cuda.get_device_name(0) if self.is_gpu else "CPU"
        self._write({"device": device, "python": sys.version.split()[0]})
        if self.launch.kind == "collectives":
            self.collectives()
        else:
            for model in MODELS:
                self.train(model)
        self._leave()

    # --- collectives ---

    def collectives(self) -> None:
        opened: set[str] = set()
        for call in cases(self.launch):
            issue, is_correct = self._operation(*call)
            # Connections cost bytes of their own. Left alone, NCCL may open others for every size.
            if call[0] not in opened or self.launch.algorithm is None:
                issue()
                opened.add(call[0])
            sent, choices = self._measured(issue)
            record = {"kind": "collective", "name": call[0], "calls": [call], "sent_bytes": sent}
            self._write({**record, "is_correct": is_correct(), "choices": choices})

    def _operation(self, op: str, payload_bytes: int, root: int) -> tuple[Callable[[], Any], Callable[[], bool]]:
        """What issues the operation, and what says whether its result is right: rank r contributes r + 1."""
        ranks, elements = self.launch.num_ranks, payload_bytes // ELEMENT_BYTES
        total = ranks * (ranks + 1) / 2
        mine = torch.empty(elements, device=self.device)

        def fresh() -> torch.Tensor:
            return mine.fill_(self.rank + 1)

        def holds(tensor: torch.Tensor, value: float) -> bool:
            return bool((tensor == value).all())

        match op:
            case "barrier":
                devices = [0] if self.is_gpu else None
                return lambda: dist.barrier(device_ids=devices), lambda: True
            case "all_reduce":
                return lambda: dist.all_reduce(fresh()), lambda: holds(mine, total)
            case "broadcast":
                return lambda: dist.broadcast(fresh(), root), lambda: holds(mine, root + 1)
            case "reduce":
                return lambda: dist.reduce(fresh(), root), lambda: self.rank != root or holds(mine, total)
            case "all_gather":
                out = torch.empty(ranks * elements, device=self.device)
                parts = out.view(ranks, elements)
                return lambda: dist.all_gather_into_tensor(out, fresh()), lambda: all(
                    holds(part, rank + 1) for rank, part in enumerate(parts)
                )
            case "reduce_scatter":
                share = torch.empty(elements // ranks, device=self.device)
                return lambda: dist.reduce_scatter_tensor(share, fresh()), lambda: holds(share, total)
            case _:
                raise AssertionError(op)

    # --- training ---

    def train(self, name: str) -> None:
        """DDP's steps: gradients in its buckets, and BatchNorm's buffers, which it broadcasts before each."""
        torch.manual_seed(0)
        model = DistributedDataParallel(MODELS[name]().to(self.device))
        calls: list[Call] = []

        def hook(
            state: object,
            bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
        ) -> torch.futures.Future[torch.Tensor]:
            del state
            buffer = bucket.buffer()
            calls.append(("all_reduce", buffer.numel() * buffer.element_size(), -1))
            return allreduce_hook(dist.group.WORLD, bucket)  # pyright: ignore[reportArgumentType]

        model.register_comm_hook(None, hook)  # pyright: ignore[reportArgumentType]
        side, batch = (224, 8) if self.is_gpu else (64, 2)
        pictures = torch.randn(batch, 3, side, side, device=self.device)
        labels = torch.arange(batch, device=self.device)

        def step() -> None:
            calls[:] = [("broadcast", size, 0) for size in _buffer_bytes(model)]
            cross_entropy(model(pictures), labels).backward()

        for _ in range(NUM_WARM_UP_STEPS):
            step()
        for index in range(self.launch.num_steps):
            sent, choices = self._measured(step)
            record = {"kind": "training_step", "name": name, "step": index, "calls": calls, "sent_bytes": sent}
            self._write({**record, "is_correct": True, "choices": choices})

    # --- measuring ---

    def _measured(self, issue: Callable[[], Any]) -> tuple[int, list[str]]:
        """Bytes that this rank handed to TCP for it, and rank 0's lines of NCCL's log."""
        self._synchronise()
        self._meet()
        self._log_lines()
        before = self._settled()
        self._meet()
        issue()
        self._synchronise()
        self._meet()  # every rank's data has arrived, so has been sent
        after = self._settled()
        return sum(sent - before.get(inode, 0) for inode, sent in after.items()), self._log_lines()

    def _settled(self) -> dict[int, int]:
        """Bytes handed to TCP by each socket, once nothing waits in a buffer and nothing more comes."""
        deadline, quiet_since, last = time.monotonic() + SETTLED_SECONDS, time.monotonic(), self._sent()
        while time.monotonic() - quiet_since < QUIET_SECONDS or last[1]:
            time.sleep(QUIET_SECONDS / 10)
            now = self._sent()
            if now != last:
                quiet_since, last = time.monotonic(), now
            if time.monotonic() > deadline:
                raise MeasureError(f"Connections still send after {SETTLED_SECONDS:g} s, when no rank has work.")
        return last[0]

    def _sent(self) -> tuple[dict[int, int], int]:
        """(bytes by inode, bytes not yet sent) of connections to other ranks, the store's left out."""
        connections = own_connections()
        mine = {connection.local for connection in connections}
        sent, unsent = {}, 0
        for connection in connections:
            if self.port in (connection.local[1], connection.remote[1]) or connection.remote in mine:
                continue
            counts = connection.counts()
            if counts is None:
                raise MeasureError("This kernel does not count a connection's bytes: Linux 4.19 or newer does.")
            sent[connection.inode] = counts.sent_bytes
            unsent += counts.unsent_bytes
        return sent, unsent

    def _meet(self) -> None:
        """All ranks at once, through the store: nothing of it goes over the connections that are counted."""
        self.meetings += 1
        name = f"meeting{self.meetings}"
        if self.store.add(name, 1) == self.launch.num_ranks:
            self.store.set(f"{name}/all", "here")
        self.store.wait([f"{name}/all"])

    def _leave(self) -> None:
        """Rank 0 goes last, as it holds the store."""
        self.store.add("gone", 1)
        while self.rank == 0 and self.store.add("gone", 0) < self.launch.num_ranks:
            time.sleep(QUIET_SECONDS)

    def _synchronise(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def _log_lines(self) -> list[str]:
        """What NCCL wrote since the last call of what it chose; on rank 0 alone."""
        if self.rank != 0 or not self.log.exists():
            return []
        text = self.log.read_text(errors="replace")
        new, self.log_at = text[self.log_at :], len(text)
        return [line for line in new.splitlines() if "-> Algo" in line]

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def _buffer_bytes(model: torch.nn.Module) -> Iterator[int]:
    """Bytes of the broadcasts that DDP makes of a model's buffers: one for each type (reducer.cpp, by 250 MiB)."""
    sizes: dict[torch.dtype, int] = {}
    for buffer in model.buffers():
        sizes[buffer.dtype] = sizes.get(buffer.dtype, 0) + buffer.numel() * buffer.element_size()
    yield from sizes.values()


def exit_with_gpus() -> None:
    """In a process of its own, because CUDA may not be touched before a fork: the exit code is 0 if there is a GPU."""
    os._exit(0 if torch.cuda.is_available() else 1)
