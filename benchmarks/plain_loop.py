"""A training loop as one writes it by hand, in a process of its own: the peer of `train_step`.

It reads its settings as one line of JSON from stdin, then does one round of steps for every further line, and answers
each with a line of JSON: the seconds of the steps. Nothing of ours is in it but the model itself.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the loop trains, on what, how."""

    pictures: str
    """An .npz with `images_NBHWC` (uint8) and `labels_NB` (int64): N batches."""
    bf16: bool
    """bf16 autocast and channels_last, else fp32 and NCHW."""
    model: str
    metaparameters: dict[str, Any]
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    lr: float
    momentum: float
    weight_decay: float
    seed: int
    num_threads: int
    num_steps: int
    """Of a round."""


class PlainLoop:
    """Model, optimiser, and a step over pictures in memory."""

    def __init__(self, settings: Settings) -> None:
        import torch

        from pipeline.models import zoo

        torch.set_num_threads(settings.num_threads)
        torch.manual_seed(settings.seed)
        self.bf16 = settings.bf16
        self.memory_format = torch.channels_last if settings.bf16 else torch.contiguous_format
        model = zoo.build(settings.model, settings.num_classes, **settings.metaparameters)
        self.model = model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.mean_CHW = torch.tensor(settings.mean).view(3, 1, 1)
        self.std_CHW = torch.tensor(settings.std).view(3, 1, 1)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def batches(self, path: str) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Pictures in this loop's layout, as its own loader would hand them out, and their labels; without end."""
        import numpy as np
        import torch

        with np.load(path) as stored:
            images_NBHWC, labels_NB = torch.from_numpy(stored["images_NBHWC"]), torch.from_numpy(stored["labels_NB"])
        images_NBCHW = [
            images_BHWC.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format) for images_BHWC in images_NBHWC
        ]
        return itertools.cycle(zip(images_NBCHW, labels_NB, strict=True))

    def step(self, images_BCHW: "torch.Tensor", labels_B: "torch.Tensor") -> float:
        """One optimiser step; returns the loss."""
        import torch
        from torch.nn import functional as F

        pixels_BCHW = (images_BCHW.float() - self.mean_CHW) / self.std_CHW
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = F.cross_entropy(self.model(pixels_BCHW), labels_B)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Rounds on request, until there are no more requests."""
    settings = Settings(**json.loads(requests.readline()))
    loop = PlainLoop(settings)
    batches = loop.batches(settings.pictures)
    for _ in requests:
        seconds = []
        for images_BCHW, labels_B in itertools.islice(batches, settings.num_steps):
            started = time.perf_counter()
            loop.step(images_BCHW, labels_B)
            seconds.append(time.perf_counter() - started)
        print(json.dumps(seconds), file=answers, flush=True)


class Peer:
    """The loop in its process, seen from outside."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def round(self) -> list[float]:
        """Let it do its steps; returns their seconds. Nothing else of the benchmark computes meanwhile."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The plain loop ended with {self._process.wait()}; its own words are above.")
        return json.loads(answer)


@contextmanager
def started(settings: Settings) -> Iterator[Peer]:
    """The loop's process, with a plain environment. It ends with the block."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment["OMP_NUM_THREADS"] = str(settings.num_threads)
    command = [sys.executable, "-m", "benchmarks.plain_loop"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdin is not None
            print(json.dumps(asdict(settings)), file=process.stdin, flush=True)
            yield Peer(process)
        finally:
            process.kill()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
