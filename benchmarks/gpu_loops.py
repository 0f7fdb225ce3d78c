"""The loops that `gpu_step` times: ours, as the learner takes a step, and a plain one.

Shape suffixes: B pictures, C channels, H W pixels.
"""

import itertools
import math
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline.config.model import InputConfig
from pipeline.config.training import RecipeConfig
from pipeline.models import zoo
from pipeline.models.normalizer import Normalizer
from pipeline.training import arithmetic

if TYPE_CHECKING:
    from benchmarks.gpu_step import Configuration

NUM_BATCHES = 4  # distinct ones, reused in turn
NUM_CLASSES = 1000
RECIPE = RecipeConfig(lr=0.01)
INPUT = InputConfig()


class Loop:
    """Network, optimiser and pictures on one device; a step takes the next batch.

    Args:
        configuration: how a step is taken.
        device: where.
        image_size: side of the pictures in pixels.
    """

    def __init__(self, configuration: "Configuration", device: torch.device, image_size: int) -> None:
        self.configuration, self.device = configuration, device
        self.memory_format = torch.channels_last if configuration.channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.model: torch.nn.Module = zoo.build(configuration.model, NUM_CLASSES)
        self.model.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.network: torch.nn.Module = self.model
        if configuration.mode == "compiled":  # off a GPU, for a trial, without the minutes of a C++ compiler
            backend = "inductor" if device.type == "cuda" else "eager"
            self.network = cast(torch.nn.Module, torch.compile(self.model, backend=backend))
        self._batches = itertools.cycle(self._pictures(image_size))
        self.num_steps = 0

    def _pictures(self, image_size: int) -> list[tuple[Tensor, Tensor]]:
        shape = (self.configuration.batch, 3, image_size, image_size)
        return [
            (
                torch.randint(256, shape, dtype=torch.uint8, device=self.device).to(memory_format=self.memory_format),
                torch.randint(NUM_CLASSES, shape[:1], device=self.device),
            )
            for _ in range(NUM_BATCHES)
        ]

    def autocast(self) -> torch.autocast:
        """bf16, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.configuration.precision == "bf16")

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Pictures and labels."""
        self.num_steps += 1
        return next(self._batches)

    def step(self) -> None:
        """One optimiser step."""
        raise NotImplementedError


