"""The training step on a GPU: ours beside a plain loop, and what each choice in it is worth.

    python -m benchmarks.gpu_step --out FOLDER              every configuration that FOLDER lacks
    python -m benchmarks.gpu_step --out FOLDER --dry-run    small, on the CPU

Ours is `pipeline.training.arithmetic`, as the learner calls it, without Lightning, DDP, meter and loader; a plain loop
is what one writes by hand (`benchmarks.gpu_loops` has both). Pictures lie on the device. A step is timed between two
events of the device's own clock, none of which the host waits for. Needs torch alone; ResNet-50 needs torchvision.
"""

import gc
import hashlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from benchmarks import gpu_jobs
from benchmarks.gpu_jobs import Content

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu_loops import Loop
    from pipeline.models.cost import ModelCost

# Dense bf16 FLOP/s. NVIDIA H200 Tensor Core GPU datasheet (2024): 1,979 TFLOPS with sparsity for the SXM card, of which
# dense arithmetic is half; the H100's datasheet has the same figure for its SXM card.
BF16_PEAKS = {"NVIDIA H200": 989.5e12, "NVIDIA H100 80GB HBM3": 989.5e12}
MODELS = ("squeezenet1_1", "resnet50", "squeezenet1_0")
MATMUL, MATMUL_SIDE = "step-matmul", 8192


@dataclass(frozen=True)
class Configuration:
    """One way of taking a step."""

    model: str
    loop: str = "ours"
    """`plain` or `ours`."""
    precision: str = "bf16"
    channels_last: bool = True
    mode: str = "eager"
    """`eager`, `compiled` (the network, by torch.compile) or `graph` (the whole step, as a CUDA graph)."""
    reads: str = "twice"
    """Ours, how the host learns of norm and metrics: `twice` a step (before the optimiser, at the end), `once` (at the
    end; the device itself skips a step that is not finite), `late` (the same, one step later), `lightning` (twice, and
    once more before each micro-batch, as Lightning does where there are several ranks)."""
    fused: bool = True
    """Plain: SGD in torch's fused form. Ours always is."""
    batch: int = 256

    @property
    def name(self) -> str:
        """Of its result."""
        layout = "channels_last" if self.channels_last else "nchw"
        optimizer = f"reads_{self.reads}" if self.loop == "ours" else "fused" if self.fused else "foreach"
        return "-".join(("step", self.model, self.loop, self.precision, layout, self.mode, optimizer, f"b{self.batch}"))

    @property
    def deadline_seconds(self) -> float:
        """Warm-up and compilation included."""
        return 100.0 if self.mode == "compiled" else 40.0


def configurations(*, dry_run: bool) -> list[Configuration]:
    """All of them, in the order of what they tell."""
    eager: list[Configuration] = []
    rest: list[Configuration] = []
    for model in MODELS:
        ours = Configuration(model)
        plain = replace(ours, loop="plain")
        eager += [replace(plain, fused=False), ours, replace(ours, reads="once"), replace(ours, reads="late")]
        rest += [
            replace(ours, reads="lightning"),
            replace(ours, mode="graph", reads="late"),
            replace(plain, precision="fp32", channels_last=False, fused=False),
            replace(ours, precision="fp32"),
            replace(plain),
            replace(ours, channels_last=False),
            replace(ours, batch=1024),
            replace(ours, mode="compiled"),
            replace(ours, mode="compiled", reads="late"),
        ]
    if dry_run:  # each way of reading, each mode
        reading = [each for each in eager if each.model == MODELS[0]]
        ours = Configuration(MODELS[0])
        others = [
            replace(ours, reads="lightning"),
            replace(ours, mode="graph", reads="late"),
            replace(ours, mode="compiled"),
        ]
        return [replace(each, batch=2) for each in reading + others]
    return eager + sorted(rest, key=lambda each: each.mode == "compiled")


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    image_size: int
    num_warm_ups: int
    num_steps: int

    @classmethod
    def of(cls, *, dry_run: bool) -> "Effort":
        """A figure, or a trial."""
        return cls(32, 1, 2) if dry_run else cls(224, 10, 40)


def training_flops(cost: "ModelCost", batch: int) -> int:
    """Floating-point operations of a step: two per multiply-add, for the outputs, the weights and the inputs.

    Nobody asks for the gradient of the pictures, so the first layer works twice, not three times.
    """
    first = next(layer.macs for layer in cost.layers if layer.macs)
    return 2 * batch * (3 * cost.macs - first)


def peak_share(flops: float, seconds: float, device: str) -> float | None:
    """Of the card's dense bf16 peak; None for a card whose peak is not in the table."""
    peak = BF16_PEAKS.get(device)
    return None if peak is None else flops / seconds / peak


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and ends over the steps."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median": middle,
        "quartile_low": low,
        "quartile_high": high,
        "least": min(seconds),
        "most": max(seconds),
    }


