"""Run the commands as a user does: real processes, a deadline, and nothing left behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.run.launch.ports import reserved_port

HERE = Path(__file__).parent
TRAIN_RECORDED = HERE / "distributed/train_recorded.py"
MARK = "SQUEEZEWIRE_COMMAND_MARK"
DEADLINE_SECONDS = 300.0
BY_HAND_SECONDS = 240.0
LEFT_BEHIND_SECONDS = 30.0
SECRET = {"DECOY_TOKEN": "correct-horse-battery-staple"}
"""In the environment of every command, and never in what one prints."""
GONE_SECONDS = 15.0
"""From the death of a rank until all others are gone too."""
TIMES = ("comm/seconds", "comm/exposed_seconds", "comm/exposed_share", "comm/bus_bandwidth")
SMALL = (
    "data.size=32",
    "data.num_workers=0",
    "cluster.num_threads=1",
    "batch.global_size=12",
    "trainer.max_steps=11",
    "trainer.validate_every_steps=4",
    "trainer.checkpoint_every_steps=3",
    "recipe.warmup_steps=2",
)
"""Of a run that takes seconds: 5 steps an epoch of the small shards, validation after 4, 8 and 11 steps."""


@dataclass(frozen=True)
class Ended:
    """What a command left on its streams, and its exit code."""

    code: int
    output: str


def marked(mark: str) -> list[int]:
    """Living processes that were started with this mark, or by one that was."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
    return found


