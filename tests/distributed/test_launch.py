"""The launcher with real processes: codes, signals, deaths, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import ConfigError
from pipeline.run.launch.children import RankCommand
from pipeline.run.launch.ends import Ended, exit_code_of
from pipeline.run.launch.supervisor import Grace, supervise, supervise_commands
from tests.waiting import wait_until

MARK = "SQUEEZEWIRE_TEST_MARK"
DEADLINE_SECONDS = 30.0
# A rank that ignores nothing and sleeps; `pid.<rank>` appears when it is ready.
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
def ready():
    (out / f"new.{rank}").write_text(str(os.getpid()))
    (out / f"new.{rank}").rename(out / f"pid.{rank}")
def all_ready():
    while len(list(out.glob("pid.*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
"""


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment whose processes can be recognised. Afterwards none may be left; what is, is killed."""
    environment = {**os.environ, MARK: str(tmp_path)}
    yield environment
    try:
        wait_until(lambda: not marked(tmp_path), "processes left behind", seconds=DEADLINE_SECONDS)
    finally:
        for pid in marked(tmp_path):
            os.kill(pid, signal.SIGKILL)


def marked(value: Path) -> list[int]:
    """Processes, dead ones excepted, that carry the mark."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={value}".encode() in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def test_an_end_that_another_thread_was_told_of_is_seen(mark: dict[str, str]) -> None:
    """The kernel gives SIGCHLD to any thread that does not block it, and drops it there."""
    script = """
        import signal, sys, threading, time
        from pipeline.run.launch.supervisor import supervise

        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()  # before the signals are blocked
        inner = signal.sigtimedwait
        def late(signals, seconds):
            time.sleep(0.5)  # the rank has ended by now, and nobody waits
            assert signal.SIGCHLD not in signal.sigpending(), "the signal was not lost"
            return inner(signals, seconds)
        signal.sigtimedwait = late
        sys.exit(supervise([sys.executable, "-c", "raise SystemExit(3)"], 1))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, env=mark, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert (ended.returncode, ended.stderr) == (3, "")


def rank_command(out: Path, body: str) -> list[str]:
    return [sys.executable, "-c", PREAMBLE + textwrap.dedent(body), str(out)]


def start(out: Path, devices: int, body: str, environment: dict[str, str], **grace: float) -> subprocess.Popen[str]:
    """The launcher as a process of its own, whose exit code is what `supervise` returned."""
    program = (
        "import sys\nfrom pipeline.run.launch.supervisor import Grace, supervise\n"
        f"sys.exit(supervise({rank_command(out, body)!r}, {devices}, grace=Grace(**{grace!r})))"
    )
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)


def end(launcher: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, stderr = launcher.communicate(timeout=DEADLINE_SECONDS)
    finally:
        launcher.kill()
    return launcher.returncode, stderr


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_every_rank_knows_its_place(devices: int, tmp_path: Path, mark: dict[str, str]) -> None:
    body = 'import json; (out / f"{rank}.json").write_text(json.dumps([dict(os.environ), sys.stdin.read()]))'
    assert supervise(rank_command(tmp_path, body), devices, environment=mark, num_threads=1) == 0
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(devices)]
    for rank, (variables, stdin) in enumerate(seen):
        assert (variables["RANK"], variables["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (variables["WORLD_SIZE"], variables["LOCAL_WORLD_SIZE"]) == (str(devices), str(devices))
        assert (variables["MASTER_ADDR"], variables["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
        assert variables["OMP_NUM_THREADS"] == "1"
        assert stdin == ""
    assert len({variables["MASTER_PORT"] for variables, _ in seen}) == 1


@pytest.mark.parametrize("devices", [2, 3])
def test_threads_are_the_cores_shared_out_unless_set(devices: int, tmp_path: Path, mark: dict[str, str]) -> None:
    body = '(out / f"{rank}").write_text(os.environ["OMP_NUM_THREADS"])'
    mark.pop("OMP_NUM_THREADS", None)
    assert supervise(rank_command(tmp_path, body), devices, environment=mark) == 0
    assert (tmp_path / "1").read_text() == str(max(1, len(os.sched_getaffinity(0)) // devices))
    assert supervise(rank_command(tmp_path, body), devices, environment=mark | {"OMP_NUM_THREADS": "7"}) == 0
    assert (tmp_path / "1").read_text() == "7"


def test_each_rank_may_have_a_command_of_its_own(tmp_path: Path, mark: dict[str, str]) -> None:
    commands = [
        RankCommand(
            [*rank_command(tmp_path, '(out / f"{rank}").write_text(str(sys.argv[2:]))'), word], mark | variables
        )
        for word, variables in (("a", {"RANK": "0"}), ("b", {"RANK": "1"}))
    ]
    assert supervise_commands(commands) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["['a']", "['b']"]
    failing = RankCommand(["sh", "-c", "exit 4"], mark)
    assert supervise_commands([RankCommand(["sleep", "1000"], mark), failing], grace=Grace(peer_seconds=0.1)) == 4


@pytest.mark.parametrize("devices", [2, 3])
def test_a_failed_rank_ends_all_with_its_code(devices: int, tmp_path: Path, mark: dict[str, str]) -> None:
    body = "ready(); all_ready(); time.sleep(1000) if rank != 1 else sys.exit(3)"
    code = supervise(rank_command(tmp_path, body), devices, environment=mark, grace=Grace(peer_seconds=0.1))
    assert code == 3
    assert not marked(tmp_path)


def test_a_peer_that_ignores_sigterm_is_killed(
    tmp_path: Path, mark: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready(); all_ready()
    time.sleep(1000) if rank == 0 else sys.exit(4)
    """
    grace = Grace(peer_seconds=0.1, kill_seconds=0.3)
    assert supervise(rank_command(tmp_path, body), 2, environment=mark, grace=grace) == 4
    assert "rank 0 did not end in time" in capfd.readouterr().err


