"""`pipeline.train` that also writes down what its learner is fed, and that can be killed at a chosen moment.

Takes the overrides of `train`. FED_TO: a directory where every rank appends a line per micro-batch to `rank<r>.jsonl`.
KILL_AT, if set: "rank step place victim". The place is a micro-batch of that step (0-based): the rank is fed it; or
`backward`: it is amid the step's first backward pass; or `validation`: it validates what that many steps have made.
There it sends SIGKILL to the victim: `supervisor`, the process that started the ranks, or `rank`, itself; `hang` is
SIGSTOP to itself, `asked` is SIGTERM to itself, after which it goes on, `shell` runs the command DO and goes on,
`clock` sets this process's clock back by an hour and goes on, `memory` leaves it none to allocate, `worker` is SIGKILL
to one of its data loader workers, `bit` changes the last bit of one weight and goes on, and `sleep` no signal but a
minute in which it does nothing. All of it once.
SIGNAL_AT, if set: "rank place signal target; ...": that rank sends that signal when it comes to that place. Places:
`join` (about to meet the other ranks), `start` (joined, before the shards are opened), `loader` (the training loader is
made: all is open, and no step made), `step<n>.<micro>` (fed, 0-based), `save<n>` (a save of step n begins),
`validation<n>` (fed its micro-batch n). Targets: `rank`, itself; `supervisor`; `ranks`, all of them;
`everything`, as Slurm does it: each process of the run but the supervisor. After SIGSTOP the targets are resumed when
SUSPEND_SECONDS are over.
Before any of this happens it is noted in `<FED_TO>/fired`: a line of the time and what KILL_AT or SIGNAL_AT says.
"""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config.training import TrainConfig
from pipeline.core.cli import run_command
from pipeline.run.launch.preempt import block_early
from pipeline.run.launch.supervisor import supervise
from pipeline.train import train


def note(directory: Path, *words: object) -> None:
    """Append a line to `fired`: the time and what is about to happen. The file outlives the process."""
    with (directory / "fired").open("a") as file:
        file.write(" ".join(map(str, (time.time(), *words))) + "\n")