@contextlib.contextmanager
def _nothing_left_behind() -> Iterator[dict[str, str]]:
    """An environment by which everything started in the block is known; afterwards none of it may run."""
    mark = uuid.uuid4().hex
    try:
        yield {MARK: mark}
        deadline = time.monotonic() + LEFT_BEHIND_SECONDS
        while left := marked(mark):
            assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
            time.sleep(0.05)
    finally:
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def clean_environment() -> dict[str, str]:
    """Of this process, without what would make the ranks somebody else's or send anything to W&B."""
    foreign = ("SLURM_", "WANDB_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "MASTER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def run(
    arguments: list[str],
    *,
    expect: int | tuple[int, ...] | None = 0,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    prefix: Sequence[str] = (),
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Ended:
    """Run `python ARGUMENTS` to its end, within the deadline. `expect`: the exit code, or several; None: any.

    `prefix`: a command that runs the rest of its words as a command, such as `unshare --net`.
    """
    with _nothing_left_behind() as mark:
        process = subprocess.Popen(
            [*prefix, sys.executable, *arguments],
            env={**clean_environment(), "PYTHONPATH": str(HERE.parent), **SECRET, **mark, **(environment or {})},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=deadline_seconds)
        finally:
            process.kill()
    assert not any(value in output for value in SECRET.values())
    allowed = expect if isinstance(expect, tuple) else (expect,)
    assert expect is None or process.returncode in allowed, f"exit code {process.returncode}\n{output}"
    return Ended(process.returncode, output)


def interrupted(
    arguments: list[str], number: signal.Signals, when: Callable[[], bool], *, expect: int, cwd: Path | None = None
) -> Ended:
    """Start `python ARGUMENTS`, send it a signal once `when` says so, and see it end with the exit code `expect`."""
    with (
        _nothing_left_behind() as mark,
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**clean_environment(), "PYTHONPATH": str(HERE.parent), **mark},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not when():
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(number)
            output, _ = process.communicate(timeout=DEADLINE_SECONDS)
        finally:
            process.kill()
    assert process.returncode == expect, f"exit code {process.returncode}\n{output}"
    return Ended(process.returncode, output)


def typed(words: list[str], directory: Path, *, interrupted_after: str = "") -> tuple[int, str]:
    """Run a command as from a shell in this directory; returns exit code and output.

    Args:
        words: Of the command line; `python` is this one.
        directory: Where the user is.
        interrupted_after: Ctrl-C is pressed after the first line that holds it, if given.
    """
    lines: list[str] = []
    with (
        _nothing_left_behind() as mark,
        subprocess.Popen(
            [sys.executable if words[0] == "python" else words[0], *words[1:]],
            cwd=directory,
            env={**clean_environment(), "PYTHONPATH": str(HERE.parent), **mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            while interrupted_after and not (lines and interrupted_after in lines[-1]):
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            if interrupted_after:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal: all of the group in front
            rest, _ = process.communicate(timeout=DEADLINE_SECONDS)
        finally:
            process.kill()
    return process.returncode, "".join(lines) + rest


def train(
    root: Path,
    shards: Path | str,
    name: str,
    devices: int,
    *more: str,
    expect: int | None = 0,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """`python -m pipeline.train` on the small shards; `more` overrides what SMALL says."""
    where = [f"run_root={root}", f"data.root={shards}", f"name={name}", f"cluster.devices={devices}"]
    tracking = [] if any(key.startswith("tracking=") for key in more) else ["tracking=disabled"]
    arguments = ["-m", "pipeline.train", *where, *SMALL, *tracking, *more]
    return run(arguments, expect=expect, environment=environment)


def train_recorded(
    root: Path,
    shards: Path | str,
    name: str,
    devices: int,
    *more: str,
    kill_at: str = "",
    expect: int | tuple[int, ...] | None = None,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Ended:
    """The same through train_recorded.py, which leaves `<root>/<name>.fed/rank<r>.jsonl`.

    What `kill_at` says has happened, once, and what follows from the death of a rank is seen to. `expect`: the exit
    code; None: the one that the victim of `kill_at` makes it.
    """
    fed = root / f"{name}.fed"
    fed.mkdir(parents=True, exist_ok=True)
    victim = kill_at.rpartition(" ")[2]
    if expect is None:
        expect = {"rank": 1, "supervisor": -9}.get(victim, 0)
    num_before = len(fired(fed))
    where = [f"run_root={root}", f"data.root={shards}", f"name={name}", f"cluster.devices={devices}"]
    tracking = [] if any(key.startswith("tracking=") for key in more) else ["tracking=disabled"]
    arguments = [str(TRAIN_RECORDED), *where, *SMALL, *tracking, *more]
    environment = {"FED_TO": str(fed), "KILL_AT": kill_at, **(environment or {})}
    ended = run(arguments, expect=expect, environment=environment, prefix=prefix, deadline_seconds=deadline_seconds)
    if kill_at:
        happened = fired(fed)[num_before:]
        assert [what for _, what in happened] == [kill_at], f"{happened}\n{ended.output}"
        if victim == "rank":
            took = time.time() - happened[0][0]
            assert took <= GONE_SECONDS, f"{took:.1f} s\n{ended.output}"
            _assert_death_is_told(kill_at, devices, ended.output)
    return ended


def by_hand(
    program: Sequence[str], words_by_rank: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None
) -> list[Ended]:
    """Start Python as each rank, with words of its own and torchrun's variables; returns how they ended, by rank."""
    with reserved_port() as port:
        common = {**clean_environment(), "PYTHONPATH": str(HERE.parent), "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(words_by_rank))}
        processes = [
            subprocess.Popen(
                [sys.executable, *program, *words],
                env={**common, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, words in enumerate(words_by_rank)
        ]
        try:
            outputs = [process.communicate(timeout=BY_HAND_SECONDS)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return [Ended(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def fired(fed: Path) -> list[tuple[float, str]]:
    """What train_recorded.py did to its runs, over all attempts: when (Unix time), and what it had been told."""
    path = fed / "fired"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(float(when), what) for when, _, what in (line.partition(" ") for line in lines)]


def _assert_death_is_told(kill_at: str, devices: int, output: str) -> None:
    """The launcher names the rank that was killed, and one of its peers itself and the step."""
    rank, step, place, _ = kill_at.split()
    assert f"rank {rank} was killed by SIGKILL" in output, output
    where = f"in step {int(step) + 1}" + (", or in a pause before it" if place == "validation" else "")
    said = set(re.findall(rf"Rank (\d+) lost its connection to another rank {where} and stops", output))
    assert (devices == 1 or said) and said <= {str(peer) for peer in range(devices)} - {rank}, output


def assert_holds_no(root: Path, output: str, *secrets: str) -> None:
    """No secret in what a run has printed or written."""
    everything = [output.encode(), *(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())]
    for secret in (*secrets, *SECRET.values()):
        assert not [content for content in everything if secret.encode() in content]


def rows(run_directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured in seconds."""
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("perf/") and key not in TIMES}
        for line in lines
    ]


def sentences(output: str) -> list[str]:
    """The lines by which the command says what is wrong; not those of ranks that only lost the one that said it."""
    assert "Traceback" not in output and "Warning" not in output, output
    return [line for line in output.splitlines() if "error: " in line and "lost its connection" not in line]
