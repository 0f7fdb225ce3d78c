"""Every byte accounted for: one table of trainings in the lab, each with what the kernel counted that nobody explains.

    python -m benchmarks.ledger_matrix                 32 trainings of a few steps
    python -m benchmarks.ledger_matrix --small         the small models on 2 and 3 servers

Servers are network namespaces (`pipeline.lab`), ranks real processes, gloo over TCP. `residual` is measured minus
predicted bytes, added up over all ranks, phases and steps without regard to sign; it must be 0. `card` is the share of
the network cards' bytes that connections and headers do not explain, segmentation offloads off; at most 0.05 %.
`out of a server` is what the busiest server sends to others in a step, as the kernel counted it.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common

CARD_CEILING = 0.0005
STEPS = 3


@dataclass(frozen=True)
class Case:
    """One training."""

    model: str
    servers: int
    ranks_per_server: int = 1
    placement: str = "contiguous"
    hook: str = "none"
    accumulate: int = 1
    find_unused: bool = False

    @property
    def name(self) -> str:
        """Of its run."""
        unused = "-unused" if self.find_unused else ""
        return (
            f"ledger-{self.model}-{self.servers}x{self.ranks_per_server}-{self.placement}-{self.hook}"
            f"-{self.accumulate}{unused}"
        )

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.servers * self.ranks_per_server


SMALL = [
    *(Case("squeezenet1_1", servers) for servers in (2, 3)),
    Case("squeezenet1_1", 2, hook="fp16"),
    Case("squeezenet1_1", 3, hook="bf16", accumulate=4),
    Case("resnet18", 2, accumulate=4),
    Case("resnet18", 3, find_unused=True),
    Case("squeezenet1_1", 2, ranks_per_server=2),
    Case("squeezenet1_1", 2, ranks_per_server=2, placement="interleaved"),
]
WHOLE = [
    *(
        Case(model, servers)
        for servers in (2, 3, 4)
        for model in ("squeezenet1_0", "squeezenet1_1", "resnet18", "resnet50")
    ),
    Case("alexnet", 2),
    Case("alexnet", 3),
    Case("vgg16", 2),
    *(
        Case(model, servers, hook=hook)
        for model in ("squeezenet1_0", "resnet18")
        for hook in ("fp16", "bf16")
        for servers in (2, 3)
    ),
    *(Case(model, servers, accumulate=4) for model in ("squeezenet1_0", "resnet18") for servers in (2, 4)),
    Case("squeezenet1_0", 2, find_unused=True),
    Case("resnet18", 3, find_unused=True),
    Case("resnet18", 4, accumulate=4, find_unused=True),
    Case("squeezenet1_1", 2, ranks_per_server=2),
    Case("squeezenet1_1", 2, ranks_per_server=2, placement="interleaved"),
]


def measure(case: Case, root: Path, runs: Path) -> dict[str, Any]:
    """Train in the lab; the row."""
    shutil.rmtree(runs / case.name, ignore_errors=True)
    lab = [f"servers={case.servers}", f"ranks_per_server={case.ranks_per_server}", f"placement={case.placement}"]
    per_rank = 2 * case.accumulate
    train = [
        f"name={case.name}", f"run_root={runs}", f"data.root={root}", "data.size=64", "data.num_workers=0",
        f"model={case.model}", "model.num_classes=1000", "recipe.lr=0.0001", f"comm.hook={case.hook}",
        f"comm.find_unused_parameters={str(case.find_unused).lower()}", "comm.strict=false", "tracking=disabled",
        f"batch.global_size={per_rank * case.num_ranks}", "batch.max_per_rank=2", f"trainer.max_steps={STEPS}",
        "trainer.validate_every_steps=0", "trainer.checkpoint_every_steps=0",
    ]  # fmt: skip
    where = [f"name={case.name}", f"run_root={runs}"]
    common.run("lab", *where, *lab, "--", "python", "-m", "pipeline.train", *train)
    ledger = common.read_json(runs / case.name / "ledger.json")
    measured = ledger["attempts"][-1]["measured"]
    residual = sum(abs(value) for row in measured["rows"] for value in row["residual_bytes_per_rank"])
    cards = [card["residual_fraction"] for card in measured["interfaces"]]
    return {
        "model": case.model,
        "servers": case.servers,
        "ranks_per_server": case.ranks_per_server,
        "placement": case.placement,
        "hook": case.hook,
        "accumulate": case.accumulate,
        "find_unused": case.find_unused,
        "closed": ledger["closed"],
        "residual_bytes": residual,
        "gradient_bytes": ledger["gradient_bytes"],
        "measured_bytes_per_rank_and_step": max(ledger["transport"]["measured_bytes_per_rank"]) / STEPS,
        "egress_bytes_per_step": max(ledger["servers"]["measured_egress_bytes"]) / STEPS,
        "predicted_egress_bytes_per_step": max(ledger["servers"]["predicted_egress_bytes"]) / STEPS,
        "card_residual_fraction": max(map(abs, cards)) if cards else None,
        "retransmitted_bytes": sum(measured["retransmitted_bytes_per_rank"]),
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line a training."""
    heads = ("model", "servers", "ranks", "hook", "micro", "unused", "out of a server, bytes/step", "residual", "card")
    widths = (15, 8, 7, 6, 6, 8, 29, 10, 10)
    print("\n  " + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for row in rows:
        card = row["card_residual_fraction"]
        cells = (
            row["model"],
            row["servers"],
            f"{row['servers'] * row['ranks_per_server']}{'*' if row['placement'] == 'interleaved' else ''}",
            row["hook"],
            row["accumulate"],
            "looked" if row["find_unused"] else "",
            f"{row['egress_bytes_per_step']:,.0f}",
            f"{row['residual_bytes']:,}",
            "" if card is None else f"{card:.4%}",
        )
        print("  " + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    if any(row["placement"] == "interleaved" for row in rows):
        print("  * ranks dealt out to the servers in turn")


def main(arguments: Sequence[str]) -> int:
    """All cases; every residual must be 0."""
    parser = common.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="few and small cases")
    parser.add_argument("--runs", type=Path, default=common.RUNS, help="directory of the runs (%(default)s)")
    parser.add_argument("--shards", type=Path, default=common.SHARDS / "ledger", help="made if missing (%(default)s)")
    options = parser.parse_args(arguments)
    common.print_conditions()
    common.run("prepare", "source=builtin", f"out={options.shards}", "num_images=160")
    result = common.Result("ledger_matrix", vars(options))
    rows = [measure(case, options.shards, options.runs) for case in (SMALL if options.small else WHOLE)]
    print_table(rows)
    result.figures["trainings"] = rows
    cards = [row["card_residual_fraction"] for row in rows if row["card_residual_fraction"] is not None]
    result.floors = [
        common.Floor("largest residual, bytes", max(row["residual_bytes"] for row in rows), at_most=0),
        common.Floor("trainings whose ledger closed", sum(row["closed"] is True for row in rows), at_least=len(rows)),
        common.Floor("largest unexplained share of a card", max(cards, default=float("nan")), at_most=CARD_CEILING),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
