"""What ONNX Runtime takes to answer one picture: memory and time, in processes of their own.

    python -m pipeline.exporting.onnx_run model.onnx memory
    python -m pipeline.exporting.onnx_run model.onnx latency 5 10

The process that is measured imports nothing but numpy and ONNX Runtime, and runs on one thread. Latency is taken as
MLPerf Tiny prescribes (a warm-up, windows of at least ten seconds, the median of the windows); its name is theirs, and
these are no results of it.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pipeline.config.export import LatencyConfig
from pipeline.core.errors import ConfigError

NUM_WARM_UP_RUNS = 10
_BYTES_PER_KIB = 1024
_SECONDS_TO_START = 300.0
_NO_LATENCY: dict[str, Any] = {"p50_seconds": None, "p90_seconds": None}


@dataclass(frozen=True)
class OnnxRun:
    """One file in ONNX Runtime, on one thread of this machine's CPU."""

    activation_peak_bytes: int
    """Most bytes that the runtime's operators had asked for at once. Of what one run asks for, no weight is a part."""
    process_peak_bytes: int
    """What the process grew by at most, from before the file was opened: weights, their packed copies, activations and
    workspaces, with the runtime's arena off."""
    p50_seconds: float | None
    """Median over the windows of each window's median latency; None: not measured."""
    p90_seconds: float | None
    num_windows: int
    window_seconds: float


def measure(path: Path, latency: LatencyConfig) -> OnnxRun:
    """Measure one file.

    Args:
        path: Of the ONNX file.
        latency: For how long.

    Raises:
        ConfigError: ONNX Runtime does not run the file.
    """
    numbers, seconds = (
        (str(latency.num_windows), str(latency.window_seconds)),
        latency.num_windows * latency.window_seconds,
    )
    found = _in_a_process(path, "memory")
    found |= _in_a_process(path, "latency", *numbers, seconds=seconds) if latency.num_windows else _NO_LATENCY
    return OnnxRun(**found, **dataclasses.asdict(latency))


def _in_a_process(path: Path, *arguments: str, seconds: float = 0.0) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipeline.exporting.onnx_run", str(path), *arguments]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_SECONDS_TO_START + 3 * seconds
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or error).strip().splitlines()
        raise ConfigError(f"{path} is not run by ONNX Runtime here ({said[-1] if said else error}).") from error
    return json.loads(ended.stdout)


def _session(path: Path, *, has_arena: bool, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # An arena takes more than is asked for, and gives nothing back: fast, and no measure of what is needed.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = has_arena
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
        options.enable_cpu_mem_arena, options.enable_mem_pattern = True, False  # the arena keeps the account
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feed(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """One grey picture."""
    told = session.get_inputs()[0]
    shape_BCHW = [1, *(int(side) for side in told.shape[1:])]
    return {told.name: np.zeros(shape_BCHW, np.float32)}


def _memory(path: Path) -> dict[str, int]:
    before = _resident_bytes("VmRSS")
    session = _session(path, has_arena=False)
    feed = _feed(session)
    for _ in range(NUM_WARM_UP_RUNS):
        session.run(None, feed)
    process_peak_bytes = _resident_bytes("VmHWM") - before
    return {"process_peak_bytes": process_peak_bytes, "activation_peak_bytes": _requested_bytes(path)}


def _requested_bytes(path: Path) -> int:
    """Of the runtime's own account, which its profile holds for each operator (from version 1.30)."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(path, has_arena=True, profile=Path(folder, "run"))
        session.run(None, _feed(session))
        events = json.loads(Path(session.end_profiling()).read_text())
    accounts = [event["args"] for event in events if event["cat"] == "Node"]
    requested = [int(account["mem_bytes_requested_in_use"]) for account in accounts]
    weights = requested[0] - int(accounts[0]["mem_requested_in_use_delta"])  # asked for while the file was opened
    return max(requested) - weights


def _latency(path: Path, num_windows: int, window_seconds: float) -> dict[str, float]:
    session = _session(path, has_arena=True)
    feed = _feed(session)
    for _ in range(NUM_WARM_UP_RUNS):
        session.run(None, feed)
    windows = [_window(session, feed, window_seconds) for _ in range(num_windows)]
    p50_seconds, p90_seconds = np.median([np.percentile(window, (50, 90)) for window in windows], axis=0)
    return {"p50_seconds": float(p50_seconds), "p90_seconds": float(p90_seconds)}


def _window(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray], seconds: float) -> list[float]:
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        begin = time.perf_counter()
        session.run(None, feed)
        taken.append(time.perf_counter() - begin)
    return taken


def _resident_bytes(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * _BYTES_PER_KIB for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    file, what, *numbers = sys.argv[1:]
    print(
        json.dumps(
            _memory(Path(file)) if what == "memory" else _latency(Path(file), int(numbers[0]), float(numbers[1]))
        )
    )
