"""Ranks that no launcher of ours started, when one of them ends: what the others say, and their exit codes."""

import shutil
import signal
import sys
from pathlib import Path

import pytest

from pipeline.run.launch.ports import reserved_port
from tests.commands import SMALL, TRAIN_RECORDED, by_hand, fired, run
from tests.comparing import differences, load
from tests.making.pairs import PAIR_OPTIONS, Pair

NOTED = 'trap : TERM; "$@"; code=$?; echo $code > "$FED_TO/code.$RANK"; exit $code'
"""Around a rank of torchrun, which tells nobody how each of its ranks ended, and ends the others."""


def test_a_rank_of_torchrun_that_is_killed(two_ranks: Pair, shards: Path, tmp_path: Path) -> None:
    """The other one ends with 75 and names it; the same command goes on to the same weights."""
    where = [f"run_root={tmp_path}", f"data.root={shards}", "name=run", *SMALL, *PAIR_OPTIONS]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--no-python"]
    command = [*torchrun, "sh", "-c", NOTED, "sh", sys.executable, str(TRAIN_RECORDED), *where]
    environment = {"FED_TO": str(tmp_path), "KILL_AT": "1 5 backward rank"}
    with reserved_port() as port:
        command.insert(4, f"--master-port={port}")
        output = run(command, expect=1, environment=environment).output
        assert [what for _, what in fired(tmp_path)] == ["1 5 backward rank"]
        codes = [(tmp_path / f"code.{rank}").read_text().strip() for rank in (0, 1)]
        assert codes == ["75", str(128 + signal.SIGKILL)], output
        assert "is gone" in output or "ended without a word (was it killed?)" in output, output
        output = run(command, environment=environment | {"KILL_AT": ""}).output
    assert "resumed from" in output
    assert not differences(load(two_ranks.unbroken)["state_dict"], load(tmp_path / "run")["state_dict"])


@pytest.mark.parametrize(("victim", "num_ranks"), [(0, 2), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_a_rank_started_by_hand_that_is_killed(victim: int, num_ranks: int, shards: Path, tmp_path: Path) -> None:
    """Rank 0 keeps the store of the ranks, and takes it along."""
    where = [f"run_root={tmp_path}", f"data.root={shards}", "name=run", *SMALL, "tracking=disabled"]
    environment = {"FED_TO": str(tmp_path), "KILL_AT": f"{victim} 4 backward rank"}
    ended = by_hand([str(TRAIN_RECORDED)], [where] * num_ranks, environment)
    assert [what for _, what in fired(tmp_path)] == [environment["KILL_AT"]]
    for rank, (code, output) in enumerate((one.code, one.output) for one in ended):
        if rank == victim:
            assert code == -signal.SIGKILL
            continue
        assert code == 75 and f"Rank {rank} lost its connection to another rank in step 5 and stops" in output, output
        assert f"rank {victim} on " in output and "127.0.0.1" in output and "Traceback" not in output, output
        assert ("keeps the ranks' store" if victim == 0 else "ended without a word (was it killed?)") in output, output
    assert (tmp_path / "run/checkpoints/step=000000003.ckpt").is_file()


@pytest.mark.parametrize(("failing", "num_ranks"), [(0, 3), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_rank_that_fails_by_itself_is_named_and_its_code_is_everyones(
    failing: int, num_ranks: int, shards: Path, tmp_path: Path
) -> None:
    """Its copy of the shards is cut short. None ends with 75: the same command would end there again."""
    words = []
    for rank in range(num_ranks):
        shutil.copytree(shards, tmp_path / f"shards{rank}")
        where = [f"run_root={tmp_path}", f"data.root={tmp_path}/shards{rank}", "name=run"]
        words.append([*where, *SMALL, "tracking=disabled"])
    environment = {"FED_TO": str(tmp_path), "KILL_AT": f"{failing} 4 0 shell"}
    environment["DO"] = f"truncate --size=0 {tmp_path}/shards{failing}/*.tar"
    ended = by_hand([str(TRAIN_RECORDED)], words, environment)
    assert [what for _, what in fired(tmp_path)] == [environment["KILL_AT"]]
    assert [one.code for one in ended] == [3] * num_ranks, [one.output for one in ended]
    (own,) = [line for line in ended[failing].output.splitlines() if "error: " in line]
    reason = own.partition("error: ")[2]
    for rank, one in enumerate(ended):
        if rank != failing:
            begin = f"error: Rank {rank} lost its connection to another rank in step "
            assert begin in one.output and f"rank {failing} on " in one.output, one.output
            assert f"ended by itself with exit code 3: {reason}" in one.output, one.output
