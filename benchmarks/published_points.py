"""The forecast against published measurements of others: one constant for each kind of link, the rest predicted.

    python -m benchmarks.published_points     a minute

A point is a text that gives the speed of one GPU (or of one server), a library, a link and the speed of many. From the
model's name and the first speed alone the forecast of `pipeline.plan` (`model=`) says what many do. One constant is
free for each kind of link: the share of the line rate that bytes get, or the rate itself where no text gives one. It
is fitted on one point, the one that the forecast itself says its link holds back most, frozen, and never touched for
another.

Assumed of all: what ASSUMPTIONS says, and of a kind what its `assumes` says. Efficiency and exposed time are against
what computes alone and whose speed the forecast is given: a GPU, or a server with all of its own, so that what a server
loses inside is in neither. Exposed time is scored where it was at least 1 % of a step. Medians are over predicted
points only, also of lone GPUs and of servers apart, and of lone GPUs without TAKING_PART, which all links share.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks import common
from pipeline.comm.all_reduce import Network
from pipeline.comm.forecast import StepForecast
from pipeline.config.model import InputConfig, ModelConfig
from pipeline.forecasting.alone import estimate_source
from pipeline.forecasting.grid import Cluster, step_on
from pipeline.forecasting.source import Source

LARGEST_EFFICIENCY_ERROR, LARGEST_EXPOSED_ERROR = 0.06, 0.35
SCORED_SHARE = 0.01
ROUND_SECONDS = 2e-5  # of a message between two hosts: not fitted
UNKNOWN_RATE = 1e9  # bit/s: where no text gives a line rate, the constant is in Gbit/s
TAKING_PART = 0.08
DDP = "pytorch benchmarks/distributed/ddp README"
ASSUMPTIONS = (
    "fp32 gradients of the whole model, 1,000 classes, no auxiliary head; a third of a step is forward.",
    f"A message takes {ROUND_SECONDS * 1e6:g} us; no rank is late; what GPUs of one server exchange takes no time, or"
    " is in the speed of the server where that is what computes alone.",
    "All-reduces are one ring over all GPUs; Horovod sends tensors in 1 MiB as they become ready, DDP and the others in"
    " its buckets of 25 MiB.",
    "Parameter servers hold whole variables, as many servers as the text says, each on a card of its own; every worker"
    " pushes and then pulls, all at once.",
    f"A GPU that trains with others takes {TAKING_PART:.0%} longer than a plain program on one, whatever the link"
    f" ({DDP}: eight GPUs of one server against no DDP, median of four models); where a server is what computes alone,"
    " that is in its speed.",
)

HOROVOD = "Horovod README, 2017"
EBUG = "e-bug/distributed-tensorflow-benchmarks a0d3d61, 2017"
TENSORFLOW = "TensorFlow r1 guide, performance/benchmarks, 2017"
DLPERF = "DLPerf v1.0, dlperf_benchmark_test_report_v1, 2020"
ISSUE = "horovod issue {}"


@dataclass(frozen=True)
class Kind:
    """Links of one kind, which have one constant."""

    name: str
    algorithm: str
    rate: float | None
    """Line rate of a server's card in bit/s; None: no text gives it."""
    assumes: str = ""


RDMA = Kind("RoCE with RDMA, NCCL", "ring", 25e9, "the 40 Gbit/s of issue 416 get the share that 25 Gbit/s do")
TCP = Kind(
    "TCP, NCCL", "ring", 25e9, "issue 779: 256 pictures per GPU, which its text does not say, and fp32 gradients"
)
MPI_TCP = Kind("TCP, MPI on the CPU", "ring", 25e9, "summing on the CPU is in the constant")
MPI_RDMA = Kind("RoCE with RDMA, MPI on the CPU", "ring", 25e9, "summing on the CPU is in the constant")
GRPC_25 = Kind("25 Gbit/s, gRPC", "parameter_server", 25e9, "four parameter servers, which the text does not say")
GRPC_CPU = Kind("25 Gbit/s, gRPC, variables on the CPU", "parameter_server", 25e9, "as the one before")
K80 = Kind("EC2 p2.xlarge, gRPC", "parameter_server", None)
ARIES = Kind("Cray Aries, gRPC", "parameter_server", None)
K80_X8 = Kind("EC2 p2.8xlarge, gRPC", "parameter_server", None, "a server sums before it pushes, and is what computes")
IB = Kind("InfiniBand, NCCL", "ring", 100e9, "eight GPUs of a server are what computes alone; a card of 400 is one")


