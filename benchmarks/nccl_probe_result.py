"""What benchmarks.nccl_probe makes of what its ranks left: a launch's result, and the summary of all."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.nccl_probe_plan import Launch, condition_of, predict
from pipeline.comm.wire import nccl_log
from pipeline.comm.wire.gloo import NotDerivable

SCHEMA = 1


def collect(
    launch: Launch, folder: Path, made_by: dict[str, Any], version: Sequence[int] | None, problem: str | None
) -> dict[str, Any]:
    """The result of a launch, as its JSON file holds it.

    Args:
        launch: What was started.
        folder: What its ranks left.
        made_by: What measured it.
        version: NCCL's, by the library.
        problem: What went wrong, as a sentence.
    """
    logs = [_text(folder / f"rank{rank}.nccl.log") for rank in range(launch.num_ranks)]
    said = [*logs, *(_text(folder / f"rank{rank}.log") for rank in range(launch.num_ranks))]
    refusal = next(filter(None, map(nccl_log.read_refusal, said)), None)
    transports = sorted(set().union(*map(nccl_log.read_transports, logs)))
    ranks = [list(_records(folder / f"rank{rank}.jsonl")) for rank in range(launch.num_ranks)]
    together = list(zip(*ranks, strict=False))
    if problem is None and any(not name.startswith("NET/Socket") for name in transports):
        problem = f"Ranks talk by {', '.join(transports)}, and not over sockets alone, which are what is counted."
    condition = "gloo has none." if launch.backend == "gloo" else condition_of(launch, logs[0], version)
    return {
        "schema": SCHEMA,
        "name": launch.name,
        "is_complete": problem is None,
        "problem": problem,
        "refusal": refusal,
        "made_by": made_by,
        "nccl": None if launch.backend == "gloo" else nccl_log.read_version(logs[0]) or version,
        "condition": str(condition),
        "transports": transports,
        "machine": together[0][0] if together else None,
        "cases": [_case(launch, records, condition) for records in together[1:]],
    }


def _case(launch: Launch, ranks: Sequence[dict[str, Any]], condition: Any) -> dict[str, Any]:
    first = ranks[0]
    choices = list(nccl_log.read_choices("\n".join(first["choices"])))
    calls = [(op, payload_bytes, root) for op, payload_bytes, root in first["calls"]]
    predicted = predict(launch, calls, choices, condition)
    sent = [record["sent_bytes"] for record in ranks]
    payload_bytes = sum(size for _, size, _ in calls)
    known = not isinstance(predicted, NotDerivable)
    return {
        **{key: first[key] for key in ("kind", "name", "step", "calls") if key in first},
        "payload_bytes": payload_bytes,
        "sent_bytes_per_rank": sent,
        "predicted_bytes_per_rank": predicted if known else None,
        "residual_bytes_per_rank": [a - b for a, b in zip(sent, predicted, strict=True)] if known else None,
        "reason": None if known else predicted.reason,
        "sent_over_payload": sum(sent) / len(sent) / payload_bytes if payload_bytes else None,
        "is_correct": all(record["is_correct"] for record in ranks),
        "choices": [[c.op, c.count_bytes, c.algorithm, c.protocol, c.num_channels] for c in choices],
    }


# --- summary -----------------------------------------------------------------------------------------------------


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many cases, how many as predicted, and the worst; `lines` says the same for people."""
    cases = [(result["name"], case) for result in results for case in result["cases"]]
    predicted = [(name, case) for name, case in cases if case["residual_bytes_per_rank"] is not None]
    equal = [case for _, case in predicted if not any(case["residual_bytes_per_rank"])]
    wrong = [case for _, case in cases if not case["is_correct"]]
    counts = {
        "num_launches": len(results),
        "num_incomplete_launches": sum(not result["is_complete"] for result in results),
        "num_cases": len(cases),
        "num_equal": len(equal),
        "num_different": len(predicted) - len(equal),
        "num_unpredicted": len(cases) - len(predicted),
        "num_wrong_results": len(wrong),
    }
    worst = max(predicted, key=lambda named: worst_residual(named[1]), default=None)
    largest = None
    if worst is not None and worst_residual(worst[1]):
        name, case = worst
        largest = {"launch": name, **{key: case[key] for key in ("name", "calls", "residual_bytes_per_rank")}}
    lines = [
        f"{counts['num_cases']:,} cases in {len(results)} launches: {len(equal):,} with residual 0, "
        f"{counts['num_different']:,} with another, {counts['num_unpredicted']:,} not predicted, {len(wrong):,} with a"
        " wrong result"
    ]
    if largest is not None:
        calls = ", ".join(f"{op} of {size:,} B" for op, size, _ in largest["calls"])
        residual = largest["residual_bytes_per_rank"]
        lines.append(f"largest residual: {residual} bytes per rank, {largest['launch']}, {largest['name']}: {calls}")
    reasons = sorted({case["reason"] for _, case in cases if case["reason"]})
    lines += [f"not predicted: {reason}" for reason in reasons]
    lines += [f"{result['name']}: {result['problem']}" for result in results if result["problem"]]
    return {"schema": SCHEMA, **counts, "largest_residual": largest, "lines": lines}


def worst_residual(case: dict[str, Any]) -> int:
    """Of any rank, without its sign."""
    return max(map(abs, case["residual_bytes_per_rank"]))


def line_of(result: dict[str, Any]) -> str:
    """One launch for people."""
    residuals = [case["residual_bytes_per_rank"] for case in result["cases"]]
    equal = sum(found is not None and not any(found) for found in residuals)
    problem = f": {result['problem']}" if result["problem"] else ""
    return f"{result['name']}: {equal} of {len(residuals)} cases as predicted, {result['seconds']:.1f} s{problem}"


# --- files -------------------------------------------------------------------------------------------------------


def num_records(folder: Path) -> int:
    """Cases that the first rank has measured."""
    return sum("sent_bytes" in record for record in _records(folder / "rank0.jsonl"))


def last_words(folder: Path, rank: int) -> str:
    """The line of a rank's output that says why it ended: the last that is an error, else the last."""
    lines = [line.strip() for line in _text(folder / f"rank{rank}.log").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*Error\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines alone: the last may have been cut."""
    for line in _text(path).splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
