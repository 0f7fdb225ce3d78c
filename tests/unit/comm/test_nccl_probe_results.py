"""What the probe makes of ranks on NCCL: of logs and records as they would leave them, as none has run here."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from benchmarks import nccl_probe
from benchmarks.nccl_probe_plan import SIZES_BYTES, Launch, cases, difference, environment, launches, made_by
from benchmarks.nccl_probe_result import collect, last_words, num_records, summary
from tests.unit.comm.nccl_walk import Task, walk
from tests.unit.comm.test_wire_nccl_log import LOG, log_line

REFUSAL = "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 19000"


def sent_by(
    launch: Launch, op: str, payload_bytes: int, protocol: str, version: tuple[int, int] = (2, 28)
) -> list[int]:
    """What each rank's sockets would send of it, by NCCL's loops; the log says 4 channels and 256 threads."""
    share = payload_bytes // launch.num_ranks if op == "reduce_scatter" else payload_bytes
    task = Task(op, share // 4, 4, launch.num_ranks, launch.algorithm or "ring", protocol, 4, version)
    return [sum(to.values()) for to in walk(task)]


def leave(
    folder: Path, launch: Launch, measured: list[tuple[str, int, list[int], str]], log: str = LOG, rank_log: str = ""
) -> None:
    """Files of the ranks: (operation, payload, bytes of each rank, what NCCL says it chose) a record."""
    folder.mkdir()
    for rank in range(launch.num_ranks):
        lines: list[dict[str, Any]] = [{"device": "NVIDIA H200"}]
        for op, payload_bytes, sent, chosen in measured:
            record = {"kind": "collective", "name": op, "calls": [[op, payload_bytes, -1]], "sent_bytes": sent[rank]}
            lines.append({**record, "is_correct": True, "choices": [chosen] if rank == 0 and chosen else []})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"rank{rank}.jsonl").write_text(text + '{"kind": "collective", "na')  # cut in the middle
        (folder / f"rank{rank}.nccl.log").write_text(log)
        (folder / f"rank{rank}.log").write_text(rank_log)


def collected(folder: Path, launch: Launch, problem: str | None = None) -> dict[str, Any]:
    result = collect(launch, folder, made_by(launch, "2.11.0", (2, 28, 9)), (2, 28, 9), problem)
    return json.loads(json.dumps({**result, "seconds": 1.0}))


PINNED = Launch("collectives", 3, "ring", "ll", 4)
ALONE = Launch("collectives", 2)


def test_predictions_follow_the_channels_threads_and_version_of_the_log(tmp_path: Path) -> None:
    launch = Launch("collectives", 3, "ring", "ll128", 4)
    sizes = (("all_reduce", 2_048_000), ("reduce_scatter", 3 * 40_000), ("all_gather", 262_148))
    measured = [(op, size, sent_by(launch, op, size, "LL128"), "") for op, size in sizes]
    leave(tmp_path / "a", launch, measured)
    result = collected(tmp_path / "a", launch)
    assert result["is_complete"] and result["nccl"] == [2, 28, 9] and result["transports"] == ["NET/Socket/0"]
    assert [case["residual_bytes_per_rank"] for case in result["cases"]] == [[0, 0, 0]] * 3
    assert num_records(tmp_path / "a") == 3
    leave(tmp_path / "b", launch, measured, LOG.replace("2.28.9", "2.30.7"))
    assert any(any(case["residual_bytes_per_rank"]) for case in collected(tmp_path / "b", launch)["cases"])


def test_what_nccl_chose_by_itself_is_priced_as_chosen(tmp_path: Path) -> None:
    chosen = log_line("AllReduce", 2_048_000, "RING", "LL", 0, 3)
    unknown = log_line("AllGather", 4, "PAT", "SIMPLE", 0, 0)
    measured = [
        ("all_reduce", 2_048_000, sent_by(ALONE, "all_reduce", 2_048_000, "LL"), chosen),
        ("all_gather", 4, [100, 100], unknown),
        ("all_reduce", 8, [100, 100], ""),
    ]
    leave(tmp_path / "a", ALONE, measured)
    ring, pat, unsaid = collected(tmp_path / "a", ALONE)["cases"]
    assert ring["residual_bytes_per_rank"] == [0, 0]
    assert ring["choices"] == [["all_reduce", 2_048_000, "ring", "ll", 4]]
    assert 2 <= ring["sent_over_payload"] < 2.01
    assert pat["residual_bytes_per_rank"] is None and "algorithm pat" in pat["reason"]
    assert "does not say what it chose for all_reduce of 8 bytes" in unsaid["reason"]


def test_an_unknown_version_is_measured_and_not_predicted(tmp_path: Path) -> None:
    leave(tmp_path / "a", PINNED, [("all_reduce", 400, [1, 2, 3], "")], LOG.replace("2.28.9", "2.31.2"))
    result = collected(tmp_path / "a", PINNED)
    (case,) = result["cases"]
    assert case["sent_bytes_per_rank"] == [1, 2, 3] and case["predicted_bytes_per_rank"] is None
    assert "NCCL 2.31 " in case["reason"] and "NCCL 2.31 " in summary([result])["lines"][1]
    assert summary([result])["num_unpredicted"] == 1


def test_a_refusal_and_other_ways_than_sockets_are_said(tmp_path: Path) -> None:
    leave(tmp_path / "a", PINNED, [], rank_log=f"node3:1:1 [0] init.cc:904 NCCL WARN {REFUSAL}\n")
    assert collected(tmp_path / "a", PINNED, "Rank 0 ended.")["refusal"] == REFUSAL
    leave(tmp_path / "b", PINNED, [], f"{LOG}\nn:1:1 [0] NCCL INFO Channel 00 : 1[0] -> 0[0] via SHM/direct/direct")
    result = collected(tmp_path / "b", PINNED)
    assert not result["is_complete"] and "SHM/direct/direct" in result["problem"]


def test_the_largest_residual_is_named(tmp_path: Path) -> None:
    size = 2_048_000
    sent = sent_by(PINNED, "all_reduce", size, "LL")
    measured = [("all_reduce", size, [sent[0] + more, *sent[1:]], "") for more in (0, 4, -400)]
    leave(tmp_path / "a", PINNED, measured)
    found = summary([collected(tmp_path / "a", PINNED)])
    assert (found["num_equal"], found["num_different"]) == (1, 2)
    assert found["largest_residual"]["residual_bytes_per_rank"] == [-400, 0, 0]
    assert "[-400, 0, 0] bytes per rank, collectives-3ranks-ring-ll-4ch" in found["lines"][1]


def test_without_the_header_of_every_send_nothing_would_be_equal(tmp_path: Path) -> None:
    """What the kernel counts less 4 bytes a send is what the formulas said before they knew of headers."""
    launch = Launch("collectives", 2, "ring", "simple", 4)
    sizes = (4, 400, 2_048_000)
    bare = [[sent - 4 * 4 for sent in sent_by(launch, "all_reduce", size, "Simple")] for size in sizes]
    leave(tmp_path / "a", launch, [("all_reduce", size, sent, "") for size, sent in zip(sizes, bare, strict=True)])
    assert summary([collected(tmp_path / "a", launch)])["num_equal"] == 0


# --- the plan, the folder, the options ---


def test_enough_cases_are_planned() -> None:
    """Each launch has a file of its own; one channel comes first, with at least 300 cases, training last."""
    planned = launches((2, 3), dry_run=False, sizes_bytes=SIZES_BYTES, num_steps=30)
    assert len({launch.name for launch in planned}) == len(planned) <= 22
    one = [launch for launch in planned if launch.kind == "collectives" and launch.num_channels == 1]
    assert [launch.num_channels for launch in planned[:6]] == [1] * 6
    assert sum(len(list(cases(launch))) for launch in one) >= 300
    assert planned[-1].kind == "training"
    for launch in planned:
        for op, payload_bytes, _ in cases(launch):
            assert payload_bytes % (4 * launch.num_ranks if op == "reduce_scatter" else 4) == 0
            assert payload_bytes > 0 or op == "barrier"


def test_each_rank_is_a_server_of_its_own() -> None:
    found = [environment(PINNED, rank, Path("log")) for rank in (0, 1)]
    assert found[0]["NCCL_HOSTID"] != found[1]["NCCL_HOSTID"]
    assert (found[0]["NCCL_PROTO"], found[0]["NCCL_MAX_CTAS"], found[0]["NCCL_RAS_ENABLE"]) == ("LL", "4", "0")
    assert "NCCL_PROTO" not in environment(ALONE, 0, Path("log"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, None),
        ({"code_sha256": "0"}, "the code"),
        ({"torch": "2.12.0", "nccl": [2, 30, 7]}, "torch and NCCL"),
        ({"launch": {}}, "the options"),
    ],
)
def test_what_differed_is_named(changed: dict[str, Any], named: str | None) -> None:
    now = made_by(PINNED, "2.11.0", (2, 28, 9))
    assert difference({**now, **changed}, now) == named
    assert difference(None, now) is not None


def test_last_words() -> None:
    assert last_words(Path("/nowhere"), 0) == "it said nothing"


def test_the_last_error_is_what_a_rank_said(tmp_path: Path) -> None:
    (tmp_path / "rank1.log").write_text(
        "Traceback\n  File x\ntorch.distributed.DistBackendError: NCCL error\n  and more\n"
    )
    assert last_words(tmp_path, 1) == "torch.distributed.DistBackendError: NCCL error"


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code = nccl_probe.main(["--out", str(tmp_path), "--dry-run", "--port", port])
    assert code == nccl_probe.BAD_INPUT
    assert f"Port {port} is in use" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--ranks", "1,2"), ("--sizes", "2"), ("--ranks", "two")])
def test_numbers_that_cannot_be(option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        nccl_probe.main(["--out", str(tmp_path), *option])
    assert ended.value.code == nccl_probe.BAD_INPUT
    assert option[0] in capsys.readouterr().err