@dataclass(frozen=True)
class Point:
    """One published cluster. A unit is what computes alone: a GPU, or a server with all of its GPUs."""

    kind: Kind
    source: str
    model: str
    batch: int
    """Pictures of a step of a unit."""
    alone: float
    """Pictures per second of one unit alone."""
    servers: int
    units_per_server: int
    total: float
    """Pictures per second of all units."""
    parameter_servers: int = 1
    bucket_megabytes: float | None = 1.0
    rate: float | None = None
    """Line rate where it is not the kind's."""
    gpu: float | None = None
    """Where the unit is a server: pictures per second of as many lone GPUs as it has, which the forecast is not told.
    None: the unit is one GPU, whose program knew of no others."""

    @property
    def num_units(self) -> int:
        """Of all servers."""
        return self.servers * self.units_per_server

    @property
    def step_seconds(self) -> float:
        """As published."""
        return self.batch * self.num_units / self.total

    @property
    def line_rate(self) -> float:
        """Of which the constant is a share."""
        return self.rate or self.kind.rate or UNKNOWN_RATE


def horovod(kind: Kind, totals: Sequence[float], parameter_servers: int = 1) -> list[Point]:
    """4 servers of 4 Pascal GPUs, 64 pictures on each: VGG-16, Inception V3, ResNet-101."""
    rows = zip(("vgg16", "inception_v3", "resnet101"), (130.9, 134.4, 119.4), totals, strict=True)
    return [Point(kind, HOROVOD, name, 64, alone, 4, 4, total, parameter_servers) for name, alone, total in rows]


def tensorflow(
    kind: Kind,
    source: str,
    model: str,
    batch: int,
    alone: float,
    rows: Sequence[tuple[int, float, int]],
    gpu: float | None = None,
) -> list[Point]:
    """Parameter servers: (units, pictures per second of all, parameter servers) of each row; `gpu`: of one of eight."""
    of_eight = gpu and 8 * gpu
    return [
        Point(kind, source, model, batch, alone, units, 1, total, servers, gpu=of_eight)
        for units, total, servers in rows
    ]


def dlperf(
    stack: str, gpu: float, of_a_server: float, totals: Sequence[float], buckets: float | None = None
) -> list[Point]:
    """ResNet-50 with 128 pictures on each of a server's 8 V100, on 2 and 4 servers; the server is the unit."""
    rows = zip((2, 4), totals, strict=True)
    source = f"{DLPERF}: {stack}"
    return [Point(IB, source, "resnet50", 1024, of_a_server, n, 1, total, 1, buckets, gpu=8 * gpu) for n, total in rows]


def ddp(model: str, gpu: float, of_a_server: float, seconds: float) -> Point:
    """Two servers of 8 V100 with four 100 Gbit/s cards, 32 pictures per GPU; the text gives seconds of a step."""
    return Point(IB, DDP, model, 256, 256 / of_a_server, 2, 1, 512 / seconds, 1, None, 400e9, 256 / gpu)


