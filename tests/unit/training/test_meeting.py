"""Before there is a process group: what one rank finds wrong is everyone's sentence, and nobody waits for the gone."""

import json
import os
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ConfigError
from pipeline.core.exits import ended_ranks
from pipeline.run.launch.ports import reserved_port
from pipeline.run.launch.ranks import RankInfo
from pipeline.run.launch.secret import SECRET_VARIABLE, new_secret
from pipeline.run.launch.supervisor import supervise

PREAMBLE = """
import dataclasses, json, os, sys, time
from pathlib import Path
from pipeline.core.errors import ConfigError, DataError, UserError
from pipeline.run.launch.network import interfaces
from pipeline.run.launch.ranks import find_ranks
from pipeline.training.meeting import Meeting

out, ports = Path(sys.argv[1]), iter(map(int, sys.argv[2:]))
ranks = find_ranks(1)
has_ipv6 = any(address == "::1" for addresses in interfaces().values() for address in addresses)
ADDRESS = "::1" if has_ipv6 else "127.0.0.1"
told = {}

def meet(seconds=60.0):
    return Meeting(dataclasses.replace(ranks, master_addr=ADDRESS, master_port=next(ports)), seconds)

def outcome(name, call):
    try:
        told[name] = ["value", call()]
    except UserError as error:
        told[name] = [int(error.exit_code), str(error)]
    except ZeroDivisionError as error:
        told[name] = ["bug", str(error)]

def failing(rank, error):
    def work():
        if ranks.rank == rank:
            raise error
        return ranks.rank
    return work
"""
BODY = """
well = meet()
outcome("well", lambda: [well.agree(topic, failing(None, None)) for topic in "ab"] + [well.store.get("a/1").decode()])
# Rank 0 holds the store, and would take it along.
outcome("first", lambda: meet().agree("a", failing(0, ConfigError("no GPU"))))
outcome("last", lambda: meet().agree("a", failing(2, DataError("no shards"))))
outcome("bug", lambda: meet().agree("a", failing(1, ZeroDivisionError("ours"))))
second = meet()
second.agree("a", failing(None, None))
outcome("second", lambda: second.agree("b", failing(1, ConfigError("later"))))

# One does not come: the others wait as long as they may; and no longer, where it is known to have ended.
port = next(ports)
late = Meeting(dataclasses.replace(ranks, master_port=port), 6)
if ranks.rank == 1:
    while not all((out / f"waited{rank}").exists() for rank in (0, 2)):
        time.sleep(0.05)
else:
    outcome("late", lambda: late.agree("a", lambda: 1))
(out / f"waited{ranks.rank}").touch()
os.environ["SQUEEZEWIRE_CAUSES"] = str(out / "causes")
gone = meet(3600)
if ranks.rank == 1:
    (out / "causes").mkdir()
    (out / "causes/ended1").touch()
else:
    outcome("gone", lambda: gone.agree("a", lambda: 1))
(out / f"rank{ranks.rank}.json").write_text(json.dumps(told))
os._exit(0)
"""


@pytest.mark.not_quick
def test_three_ranks_meet_or_say_why_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        ports = [str(stack.enter_context(reserved_port())) for _ in range(7)]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(BODY), str(tmp_path), *ports]
        assert supervise(command, 3, environment=variables, num_threads=1) == 0
    assert "Traceback" not in capfd.readouterr().err
    every: list[dict[str, Any]] = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    for rank, told in enumerate(every):
        assert told["well"] == ["value", [[0, 1, 2], [0, 1, 2], '{"value": 1}']]
        for name, culprit, code, message in (
            ("first", 0, 2, "no GPU"),
            ("last", 2, 3, "no shards"),
            ("second", 1, 2, "later"),
        ):
            assert told[name] == [code, message if rank == culprit else f"{message} (seen by rank {culprit})"]
        assert told["bug"] == (["bug", "ours"] if rank == 1 else [1, "ZeroDivisionError('ours') (seen by rank 1)"])
        if rank != 1:
            code, message = told["late"]
            assert code == 1 and message.startswith(f"Rank {rank} of 3 did not find the others at "), message
            missing = "rank 1 did not come" if rank == 0 else "did not come"
            assert " in 6 s: " in message and missing in message and "raise cluster.timeout_seconds" in message
            assert told["gone"][0] == 1 and told["gone"][1].startswith("rank 1 ended before the ranks had met")


def test_a_name_that_nobody_knows_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training.meeting import Meeting

    monkeypatch.setenv(SECRET_VARIABLE, new_secret())
    ranks = RankInfo(1, 2, 0, 1, 1, 2, "no such name.invalid", 29500, "slurm")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=no such name\.invalid, where rank 0 is, is no name that"):
        Meeting(ranks, 3600).agree("a", lambda: 1)


def test_ranks_that_have_ended_are_known(tmp_path: Path) -> None:
    assert ended_ranks(None) == ended_ranks(str(tmp_path / "none")) == []
    for name in ("rank3", "ended3", "ended12", "rank0", "rankx"):
        (tmp_path / name).touch()
    assert ended_ranks(str(tmp_path)) == [0, 3, 12]
