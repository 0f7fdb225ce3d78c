"""`lab`: the real kernel, real interfaces, real ranks; and nothing of it left, however it ends."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.commands import MARK, SMALL, Ended, clean_environment, marked, rows, run, train
from tests.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 60.0
PRIVATE = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--mount", "--user", "--map-root-user")
"""Before a command that is to change mounts: its own."""


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    """Skips, in CI fails, where no lab can be made."""
    if absent := [tool for tool in ("ip", "tc", "ethtool", "unshare", "setpriv") if not shutil.which(tool, path=PATH)]:
        pytest.skip(f"{', '.join(absent)} not found: apt-get install iproute2 ethtool util-linux")
    if subprocess.run([*PRIVATE, "--net", "true"], capture_output=True).returncode != 0:
        pytest.skip("this kernel lets this user make no network namespaces")


PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def lab(root: Path, *arguments: str, expect: int = 0, prefix: Sequence[str] = ()) -> Ended:
    """`python -m pipeline.lab`; lab.json goes to `root/lab`."""
    words = ["-m", "pipeline.lab", f"run_root={root}", *arguments]
    return run(words, expect=expect, cwd=REPOSITORY, environment={"PATH": PATH}, prefix=prefix)


def python(body: str, *arguments: object) -> list[str]:
    """The command that runs `body` on a rank."""
    return ["--", "python", "-c", textwrap.dedent(body), *map(str, arguments)]


def record(root: Path) -> dict[str, Any]:
    """lab.json."""
    return json.loads((root / "lab/lab.json").read_text())


# --- places, addresses, counters ---

TELL = """
import json, os, subprocess, sys
from pathlib import Path
addresses = json.loads(subprocess.check_output(["ip", "-json", "address", "show", "dev", "eth0"]))[0]["addr_info"]
connect = f"import socket; socket.create_connection(('127.0.0.1', {sys.argv[2]}))"
outside = subprocess.run([sys.executable, "-c", connect])
told = [dict(os.environ), [address["local"] for address in addresses], outside.returncode, sys.argv[3:]]
Path(sys.argv[1], os.environ["RANK"] + ".json").write_text(json.dumps(told))
"""


@pytest.mark.parametrize(
    ("servers", "ranks_per_server", "placement", "server_of_rank"),
    [(2, 2, "interleaved", [0, 1, 0, 1]), (3, 1, "contiguous", [0, 1, 2])],
)
def test_every_rank_knows_its_place(
    servers: int, ranks_per_server: int, placement: str, server_of_rank: list[int], tmp_path: Path
) -> None:
    layout = [f"servers={servers}", f"ranks_per_server={ranks_per_server}", f"placement={placement}"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        said = lab(tmp_path, *layout, "num_threads=1", *python(TELL, tmp_path, port, "a b", "--", "x=$HOME")).output
    made = record(tmp_path)
    assert (made["server_of_rank"], made["servers"], made["placement"]) == (server_of_rank, servers, placement)
    assert (made["exit_code"], made["command"][-3:]) == (0, ["a b", "--", "x=$HOME"])
    for rank, server in enumerate(server_of_rank):
        variables, addresses, reached_outside, words = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (variables["RANK"], variables["GROUP_RANK"]) == (str(rank), str(server))
        assert variables["LOCAL_RANK"] == str(server_of_rank[:rank].count(server))
        assert (variables["GLOO_SOCKET_IFNAME"], variables["OMP_NUM_THREADS"]) == ("eth0", "1")
        assert addresses == [made["interfaces"][server]["address"]]  # an address of IPv6 would talk by itself
        assert variables["MASTER_ADDR"] == made["interfaces"][0]["address"]
        assert json.loads(variables["SQUEEZEWIRE_LAB"])["server_of_rank"] == server_of_rank
        assert reached_outside != 0, "a listener of the machine was reached"
        assert words == ["a b", "--", "x=$HOME"]
    # The ranks sent nothing, so the interfaces have counted nothing.
    for interface in made["interfaces"]:
        assert [interface[f"{way}_{what}"] for way in ("tx", "rx") for what in ("bytes", "packets")] == [0] * 4
        assert interface["address"] in said


REDUCE = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
from pipeline.comm.kernel.sockets import own_connections
dist.init_process_group("gloo")
values = torch.ones(int(sys.argv[1]) // 4)
dist.all_reduce(values)
assert values.tolist() == [dist.get_world_size()] * values.numel()
dist.barrier()
retransmitted = sum(connection.counts().retransmitted_bytes for connection in own_connections())
Path(sys.argv[2], f"again.{os.environ['RANK']}").write_text(str(retransmitted))
os._exit(0)  # connections are closed by the kernel: nothing more is sent than it must
"""


