"""Plain values between ranks: what JSON says arrives; what is no rank's word, such as a pickle, is refused."""

import json
import os
import pickle
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pipeline
from pipeline.comm import plain_values
from pipeline.core.errors import PeerLost
from pipeline.run.launch.supervisor import supervise

PIPELINE = Path(pipeline.__file__).parent
BODY = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from pipeline.comm.plain_values import broadcast_value, gather_values
dist.init_process_group("gloo")
rank, cpu = dist.get_rank(), torch.device("cpu")
gathered = gather_values({"rank": rank, "text": "\\u00e9" * 1000 * rank, "none": None}, cpu)
given = broadcast_value([0.1, (1, 2), "a"] if rank == 1 else object(), 1, cpu)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps([gathered, given]))
dist.destroy_process_group()
"""


@pytest.mark.not_quick
def test_what_a_rank_says_arrives_at_all_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(BODY), str(tmp_path)]
    assert supervise(command, 3, num_threads=1) == 0
    for rank in range(3):
        gathered, given = json.loads((tmp_path / f"{rank}.json").read_text())
        assert gathered == [{"rank": of, "text": "é" * 1000 * of, "none": None} for of in range(3)]
        assert given == [0.1, [1, 2], "a"]


class _Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("kind", ["pickle", "garbage", "nested", "empty", "endless", "negative"])
def test_another_programs_word_is_refused_and_never_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    words = {"pickle": pickle.dumps(_Canary(canary)), "garbage": b"\xff\x00{", "nested": b"[" * 100_000}
    sent = words.get(kind, b"")
    length = {"endless": 2**62, "negative": -1}.get(kind, len(sent))

    def broadcast(tensor: torch.Tensor, _: int) -> None:
        if tensor.dtype == torch.int64:
            tensor.fill_(length)
        else:
            tensor.copy_(torch.frombuffer(bytearray(sent), dtype=torch.uint8))

    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with pytest.raises(PeerLost, match=r"(sent what is no JSON|announces a value of)"):
        plain_values.broadcast_value(None, 0, torch.device("cpu"))
    assert not canary.exists()


def test_no_code_of_ours_asks_torch_for_pickles_between_ranks() -> None:
    calls = ("_object(", "_object_list(", "monitored_barrier(", "pickle.load", "rpc.")
    found = [(path.name, call) for path in PIPELINE.rglob("*.py") for call in calls if call in path.read_text()]
    allowed = {("s3.py", "_object(")}
    assert set(found) <= allowed
