"""What a device takes to decode a package and to apply a delta: seconds on one core, memory beyond the interpreter's.

    python -m benchmarks.decode_package --weights squeezenet_v1_0.npz

SqueezeNet v1.0's published weights as a package of 400,000 bytes, made without pictures; the newer version has one of a
hundred weights changed by a tenth. Each row is a fresh process on one core that has imported the reference decoder and
nothing else of ours, the median of five.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import common
from pipeline.config.model import ModelConfig
from pipeline.config.registry import preset_input
from pipeline.training.trained import load_trained

NAME, MODEL = "decode-package", "squeezenet1_0_caffe"
NUM_ROUNDS = 5
MOST_SECONDS, MOST_TIMES_FP32 = 1.0, 3.0


def measure(package: Path, delta: Path | None) -> dict[str, float]:
    """The median of some fresh processes."""
    command = [sys.executable, "-m", "benchmarks.as_device", str(package)]
    command += [] if delta is None else [str(delta)]
    rounds = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(NUM_ROUNDS)
    ]
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def write_newer(weights: Path, path: Path) -> int:
    """The same weights, a few of them changed, for `export`; returns their bytes in fp32."""
    model = load_trained(weights, ModelConfig(name=MODEL, input=preset_input(MODEL))).model
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for value in state.values():
        value *= 1 + 0.1 * (torch.rand(value.shape, generator=generator) < 0.01)
    torch.save(state, path)
    return sum(value.numel() * value.element_size() for value in state.values())


def main(arguments: Sequence[str]) -> int:
    """Two packages, the delta between them, two rows."""
    parser = common.parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="v1.0's published weights, as .npz")
    options = parser.parse_args(arguments)
    common.print_conditions()
    first, second = common.fresh(f"{NAME}-first"), common.fresh(f"{NAME}-second")
    own = ("formats=[package]", f"model={MODEL}")
    common.run("export", f"name={first}", f"checkpoint={options.weights}", *own, "max_bytes=400000")
    newer = common.RUNS / f"{NAME}.pth"
    fp32_bytes = write_newer(options.weights, newer)
    base = common.RUNS / f"{NAME}-first" / "model.sqz"
    common.run("export", f"name={second}", f"checkpoint={newer}", *own, f"base={base}")
    delta = common.RUNS / f"{NAME}-second" / "model.sqd"
    result = common.Result("decode_package", vars(options))
    result.figures |= {"fp32_bytes": fp32_bytes, "package_bytes": base.stat().st_size}
    result.figures["delta_bytes"] = delta.stat().st_size
    result.figures["rows"] = rows = {"decode": measure(base, None), "apply and decode": measure(base, delta)}
    for name, row in rows.items():
        common.show(name, row)
        result.floors.append(common.Floor(f"{name}: seconds of a core", row["cpu_seconds"], at_most=MOST_SECONDS))
    times = rows["decode"]["peak_bytes"] / fp32_bytes
    result.floors.append(common.Floor("decode: memory over fp32 weights", times, at_most=MOST_TIMES_FP32))
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
