"""What the W&B dashboards show, as data: sections of panels, and the names of the metrics these need.

`wandb_pages.py` makes W&B's specifications of it. Nothing else names a metric of the dashboards, so that a test can
compare the names with those a real run logs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

STEP = "trainer/step"
SAMPLES = "samples"
"""Pictures seen so far: where models trained with different batches can be compared."""
TOTAL_GIGABYTES = "comm/total_gigabytes"
BEST_TOP1 = "best_val_top1"
"""Key in the summary of a run that validated."""
MODEL_GROUP = "group"
"""W&B's attribute that holds the model; see run/tracking.py."""
NOISY = 0.6
"""Weight of the running mean over what jumps from step to step."""

# What the comparison's own run logs (pipeline/comparison/tracking.py).
COMPARISON_TABLE = "comparison/models"
COMPARISON_PICTURE = "comparison/picture"
COMPARISON_BARS = {
    "comparison/gradient_bytes": ("gradient_bytes", "Gradient bytes per step"),
    "comparison/step_seconds": ("step_seconds", "Seconds per step"),
}
"""Key -> (column of the table, title)."""

# What an export's own run logs (pipeline/exporting/tracking.py).
ARTEFACTS_TABLE = "export/artefacts"
ARTEFACTS_BARS = {
    "export/num_bytes": ("num_bytes", "Bytes to ship"),
    "export/loss_change": ("judged_loss_change", "Change of the loss"),
}
"""Key -> (column of the table, title)."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Curves of metrics over `x`, one per model."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    """Unit of the y-axis."""
    x: str = STEP
    log_x: bool = False
    log_y: bool = False
    """Logarithmic y-axis, where models lie decades apart."""
    smoothing: float = 0.0
    """Weight of the exponential running mean, 0 to 1; the original stays visible."""

    @property
    def names(self) -> tuple[str, ...]:
        """Metrics that the panel needs."""
        return (self.x, *self.metrics)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """The last value of a metric, one bar per model."""

    title: str
    metric: str
    unit: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Metrics that the panel needs."""
        return (self.metric,)


@dataclass(frozen=True, kw_only=True)
class Points:
    """One point per run, from its last values."""

    title: str
    x: str
    y: str
    log_x: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Metrics that the panel needs."""
        return (self.x, self.y)


Panel = Lines | Bars | Points


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the dashboards. `text` introduces it on the report page, in Markdown."""

    title: str
    text: str
    panels: tuple[Panel, ...]