POINTS = (
    *horovod(RDMA, (1787.4, 2022.6, 1746.2)),
    Point(RDMA, ISSUE.format(416), "resnet101", 256, 650.92, 2, 2, 2379.56, 1, 1.0, 40e9, 4 * 202.78),
    *horovod(TCP, (1308.7, 1990.7, 1685.1)),
    *(
        Point(TCP, ISSUE.format(779), "resnet50", 2048, 6679, servers, 1, total, gpu=8 * 872)
        for servers, total in ((2, 12828), (4, 23870), (8, 47195), (16, 89783))
    ),
    *horovod(MPI_TCP, (616.8, 2073.3, 1338.3)),
    *horovod(MPI_RDMA, (618.0, 2073.1, 1446.3)),
    *horovod(GRPC_25, (74.7, 1345.8, 959.6), 4),
    *horovod(GRPC_CPU, (79.5, 1576.4, 1168.8), 4),
    *tensorflow(
        K80, EBUG, "inception_v3", 64, 30.55,
        [(64, 996.32, 64), (128, 1077.59, 128), (32, 825.638, 32), (16, 431.645, 12), (8, 228.41, 8), (4, 114.568, 4),
         (2, 57.448, 2)],
    ),
    *tensorflow(
        ARIES, EBUG, "inception_v3", 64, 138.23,
        [(64, 7118.31, 40), (128, 9219.70, 116), (32, 3840.35, 12), (16, 2001.00, 4), (8, 1018.18, 2), (4, 523.38, 3),
         (2, 264.57, 1)],
    ),
    *tensorflow(K80_X8, TENSORFLOW, "resnet50", 512, 378, [(8, 2744, 8), (4, 1388, 4), (2, 751, 2)], 52.4),
    *tensorflow(K80_X8, TENSORFLOW, "resnet50", 256, 333, [(8, 2315, 4), (4, 1180, 4), (2, 667, 2)], 48.4),
    *tensorflow(K80_X8, TENSORFLOW, "inception_v3", 512, 229, [(8, 1783, 6), (4, 902, 4), (2, 459, 2)], 29.7),
    *tensorflow(K80_X8, TENSORFLOW, "inception_v3", 256, 219, [(8, 1608, 6), (4, 820, 4), (2, 427, 2)], 29.2),
    *tensorflow(K80_X8, TENSORFLOW, "resnet152", 256, 146, [(8, 981, 4), (4, 565, 4), (2, 291, 2)], 19.4),
    *tensorflow(
        K80_X8, EBUG, "inception_v3", 512, 230.748,
        [(8, 1731.31, 8), (16, 3333.20, 16), (4, 863.723, 3), (2, 448.574, 1)], 30.55,
    ),
    *dlperf("PyTorch DDP", 354.40, 2719.07, (5307.21, 10632.33)),
    *dlperf("OneFlow", 384.85, 2969.45, (5906.55, 11711.18)),
    *dlperf("TensorFlow 1.15, Horovod", 362.44, 2721.98, (5099.42, 9514.64), 1.0),
    *dlperf("TensorFlow 2.3", 321.80, 2458.74, (4849.68, 9418.44)),
    *dlperf("Paddle", 352.72, 2625.38, (4895.27, 9348.17)),
    ddp("resnet50", 0.097, 0.104, 0.104), ddp("resnet101", 0.162, 0.179, 0.179),
    ddp("torchvision:resnext50_32x4d", 0.145, 0.157, 0.157),
    ddp("torchvision:resnext101_32x8d", 0.415, 0.447, 0.450),
)  # fmt: skip


@cache
def source_of(model: str, batch: int, alone: float, bucket_megabytes: float | None) -> Source:
    """The model at the speed of a unit among others; without the small exchanges that are ours."""
    if model == "inception_v3":
        config = ModelConfig(
            name="torchvision:inception_v3",
            metaparameters={"aux_logits": False, "init_weights": False},
            input=InputConfig(size=299, resize_side=342),
        )
    else:
        config = ModelConfig(name=model)
    source = estimate_source(config, alone, batch, bucket_megabytes=bucket_megabytes, round_seconds=ROUND_SECONDS)
    return replace(source, step=replace(source.step, blocking_all_reduces=0, blocking_broadcasts=0))


def forecast(point: Point, share: float, taking_part: float = TAKING_PART) -> StepForecast:
    """The point's step with that share of the line rate."""
    alone = point.alone if point.gpu else point.alone / (1 + taking_part)
    source = source_of(point.model, point.batch, alone, point.bucket_megabytes)
    cluster = Cluster(
        point.servers, point.units_per_server, Network(share * point.line_rate), point.kind.algorithm, "none",
        point.batch, 1, point.parameter_servers,
    )  # fmt: skip
    found = step_on(source, cluster)
    assert isinstance(found, StepForecast)
    return found


def held_back(point: Point, taking_part: float) -> float:
    """The share of its step that a unit computes, by the forecast at the line rate: the least is held back most."""
    return point.batch / point.alone / forecast(point, 1.0, taking_part).step_seconds


