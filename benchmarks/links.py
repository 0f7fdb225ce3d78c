"""What a link costs: two servers in the lab, three models, several links, batches and bucket sizes.

    python -m benchmarks.links              step, exposed time and scaling at 1 Gbit/s and 100 Mbit/s; a picture
    python -m benchmarks.links --batches    SqueezeNet and AlexNet at 1 Gbit/s, per-rank batches of 1, 4 and 16

Servers are network namespaces (`pipeline.lab`), one rank with one thread on each; `alone` is one such rank without a
network. Packets are cut into frames after they leave a server (`offloads=true`), as network cards do it, which costs no
processor. Steps are the median of a run less its wait for data. Scaling is pictures per second and rank against one
rank alone. `wire` is what the busiest server sends in a step, frame headers included, over the link's bandwidth.
`forward + max(backward, wire)` is the least a step can take when communication overlaps the backward pass.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import common
from pipeline.comm.all_reduce import Network

MODELS = ("squeezenet1_0", "resnet18", "alexnet")
BANDWIDTHS = {"1gbit": 1e9, "100mbit": 1e8}
BUCKETS = ("null", "0.5", "5", "25")  # comm.bucket_megabytes beside our default; null is torch's own choice
LARGEST_DEVIATION = 0.10


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    bandwidth: str | None
    """None: one rank alone."""
    batch: int
    buckets: str = ""
    """comm.bucket_megabytes; empty: our default."""

    @property
    def name(self) -> str:
        """Of its run."""
        return f"links-{self.model}-{self.bandwidth or 'alone'}-{self.batch}-{self.buckets or 'default'}"


def measure(case: Case, steps: int, size: int) -> dict[str, Any]:
    """Train; the row."""
    shutil.rmtree(common.RUNS / case.name, ignore_errors=True)
    ranks = 2 if case.bandwidth else 1
    where = [f"name={case.name}", f"run_root={common.RUNS}"]
    train = [
        *where, f"data.root={common.SHARDS / 'links'}", f"data.size={size}", "data.num_workers=0",
        "data.augment.crop=center", f"model={case.model}", "model.num_classes=1000", "recipe.lr=0.0001",
        "tracking=disabled", f"batch.global_size={case.batch * ranks}", f"trainer.max_steps={steps}",
        "trainer.validate_every_steps=0", "trainer.checkpoint_every_steps=0", "cluster.num_threads=1",
        *([f"comm.bucket_megabytes={case.buckets}"] if case.buckets else []),
    ]  # fmt: skip
    if case.bandwidth:
        lab = [*where, "servers=2", f"bandwidth={case.bandwidth}", "offloads=true", "num_threads=1"]
        common.run("lab", *lab, "--", "python", "-m", "pipeline.train", *train)
    else:
        common.run("train", *train)
    ledger = common.read_json(common.RUNS / case.name / "ledger.json")
    rows = list(common.read_rows(case.name))[1:]
    step = statistics.median(row["perf/step_seconds"] - row["perf/data_wait_seconds"] for row in rows)
    told = ledger["time"]
    row = {
        "model": case.model,
        "bandwidth": case.bandwidth,
        "batch_per_rank": case.batch,
        "buckets": case.buckets or "default",
        "step_seconds": step,
        "images_per_second_and_rank": case.batch / step,
        "exposed_seconds": told["exposed_seconds"],
        "communication_seconds": told["communication_seconds"],
        "forward_seconds": told.get("forward_seconds"),
        "backward_seconds": told.get("backward_seconds"),
        "closed": ledger["closed"],
        "wire_seconds": None,
    }
    if case.bandwidth:
        sent = max(ledger["servers"]["measured_egress_bytes"]) / ledger["num_steps"]
        row["wire_seconds"] = Network(BANDWIDTHS[case.bandwidth]).seconds(sent)
    return row


def scaling_rows(steps: int, batch: int, size: int) -> list[dict[str, Any]]:
    """Every model on every link, beside one rank alone. AlexNet takes a third of the steps."""
    rows = []
    for model in MODELS:
        count = max(4, steps // 3) if model == "alexnet" else steps
        alone = measure(Case(model, None, batch), steps, size)
        for bandwidth in BANDWIDTHS:
            row = measure(Case(model, bandwidth, batch), count, size)
            row["scaling_efficiency"] = row["images_per_second_and_rank"] / alone["images_per_second_and_rank"]
            row["step_seconds_alone"] = alone["step_seconds"]
            rows.append(row)
    return rows


def least(row: dict[str, Any]) -> float | None:
    """forward + max(backward, wire), seconds."""
    if None in (row["forward_seconds"], row["backward_seconds"], row["wire_seconds"]):
        return None
    return row["forward_seconds"] + max(row["backward_seconds"], row["wire_seconds"])


def batch_rows(steps: int, size: int) -> list[dict[str, Any]]:
    """SqueezeNet and AlexNet at 1 Gbit/s; what the buckets do to both. AlexNet takes a third of the steps."""
    rows = []
    for model in ("squeezenet1_0", "alexnet"):
        for batch in (1, 4, 16):
            for buckets in ("", *BUCKETS) if model == "squeezenet1_0" or batch == 4 else ("",):
                case = Case(model, "1gbit", batch, buckets)
                row = measure(case, steps if model == "squeezenet1_0" else max(4, steps // 3), size)
                row["least_seconds"] = least(row)
                row["over_least"] = row["step_seconds"] / row["least_seconds"] - 1 if row["least_seconds"] else None
                rows.append(row)
                common.show(case.name, {key: row[key] for key in ("step_seconds", "least_seconds", "over_least")})
    return rows


def print_table(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Seconds in milliseconds, the rest as it is."""
    print("\n  " + "".join(f"{key.removesuffix('_seconds'):>18}" for key in keys))
    for row in rows:
        cells = []
        for key in keys:
            value = row[key]
            if key.endswith("seconds") or key == "step_seconds_alone":
                cells.append("" if value is None else f"{1e3 * value:,.1f} ms")
            else:
                cells.append("" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value))
        print("  " + "".join(f"{cell:>18}" for cell in cells))