def weights_after(configuration: Configuration, device: "torch.device", effort: Effort) -> list[str] | None:
    """SHA-256 of the weights after the warm-up's steps, of two tries; None for what is not computed in plain steps.

    torch is asked for deterministic kernels meanwhile; where the tries differ nevertheless, they tell nothing.
    """
    import torch

    from benchmarks.gpu_loops import make_loop

    if configuration.mode != "eager":
        return None
    found = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for _ in range(2):
            loop = make_loop(configuration, device, effort.image_size)
            for _ in range(effort.num_warm_ups):
                loop.step()
            found.append(weights_sha256(loop.model))
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def weights_sha256(model: "torch.nn.Module") -> str:
    """Of all parameters and buffers, bit for bit."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def step_seconds(loop: "Loop", num_steps: int) -> list[float]:
    """Of each step; on a GPU between events of its own clock."""
    import torch

    on_gpu = loop.device.type == "cuda"
    marks: list[torch.cuda.Event] = []
    clock = [time.perf_counter()]
    for step in range(num_steps + 1):
        if on_gpu:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        if step < num_steps:
            loop.step()
            clock.append(time.perf_counter())
    if not on_gpu:
        return [after - before for before, after in itertools.pairwise(clock)]
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]


def measure(configuration: Configuration, device: str, *, dry_run: bool) -> Content:
    """Steps of one configuration; where memory runs out, of half as many pictures, and it says so."""
    import torch

    needed = "torchvision" if configuration.model == "resnet50" else None
    if needed and importlib.util.find_spec(needed) is None:
        return {"left_out": f"{configuration.model} is torchvision's, which is not installed here: bring its wheel."}
    if configuration.mode == "graph" and dry_run:
        return {"left_out": "CUDA graphs need a GPU."}
    tried = configuration
    while True:
        try:
            content = _measure(tried, device, Effort.of(dry_run=dry_run))
        except torch.OutOfMemoryError:
            if tried.batch == 1:
                raise
            tried = replace(tried, batch=tried.batch // 2)
        else:
            break
        finally:
            _tidy()
    if tried.batch != configuration.batch:
        content["batch_halved_from"] = configuration.batch
    return content


def _measure(configuration: Configuration, device: str, effort: Effort) -> Content:
    import torch

    from benchmarks.gpu_loops import OurLoop, host_waits, make_loop
    from pipeline.models.cost import cost

    on_gpu = device != "CPU"
    where = torch.device("cuda" if on_gpu else "cpu")
    weights = weights_after(configuration, where, effort)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    loop = make_loop(configuration, where, effort.image_size)
    for _ in range(effort.num_warm_ups):
        loop.step()
    waits = host_waits(loop)
    seconds = step_seconds(loop, effort.num_steps)
    if isinstance(loop, OurLoop):
        loop.finish()
    median = statistics.median(seconds)
    flops = training_flops(cost(loop.model, effort.image_size), configuration.batch)
    return {
        "configuration": asdict(configuration),
        "image_size": effort.image_size,
        "num_steps": effort.num_steps,
        "step_seconds": spread(seconds),
        "images_per_second": configuration.batch / median,
        "flops_per_step": flops,
        "share_of_bf16_peak": peak_share(flops, median, device),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "host_waits_per_step": waits,
        "weights_sha256": weights,
        "allows_tf32": torch.backends.cudnn.allow_tf32,
    }


def _tidy() -> None:
    """Give back what a configuration held."""
    import torch

    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_matmul(device: str, *, dry_run: bool) -> Content:
    """What the card really reaches in bf16: a large square product of random numbers."""
    import torch

    side, where = (256, "cpu") if dry_run else (MATMUL_SIDE, "cuda")
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=where) for _ in range(2))
    seconds = []
    for _ in range(13):
        if not dry_run:
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.matmul(left, right)
        if not dry_run:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    median, flops = statistics.median(seconds[3:]), 2 * side**3
    return {
        "side": side,
        "seconds": spread(seconds[3:]),
        "flops_per_second": flops / median,
        "share_of_bf16_peak": peak_share(flops, median, device),
    }


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def main(arguments: Sequence[str]) -> int:
    """Measure what the folder lacks; returns 1 where something stays missing, 2 without a GPU."""
    options = gpu_jobs.parser(__doc__).parse_args(arguments)
    ends = time.monotonic() + options.seconds
    by_name = {each.name: each for each in configurations(dry_run=options.dry_run)}
    names = [MATMUL, *by_name]
    if options.worker:
        if options.dry_run:
            _one_thread()  # a trial must not fight for the cores
        conditions = gpu_jobs.conditions(dry_run=options.dry_run)
        device = conditions["device"]

        def measure_one(name: str) -> Content:
            if name == MATMUL:
                return conditions | measure_matmul(device, dry_run=options.dry_run)
            return conditions | measure(by_name[name], device, dry_run=options.dry_run)

        gpu_jobs.measure_each(options.out, options.worker.split(","), measure_one)
        return 0

    def deadline_seconds(name: str) -> float:
        return by_name[name].deadline_seconds if name in by_name else 30.0

    return gpu_jobs.run("gpu_step", options, names, deadline_seconds, ends)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
