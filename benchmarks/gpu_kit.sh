#!/bin/bash
# All that is to be measured on a machine with one GPU: bash benchmarks/gpu_kit.sh [FOLDER] [--dry-run] [--resume FILE]
# The machine's own python3 is taken where it has torch, else this checkout's environment; PYTHON=... overrides.
set -euo pipefail
cd "$(dirname "$0")/.."

has_torch='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
for python in ${PYTHON:+"$PYTHON"} python3 .venv/bin/python; do
    if command -v "$python" > /dev/null && "$python" -c "$has_torch"; then
        exec "$python" -m benchmarks.gpu_kit "$@"
    fi
done
echo "error: no python with torch here: give one (PYTHON=/path/to/python3 bash benchmarks/gpu_kit.sh)." >&2
exit 2