LEARNING = Section(
    title="Learning",
    text=(
        "Over the number of pictures seen, so that models trained with different batches can be compared. Training "
        "curves are smoothed; validation counts every picture of its split once."
    ),
    panels=(
        Lines(title="Training loss", metrics=("train/loss",), x=SAMPLES, smoothing=NOISY),
        Lines(title="Training top-1", metrics=("train/top1",), x=SAMPLES, smoothing=NOISY, unit="share of pictures"),
        Lines(title="Validation loss", metrics=("val/loss",), x=SAMPLES),
        Lines(title="Validation top-1", metrics=("val/top1",), x=SAMPLES, unit="share of pictures"),
        Lines(title="Validation top-5", metrics=("val/top5",), x=SAMPLES, unit="share of pictures"),
        Lines(title="Learning rate", metrics=("lr",)),
        Lines(title="Norm of the whole gradient", metrics=("train/grad_norm",), log_y=True, smoothing=NOISY),
        Lines(title="Density while pruning", metrics=("train/density",), unit="share of weights"),
    ),
)
SPEED = Section(
    title="Speed",
    text=(
        "Times belong to the machine and the link they were measured on, and are compared within one set of conditions "
        "only: the notes of each run name them."
    ),
    panels=(
        Lines(title="Pictures per second", metrics=("perf/images_per_second",), smoothing=NOISY),
        Lines(title="Seconds per step", metrics=("perf/step_seconds",), smoothing=NOISY, unit="s"),
        Lines(title="Waiting for data per step", metrics=("perf/data_wait_seconds",), smoothing=NOISY, unit="s"),
        Lines(
            title="Share of a step spent waiting for data",
            metrics=("perf/data_wait_share",),
            smoothing=NOISY,
            unit="share of the step",
        ),
    ),
)
COMMUNICATION = Section(
    title="Communication",
    text=(
        "Bytes per optimiser step, on logarithmic axes, because models lie decades apart. The residual is what the "
        "kernel counted less what was predicted: on gloo it is 0 or the run ends."
    ),
    panels=(
        Lines(title="Gradients owed per step", metrics=("comm/gradient_bytes",), log_y=True, unit="bytes"),
        Lines(title="Payload of rank 0 per step", metrics=("comm/payload_bytes",), log_y=True, unit="bytes"),
        Lines(title="Sent by a rank per step", metrics=("comm/transport_bytes",), log_y=True, unit="bytes"),
        Lines(
            title="Out of the busiest server per step", metrics=("comm/server_egress_bytes",), log_y=True, unit="bytes"
        ),
        Lines(title="Sent between servers so far", metrics=(TOTAL_GIGABYTES,), log_y=True, unit="GB"),
        Lines(title="Counted less predicted per step", metrics=("comm/residual_bytes",), unit="bytes"),
        Lines(title="Communication per step", metrics=("comm/seconds",), smoothing=NOISY, unit="s"),
        Lines(title="Exposed communication per step", metrics=("comm/exposed_seconds",), smoothing=NOISY, unit="s"),
        Lines(
            title="Exposed share of a step",
            metrics=("comm/exposed_share",),
            smoothing=NOISY,
            unit="share of the step",
        ),
        Lines(
            title="Bus bandwidth", metrics=("comm/bus_bandwidth",), log_y=True, smoothing=NOISY, unit="bytes per second"
        ),
    ),
)
COMPARISON = Section(
    title="Comparison between models",
    text=(
        "What a point of accuracy costs in gigabytes, and what each model sends and takes per step. Below, the tables "
        "of `python -m pipeline.compare`: one row per model, all under the same conditions."
    ),
    panels=(
        Lines(
            title="Validation top-1 over gigabytes sent",
            metrics=("val/top1",),
            x=TOTAL_GIGABYTES,
            log_x=True,
            unit="share of pictures",
        ),
        Points(title="Best validation top-1 and gigabytes sent", x=TOTAL_GIGABYTES, y=BEST_TOP1, log_x=True),
        Bars(title="Gradient bytes per step", metric="comm/gradient_bytes", unit="bytes"),
        Bars(title="Out of the busiest server per step", metric="comm/server_egress_bytes", unit="bytes"),
        Bars(title="Median seconds per step", metric="step_seconds_p50", unit="s"),
        Bars(title="Exposed share of the last step", metric="comm/exposed_share", unit="share of the step"),
    ),
)
SECTIONS = (LEARNING, SPEED, COMMUNICATION, COMPARISON)

REPORT_INTRODUCTION = """\
Each run is one training, and the runs of a model form a group. What a run is made of stands in its notes and in its \
configuration; what it counted stands in the `ledger.json` of its directory. These pages show what W&B was told of it, \
step by step.
"""
REPORT_LEDGER = """\
Read the bytes of a step from what the model owes to what leaves a server:

- `comm/gradient_bytes`: what the trainable parameters owe in one optimiser step. It depends on the model alone.
- `comm/payload_bytes`: what rank 0 handed to all collectives of the step. Compression makes it smaller than what is \
owed; buffers, metrics and Lightning's own broadcasts add to it.
- `comm/transport_bytes`: what a rank's sockets send for it, message headers included, as a mean over the ranks. It is \
predicted by exact formulas; where there is none, the curve is missing.
- `comm/server_egress_bytes`: what leaves the busiest server. On one machine each rank is taken as a server.
- `comm/total_gigabytes`: what left all servers in all steps so far. A gigabyte is 10^9 bytes.
- `comm/residual_bytes`: what the kernel counted on the connections between the ranks, less what was predicted.

And the times of a step, on rank 0:

- `comm/seconds`: the time in which anything was being exchanged, each moment once.
- `comm/exposed_seconds`, `comm/exposed_share`: the part of the step in which the rank waited for it with nothing else \
to do. Waiting for a rank that is late is in it.
- `comm/bus_bandwidth`: payload / time x 2(n-1)/n of n ranks, as nccl-tests defines it.

A curve that is missing was not measured. It is not zero, and `null_reasons` in `ledger.json` says why.
"""


def metric_names() -> set[str]:
    """Return every metric that a panel needs: of a run's history, or of its summary."""
    return set(_names())


def _names() -> Iterator[str]:
    for section in SECTIONS:
        for panel in section.panels:
            yield from panel.names
