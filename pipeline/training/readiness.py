"""The checks of `ready.py`: what rank 0 can see alone, and what all ranks must try together."""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.comm.link import MeasuredLink
from pipeline.comm.plain_values import broadcast_value
from pipeline.config.training import TrainConfig
from pipeline.core.errors import ConfigError, ExitCode, PeerLost, UserError
from pipeline.run.checkpoint import find_latest
from pipeline.run.directory import RunDirectory
from pipeline.run.launch.ranks import RankInfo
from pipeline.run.record.wandb_mirror import why_not_online
from pipeline.training import steps
from pipeline.training.preflight import check_before_ranks, check_model
from pipeline.training.world import World

LONGEST_JOIN_SECONDS = 60.0
LITTLE_SPACE_BYTES = 10**9
LINK_BYTES = 32 * 2**20
NUM_PINGS = 20


@dataclass
class Findings:
    """What was checked, in order, and how it was."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """(`ok`, `note` or `WRONG`; what; detail)."""
    _codes: list[int] = field(default_factory=list)

    def check(self, what: str, work: Callable[[], str]) -> None:
        """Note what `work` says, or the user error it ends with."""
        try:
            self.rows.append(("ok", what, work()))
        except UserError as error:
            self.wrong(what, error)

    def wrong(self, what: str, error: UserError) -> None:
        """Note what does not work."""
        self.rows.append(("WRONG", what, str(error)))
        self._codes.append(int(error.exit_code))

    def note(self, what: str, detail: str) -> None:
        """Something to know that stops nothing."""
        self.rows.append(("note", what, detail))

    def exit_code(self) -> int:
        """Of the first thing that is wrong; 0 if nothing is."""
        return self._codes[0] if self._codes else int(ExitCode.DONE)

    def table(self) -> str:
        """One line each, and a verdict."""
        width = max(len(what) for _, what, _ in self.rows)
        lines = [f"{verdict:<6} {what:<{width}}  {detail}" for verdict, what, detail in self.rows]
        num_wrong = len(self._codes)
        return "\n".join([*lines, f"{num_wrong} of {len(lines)} checks failed." if num_wrong else "Ready."])


def check_alone(config: TrainConfig, findings: Findings) -> None:
    """What needs no other rank, by rank 0."""
    findings.check("configuration", lambda: _configuration(config))
    findings.check("run directory", lambda: _directory(config))
    with contextlib.suppress(OSError):
        free_bytes = shutil.disk_usage(_nearest(Path(config.run_root))).free
        if free_bytes < LITTLE_SPACE_BYTES:
            findings.note("disk", f"only {free_bytes / 1e6:,.0f} MB are free at run_root={config.run_root}")
    reason = why_not_online() if config.tracking.mode == "online" else None
    if reason is None:
        findings.check("W&B", lambda: config.tracking.mode)
    else:
        findings.note("W&B", f"would stay offline: {reason}")
    if "SLURM_JOB_ID" in os.environ and shutil.which("scontrol") is None:
        findings.note("requeue", "no scontrol on this node: the batch script may have one; else submit again yourself")


def _configuration(config: TrainConfig) -> str:
    check_before_ranks(dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, devices=1)))
    return f"{config.model.name}, {config.batch.global_size} pictures a step"


def _nearest(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _directory(config: TrainConfig) -> str:
    """Opened as a training would, locks and a probe of 1 MiB included; what was made for it is removed."""
    run = RunDirectory(config.run_root, config.name)
    made = [path for path in (run.checkpoints, *run.checkpoints.parents) if not path.exists()]
    was_there = run.path.exists()
    run.open()
    try:
        found = find_latest(run.checkpoints)
        where = "new" if found is None else f"goes on from step {found.step}"
        return f"{run.path} can be written; {where}"
    finally:
        if not was_there:
            (run.path / "lock").unlink(missing_ok=True)
        run.close()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def join_soon(config: TrainConfig, ranks: RankInfo) -> Iterator[World]:
    """`training.join`, with less patience.

    Raises:
        ConfigError: the ranks do not find one another.
    """
    seconds = min(LONGEST_JOIN_SECONDS, config.cluster.timeout_seconds)
    impatient = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, timeout_seconds=seconds))
    joined = False
    try:
        with steps.join(impatient, ranks, command="ready") as world:
            joined = True
            yield world
    except PeerLost as error:
        if joined:
            raise
        raise ConfigError(str(error)) from error


def check_together(config: TrainConfig, world: World, findings: Findings) -> None:
    """What all ranks try. Collective."""
    hosts = world.gather_hosts()
    findings.check("ranks", lambda: f"{world.size} on {', '.join(dict.fromkeys(hosts))}, {world.compute.backend}")
    findings.check("arithmetic", lambda: f"{world.compute.sentence}; {world.num_threads} thread(s) per rank")
    findings.check("batch", lambda: _batch(config, world))
    findings.check("shards", lambda: _shards(config, world))
    for text in _links(world):
        findings.check("link", lambda text=text: text)


def _batch(config: TrainConfig, world: World) -> str:
    batch = config.batch.split(world.size)
    check_model(config, world.size)
    return f"{batch.global_size} = {world.size} ranks x {batch.num_micro_batches} micro-batches x {batch.per_rank}"


def _shards(config: TrainConfig, world: World) -> str:
    started = time.monotonic()
    shards = steps.open_shards(config, world)
    pictures = f"{shards.training.num_samples:,} to train"
    if shards.validation is not None:
        pictures += f", {shards.validation.num_samples:,} to validate"
    how = "read and hashed" if config.data.verify == "sha256" else "sizes compared; data.verify=sha256 reads them"
    return f"{pictures}, {shards.num_classes} classes, the same on every server ({how}; {_seconds(started):.1f} s)"


def _links(world: World) -> list[str]:
    """From each server to the next one: bandwidth and latency, measured between two ranks, one link at a time."""
    first_rank = {server: rank for rank, server in reversed(list(enumerate(world.placement.server_of_rank)))}
    if len(first_rank) < 2 or not world.placement.measured:
        return ["none between servers: all ranks are on one machine" if world.size > 1 else "none: one rank"]
    servers = sorted(first_rank)
    measured = []
    for sender, receiver in zip(servers, [*servers[1:], servers[0]], strict=True):
        pair = (first_rank[sender], first_rank[receiver])
        times = _time_link(world, *pair) if world.rank in pair else None
        send_seconds, ping_seconds = broadcast_value(times, pair[0], world.device)
        rate = 8 * LINK_BYTES / max(1e-9, send_seconds - ping_seconds / 2)
        measured.append(str(MeasuredLink(sender, receiver, rate, ping_seconds * 1e6)))
    return measured


def _time_link(world: World, sender: int, receiver: int) -> tuple[float, float]:
    """(seconds for LINK_BYTES to arrive and be confirmed, least seconds there and back of 4 bytes), by both ranks."""
    small, large = (torch.zeros(size, dtype=torch.uint8, device=world.device) for size in (4, LINK_BYTES))

    def exchange(tensor: torch.Tensor) -> float:
        started = time.monotonic()
        if world.rank == sender:
            dist.send(tensor, receiver)
            dist.recv(small, receiver)
        else:
            dist.recv(tensor, sender)
            dist.send(small, sender)
        float(small[0])  # waits for the device
        return _seconds(started)

    pings = [exchange(small) for _ in range(NUM_PINGS)]
    exchange(large)  # the first opens connections and touches memory
    return exchange(large), min(pings[1:])


def _seconds(started: float) -> float:
    return time.monotonic() - started