def fit(point: Point, taking_part: float) -> float:
    """The share of the line rate at which the forecast is the published step; the largest tried where none is."""
    low, high = math.log(1e-3), math.log(1e2)
    while high - low > 1e-9:
        middle = (low + high) / 2
        too_slow = forecast(point, math.exp(middle), taking_part).step_seconds > point.step_seconds
        low, high = (middle, high) if too_slow else (low, middle)
    return math.exp(high)


def compared(point: Point, share: float, taking_part: float, *, is_fitted: bool) -> dict[str, Any]:
    """A point, its forecast beside what was published."""
    told = forecast(point, share, taking_part)
    alone = point.batch / point.alone
    exposed = point.step_seconds - alone
    is_scored = exposed >= SCORED_SHARE * point.step_seconds
    return {
        "kind": point.kind.name,
        "source": point.source,
        "model": point.model.removeprefix("torchvision:"),
        "batch": point.batch,
        "servers": point.servers,
        "units_each": point.units_per_server,
        "unit": "server" if point.gpu else "GPU",
        "parameter_servers": point.parameter_servers if point.kind.algorithm == "parameter_server" else None,
        "fitted": is_fitted,
        "published_fraction": alone / point.step_seconds,
        "forecast_fraction": alone / told.step_seconds,
        "error": alone / told.step_seconds - alone / point.step_seconds,
        "published_exposed_seconds": exposed,
        "forecast_exposed_seconds": told.step_seconds - alone,
        "exposed_error_fraction": (told.step_seconds - alone) / exposed - 1 if is_scored else None,
    }


def predicted(taking_part: float) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The constant of each kind of link, and every point beside its forecast."""
    rows, constants = list[dict[str, Any]](), dict[str, dict[str, Any]]()
    for kind in dict.fromkeys(point.kind for point in POINTS):
        own = [point for point in POINTS if point.kind is kind]
        fitted = min(own, key=lambda point: held_back(point, taking_part))
        share = fit(fitted, taking_part)
        constants[kind.name] = {
            "line_rate_gigabits": kind.rate and kind.rate / 1e9,
            "achieved_gigabits": share * fitted.line_rate / 1e9,
            "share_of_line": share if kind.rate else None,
            "fitted_on": f"{fitted.model}, {fitted.servers} servers, {fitted.source}",
            "assumes": kind.assumes or None,
        }
        rows += [compared(point, share, taking_part, is_fitted=point is fitted) for point in own]
    return constants, rows


def median_errors(rows: Sequence[dict[str, Any]]) -> dict[str, float | int]:
    """Of points that were not fitted: median and worst absolute error, and how many there are."""
    own = [row for row in rows if not row["fitted"]]
    exposed = [abs(row["exposed_error_fraction"]) for row in own if row["exposed_error_fraction"] is not None]
    efficiency = [abs(row["error"]) for row in own]
    return {
        "num_predicted": len(own),
        "num_scored_exposed": len(exposed),
        "efficiency": statistics.median(efficiency),
        "exposed_time": statistics.median(exposed),
        "worst_efficiency": max(efficiency),
        "worst_exposed_time": max(exposed),
    }


def main(arguments: Sequence[str]) -> int:
    """Fit each kind on one point, then predict the others."""
    options = common.parser(__doc__).parse_args(arguments)
    common.print_conditions()
    constants, rows = predicted(TAKING_PART)
    _, without = predicted(0.0)
    for row in rows:
        common.show(row["kind"], {key: row[key] for key in list(row)[2:]})
    median = median_errors(rows)
    result = common.Result("published_points", vars(options))
    result.figures = {
        "num_points": len(rows),
        "median_error": median,
        "median_error_of_lone_gpus": median_errors([row for row in rows if row["unit"] == "GPU"]),
        "median_error_of_servers": median_errors([row for row in rows if row["unit"] == "server"]),
        "median_error_of_lone_gpus_without_taking_part": median_errors(
            [row for row in without if row["unit"] == "GPU"]
        ),
        "constants": constants,
        "points": rows,
        "assumptions": list(ASSUMPTIONS),
    }
    result.floors = [
        common.Floor(
            "median absolute error of the scaling efficiency", median["efficiency"], at_most=LARGEST_EFFICIENCY_ERROR
        ),
        common.Floor(
            "median absolute error of the exposed time", median["exposed_time"], at_most=LARGEST_EXPOSED_ERROR
        ),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