def draw(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Step time by model: a rank alone, and on two servers by link, with the share of its speed that a rank keeps."""
    from pipeline.core.units import format_bandwidth, format_seconds
    from pipeline.reporting import figures

    marks = {None: ("o", figures.GREY), "1gbit": ("s", figures.BLUE), "100mbit": ("D", figures.ORANGE)}

    def point(axes: Any, level: int, bandwidth: str | None, seconds: float, note: str) -> None:
        mark, colour = marks[bandwidth]
        axes.plot(seconds, level, mark, color=colour, markersize=7)
        axes.annotate(note, (seconds, level), (0, 8), textcoords="offset points", ha="center", fontsize=8)

    def paint(axes: Any) -> None:
        for level, model in enumerate(reversed(MODELS)):
            mine = [row for row in rows if row["model"] == model]
            ends = [mine[0]["step_seconds_alone"], *(row["step_seconds"] for row in mine)]
            axes.plot([min(ends), max(ends)], [level, level], color=figures.GRID, zorder=0)
            point(axes, level, None, ends[0], "")
            for row in mine:
                note = f"{format_seconds(row['step_seconds'])} · {row['scaling_efficiency']:.0%}"
                point(axes, level, row["bandwidth"], row["step_seconds"], note)
        for bandwidth, (mark, colour) in marks.items():
            label = f"two servers, {format_bandwidth(BANDWIDTHS[bandwidth])}" if bandwidth else "one rank alone"
            axes.plot([], [], mark, color=colour, label=label)
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set_ylim(-0.6, len(MODELS) - 0.3)
        axes.set_yticks(range(len(MODELS)), list(reversed(MODELS)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(
            f"seconds per step (log scale), {options.batch} pictures of {options.size} px per rank;"
            " percentages: of the speed of a rank alone"
        )
        axes.xaxis.grid(True)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    figures.save(figures.draw(9.2, 3.2, paint), options.results / "links")


def main(arguments: Sequence[str]) -> int:
    """Both tables go to one kind of JSON each."""
    parser = common.parser(__doc__)
    parser.add_argument("--batches", action="store_true", help="the second table")
    parser.add_argument("--batch", type=int, default=16, help="pictures per rank in the first table (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="crop side in pixels (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of a run, AlexNet a third of it (%(default)s)")
    options = parser.parse_args(arguments)
    common.print_conditions()
    common.run("prepare", "source=builtin", f"out={common.SHARDS / 'links'}", "num_images=1200", "short_side=256")
    name = "links_batches" if options.batches else "links"
    result = common.Result(name, vars(options))
    if options.batches:
        rows = batch_rows(options.steps, options.size)
        shown = ("model", "batch_per_rank", "buckets", "step_seconds", "forward_seconds", "backward_seconds",
                 "wire_seconds", "least_seconds", "over_least", "exposed_seconds")  # fmt: skip
        over = [
            abs(row["over_least"])
            for row in rows
            if row["model"] == "squeezenet1_0" and row["buckets"] == "default" and row["over_least"] is not None
        ]
        result.floors = [
            common.Floor("SqueezeNet's step over the least it can take", max(over), at_most=LARGEST_DEVIATION)
        ]
    else:
        rows = scaling_rows(options.steps, options.batch, options.size)
        shown = ("model", "bandwidth", "step_seconds_alone", "step_seconds", "wire_seconds", "exposed_seconds",
                 "scaling_efficiency")  # fmt: skip
    print_table(rows, shown)
    result.figures["runs"] = rows
    result.floors.append(
        common.Floor("runs whose ledger closed", sum(row["closed"] is True for row in rows), at_least=len(rows))
    )
    code = result.finish(options.results)
    if not options.batches:
        draw(rows, options)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
