"""Programs of others under `pipeline.meter`, unchanged: what a step owes, carries and sends, and what the meter costs.

    python -m benchmarks.foreign_programs
    python -m benchmarks.foreign_programs --python VENV/bin/python     one that has accelerate and transformers

Loops of torch, Lightning, timm, Accelerate and transformers (`foreign_loops`), two ranks on gloo and four for FSDP2 on
a mesh of two levels. `residual` is measured minus predicted bytes of the worst rank in the worst phase: 0 in every row
where all collectives have a formula. The meter's share is what rank 0 spends in its code, of all steps but the first.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.foreign_loops import LOOPS

NAME = "foreign_programs"
NUM_RANKS = {"fsdp2_on_two_levels": 4}
NEEDS = {"accelerate_loop": "accelerate", "transformers_trainer": "transformers"}


def measure(loop: str, python: str) -> dict[str, Any] | None:
    """The row of a loop; None where its library is not installed."""
    if loop in NEEDS and subprocess.run([python, "-c", f"import {NEEDS[loop]}"], capture_output=True).returncode:
        print(f"  {loop}: left out, {NEEDS[loop]} is not installed", flush=True)
        return None
    directory = common.RUNS / NAME / loop
    shutil.rmtree(directory, ignore_errors=True)
    ranks = [f"--nproc-per-node={NUM_RANKS.get(loop, 2)}", str(Path(__file__).with_name("foreign_loops.py")), loop]
    where = [f"name={NAME}/{loop}", f"run_root={common.RUNS}", "placement=rank"]
    command = [python, "-m", "torch.distributed.run", "--standalone", *ranks]
    print(f"$ python -m pipeline.meter {' '.join(where)} -- torchrun {ranks[0]} benchmarks/foreign_loops.py {loop}")
    log = common.RUNS / NAME / f"{loop}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        metered = [sys.executable, "-m", "pipeline.meter", *where, "--", *command]
        code = subprocess.run(metered, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"{loop} ended with {code}: {log}")
    return row_of(json.loads((directory / "ledger.json").read_text()))


def row_of(ledger: dict[str, Any]) -> dict[str, Any]:
    measured = ledger["attempts"][0]["measured"]
    residuals = [residual for row in measured["rows"] for residual in row["residual_bytes_per_rank"] or ()]
    is_predicted = all(row["predicted_bytes_per_rank"] is not None for row in measured["rows"])
    steps = [row for row in ledger["collectives"] if row["phase"] == "train" and row["committed"]]
    per_rank = ledger["transport"]["measured_bytes_per_rank"]
    return {
        "num_ranks": ledger["world_size"],
        "num_steps": ledger["num_steps"],
        "owed_bytes_per_step": ledger["gradient_bytes"],
        "carried_bytes_per_step": sum(row["payload_bytes"] for row in steps) / ledger["num_steps"],
        "measured_bytes_per_rank_and_step": sum(per_rank) / len(per_rank) / ledger["num_steps"],
        "residual_bytes": max(residuals, key=abs) if is_predicted else None,
        "closed": ledger["closed"],
        "why_not_closed": ledger["null_reasons"].get("closed"),
        "origins": sorted({row["origin"] for row in ledger["collectives"]}),
        "groups": sorted({row["group"] for row in ledger["collectives"] if "group" in row}),
        "step_seconds": ledger["time"]["step_seconds"]["p50"],
        "meter_share": ledger["meter_overhead_fraction"],
    }


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the programs (%(default)s)")
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), default=list(LOOPS), help="which (all)")
    arguments = parser.parse_args()
    common.print_conditions()
    rows: list[dict[str, Any]] = []
    for loop in arguments.loops:
        row = measure(loop, arguments.python)
        if row is not None:
            rows.append({"program": loop, **row})
            print(
                f"  {loop:<24} owed {row['owed_bytes_per_step'] / 1e6:8.3f} MB, carried"
                f" {row['carried_bytes_per_step'] / 1e6:8.3f} MB, sent"
                f" {row['measured_bytes_per_rank_and_step'] / 1e6:8.3f} MB, residual {row['residual_bytes']},"
                f" closed {row['closed']}, meter {100 * row['meter_share']:.2f} % of {row['step_seconds']:.3f} s",
                flush=True,
            )
    floors = [
        common.Floor("programs", len(rows), at_least=8),
        common.Floor("programs whose ledger closes", sum(row["closed"] is True for row in rows), at_least=8),
        common.Floor("programs that do not close", sum(row["closed"] is False for row in rows), at_most=0),
    ]
    result = common.Result(NAME, {"loops": arguments.loops}, {"programs": rows}, floors)
    return result.finish(arguments.results)


if __name__ == "__main__":
    sys.exit(main())
