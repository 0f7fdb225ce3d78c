"""How each training of several is started and watched: as ranks of this machine, in a lab, over a Slurm allocation."""

import contextlib
import os
import re
import signal
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pipeline.config.lab import TrainingsLab
from pipeline.config.training import ClusterConfig
from pipeline.core.overrides import literal
from pipeline.core.processes import our_module
from pipeline.core.typed import require
from pipeline.run.launch.children import die_with_parent
from pipeline.run.launch.limits import check_count
from pipeline.run.launch.ranks import without_ranks

# Ranks that fail agree on it and leave with the same code, but not at the same instant: as in slurm/train.sh.
_SRUN_DEFAULTS = {"SLURM_WAIT": "300", "SLURM_KILL_BAD_EXIT": "0"}
_SRUN_EXPORTS = {"SLURM_EXPORT_ENV": "ALL"}  # what this process has, its ranks need, also after `sbatch --export=NONE`
_SRUN_SECONDS = 60.0  # for srun to end its ranks when the command is told to stop
LONGEST_REASON = 300  # characters of a training's last words


class ToStart(Protocol):
    """What a command that starts trainings is told about where they run."""

    @property
    def launcher(self) -> str:
        """`local`, `slurm` or `auto`."""
        ...

    @property
    def cluster(self) -> ClusterConfig:
        """Ranks of this machine, and threads of each."""
        ...

    @property
    def lab(self) -> TrainingsLab:
        """The lab, if any."""
        ...


@dataclass(frozen=True)
class Launcher:
    """Where the ranks of each training run."""

    kind: str
    """`local`, `lab` or `slurm`."""
    num_ranks: int
    num_machines: int = 1
    cpus_per_rank: int | None = None
    """Processors of a rank under Slurm; None elsewhere."""
    lab: tuple[str, ...] = ()
    """Overrides of the lab, without name and run_root."""

    @property
    def ranks_per_machine(self) -> int:
        """Ranks of the machine that has most."""
        return -(-self.num_ranks // self.num_machines)

    @property
    def devices(self) -> int:
        """What `cluster.devices` of a training must say: Slurm and the lab give their ranks themselves."""
        return self.num_ranks if self.kind == "local" else 1

    def command(self, overrides: Sequence[str], where: Sequence[str], *, alone: bool) -> list[str]:
        """Return the command line of one training.

        Args:
            overrides: Overrides of `pipeline.train`.
            where: Overrides of the lab: name and run_root.
            alone: On one rank, which needs neither a lab nor other nodes.
        """
        train = [*our_module("pipeline.train"), *overrides]
        if self.kind == "slurm":
            nodes, tasks = (1, 1) if alone else (self.num_machines, self.num_ranks)
            return ["srun", f"--nodes={nodes}", f"--ntasks={tasks}", f"--cpus-per-task={self.cpus_per_rank}", *train]
        if self.kind == "lab" and not alone:
            return [*our_module("pipeline.lab"), *where, *self.lab, "--", *train]
        return train

    def run(self, command: Sequence[str], log: Path, *, grace_seconds: float = 0.0) -> int:
        """Run a command to its end, its output in `log`. An exception here ends the command too.

        It is in a process group of its own, so that a Ctrl-C reaches it once, through us; and it does not outlive us.

        Args:
            command: The command line.
            log: File of its output.
            grace_seconds: On an exception, how long it may take to save its state and leave; 0: it is killed.

        Returns:
            The exit code, negative where a signal ended the command.
        """
        with (
            log.open("w") as output,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                process_group=0,
                preexec_fn=die_with_parent(set()),
            ) as process,
        ):
            try:
                return process.wait()
            except BaseException:
                if self.kind == "slurm":  # killed, srun would leave its ranks behind
                    grace_seconds = max(grace_seconds, _SRUN_SECONDS)
                try:
                    if grace_seconds:
                        process.terminate()
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(grace_seconds)
                finally:  # also where a second signal ends the wait
                    process.kill()  # its ranks go with it
                raise

    def environment(self) -> dict[str, str]:
        """Return this process's environment, without ranks that are not the run's own."""
        if self.kind == "slurm":
            return {**_SRUN_DEFAULTS, **without_ranks(os.environ, keep_slurm=True), **_SRUN_EXPORTS}
        return without_ranks(os.environ)


