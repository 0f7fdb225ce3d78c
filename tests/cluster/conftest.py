"""A real two-node Slurm on this machine: slurmctld, slurmd, munge, each node a network namespace with its own address.

Everything lives in one throw-away scope (own pid, network, mount and host-name namespaces). Its first process is the
only thing to end: the kernel then kills every process inside and drops the bridge, the interfaces, the namespaces and
the private /etc/hosts, whether the test passed, failed, or pytest itself was killed. Nothing of the machine is changed.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv", "mount")
SUBNET = "10.77.0"  # private twice over: the bridge exists only in the scope
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PASSED_ON = ("HOME", "LANG", "TMPDIR", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
# Promised to Slurm whatever the machine has. GPUs are counted, not driven: jobs can ask for them where there is none.
GPUS_PER_NODE = 8
NODE = f"CPUs=8 RealMemory=8000 Gres=gpu:{GPUS_PER_NODE}"

SLURM_CONF = """
ClusterName=squeezewire
SlurmctldHost=controller({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
# No cgroup is asked for: works with v1, v2, and where neither may be written.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4 State=UP
"""


def missing_requirement() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a real Slurm needs root, for namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
    return f"{', '.join(absent)} not found: apt-get install {' '.join(PACKAGES)}" if absent else None


@dataclass
class SlurmCluster:
    """A controller and `num_nodes` nodes named node1, node2, ..., each with `eth0` in its own network namespace."""

    directory: Path
    """Configuration, sockets, logs and state. Must be short: a socket's path has at most 107 bytes."""
    num_nodes: int = 2
    scope: psutil.Process | None = None
    """First process of the scope, as seen from outside."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """node1, node2, ..."""
        return [f"node{index + 1}" for index in range(self.num_nodes)]

    @classmethod
    def make(cls, num_nodes: int) -> "SlurmCluster":
        """A cluster not yet started, in a directory of its own. Not pytest's: that may exceed a socket's path."""
        return cls(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")), num_nodes)

    def start(self, extra_configuration: str = "") -> None:
        """Build scope, network and daemons; return when every node is idle. `extra_configuration` is for slurm.conf.

        Raises:
            RuntimeError: something died or was not ready in time; the message ends with its log.
        """
        self._write_configuration(extra_configuration)
        self._open_scope()
        self._build_network()
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.directory}/munge.{suffix}" for option, suffix in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        self._wait_until(lambda: (self.directory / "munge.socket").exists(), 20, "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.directory / "slurm.conf"))
        for name in self.names:
            self.start_daemon(name)
        self._wait_until(lambda: self.states() == ["idle"] * self.num_nodes, 60, "the nodes")

    def start_daemon(self, name: str) -> None:
        """The slurmd of a node, without waiting for it."""
        # Not `ip netns exec`: it remounts /sys and hides the cgroup tree, without which slurmd ends at once.
        script = f"hostname {name} && exec slurmd -D -N {name} -f {self.directory}/slurm.conf"
        self._daemon(name, "nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "sh", "-c", script)

    def daemon(self, name: str) -> psutil.Process:
        """The running slurmd of a node; it lives in the node's network namespace."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if line[:4] == ["slurmd", "-D", "-N", name] and str(self.directory) in line[-1]:
                    return process
        raise RuntimeError(f"{name} has no slurmd.\n{self.logs()}")

    def stop(self) -> None:
        """End the scope and everything in it. Safe to call twice and after a failed start."""
        for process in self.processes[:1]:  # unshare: its --kill-child ends the scope's first process, and so the scope
            process.kill()
        for process in self.processes:
            process.wait(timeout=30)
        if self.scope is not None:
            self.scope.wait(timeout=30)
        self.processes.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout_seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command beside the controller (sbatch, squeue, ...) and return its exit code and output.

        `env` is added to a small clean environment, which is what jobs inherit.
        """
        clean = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
        clean |= {"PATH": SEARCH_PATH, "SLURM_CONF": str(self.directory / "slurm.conf"), **(env or {})}
        return subprocess.run(
            self._inside(*command, cwd=cwd), env=clean, capture_output=True, text=True, timeout=timeout_seconds
        )

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> int:
        """`sbatch arguments` from directory `cwd`; the id of the job."""
        answer = self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env)
        assert answer.returncode == 0, answer.stderr
        return int(answer.stdout)

    def wait(self, job_id: int, timeout_seconds: float, *, impatient: bool = False) -> dict[str, str]:
        """`job(job_id)` once it has ended; it is cancelled, and the test fails, if that takes too long.

        impatient: a job that is put back into the queue starts at once, not after Slurm's two minutes.
        """
        deadline = time.monotonic() + timeout_seconds
        # `sbatch --wait` would do, but looks only every ten seconds.
        while (job := self.job(job_id))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            if time.monotonic() > deadline:
                self.run("scancel", str(job_id))
                raise TimeoutError(f"job {job_id} has not ended in {timeout_seconds} s: {job}\n{self.logs()}")
            if impatient and job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                time.sleep(1.5)  # started in the second in which it was put back, its credential would be refused
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")
            time.sleep(0.2)
        return job

    def states(self) -> list[str]:
        """State of each node, as sinfo names it; empty while the controller does not answer."""
        answer = self.run("sinfo", "--noheader", "--Node", "--format=%T")
        return answer.stdout.split() if answer.returncode == 0 else []

    def job(self, job_id: int) -> dict[str, str]:
        """What scontrol says about a job: JobState, ExitCode, NodeList, Restarts, ..."""
        answer = self.run("scontrol", "--oneliner", "show", "job", str(job_id))
        assert answer.returncode == 0, answer.stderr
        return dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)

    def logs(self, num_lines: int = 20) -> str:
        """The end of every daemon's log."""
        tails = []
        for log in sorted(self.directory.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-num_lines:]
            tails.append("\n".join([f"--- {log.name}", *lines]))
        return "\n".join(tails)

    def _write_configuration(self, extra: str) -> None:
        nodes = [f"NodeName={name} NodeAddr={self._address(index)} {NODE}" for index, name in enumerate(self.names)]
        conf = SLURM_CONF.format(
            directory=self.directory, subnet=SUBNET, nodes="\n".join(nodes), names=",".join(self.names)
        )
        (self.directory / "slurm.conf").write_text(conf + extra + "\n")
        for index in range(GPUS_PER_NODE):
            (self.directory / f"gpu{index}").touch()
        (self.directory / "gres.conf").write_text(f"Name=gpu File={self.directory}/gpu[0-{GPUS_PER_NODE - 1}]\n")
        version_1 = Path("/sys/fs/cgroup/freezer").is_dir()
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n" if version_1 else "IgnoreSystemd=yes\n")
        hosts = ["127.0.0.1 localhost", f"{SUBNET}.1 controller"]
        hosts += [f"{self._address(index)} {name}" for index, name in enumerate(self.names)]
        (self.directory / "hosts").write_text("\n".join(hosts) + "\n")
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.directory / "state").mkdir()

    def _open_scope(self) -> None:
        # The first process reaps what Slurm's daemons orphan. PDEATHSIG ends the scope however pytest dies.
        self._spawn(
            "scope", "setpriv", "--pdeathsig=KILL", "unshare", "--net", "--mount", "--uts", "--pid", "--fork",
            "--kill-child", "--mount-proc", "bash", "-c", "echo ready; while :; do sleep 60; done",
        )  # fmt: skip
        self._wait_until(lambda: "ready" in (self.directory / "scope.log").read_text(), 20, "the scope")
        (self.scope,) = psutil.Process(self.processes[0].pid).children()

    def _build_network(self) -> None:
        script = [
            "set -eu",
            "hostname controller",
            "mount -t tmpfs tmpfs /run",  # ip keeps its names in /run/netns: ours are seen by nobody else
            f"mount --bind '{self.directory}/hosts' /etc/hosts",
            "ip link set lo up",
            "ip link add br0 type bridge",
            f"ip address add {SUBNET}.1/24 dev br0",
            "ip link set br0 up",
        ]
        for index, name in enumerate(self.names):
            inside = f"nsenter --net=/run/netns/{name} ip"
            script += [
                f"ip netns add {name}",
                f"ip link add veth{index} type veth peer name eth0 netns {name}",
                f"ip link set veth{index} master br0 up",
                f"{inside} link set lo up",
                f"{inside} address add {self._address(index)}/24 dev eth0",
                f"{inside} link set eth0 up",
            ]
        answer = self.run("sh", "-c", "\n".join(script))
        if answer.returncode != 0:
            raise RuntimeError(f"The network could not be built: {answer.stderr}")

    @staticmethod
    def _address(index: int) -> str:
        return f"{SUBNET}.{11 + index}"

    def _inside(self, *command: str, cwd: Path | None = None) -> list[str]:
        """The command line that runs `command` in the scope, in directory `cwd`."""
        assert self.scope is not None
        into = ["nsenter", f"--target={self.scope.pid}", "--net", "--mount", "--uts", "--pid"]
        return [*into, f"--wdns={cwd or self.directory}", "--", *command]

    def _daemon(self, name: str, *command: str) -> None:
        self._spawn(name, *self._inside(*command))

    def _spawn(self, name: str, *command: str) -> None:
        environment = {"PATH": SEARCH_PATH, "SLURM_CONF": str(self.directory / "slurm.conf")}
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self.processes.append(process)

    def _wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [" ".join(map(str, process.args)) for process in self.processes if process.poll() is not None]  # pyright: ignore
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not ready within {seconds} s. Ended: {ended}.\n{self.logs()}")
            time.sleep(0.1)


@contextlib.contextmanager
def running_cluster(num_nodes: int = 2, *, extra: str = "") -> Iterator[SlurmCluster]:
    """A started cluster, gone afterwards. Where none can be started the test skips, and in CI fails."""
    if reason := missing_requirement():
        if os.environ.get("CI"):
            pytest.fail(f"CI must run the cluster tests: {reason}")
        pytest.skip(reason)
    cluster = SlurmCluster.make(num_nodes)
    try:
        cluster.start(extra)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Two nodes, shared by the session's tests."""
    with running_cluster() as cluster:
        yield cluster
