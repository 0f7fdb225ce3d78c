"""Trainings on servers of the lab whose network falters: what it costs in time, and what the ledger says of it.

    python -m benchmarks.faltering_network [--only 'cut for 1 s']

Needs what the lab needs. A small SqueezeNet 1.1, six steps, gradients of 2.9 MB. Each row is what
tests/distributed/test_faltering.py asserts: the ledger closes with a residual of 0 bytes, the card's bytes are
explained, the weights are the undisturbed run's bit for bit; or all ranks end with 75, each naming the address that
does not answer, and come back. A row that does not hold ends the benchmark.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common

NAME = "faltering_network"
LARGEST_UNEXPLAINED = 0.02
"""Of a card's bytes: selective acknowledgements, 12 bytes or more in a segment of 1,514."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="networks by their names in the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """One after another: they would share the cores."""
    from tests.distributed import faltering
    from tests.making.shards import write_shards

    options = parse(arguments)
    common.print_conditions()
    result = common.Result(NAME, {})
    with tempfile.TemporaryDirectory() as scratch:
        root, shards = Path(scratch), Path(scratch) / "shards"
        write_shards(shards)
        names = options.only or list(faltering.NETWORKS)
        rows = []
        for number, name in enumerate(names):
            rows.append(faltering.measure(name, shards, root / str(number)))
            common.show(name, rows[-1])
        result.figures["trainings"] = rows
        result.figures["endings"] = [] if options.only else [
            faltering.measure_cut_for_ever(shards, root / "cut", {}),
            faltering.measure_large_frames(shards, root / "large"),
        ]  # fmt: skip
    for row in result.figures["endings"]:
        common.show(row["network"], row)
    worst = max(row["unexplained_fraction"] for row in rows)
    result.floors = [
        common.Floor("residual bytes of all ledgers", sum(row["residual_bytes"] for row in rows), at_most=0),
        common.Floor("largest unexplained share of a card's bytes", worst, at_most=LARGEST_UNEXPLAINED),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