def strike(directory: Path, kill_at: list[str]) -> None:
    """Note it, then end this process by ending its victim, or stop it for good. A second time nothing happens."""
    if not kill_at:
        return
    note(directory, *kill_at)
    victim = kill_at[3]
    kill_at.clear()
    if victim == "shell":
        subprocess.run(os.environ["DO"], shell=True, check=True)
        return
    if victim == "asked":
        os.kill(os.getpid(), signal.SIGTERM)
        return
    if victim == "clock":
        now = time.time
        time.time = lambda: now() - 3600
        return
    if victim == "memory":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
        return
    if victim == "worker":
        import psutil

        # Children of the fork server, which is a child of ours.
        workers = [child for child in psutil.Process().children(recursive=True) if child.ppid() != os.getpid()]
        workers[0].kill()
        return
    if victim == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif victim != "sleep":
        os.kill(os.getppid() if victim == "supervisor" else os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the end comes from the kernel, as soon as the supervisor is gone


def generators() -> str:
    """Hash of the state of every global generator."""
    import random  # here, as all that follows: the supervisor imports no torch and has one thread

    import numpy as np
    import torch

    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    digest.update(repr((random.getstate(), np.random.get_state()[1].tolist())).encode())  # type: ignore[index]
    return digest.hexdigest()


def resources() -> dict[str, float]:
    """What this process holds: open files, threads, bytes of memory; and what it has used: seconds of a core."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    counts = {name: len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("fd", "task")}
    return {**counts, "rss": pages * os.sysconf("SC_PAGE_SIZE"), "cpu_seconds": time.process_time()}


def record(directory: Path, rank: int, kill_at: list[str]) -> None:
    """Wrap the learner's training and validation steps."""
    import torch

    from pipeline.training.learner import Learner

    inner, inner_validation = Learner.training_step, Learner.validation_step
    place = {"step": -1, "micro": -1}

    def is_due(step: int, where: str) -> bool:
        return kill_at[:3] == [str(rank), str(step), where]

    def training_step(learner: Learner, loaded: Any, batch_idx: int) -> Any:
        if not learner.warming_up:
            step = learner.committed_steps
            place["micro"] = place["micro"] + 1 if place["step"] == step else 0
            place["step"] = step
            pixels = hashlib.sha256(loaded.images_BCHW.numpy().tobytes()).hexdigest()
            line = {
                **place,
                "num_ranks": learner.trainer.world_size,
                "ids": loaded.sample_ids_B.tolist(),
                "pixels": pixels,
                "generators": generators(),
            }
            with (directory / f"rank{rank}.jsonl").open("a") as file:
                file.write(json.dumps({**line, "pid": os.getpid(), **resources()}) + "\n")
            if is_due(step, str(place["micro"])) and kill_at[3] == "bit":
                note(directory, *kill_at)
                kill_at.clear()
                weight = next(learner.model.parameters()).detach()
                torch.as_strided(weight, (weight.numel(),), (1,)).view(torch.int32)[3] ^= 1  # whatever its layout
            if is_due(step, str(place["micro"])):
                strike(directory, kill_at)
            if is_due(step, "backward") and place["micro"] == 0:
                parameters = list(learner.model.parameters())
                parameters[len(parameters) // 2].register_hook(lambda _: strike(directory, kill_at))
        return inner(learner, loaded, batch_idx)

    def validation_step(learner: Learner, loaded: Any, batch_idx: int) -> None:
        if is_due(learner.committed_steps, "validation"):
            strike(directory, kill_at)
        inner_validation(learner, loaded, batch_idx)

    Learner.training_step = training_step  # type: ignore[method-assign]
    Learner.validation_step = validation_step  # type: ignore[method-assign]


def send(number: signal.Signals, target: str) -> None:
    """To processes of this run, which carry FED_TO; dead ones excepted."""
    pids = targets(target)
    if number == signal.SIGSTOP:
        resume = f"sleep {os.environ['SUSPEND_SECONDS']}; kill -CONT {' '.join(map(str, pids))}"
        subprocess.Popen(["sh", "-c", resume], start_new_session=True)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def targets(target: str) -> list[int]:
    """Process ids of a target, this process last."""
    supervisor = os.getppid()
    if target == "supervisor":
        return [supervisor]
    found = []
    mark = f"FED_TO={os.environ['FED_TO']}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        pid = int(directory.name)
        with contextlib.suppress(OSError):
            is_rank = f"\nPPid:\t{supervisor}\n" in (directory / "status").read_text()
            if {"rank": pid == os.getpid(), "ranks": is_rank, "everything": pid != supervisor}[target] and (
                mark in (directory / "environ").read_bytes().split(b"\0")
            ):
                found.append(pid)
    return sorted(found, key=lambda pid: pid == os.getpid())


def signal_at(events: str, directory: Path, rank: int) -> None:
    """Wrap the places that `events` name."""
    from pipeline.run.checkpoint import AtomicCheckpointIO
    from pipeline.training import steps, world
    from pipeline.training.learner import Learner

    due: dict[str, list[tuple[signal.Signals, str]]] = {}
    for who, place, name, target in (event.split() for event in filter(None, events.split(";"))):
        if int(who) == rank:
            due.setdefault(place, []).append((signal.Signals[name], target))

    def come_to(place: str) -> None:
        for number, target in due.pop(place, []):
            note(directory, rank, place, number.name, target)
            send(number, target)

    def wrap(owner: Any, name: str, place_of: Any) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            come_to(place_of(*args))
            return inner(*args, **kwargs)

        setattr(owner, name, wrapped)

    wrap(world.dist, "init_process_group", lambda *_: "join")
    wrap(steps, "open_shards", lambda *_: "start")
    wrap(steps, "make_training_loader", lambda _: "loader")
    wrap(
        Learner,
        "training_step",
        lambda learner, *_: "" if learner.warming_up else f"step{learner.committed_steps}.{learner._micro}",
    )
    wrap(Learner, "validation_step", lambda _, __, number: f"validation{number}")
    wrap(AtomicCheckpointIO, "save_checkpoint", lambda _, content, *__: f"save{content['squeezewire']['step']}")


def train_recorded(config: TrainConfig) -> int:
    """As `train`, with this file as the program of the ranks."""
    if "RANK" not in os.environ:
        return supervise([sys.executable, *sys.argv], config.cluster.devices, num_threads=config.cluster.num_threads)
    directory, rank = Path(os.environ["FED_TO"]), int(os.environ["RANK"])
    record(directory, rank, os.environ.get("KILL_AT", "").split())
    signal_at(os.environ.get("SIGNAL_AT", ""), directory, rank)
    return train(config)


if __name__ == "__main__":
    block_early()
    run_command("train", TrainConfig, train_recorded)
