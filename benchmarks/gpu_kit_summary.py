"""What came out of the GPU kit, in one file and in one table.

python -m benchmarks.gpu_kit_summary summary.json      the table once more
"""

import datetime
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_decode import NVJPEG, NVJPEG_VIEWS, crossing_point
from pipeline.core.files import write_json_atomic

FILE = "summary.json"
WEIGHTS = {True: "the same weights", False: "OTHER WEIGHTS", None: "weights not comparable"}
Content = dict[str, Any]


def summarize(folder: Path, *, missing: Mapping[str, str], ended: str | None) -> Content:
    """All results of `folder`, and what follows from them.

    Args:
        folder: of the kit: nccl/, step/ and decode/ lie in it.
        missing: what became of each part, in words.
        ended: what ended the kit before its time.
    """
    results = _results(folder)
    return {
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "ended": ended,
        "parts": dict(missing),
        "reads": reads(results),
        "decoding": decoding(results),
        "results": results,
    }


def _results(folder: Path) -> dict[str, Content]:
    """By their path in the folder; one that is half written by somebody else is left out."""
    found: dict[str, Content] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            found[str(path.relative_to(folder))] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
    return found


def unpack(summary: Path, folder: Path) -> None:
    """Lay an earlier summary's results where a further run looks for them; what lies there already stays.

    Raises:
        ValueError: it is no summary.
    """
    content = json.loads(summary.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise ValueError(f"{summary} is no summary.json of the kit: it has no results.")
    for name, result in content["results"].items():
        path = folder / name
        if ".." in path.parts or Path(name).is_absolute():
            raise ValueError(f"{summary} names {name!r}, which is no file in the folder.")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, result)


def _measured(results: Mapping[str, Content], part: str) -> Iterator[Content]:
    return (result for name, result in results.items() if name.startswith(f"{part}/"))


def reads(results: Mapping[str, Content]) -> list[Content]:
    """What the host's waits cost, per network and mode: times as fast as reading twice a step, and the same weights?"""
    steps = [result for result in _measured(results, "step") if "step_seconds" in result]
    ours = [step for step in steps if step.get("configuration", {}).get("loop") == "ours"]
    found = []
    for base in ours:
        for other in ours:
            changed = {"reads": other["configuration"]["reads"]}
            if base["configuration"]["reads"] != "twice" or other is base:
                continue
            if {**base["configuration"], **changed} == other["configuration"]:
                found.append(
                    {
                        "model": base["configuration"]["model"],
                        "mode": base["configuration"]["mode"],
                        **changed,
                        "times_as_fast": base["step_seconds"]["median"] / other["step_seconds"]["median"],
                        "same_weights": _same_weights(base["weights_sha256"], other["weights_sha256"]),
                    }
                )
    return found


def _same_weights(these: Sequence[str] | None, those: Sequence[str] | None) -> bool | None:
    """Of two tries each; None: they were not compared, or not even two tries of one way are equal."""
    if these is None or those is None or len(set(these)) > 1 or len(set(those)) > 1:
        return None
    return these == those


def decoding(results: Mapping[str, Content]) -> Content:
    """How many of our processes decode as fast as nvJPEG; None: none of those tried."""
    rates = {
        result["name"]: result["pictures_per_second"]
        for result in _measured(results, "decode")
        if "pictures_per_second" in result
    }
    ours = {int(name.rpartition("-w")[2]): rate for name, rate in rates.items() if "-ours-" in name}
    crossing = {name: crossing_point(ours, rates[name]) for name in (NVJPEG, NVJPEG_VIEWS) if name in rates}
    return {"pictures_per_second": rates, "crossing_point_processes": crossing}


def table(summary: Content) -> list[str]:
    """For people, one line per figure."""
    results = summary.get("results", {})
    lines = [f"{part}: {word}" for part, word in summary.get("parts", {}).items()]
    lines += results.get(f"nccl/{FILE}", {}).get("lines", [])
    for result in [*_measured(results, "step"), *_measured(results, "decode")]:
        lines.append(f"  {result['name']:72s} {_told(result)}")
    for row in summary.get("reads", []):
        weights = WEIGHTS[row["same_weights"]]
        lines.append(
            f"  {row['model']}, {row['mode']}: reading {row['reads']} is {row['times_as_fast']:.3f} times as fast as"
            f" twice, {weights}"
        )
    for name, processes in summary.get("decoding", {}).get("crossing_point_processes", {}).items():
        lines.append(f"  {name}: {'none' if processes is None else processes} of our processes are as fast")
    return lines


def _told(result: Content) -> str:
    for key in ("error", "left_out"):
        if key in result:
            return f"{key.replace('_', ' ')}: {result[key].splitlines()[0][:100]}"
    share = result.get("share_of_bf16_peak")
    told = "" if share is None else f", {share:.1%} of the bf16 peak"
    if "flops_per_second" in result:
        return f"{result['flops_per_second'] / 1e12:.1f} TFLOP/s{told}"
    if "pictures_per_second" in result:
        return f"{result['pictures_per_second']:,.0f} pictures/s"
    seconds, memory = result["step_seconds"], result["peak_memory_bytes"]
    if memory is not None:
        told += f", {memory / 1e9:.1f} GB"
    if "batch_halved_from" in result:
        told += f", batch halved from {result['batch_halved_from']} to {result['configuration']['batch']}"
    return (
        f"{result['images_per_second']:,.0f} images/s, {1e3 * seconds['median']:.2f} ms"
        f" ({1e3 * seconds['quartile_low']:.2f} to {1e3 * seconds['quartile_high']:.2f}),"
        f" {result['host_waits_per_step']} waits{told}"
    )


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(sys.argv[1]).read_text()))))