class PlainLoop(Loop):
    """As one writes it by hand. It reads nothing back, so it never waits for the device."""

    def __init__(self, configuration: "Configuration", device: torch.device, image_size: int) -> None:
        super().__init__(configuration, device, image_size)
        self.mean_CHW = torch.tensor(INPUT.mean, device=device).view(3, 1, 1)
        self.std_CHW = torch.tensor(INPUT.std, device=device).view(3, 1, 1)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=RECIPE.peak_lr,
            momentum=RECIPE.momentum,
            weight_decay=RECIPE.weight_decay,
            fused=configuration.fused or None,
        )

    def step(self) -> None:
        """Loss, gradients, weights."""
        images_BCHW, labels_B = self.next_batch()
        pixels_BCHW = (images_BCHW.float() - self.mean_CHW) / self.std_CHW
        with self.autocast():
            loss = F.cross_entropy(self.network(pixels_BCHW), labels_B)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class OurLoop(Loop):
    """As the learner takes a step, with `configuration.reads` saying when the host learns of what came out.

    Where the host reads after the optimiser step, the device guards the weights by itself: torch's fused SGD changes
    nothing while its `found_inf` is 1, which it stays from the first step that is not finite.
    """

    def __init__(self, configuration: "Configuration", device: torch.device, image_size: int) -> None:
        super().__init__(configuration, device, image_size)
        self.normalizer = Normalizer(INPUT)
        self.optimizer: Any = arithmetic.make_optimizer(self.model.parameters(), RECIPE, RECIPE.peak_lr)
        self.found_inf = torch.zeros((), device=device)
        if configuration.reads in ("once", "late"):
            self.optimizer.found_inf = self.found_inf
        self.results: list[list[float]] = []
        """Of each step whose results the host has: loss, correct, pictures (sums), gradient norm."""
        self.host_copies = [torch.empty(4, dtype=torch.float64, pin_memory=device.type == "cuda") for _ in range(2)]
        self._copied: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if configuration.mode == "graph":
            self._capture()

    def step(self) -> None:
        """One step, as `Learner` takes it between two calls of the loader."""
        images_BCHW, labels_B = self.next_batch()
        if self.configuration.reads == "lightning":  # asks all ranks about SIGTERM before every micro-batch
            torch.tensor([0], device=self.device).item()
        arithmetic.seed_generators((0, self.num_steps, 0, 0), self.device)
        if self._graph is None:
            values = self._compute(images_BCHW, labels_B)
        else:
            self._images_BCHW.copy_(images_BCHW)
            self._labels_B.copy_(labels_B)
            self._graph.replay()
            values = self._values
        if self.configuration.reads == "late":
            self.finish()
            self._copied = self._copy(values)
        else:
            self._take(values)

    def finish(self) -> None:
        """Take what was copied a step ago; by now it has arrived."""
        if self._copied is not None:
            values, arrived = self._copied
            if arrived is not None:
                arrived.synchronize()
            self._take(values)
            self._copied = None

    def _compute(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """The step on the device; returns loss, correct, pictures and norm, there."""
        with self.autocast():
            loss, sums = arithmetic.micro_batch(
                self.network,
                self.normalizer,
                images_BCHW,
                labels_B,
                memory_format=self.memory_format,
                label_smoothing=RECIPE.label_smoothing,
            )
        self.optimizer.zero_grad()
        loss.backward()
        parameters, norm = arithmetic.reduced_gradient(self.optimizer)
        if self.configuration.reads in ("twice", "lightning"):
            _require_finite(float(norm))
        else:
            self.found_inf.copy_(torch.maximum(self.found_inf, norm.isfinite().logical_not()))
        arithmetic.clip(parameters, norm, RECIPE.grad_clip_norm)
        self.optimizer.step()
        return torch.cat([sums.double(), norm.detach().double().reshape(1)])

    def _copy(self, values: Tensor) -> "tuple[Tensor, torch.cuda.Event | None]":
        """To the host, without waiting; what says that it has arrived."""
        host = self.host_copies[self.num_steps % 2]
        host.copy_(values, non_blocking=True)
        if self.device.type != "cuda":
            return host, None
        arrived = torch.cuda.Event()
        arrived.record()
        return host, arrived

    def _take(self, values: Tensor) -> None:
        self.results.append(values.tolist())
        _require_finite(self.results[-1][3])

    def _capture(self) -> None:
        """The whole step as one CUDA graph, after three steps beside it, as torch asks for."""
        images_BCHW, labels_B = self.next_batch()
        self._images_BCHW, self._labels_B = images_BCHW.clone(), labels_B.clone()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                self._compute(self._images_BCHW, self._labels_B)
        torch.cuda.current_stream().wait_stream(beside)
        self.optimizer.zero_grad()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._values = self._compute(self._images_BCHW, self._labels_B)


def _require_finite(norm: float) -> None:
    if not math.isfinite(norm):
        raise FloatingPointError(f"a gradient of norm {norm}: every step here must be finite")


def make_loop(configuration: "Configuration", device: torch.device, image_size: int) -> Loop:
    """The loop that a configuration names."""
    return (PlainLoop if configuration.loop == "plain" else OurLoop)(configuration, device, image_size)


class HostReads(TorchFunctionMode):
    """Counts where Python asks a tensor for its value: on a GPU, each is a wait for all that was asked of it before.

    Args:
        ignored: tensors that lie in the host's memory on every device.
    """

    READS = (
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.cpu,
        Tensor.__bool__,
        Tensor.__float__,
        Tensor.__int__,
        Tensor.__index__,
    )

    def __init__(self, ignored: list[Tensor] | None = None) -> None:
        super().__init__()
        self.count = 0
        self.ignored = ignored or []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS and not any(args[0] is tensor for tensor in self.ignored):
            self.count += 1
        return func(*args, **(kwargs or {}))


def host_waits(loop: Loop) -> int:
    """How often the host waits for the device in one step: by torch's own check of CUDA, elsewhere by `HostReads`."""
    if loop.device.type != "cuda":
        with HostReads(getattr(loop, "host_copies", None)) as reads:
            loop.step()
        return reads.count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loop.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught)