def test_the_cause_is_preferred_to_a_peer_that_died_of_it_first(tmp_path: Path, mark: dict[str, str]) -> None:
    # Rank 0 loses its connection and ends with 1 while rank 1, the cause, still prints its sentence.
    body = "ready(); all_ready(); sys.exit(1) if rank == 0 else (time.sleep(0.3), sys.exit(3))"
    assert supervise(rank_command(tmp_path, body), 2, environment=mark) == 3


def test_a_rank_killed_is_our_fault_and_said(
    tmp_path: Path, mark: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    body = "ready(); all_ready(); os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(1000)"
    assert supervise(rank_command(tmp_path, body), 2, environment=mark, grace=Grace(peer_seconds=0.1)) == 1
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err


def test_ranks_meet_and_the_first_to_fail_is_the_answer(tmp_path: Path, mark: dict[str, str]) -> None:
    """Real gloo: the peers of the rank that leaves die of their broken connections, with code 1."""
    devices = 3
    body = """
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    (out / f"sum.{rank}").write_text(str(int(ones)))
    if rank == dist.get_world_size() - 1:
        os._exit(6)
    dist.all_reduce(ones)
    """
    assert supervise(rank_command(tmp_path, body), devices, environment=mark, num_threads=1) == 6
    assert [(tmp_path / f"sum.{rank}").read_text() for rank in range(devices)] == [str(devices)] * devices


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_passed_to_every_rank(number: signal.Signals, tmp_path: Path, mark: dict[str, str]) -> None:
    body = f"""
    def note(*_):
        (out / f"got.{{rank}}").touch()
        sys.exit(75)
    signal.signal({int(number)}, note)
    ready()
    time.sleep(1000)
    """
    launcher = start(tmp_path, 3, body, mark)
    wait_until(lambda: len(list(tmp_path.glob("pid.*"))) == 3, "ranks did not start")
    launcher.send_signal(number)
    assert end(launcher)[0] == 75
    assert len(list(tmp_path.glob("got.*"))) == 3


def test_ranks_that_die_of_a_passed_signal_give_the_code_of_a_shell(tmp_path: Path, mark: dict[str, str]) -> None:
    launcher = start(tmp_path, 2, "ready(); time.sleep(1000)", mark)
    wait_until(lambda: len(list(tmp_path.glob("pid.*"))) == 2, "ranks did not start")
    launcher.send_signal(signal.SIGTERM)
    assert end(launcher)[0] == 128 + signal.SIGTERM


STOPPED_WHILE_STARTING = """
import os, signal, sys
from pipeline.run.launch.children import RankCommand
from pipeline.run.launch.supervisor import supervise_commands

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
if sys.argv[1] == "none":
    os.kill(os.getpid(), signal.SIGTERM)
script = f"touch started.$0; [ $0 = {sys.argv[1]} ] && kill -TERM $PPID; exec sleep 60"
sys.exit(supervise_commands([RankCommand(["sh", "-c", script, str(rank)], os.environ) for rank in range(100)]))
"""


@pytest.mark.parametrize("told_by", ["none", "2"])
def test_a_stop_while_ranks_are_being_started_is_obeyed(told_by: str, tmp_path: Path, mark: dict[str, str]) -> None:
    """Asked before the first rank, or by the third: the hundredth is never started."""
    environment = {**mark, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", STOPPED_WHILE_STARTING, told_by]
    ended = subprocess.run(words, cwd=tmp_path, env=environment, timeout=DEADLINE_SECONDS)
    started = {path.name for path in tmp_path.glob("started.*")}
    assert ended.returncode == 128 + signal.SIGTERM
    assert ("started.2" in started and len(started) < 100) if told_by == "2" else not started


def test_ranks_that_do_not_obey_a_signal_are_killed_in_time(tmp_path: Path, mark: dict[str, str]) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(1000)"
    launcher = start(tmp_path, 2, body, mark, signal_seconds=0.3)
    wait_until(lambda: len(list(tmp_path.glob("pid.*"))) == 2, "ranks did not start")
    launcher.send_signal(signal.SIGTERM)
    assert end(launcher)[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("devices", [2, 3])
def test_ranks_do_not_survive_their_launcher(devices: int, tmp_path: Path, mark: dict[str, str]) -> None:
    launcher = start(tmp_path, devices, "ready(); time.sleep(1000)", mark)
    wait_until(lambda: len(list(tmp_path.glob("pid.*"))) == devices, "ranks did not start")
    assert len(marked(tmp_path)) == devices + 1
    launcher.kill()
    end(launcher)
    wait_until(lambda: not marked(tmp_path), "ranks survived", seconds=DEADLINE_SECONDS)


def test_workers_of_a_rank_do_not_survive_it(tmp_path: Path, mark: dict[str, str]) -> None:
    body = 'import subprocess; subprocess.Popen(["sleep", "1000"]); ready(); all_ready(); sys.exit(2 * rank)'
    assert supervise(rank_command(tmp_path, body), 2, environment=mark, grace=Grace(peer_seconds=0.1)) == 2
    wait_until(lambda: not marked(tmp_path), "workers survived", seconds=DEADLINE_SECONDS)


def test_what_cannot_be_started_is_a_sentence(mark: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="/no/such/program"):
        supervise(["/no/such/program"], 2, environment=mark)


def test_a_taken_master_port_is_a_sentence(mark: dict[str, str]) -> None:
    import socket

    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port}"):
            supervise([sys.executable, "-c", ""], 2, environment=mark | {"MASTER_PORT": port})


def test_the_mask_and_handlers_of_the_caller_come_back(mark: dict[str, str]) -> None:
    before = (signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGCHLD))
    assert supervise([sys.executable, "-c", ""], 2, environment=mark) == 0
    assert (signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGCHLD)) == before


