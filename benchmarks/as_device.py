"""What `decode_package` measures: a fresh process on one core that decodes a package, or applies a delta and decodes.

    python -m benchmarks.as_device model.sqz [model.sqd]

Imports the reference decoder, the standard library and numpy; prints seconds, and the most bytes beyond those held.
"""

import json
import os
import sys
import time
from pathlib import Path

from pipeline.models.sqz.decoder import decode
from pipeline.models.sqz.delta import apply_delta


def resident_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main(package: str, delta: str | None = None) -> None:
    """Decode one file, or the newer one that the delta makes of it."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    content = Path(package).read_bytes()
    change = None if delta is None else Path(delta).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, wall, cpu = resident_bytes("VmRSS"), time.perf_counter(), time.process_time()
    tensors = decode(content if change is None else apply_delta(content, change)).tensors()
    found = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    found |= {"peak_bytes": resident_bytes("VmHWM") - before, "num_tensors": len(tensors)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
