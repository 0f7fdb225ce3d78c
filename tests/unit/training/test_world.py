"""Ranks that decide together: real processes over gloo, and a world of one."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.config.training import ClusterConfig, TrainerConfig
from pipeline.core.compute import choose_compute
from pipeline.core.errors import DataError, ExitCode, UserError
from pipeline.run.launch.ports import reserved_port
from pipeline.run.launch.ranks import RankInfo, find_ranks
from pipeline.run.launch.secret import SECRET_VARIABLE, new_secret
from pipeline.run.launch.supervisor import supervise
from pipeline.training.world import World, join_group

pytestmark = pytest.mark.not_quick

CPU = ClusterConfig(accelerator="cpu", num_threads=1, timeout_seconds=60)
FP32 = TrainerConfig(max_steps=1, precision="fp32")
PREAMBLE = """
import json, os, sys
from pathlib import Path
from pipeline.config.training import ClusterConfig, TrainerConfig
from pipeline.core.errors import CheckpointError, DataError, UserError
from pipeline.run.launch.ranks import find_ranks
from pipeline.core.compute import choose_compute
from pipeline.training.world import join_group

out = Path(sys.argv[1])
cluster = ClusterConfig(accelerator="cpu", num_threads=1, timeout_seconds=60)
compute = choose_compute(accelerator=cluster.accelerator, precision="fp32")
ranks = find_ranks(1)

def tell(**facts):
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(facts))

def refusing(who, error):
    def work():
        if ranks.rank in who:
            raise error
        return ranks.rank
    return work

def outcome(call):
    try:
        return ["value", call()]
    except UserError as error:
        return [int(error.exit_code), str(error)]
"""


def environment() -> dict[str, str]:
    """Of this process, without Slurm's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


def on_ranks(num_ranks: int, out: Path, body: str) -> list[dict[str, Any]]:
    """Run `body` on real ranks; returns what each told."""
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(body), str(out)]
    assert supervise(command, num_ranks, environment=environment(), num_threads=1) == 0
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_error_anywhere_is_everyones_with_its_code(num_ranks: int, tmp_path: Path) -> None:
    body = """
    import psutil
    with join_group(ranks, compute, cluster) as world:
        tell(
            sound=outcome(lambda: world.agree(refusing((), None))),
            last=outcome(lambda: world.agree(refusing((world.size - 1,), DataError("shard 7 is gone")))),
            all=outcome(lambda: world.agree(refusing(range(9), CheckpointError(f"by {ranks.rank}")))),
            first_ok=outcome(lambda: world.first_decides(lambda: {"step": 6, "of": [1, None, "x"]})),
            first_bad=outcome(lambda: world.first_decides(refusing((0,), DataError("no shards")))),
            alike=outcome(lambda: world.require_same("shards", "the ranks see different shards")),
            unlike=outcome(lambda: world.require_same(f"of {ranks.rank}", "the ranks see different shards")),
            hosts=world.gather_hosts(),
            still=outcome(lambda: world.agree(refusing((), None))),
            servers=list(world.placement.server_of_rank), measured=world.placement.measured,
            listens=sorted({of.laddr.ip for of in psutil.Process().net_connections("tcp") if of.status == "LISTEN"}),
        )
    """
    told = on_ranks(num_ranks, tmp_path, body)
    for rank, facts in enumerate(told):
        assert facts["sound"] == ["value", rank]
        code, message = facts["last"]
        assert code == 3 and message.startswith("shard 7 is gone")
        assert ("(seen by rank" in message) == (rank != num_ranks - 1)
        assert facts["all"] == [4, f"by {rank}"]
        assert facts["first_ok"] == ["value", {"step": 6, "of": [1, None, "x"]}]
        assert facts["first_bad"][0] == 3 and "no shards" in facts["first_bad"][1]
        assert (facts["alike"], facts["unlike"]) == (["value", None], [3, "the ranks see different shards"])
        assert len(facts["hosts"]) == num_ranks and facts["still"] == ["value", rank]
        assert facts["servers"] == list(range(num_ranks)) and facts["measured"] is False
        assert facts["listens"] == ["127.0.0.1"]


def test_the_first_rank_works_first_and_may_take_longer_than_a_collective_may(tmp_path: Path) -> None:
    """The other ranks wait 12 seconds for it, and a collective of theirs only 6."""
    body = """
    import dataclasses, time
    with join_group(ranks, compute, dataclasses.replace(cluster, timeout_seconds=6)) as world:
        def work(is_first):
            began = time.monotonic()
            time.sleep(12 if is_first else 0)
            return is_first, began, time.monotonic()
        quick = outcome(lambda: world.locally_first(lambda is_first: is_first))
        first = outcome(lambda: world.locally_first(lambda is_first: refusing((0,), DataError("gone"))()))
        other = outcome(lambda: world.locally_first(lambda is_first: refusing((1,), DataError("gone"))()))
        tell(quick=quick, first=first, other=other, times=world.locally_first(work))
    """
    told = on_ranks(2, tmp_path, body)
    for rank, facts in enumerate(told):
        assert facts["quick"] == ["value", rank == 0]
        assert facts["first"][0] == facts["other"][0] == 3 and "gone" in facts["other"][1]
    (is_first, _, ended), (is_also_first, began, _) = (facts["times"] for facts in told)
    assert (is_first, is_also_first) == (True, False) and ended <= began