TERM, KILL, USR1 = int(signal.SIGTERM), int(signal.SIGKILL), int(signal.SIGUSR1)


@pytest.mark.parametrize(
    ("ended", "forwarded", "code"),
    [
        ([Ended(0, 0), Ended(1, 0)], [], 0),
        ([Ended(0, 1), Ended(1, 3)], [], 3),
        ([Ended(0, -KILL), Ended(1, 1)], [], 1),
        ([Ended(0, -KILL), Ended(1, 75, told_to_stop=True)], [], 1),
        ([Ended(0, 1), Ended(1, 4, told_to_stop=True)], [], 4),
        ([Ended(0, 75), Ended(1, 75)], [TERM], 75),
        ([Ended(0, 1), Ended(1, -TERM)], [TERM], 128 + TERM),
        ([Ended(0, 128 + TERM), Ended(1, 1)], [TERM], 128 + TERM),
        ([Ended(0, -TERM)], [], 1),
        ([Ended(0, -KILL, told_to_stop=True)], [TERM], 128 + TERM),
        ([Ended(0, -KILL)], [USR1], 1),
        ([Ended(0, -USR1)], [USR1], 128 + USR1),
        ([Ended(0, 42)], [], 42),
    ],
)
def test_exit_code_of(ended: list[Ended], forwarded: list[int], code: int) -> None:
    assert exit_code_of(ended, forwarded) == code


SAY = "from pipeline.core.exits import leave_cause; leave_cause({code}, has_lost_others={lost}); sys.exit({code})"
LOST, OWN = SAY.format(code=1, lost=True), SAY.format(code=1, lost=False)


@pytest.mark.parametrize(
    ("bodies", "code"),
    [
        ((LOST, LOST), 75),
        ((LOST, OWN), 1),
        ((LOST, "sys.exit(1)"), 1),
        ((LOST, "os.kill(os.getpid(), 9)"), 1),
        ((LOST, "signal.signal(15, lambda *_: sys.exit(75)); ready(); time.sleep(60)"), 75),
        ((f"ready(); os.close(int(os.environ['SQUEEZEWIRE_CAUSES_PIPE'].partition(':')[0])); {LOST}", LOST), 1),
    ],
)
def test_ranks_that_only_lost_one_another_may_come_back(
    bodies: tuple[str, str], code: int, tmp_path: Path, mark: dict[str, str]
) -> None:
    body = f"if rank == 0:\n    {bodies[0]}\n{bodies[1]}"
    assert supervise(rank_command(tmp_path, body), 2, environment=mark, grace=Grace(peer_seconds=1)) == code
