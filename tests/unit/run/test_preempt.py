"""Signals as a wish, in real processes: heard in every phase, once, and with an end that nothing can hold up."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

pytestmark = pytest.mark.not_quick

DEADLINE_SECONDS = 60.0
PREAMBLE = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from pipeline.run.launch.preempt import StopRequest, block_early

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup

def me(number):
    os.kill(os.getpid(), number)

def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
"""


def run(body: str, *, expect: int = 0) -> str:
    """The body's stderr; it ended with this code."""
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert ended.returncode == expect, ended.stderr
    return ended.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_before_training_it_leaves_at_once(name: str) -> None:
    """Also where the main thread does not come back: here it sleeps in C."""
    said = run(f"with StopRequest().listening(): me(signal.{name}); time.sleep(50)", expect=75)
    assert said == f"preempted: [rank 0] {name} before the first step: nothing is lost. The same command goes on.\n"


def test_of_ranks_that_their_launcher_tells_one_says_it() -> None:
    """One that somebody else tells says it itself, for no other may know."""
    child = PREAMBLE + "with StopRequest().listening(): print(flush=True); time.sleep(50)"
    body = f"""
    mine = {{**os.environ, "SQUEEZEWIRE_SPAWNED": "1"}}
    ranks = [
        subprocess.Popen([sys.executable, "-c", {child!r}], env={{**mine, "RANK": rank}}, stdout=subprocess.PIPE)
        for rank in "012"
    ]
    assert all(rank.stdout.readline() for rank in ranks)
    subprocess.run(["/bin/kill", "-TERM", str(ranks[2].pid)], check=True)
    ranks[2].wait()
    for rank in ranks[:2]:
        rank.send_signal(signal.SIGINT)
    assert [rank.wait() for rank in ranks] == [75, 75, 75]
    """
    told = "before the first step: nothing is lost. The same command goes on."
    assert run(body) == f"preempted: [rank 2] SIGTERM {told}\npreempted: [rank 0] SIGINT {told}\n"


@pytest.mark.parametrize("ignored", [["SIGUSR2"], ["SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2"]])
def test_what_was_ignored_at_start_stays_so_and_the_end_comes(ignored: list[str]) -> None:
    body = f"""
    for name in {ignored}:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    stop = StopRequest()
    with stop.listening():
        stop.begin_training()
        me(signal.SIGUSR2)
        time.sleep(0.3)
        assert not stop.asked
    """
    assert run(body) == ""


def test_while_training_it_is_a_flag_and_the_first_counts() -> None:
    body = """
    stop = StopRequest()
    with stop.listening():
        stop.begin_training()
        assert not stop.asked
        me(signal.SIGUSR1)
        wait_for(lambda: stop.asked)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            me(number)
        time.sleep(0.5)
        assert stop.name == "SIGUSR1"
        stop.end_training()
        me(signal.SIGTERM)
        time.sleep(0.3)
    """
    assert run(body) == ""


def test_a_stuck_collective_ends_with_the_stacks() -> None:
    """Nothing looks at the flag: a thread holds a lock that the main thread waits for, for ever."""
    body = """
    def stuck_in_a_collective():
        threading.Lock().acquire() and threading.Event().wait()
    stop = StopRequest(grace_seconds=0.5)
    with stop.listening():
        stop.begin_training()
        me(signal.SIGTERM)
        stuck_in_a_collective()
    """
    said = run(body, expect=75)
    assert "in stuck_in_a_collective" in said
    assert "SIGTERM came 0.5 s ago, and ranks have not agreed on a step since: this rank leaves without saving." in said


def test_the_limit_is_lifted_once_training_is_over() -> None:
    body = """
    stop = StopRequest(grace_seconds=0.5)
    with stop.listening():
        stop.begin_training()
        me(signal.SIGTERM)
        wait_for(lambda: stop.asked)
        stop.end_training()
        time.sleep(1.5)
    """
    assert run(body) == ""


def test_a_signal_from_before_is_not_lost() -> None:
    """It waits, blocked, while a command is still being read."""
    body = """
    block_early()
    me(signal.SIGTERM)
    time.sleep(0.2)
    with StopRequest().listening():
        time.sleep(50)
    """
    run(body, expect=75)


def test_what_it_starts_does_not_hear_the_signals() -> None:
    """As W&B's helper: Slurm signals every process of a step."""
    body = """
    stop = StopRequest()
    with stop.listening():
        stop.begin_training()
        child = subprocess.Popen(["sleep", "1"])
        wait_for(lambda: "sleep" in Path(f"/proc/{child.pid}/cmdline").read_text())
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(child.pid, number)
        assert child.wait() == 0
    """
    run(body)


def test_a_library_that_unblocks_a_signal_does_no_harm() -> None:
    """As Python's resource tracker does when it starts."""
    body = """
    stop = StopRequest()
    with stop.listening():
        stop.begin_training()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
        me(signal.SIGTERM)
        me(signal.SIGINT)
        wait_for(lambda: stop.asked)
    """
    run(body)


def test_afterwards_a_launcher_takes_the_signals() -> None:
    """The thread is gone, and a signal waits for whoever asks for it."""
    body = """
    with StopRequest().listening():
        pass
    assert threading.active_count() == 1
    me(signal.SIGTERM)
    assert signal.sigtimedwait([signal.SIGTERM], 5).si_signo == signal.SIGTERM
    """
    run(body)


def test_what_was_ignored_at_start_stays_so() -> None:
    body = """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = StopRequest()
    with stop.listening():
        stop.begin_training()
        me(signal.SIGINT)
        time.sleep(0.3)
        assert not stop.asked
    """
    run(body)


def test_a_process_that_is_killed_while_it_waits_is_just_killed() -> None:
    command = [
        sys.executable,
        "-c",
        PREAMBLE + "with StopRequest().listening(): print('up', flush=True); time.sleep(50)",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        assert process.wait(DEADLINE_SECONDS) == -signal.SIGKILL and time.monotonic() - began < DEADLINE_SECONDS