@pytest.mark.parametrize("servers", [2, 3])
def test_an_all_reduce_crosses_the_links(servers: int, tmp_path: Path) -> None:
    payload_bytes = 6_000_000
    said = lab(tmp_path, f"servers={servers}", *python(REDUCE, payload_bytes, tmp_path)).output
    assert "hostname of the client socket" not in said  # torch's warning where a peer has no name
    made = record(tmp_path)
    ring_bytes = 2 * (servers - 1) / servers * payload_bytes
    for rank, interface in enumerate(made["interfaces"]):
        carried = interface["tx_bytes"] - 66 * interface["tx_packets"]  # header of every frame
        once = carried - int((tmp_path / f"again.{rank}").read_text())  # TCP may have sent some of it twice
        assert ring_bytes <= once <= ring_bytes + 20_000  # beside it the group's start and message headers
        assert interface["tx_packets"] >= ring_bytes / 1448  # frames of the wire, none larger
    sent, received = (sum(row[key] for row in made["interfaces"]) for key in ("tx_bytes", "rx_bytes"))
    assert sent == received  # the switch loses nothing, and sends nobody what is another's


TRANSFER = """
import os, socket, sys, threading, time
num_bytes, others = int(sys.argv[1]), int(os.environ["WORLD_SIZE"]) - 1
head = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
def receive(connection):
    while connection.recv(1 << 20):
        pass
if os.environ["RANK"] == "0":
    server = socket.create_server(head)
    connections = [server.accept()[0] for _ in range(others)]
    threads = [threading.Thread(target=receive, args=(connection,)) for connection in connections]
    started = time.perf_counter()
    for connection in connections:
        connection.sendall(b"!")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("seconds", time.perf_counter() - started)
else:
    while True:
        try:
            connection = socket.create_connection(head)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    connection.recv(1)
    connection.sendall(bytes(num_bytes))
"""


@pytest.mark.parametrize("servers", [2, 3])
def test_a_link_is_as_slow_as_asked(servers: int, tmp_path: Path) -> None:
    """Everybody sends to server 0 at once: with three, it is the way into server 0 that is narrow."""
    output = lab(tmp_path, f"servers={servers}", "bandwidth=100mbit", *python(TRANSFER, 4_000_000)).output
    seconds = float(output.split("seconds ")[1].split()[0])
    wire_seconds = record(tmp_path)["interfaces"][0]["rx_bytes"] * 8 / 100e6
    assert wire_seconds > 4_000_000 * (servers - 1) * 8 / 100e6
    # Not faster, but for the bucket of each of two ends; slower only by what a busy machine costs.
    assert 0.9 * wire_seconds < seconds < 3 * wire_seconds


def test_with_offloads_packets_leave_whole(tmp_path: Path) -> None:
    num_bytes = 4_000_000
    assert "whole packets" in lab(tmp_path, "offloads=true", *python(TRANSFER, num_bytes)).output
    sender = record(tmp_path)["interfaces"][1]
    assert sender["tx_bytes"] >= num_bytes
    assert sender["tx_packets"] < num_bytes / 1448 / 4