def choose_launcher(config: ToStart, environment: Mapping[str, str] | None = None) -> Launcher:
    """Decide how trainings are started here, from `launcher` and `lab`.

    Args:
        config: What the command was told.
        environment: Variables; None: this process's.

    Raises:
        ConfigError: Slurm is asked for outside of a job or together with a lab, there is a single rank, or this process
            is itself one of several ranks.
    """
    environment = os.environ if environment is None else environment
    is_one_of_several = "RANK" in environment and environment.get("WORLD_SIZE", "1") != "1"
    require(
        not is_one_of_several,
        f"This is rank {environment.get('RANK')} of {environment.get('WORLD_SIZE')}, and each would start all of them:"
        " start the command once, without torchrun; it starts their ranks itself (cluster.devices).",
    )
    in_job = environment.get("SLURM_JOB_ID", "") != ""
    num_nodes = int(environment.get("SLURM_JOB_NUM_NODES") or 1)
    num_tasks = int(environment.get("SLURM_NTASKS") or 0)
    require(
        in_job or config.launcher != "slurm",
        "launcher=slurm, but this is no Slurm job: submit slurm/compare.sh or slurm/study.sh, or set launcher=local.",
    )
    in_lab = config.lab.servers is not None
    require(
        not in_lab or config.launcher != "slurm",
        "lab.servers makes a cluster of one machine: set launcher=local, or leave lab.servers out.",
    )
    if in_lab:
        assert config.lab.servers is not None
        launcher = Launcher("lab", config.lab.servers * config.lab.ranks_per_server, lab=tuple(_lab(config)))
    elif config.launcher == "slurm" or (config.launcher == "auto" and in_job and max(num_nodes, num_tasks) > 1):
        # As slurm/train.sh: one rank per GPU, else one per node, unless the allocation says how many tasks.
        num_ranks = num_tasks or num_nodes * max(1, int(environment.get("SLURM_GPUS_ON_NODE") or 0))
        of_node = int(environment.get("SLURM_CPUS_ON_NODE") or 1) // -(-num_ranks // num_nodes)
        cpus = int(environment.get("SLURM_CPUS_PER_TASK") or max(1, of_node))
        launcher = Launcher("slurm", num_ranks, num_nodes, cpus)
    else:
        launcher = Launcher("local", config.cluster.devices)
    if launcher.kind != "slurm":
        key = "cluster.devices" if launcher.kind == "local" else "lab.servers x lab.ranks_per_server"
        check_count(key, launcher.num_ranks)
    require(
        launcher.num_ranks >= 2,
        "One rank alone sends nothing: give cluster.devices, lab.servers, or Slurm's tasks, at least 2.",
    )
    return launcher


def _lab(config: ToStart) -> list[str]:
    values = {**asdict(config.lab), "num_threads": config.cluster.num_threads}
    return [f"{key}={literal(value)}" for key, value in values.items()]


def why_failed(returncode: int, log: Path) -> str:
    """Return why a training command failed: its own last error sentence, else the exception, else its last line."""
    number = -returncode if returncode < 0 else returncode - 128  # as a child or as a shell tells it
    if number in set(signal.Signals):
        name = signal.Signals(number).name
        hint = ", most likely for want of memory" if name == "SIGKILL" else ""
        return f"The run was killed by {name}{hint}; its output is in {log}."
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)]
    if errors:
        return f"{errors[-1]} (exit code {returncode})"
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    last_words = textwrap.shorten((exceptions or lines)[-1], LONGEST_REASON) if lines else "It said nothing"
    return f"{last_words} (exit code {returncode}; its output is in {log})"