@pytest.mark.parametrize("how", ["dist.all_reduce(torch.ones(3))", "world.agree(lambda: 1)", "dist.barrier()"])
def test_a_lost_peer_is_one_sentence_and_no_cause(how: str, tmp_path: Path) -> None:
    body = f"""
    import time
    import torch
    import torch.distributed as dist
    try:
        with join_group(ranks, compute, cluster) as world:
            world.agree(lambda: 1)
            if ranks.rank == 1:
                tell(code=None)
                os._exit(0)
            {how}
    except UserError as error:
        tell(code=int(error.exit_code), message=str(error))
        os._exit(0)
    """
    first, _, last = on_ranks(3, tmp_path, body)
    for rank, facts in ((0, first), (2, last)):
        assert facts["code"] == 1
        assert facts["message"].startswith(f"Rank {rank} lost its connection to another rank")
        assert "pair.cc" not in facts["message"] and len(facts["message"]) < 250, facts["message"]


@pytest.mark.parametrize("heard_first", [0, 1])
def test_a_silent_peer_is_the_same_sentence_whichever_transfer_hears_of_it_first(
    heard_first: int, tmp_path: Path
) -> None:
    """gloo tells the transfer that waited longest of a timeout, and the others of a connection that it closed."""
    body = f"""
    import dataclasses, time
    import torch
    import torch.distributed as dist
    try:
        with join_group(ranks, compute, dataclasses.replace(cluster, timeout_seconds=2)) as world:
            world.agree(lambda: 1)
            if ranks.rank == 1:
                while not (out / "rank0.json").exists():
                    time.sleep(0.1)
                tell(silent=True)
                os._exit(0)
            waiting = []
            for _ in range(2):
                waiting.append(dist.all_reduce(torch.ones(1000), async_op=True))
                time.sleep(1)
            time.sleep(3)
            waiting[{heard_first}].wait()
    except UserError as error:
        tell(code=int(error.exit_code), message=str(error))
        os._exit(0)
    """
    told, silent = on_ranks(2, tmp_path, body)
    assert silent == {"silent": True}
    assert told["code"] == 1
    assert "stops (silent for longer than cluster.step_timeout_seconds" in told["message"], told


def test_a_bug_on_one_rank_leaves_no_other_waiting(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    import traceback
    try:
        with join_group(ranks, compute, cluster) as world:
            world.agree(refusing((1,), ZeroDivisionError("ours")))
    except Exception:
        traceback.print_exc()
        os._exit(1)
    """
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(body), str(tmp_path)]
    assert supervise(command, 2, environment=environment(), num_threads=1) == ExitCode.INTERNAL
    assert "ZeroDivisionError: ours" in capfd.readouterr().err


def test_a_port_that_another_program_has_is_a_sentence_at_once(tmp_path: Path) -> None:
    """As two jobs on a node that were given the same MASTER_PORT."""
    body = """
    tell(outcome=outcome(lambda: join_group(ranks, compute, cluster).__enter__()))
    os._exit(0)
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        place = {**place, "MASTER_PORT": str(server.getsockname()[1]), SECRET_VARIABLE: new_secret()}
        variables = {**environment(), **place}
        command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(body), str(tmp_path)]
        subprocess.run(command, env=variables, check=True, timeout=60)
    code, message = json.loads((tmp_path / "rank0.json").read_text())["outcome"]
    assert code == 2 and "is another program's: set MASTER_PORT" in message


def test_ranks_that_meet_and_then_get_no_connections_say_so(tmp_path: Path) -> None:
    """As behind a firewall that lets one port through: gloo alone would wait several times as long."""
    body = """
    import dataclasses, time
    import torch.distributed as dist
    if ranks.rank == 1:
        dist.init_process_group = lambda *args, **kwargs: time.sleep(600)
    patience = dataclasses.replace(cluster, timeout_seconds=4)
    tell(outcome=outcome(lambda: join_group(ranks, compute, patience).__enter__()))
    os._exit(0)
    """
    for rank, facts in enumerate(on_ranks(2, tmp_path, body)):
        code, message = facts["outcome"]
        assert code == 1 and message.startswith(f"Rank {rank} got no connections with the others within 4 s"), message
        # The interface is the one this machine's name stands for: lo here, a card there.
        assert re.search(r"rank 1 on \S+ at \S+ \(\w+\)\. Can they reach one another there", message), message


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with reserved_port() as port:
        variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**variables, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        ranks = find_ranks(1)
        assert isinstance(ranks, RankInfo)
        before = torch.get_num_threads()
        with join_group(ranks, choose_compute(accelerator="cpu", precision="fp32"), CPU) as world:
            yield world
        torch.set_num_threads(before)


def test_a_world_of_one_needs_nobody(alone: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert (alone.rank, alone.size, alone.is_rank_zero, str(alone.device)) == (0, 1, True, "cpu")
    assert alone.agree(lambda: 7) == alone.first_decides(lambda: 7) == 7
    assert alone.locally_first(lambda is_first: is_first) is True
    assert len(alone.gather_hosts()) == 1
    alone.say("once")
    assert capsys.readouterr().out == "once\n"

    def refuse() -> None:
        raise DataError("no")

    for decide in (alone.agree, alone.first_decides):
        with pytest.raises(UserError, match="no") as raised:
            decide(refuse)
        assert raised.value.exit_code == 3
    assert not alone.meter.take().calls


@pytest.mark.usefixtures("alone")
def test_the_group_exists_inside() -> None:
    assert dist.is_initialized() and dist.get_world_size() == 1