# --- exit codes ---


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        (["python", "-m", "pipeline.train", "trainer.max_step=1"], 2, "Did you mean 'trainer.max_steps'?"),
        (["python", "-c", "1 / 0"], 1, "ZeroDivisionError"),
        (["sh", "-c", 'test $RANK = 0 && sleep 60; kill -SEGV $$'], 1, "rank 1 was killed by SIGSEGV"),
        (["sh", "-c", 'test $RANK = 0 && sleep 60; exit 6'], 6, "bytes out"),
        (["no-such-program"], 2, "no-such-program is not a program"),
        ([], 2, "No command"),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_commands(command: list[str], code: int, sentence: str, tmp_path: Path) -> None:
    assert sentence in lab(tmp_path, "--", *command, expect=code).output
    if command and command[0] != "no-such-program":
        assert record(tmp_path)["exit_code"] == code


# --- ends ---

LINGER = """
mkdir -p {out}
setsid sh -c 'echo daemon > {out}/daemon.$RANK; sleep 1000' &
echo $$ > {out}/new.$RANK && mv {out}/new.$RANK {out}/up.$RANK
exec sleep 1000
"""


class Running:
    """A lab of two servers whose ranks sleep, each with a daemon of its own, started by `prefix` lab."""

    def __init__(self, out: Path, *prefix: str) -> None:
        self.out = out
        words = ["-m", "pipeline.lab", f"run_root={out}", "--", "sh", "-c", LINGER.format(out=shlex.quote(str(out)))]
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *words],
            env={**clean_environment(), "PATH": PATH, MARK: str(out)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_until(lambda: self.num_up == 4 or self.process.poll() is not None, "ranks did not start")
        assert self.process.poll() is None, self.process.communicate()[0]
        self.networks = {link_of(pid, "net") for pid in marked(str(out))} - {link_of(os.getpid(), "net"), None}
        assert len(self.networks) == 3  # the switch's and each server's

    @property
    def num_up(self) -> int:
        return len([*self.out.glob("up.*"), *self.out.glob("daemon.*")])

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal to the lab's process; (how it ended, what it said)."""
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, output

    def is_gone(self) -> bool:
        """No process is left, and nobody is in one of the networks."""
        return not marked(str(self.out)) and self.networks.isdisjoint(
            {link_of(int(directory.name), "net") for directory in Path("/proc").glob("[0-9]*")}
        )


def link_of(pid: int, kind: str) -> str | None:
    """A process's namespace, by its number; None if the process has ended."""
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return None


@pytest.fixture
def lingering(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts one; whatever is left of it is killed."""
    try:
        yield lambda *prefix: Running(tmp_path, *prefix)
    finally:
        for pid in marked(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_survives_the_lab(
    number: signal.Signals, code: int, lingering: Callable[..., Running], tmp_path: Path
) -> None:
    named = subprocess.check_output(["ip", "netns", "list"])
    running = lingering()
    returned, output = running.end(number)
    assert returned == code, output
    wait_until(running.is_gone, f"left behind: {marked(str(tmp_path))}")
    assert subprocess.check_output(["ip", "netns", "list"]) == named
    if number != signal.SIGKILL:
        assert record(tmp_path)["exit_code"] == code


def test_a_rank_that_crashes_takes_all_with_it(lingering: Callable[..., Running], tmp_path: Path) -> None:
    running = lingering()
    own = [pid for pid in marked(str(tmp_path)) if link_of(pid, "pid") != link_of(os.getpid(), "pid")]
    ranks = [
        pid
        for pid in own
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[1] == str(running.process.pid)
    ]
    assert len(ranks) >= 2
    os.kill(ranks[-1], signal.SIGKILL)
    output, _ = running.process.communicate(timeout=DEADLINE_SECONDS)
    assert (running.process.returncode, "killed by SIGKILL" in output) == (1, True), output
    wait_until(running.is_gone, f"left behind: {marked(str(tmp_path))}")


NO_MORE = 'echo 0 > /proc/sys/user/{limit} && exec "$@"'


def without(limit: str) -> list[str]:
    """Before a command: on a kernel that allows no namespaces of this kind; the limit ends with the command."""
    return ["unshare", "--user", "--map-root-user", "sh", "-c", NO_MORE.format(limit=limit), "sh"]


def test_without_a_process_table_nothing_survives_either(lingering: Callable[..., Running], tmp_path: Path) -> None:
    """As in most containers: ranks share the machine's process table, and nobody kills daemons with it."""
    running = lingering(*without("max_pid_namespaces"))
    assert {link_of(pid, "pid") for pid in marked(str(tmp_path))} == {link_of(os.getpid(), "pid")}
    running.end(signal.SIGKILL)
    wait_until(running.is_gone, f"left behind: {marked(str(tmp_path))}")


# --- what the machine lacks or forbids ---


def test_a_missing_tool_is_a_sentence(tmp_path: Path) -> None:
    hide = 'for tool in $(which -a ethtool tc); do mount --bind /dev/null "$tool"; done; exec "$@"'
    hidden = [*PRIVATE, "sh", "-c", hide, "sh"]
    output = lab(tmp_path, "bandwidth=1gbit", "--", "true", expect=2, prefix=hidden).output
    assert output == "error: The lab needs tc, ethtool, not found here: apt-get install iproute2 ethtool.\n"
    lab(tmp_path, "offloads=true", "--", "true", prefix=hidden)  # which needs neither


@pytest.mark.parametrize("limit", ["max_net_namespaces", "max_mnt_namespaces"])
def test_a_kernel_that_forbids_it_is_a_sentence(limit: str, tmp_path: Path) -> None:
    (sentence,) = lab(tmp_path, "--", "true", expect=2, prefix=without(limit)).output.splitlines()
    assert sentence.startswith("error: This kernel does not let you make network namespaces")
    assert "run it as root" in sentence


NOBODY = 65534


def as_nobody(stash: Path) -> list[str]:
    """Before a command: run by a user without any right, who can read the interpreter and the project all the same.

    What lies below a directory closed to others, such as root's home, is laid open in mounts that the command alone
    sees.
    """
    needed = [Path(path).resolve() for path in (sys.base_prefix, sys.prefix, str(REPOSITORY))]
    closed = {path: next((up for up in reversed(path.parents) if not up.stat().st_mode & 1), None) for path in needed}
    kept = {path: stash / str(number) for number, path in enumerate(needed) if closed[path] is not None}
    script = [f"mkdir -p {aside}; mount --rbind {path} {aside}" for path, aside in kept.items()]
    script += [f"mount -t tmpfs -o mode=755 tmpfs {up}" for up in {closed[path] for path in kept}]
    script += [f"mkdir -p {path}; mount --rbind {aside} {path}" for path, aside in kept.items()]
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return [*PRIVATE, "sh", "-euc", "\n".join([*script, 'exec "$@"']), "sh", *drop]


def test_an_ordinary_user_has_a_lab_or_a_sentence() -> None:
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own are closed to others
        root = Path(directory)
        (root / "runs").mkdir()
        (root / "runs").chmod(0o777)
        root.chmod(0o755)
        prefix = as_nobody(root) if os.geteuid() == 0 else []
        allowed = subprocess.run([*prefix, "unshare", "--user", "--map-root-user", "--net", "true"]).returncode == 0
        command = ["bandwidth=1gbit", *python(f"print(open('/proc/self/uid_map').read())\n{TRANSFER}", 100_000)]
        ended = lab(root / "runs", *command, expect=0 if allowed else 2, prefix=prefix)
        if allowed:
            assert [line.split() for line in ended.output.splitlines()].count(["0", str(user), "1"]) == 2
            assert record(root / "runs")["interfaces"][1]["tx_bytes"] > 100_000
            assert (root / "runs/lab/lab.json").stat().st_uid == user
        else:
            assert ended.output.startswith("error: This kernel does not let you make network namespaces")


# --- trainings ---


@pytest.mark.slow
def test_ranks_dealt_out_in_turn_train_as_any_others(shards: Path, tmp_path: Path) -> None:
    """Lightning derives another rank than the true one for two of the four. Only what leaves a server may differ."""
    options = ["model=squeezenet_small", "trainer.max_steps=4", "batch.max_per_rank=2", "batch.global_size=16"]
    train(tmp_path, shards, "local", 4, *options)
    dealt = ["servers=2", "ranks_per_server=2", "placement=interleaved"]
    where = [f"run_root={tmp_path}", f"data.root={shards}", "name=dealt", "tracking=disabled"]
    lab(tmp_path, *dealt, "--", "python", "-m", "pipeline.train", *where, *SMALL, *options)
    local, dealt = (without_egress(rows(tmp_path / name)) for name in ("local", "dealt"))
    assert len(local) == 4 and local == dealt

    ledger = json.loads((tmp_path / "dealt/ledger.json").read_text())
    assert (ledger["server_of_rank"], ledger["placement"], ledger["num_servers"]) == ([0, 1, 0, 1], "measured", 2)
    told = json.loads((tmp_path / "dealt/environment.json").read_text())["lab"]
    assert (told["placement"], told["server_of_rank"]) == ("interleaved", [0, 1, 0, 1])
    sent = [interface["tx_bytes"] for interface in record(tmp_path)["interfaces"]]
    assert all(
        more > egress > 0 for more, egress in zip(sent, ledger["servers"]["predicted_egress_bytes"], strict=True)
    )


def without_egress(of_a_run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in ("comm/server_egress_bytes", "comm/total_gigabytes")}
        for row in of_a_run
    ]


def compare_on_a_lab(shards: Path, root: Path, models: str, *more: str, expect: int = 0) -> tuple[dict[str, Any], str]:
    """(comparison.json, the output) of `python -m pipeline.compare` on two servers."""
    small = ["data.size=32", "batch.global_size=4", "steps=2", "cluster.num_threads=1", "data.num_workers=0"]
    where = ["name=c", f"run_root={root}", f"data.root={shards}", "cluster.devices=1", "alone=false"]
    of_lab = ["lab.servers=2", "lab.bandwidth=1gbit"]
    ended = run(["-m", "pipeline.compare", f"models=[{models}]", *where, *small, *of_lab, *more], expect=expect)
    return json.loads((root / "c/comparison.json").read_text()) if expect == 0 else {}, ended.output


def test_compare_runs_each_model_on_a_lab(shards: Path, tmp_path: Path) -> None:
    result, _ = compare_on_a_lab(shards, tmp_path, "squeezenet1_1")
    assert result["conditions"]["link of a server"] == "1 Gbit/s, emulated"
    assert (result["conditions"]["servers"], result["conditions"]["placement"]) == (2, "measured")
    (measured,) = result["models"]
    assert measured["gradient_bytes"] == 4_941_984
    made = json.loads((tmp_path / "c/squeezenet1_1/lab.json").read_text())
    assert (made["servers"], made["bandwidth_bits_per_second"], made["exit_code"]) == (2, 10**9, 0)
    assert all(row["tx_bytes"] > 2 * measured["server_egress_bytes_per_step"] for row in made["interfaces"])


def test_compare_refuses_an_impossible_lab_before_the_first_run(shards: Path, tmp_path: Path) -> None:
    _, output = compare_on_a_lab(shards, tmp_path, "squeezenet1_1", "lab.placement=interleafed", expect=2)
    assert "Did you mean 'interleaved'?" in output
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_why_a_model_failed_is_what_its_ranks_said_not_the_lab(shards: Path, tmp_path: Path) -> None:
    result, _ = compare_on_a_lab(shards, tmp_path, "resnet18,squeezenet1_1", "batch.global_size=2")
    failed, measured = result["models"]  # one picture of a rank comes to one value per channel: BatchNorm refuses
    assert failed["reason"].startswith("ValueError")
    assert measured["gradient_bytes"] == 4_941_984
