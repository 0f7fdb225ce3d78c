"""Whether two runs ended in the same state and left the same record: bit for bit, with no tolerance."""

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from tests.commands import rows
from tests.making.pairs import Pair


def load(run: Path) -> dict[str, Any]:
    """Its last checkpoint."""
    return torch.load(max((run / "checkpoints").glob("step=*.ckpt")), weights_only=True)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nests of containers, tensors and plain values are not bit for bit the same."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [f"{path}.{key}" for key in one.keys() ^ other.keys()]
        return keys + [
            d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{path}.{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    return [] if one == other else [f"{path}: {one!r} and {other!r}"]


def fed(root: Path, name: str, devices: int) -> dict[tuple[int, int, int], set[tuple[Any, ...]]]:
    """By (rank, step, micro-batch): the different things the learner was fed there, in all attempts."""
    seen: dict[tuple[int, int, int], set[tuple[Any, ...]]] = {}
    for rank in range(devices):
        for line in (root / f"{name}.fed" / f"rank{rank}.jsonl").read_text().splitlines():
            said = json.loads(line)
            place = (rank, said["step"], said["micro"])
            seen.setdefault(place, set()).add((tuple(said["ids"]), said["pixels"], said["generators"]))
    return seen


def global_batches(fed_to: Path, num_ranks: int, *, by_rank: bool = False) -> dict[int, list[int]]:
    """By step: the sample ids of its global batch, in order, as attempts on `num_ranks` ranks were fed it.

    Put together as `pipeline.data.order.stripe` cuts a batch. Attempts must agree; one that was killed amid a step may
    leave that batch incomplete.
    """
    pieces: dict[int, dict[tuple[int, int], list[int]]] = {}
    for rank in range(num_ranks):
        for said in map(json.loads, (fed_to / f"rank{rank}.jsonl").read_text().splitlines()):
            if said["num_ranks"] == num_ranks:
                place = (rank, said["micro"]) if by_rank else (said["micro"], rank)
                assert pieces.setdefault(said["step"], {}).setdefault(place, said["ids"]) == said["ids"], said
    return {step: [number for place in sorted(cut) for number in cut[place]] for step, cut in pieces.items()}


def committed(ledger: dict[str, Any]) -> Counter[tuple[str, ...]]:
    """(calls, bytes) of the committed training steps, over all attempts."""
    totals: Counter[tuple[str, ...]] = Counter()
    for row in ledger["collectives"]:
        if row["phase"] == "train" and row["committed"]:
            totals[row["op"], row["origin"], "calls"] += row["num_calls"]
            totals[row["op"], row["origin"], "bytes"] += row["payload_bytes"]
    return totals


def layout(ledger: dict[str, Any]) -> list[tuple[int, int, int]]:
    """The gradient buckets, without their times."""
    return [(bucket["index"], bucket["bytes"], bucket["num_parameters"]) for bucket in ledger["buckets"]]


def assert_same(pair: Pair, *, least_attempts: int = 2, under_way: Collection[int] = ()) -> None:
    """The resumed run is the unbroken one.

    Args:
        pair: The runs.
        least_attempts: Of the resumed one.
        under_way: Steps whose residual is told later.
    """
    unbroken, resumed = load(pair.unbroken), load(pair.resumed)
    for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert not differences(unbroken[part], resumed[part], part)
    for part in ("step", "learner", "best_score", "must_match", "powersgd", "rank_states", "outer"):
        assert not differences(unbroken["squeezewire"][part], resumed["squeezewire"][part], part)
    assert rows(pair.unbroken) == rows(pair.resumed)
    assert [row["trainer/step"] for row in rows(pair.resumed)] == list(range(1, len(rows(pair.unbroken)) + 1))

    one, other = fed(pair.root, "unbroken", pair.devices), fed(pair.root, pair.name, pair.devices)
    assert one == other
    assert all(len(things) == 1 for things in other.values())

    ledgers = [json.loads((run / "ledger.json").read_text()) for run in (pair.unbroken, pair.resumed)]
    assert committed(ledgers[0]) == committed(ledgers[1])
    for ledger in ledgers:
        ledger["transport"].pop("retransmitted_bytes_per_rank")  # the network's mood
    for part in ("num_steps", "transport", "servers", "per_step", "gradient_bytes", "layers"):
        assert ledgers[0][part] == ledgers[1][part], part
    assert layout(ledgers[0]) == layout(ledgers[1])
    if pair.devices > 1:
        assert ledgers[1]["closed"] is True
        assert ledgers[1]["transport"]["residual_bytes_per_rank"] == [0] * pair.devices
        for row in rows(pair.resumed):
            is_told = row["trainer/step"] not in under_way
            assert row.get("comm/residual_bytes", "not told") == (0 if is_told else "not told"), row
    attempts = [attempt["attempt"] for attempt in ledgers[1]["attempts"]]
    assert attempts == list(range(1, len(attempts) + 1)) and len(attempts) >= least_attempts
