"""Machines that falter under a training: disks, clocks, shared memory, W&B's helper, terminals, ranks that are late."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.record.metrics_log import read_rows
from tests.commands import sentences, train_recorded
from tests.comparing import assert_same
from tests.faults.test_disks import IN_NAMESPACE, require_mounting, small_disk
from tests.making.pairs import PAIR_OPTIONS, Pair, take_unbroken

CLOCK = Path(__file__).with_name("clock.c")
DAY_SECONDS = 86_400
# The rest of its arguments as a command in a terminal of its own, which goes away when the first one, a file, is there.
IN_TERMINAL = """
import os, pty, select, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(sys.argv[2], sys.argv[2:])
while not os.path.exists(sys.argv[1]):
    if select.select([terminal], [], [], 0.05)[0]:
        os.write(1, os.read(terminal, 65536))
os.close(terminal)
os.unlink(sys.argv[1])
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
# What is open stays so, and nothing else can be opened for writing.
READ_ONLY = "mount --bind '{0}' '{0}' && mount -o remount,bind,ro '{0}' && ! touch '{0}/new'"


def test_it_goes_on_through_all_of_this_at_once(two_ranks: Pair, shards: Path, tmp_path: Path) -> None:
    """The clock is a day ahead, and amid a step a day behind; rank 0 is late there, and W&B's disk full from then on;
    shared memory is 1 MB, and workers use it."""
    require_mounting()
    take_unbroken(tmp_path, two_ranks.root)
    there, ahead, clock = tmp_path / "resumed" / "wandb", tmp_path / "ahead", tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", clock, CLOCK], check=True)
    ahead.write_text(f"{DAY_SECONDS}\n")
    mounts = f"mkdir -p '{there}'; mount -t tmpfs -o size=4m t '{there}'; mount -t tmpfs -o size=1m t /dev/shm"
    amid = f"df --output=size /dev/shm; sleep 3; echo -{DAY_SECONDS} > '{ahead}'; head -c 9m /dev/zero > '{there}/it'"
    ended = train_recorded(
        tmp_path,
        shards,
        "resumed",
        2,
        *PAIR_OPTIONS,
        "data.num_workers=1",
        kill_at="0 5 0 shell",
        prefix=[*IN_NAMESPACE, mounts],
        environment={"LD_PRELOAD": str(clock), "CLOCK_AHEAD": str(ahead), "DO": f"{amid} || true"},
    )
    assert_same(Pair(tmp_path, 2), least_attempts=1)
    assert "1024\n" in ended.output and "No space left on device" in ended.output, ended.output
    today = datetime.datetime.now()
    said = [str((today + datetime.timedelta(days=days)).date()) for days in (1, -1)]
    assert all(f"\n{day} " in ended.output for day in said), "the clock was not another"
    assert f"{there} is full, and W&B may lack rows" in ended.output or "W&B is off" in ended.output
    seconds = [row["perf/step_seconds"] for row in read_rows(tmp_path / "resumed" / "metrics.jsonl")]
    assert min(seconds) > 0 and 3 < max(seconds) < DAY_SECONDS / 2
    assert "Traceback" not in ended.output and (tmp_path / "resumed" / "report.html").exists()


@pytest.mark.slow  # each attempt ends by one of them
def test_it_ends_in_a_sentence_and_loses_nothing(two_ranks: Pair, shards: Path, tmp_path: Path) -> None:
    """A terminal that goes away; a full disk under the record alone; a disk that becomes read-only, and that of the
    checkpoints; W&B's helper stopped."""
    take_unbroken(tmp_path, two_ranks.root)
    run, kept, hang_up = tmp_path / "resumed", tmp_path / "kept", tmp_path / "hang-up"
    kept.mkdir()
    options = (*PAIR_OPTIONS, "tracking=disabled")

    def attempt(step: int, do: str, expect: int, *more: str, prefix: tuple[str, ...] = ()) -> str:
        kill_at, environment = f"0 {step} 0 shell", {"DO": do}
        ended = train_recorded(
            tmp_path, shards, "resumed", 2, *options, *more, kill_at=kill_at, expect=expect, environment=environment,
            prefix=prefix,
        )  # fmt: skip
        assert "Traceback" not in ended.output and not list(tmp_path.rglob("*.tmp.*"))
        return ended.output

    def committed() -> int:
        return json.loads((kept / "last.json").read_text())["step"]

    with small_disk(run, 3_000_000):
        (run / "checkpoints").symlink_to(kept)
        waits = f"touch '{hang_up}'; while [ -e '{hang_up}' ]; do sleep 0.05; done"
        attempt(1, waits, 75, prefix=(sys.executable, "-c", IN_TERMINAL, str(hang_up)))
        assert committed() == 2
        output = attempt(4, f"head -c 9m /dev/zero > '{run}/filler' || true", 4)
        (sentence,) = sentences(output)
        assert f"Cannot write {run / 'metrics.jsonl'} (No space left on device): the disk is full: free" in sentence
        assert committed() == 3  # step 4 is validated, but none is the best before its weights are pruned
        (run / "filler").unlink()
        for place, words in ((run, "make that writable"), (kept, "Read-only file system; check the disk")):
            before = committed()
            try:
                output = attempt(before, READ_ONLY.format(place), 4)
            finally:
                subprocess.run(["umount", place], check=True)
            assert all(words in sentence for sentence in sentences(output)) and sentences(output), output
            assert committed() >= before
        stops = "pkill -STOP -P $PPID wandb-core && pgrep -P $PPID --runstates T wandb-core"
        output = attempt(committed(), stops, 0, "tracking=offline")
        assert "W&B is off" in output  # its helper can be told neither of files nor of the end
        assert_same(Pair(tmp_path, 2))
