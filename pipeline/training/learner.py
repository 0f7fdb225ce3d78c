"""The LightningModule: loss, optimiser, schedule, finite guard, exact validation.

Shape suffixes: B pictures of a micro-batch, C channels, H W pixels, K classes.

Everything random in a step comes from a generator seeded with (seed, step, micro-batch, rank), and the learning rate is
a function of the step, so neither needs saving: a resumed run draws and steps as the uninterrupted one does.
"""

import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.classification import MulticlassAccuracy

from pipeline.config.training import InputConfig, RecipeConfig
from pipeline.core.errors import NonFiniteError
from pipeline.training.schedule import learning_rate

NAME_PREFIX = "model."  # of the network's parameters inside a learner, and so inside a checkpoint
STOP_EVERY_BATCHES = 8  # micro-batches of a validation between two looks at whether to stop
Origin = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. Ids of -1 mark padding, which only validation has."""

    images_BCHW: Tensor
    """uint8, RGB, 0..255, channels_last in memory."""
    labels_B: Tensor
    """int64 class indices."""
    sample_ids_B: Tensor
    """int64 positions in the shard index."""

    @classmethod
    def of(cls, loaded: Any) -> "Batch":
        """From what the loader yields, be it a mapping or a sequence that starts with these three."""
        if isinstance(loaded, dict):
            return cls(loaded["images_BCHW"], loaded["labels_B"], loaded["sample_ids_B"])
        return cls(*loaded[:3])

    def to(self, device: torch.device) -> "Batch":
        """On a device; to a GPU, from pinned memory, without waiting for the copy. (Lightning does so in training.)"""
        parts = (self.images_BCHW, self.labels_B, self.sample_ids_B)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


class Normalizer(nn.Module):
    """uint8 RGB pixels to what a network expects, on the device."""

    def __init__(self, config: InputConfig) -> None:
        super().__init__()
        self.reverse_channels = config.channel_order == "bgr"
        # Plain attributes: DDP would broadcast registered buffers before every forward pass.
        self.mean_CHW = torch.tensor(config.mean).view(3, 1, 1)
        self.scale_CHW = 1 / torch.tensor(config.std).view(3, 1, 1)

    def forward(self, images_BCHW: Tensor, memory_format: torch.memory_format) -> Tensor:
        """float32 in `memory_format`."""
        if self.reverse_channels:
            images_BCHW = images_BCHW.flip(1)
        if self.mean_CHW.device != images_BCHW.device:
            self.mean_CHW, self.scale_CHW = self.mean_CHW.to(images_BCHW.device), self.scale_CHW.to(images_BCHW.device)
        pixels_BCHW = images_BCHW.to(torch.float32, memory_format=memory_format)
        return pixels_BCHW.sub_(self.mean_CHW).mul_(self.scale_CHW)


class ExactMetrics(nn.Module):
    """Top-1, top-5 and mean cross-entropy over every picture once, on any number of ranks: sums, added up once."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # sync_on_compute: each metric would gather its states by itself; here one all-reduce carries all the sums.
        arguments: dict[str, Any] = {
            "num_classes": num_classes,
            "average": "micro",
            "validate_args": False,
            "sync_on_compute": False,
        }
        self.top1 = MulticlassAccuracy(top_k=1, **arguments)
        self.top5 = MulticlassAccuracy(top_k=min(5, num_classes), **arguments)
        # Double: single precision would lose pictures from the sum over a large split.
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.num_samples = 0

    def update(self, logits_BK: Tensor, batch: Batch) -> None:
        """Add a micro-batch; rows whose sample id is -1 are padding and left out."""
        real_B = batch.sample_ids_B >= 0
        logits_BK, labels_B = logits_BK[real_B].float(), batch.labels_B[real_B]
        if len(labels_B):
            self.top1.update(logits_BK, labels_B)
            self.top5.update(logits_BK, labels_B)
            loss = F.cross_entropy(logits_BK, labels_B, reduction="sum").double()
            self.loss_sum = self.loss_sum.to(loss.device) + loss
            self.num_samples += len(labels_B)

    def compute(self) -> dict[str, float | int]:
        """{top1, top5, loss, num_samples, num_correct_top1, num_correct_top5} over all ranks. Collective."""
        device = self.top1.device
        correct = [cast(Tensor, metric.tp).sum().double() for metric in (self.top1, self.top5)]
        total = torch.tensor(self.num_samples, dtype=torch.float64, device=device)
        sums = torch.stack([*correct, self.loss_sum.to(device), total])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        top1, top5, loss, num_samples = sums.tolist()
        return {
            "num_samples": int(num_samples),
            "num_correct_top1": int(top1),
            "num_correct_top5": int(top5),
            "top1": top1 / num_samples,
            "top5": top5 / num_samples,
            "loss": loss / num_samples,
        }

    def reset(self) -> None:
        """Forget everything."""
        self.top1.reset()
        self.top5.reset()
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.num_samples = 0


@dataclass
class StepResult:
    """What a committed optimiser step was, over all ranks."""

    step: int
    """Steps committed, this one included."""
    loss: float
    """Mean cross-entropy of the global batch, label smoothing included."""
    top1: float
    lr: float
    grad_norm: float
    """Norm of the reduced gradient before clipping."""
    stop: bool = False
    """Some rank was asked to stop: all ranks know it of the same step."""


class Learner(pl.LightningModule):
    """Trains `model` for the steps start_step .. num_steps - 1 of a run of `num_steps`.

    Args:
        model: maps images_BCHW (float32, normalised) to logits_BK.
        recipe: optimiser and schedule.
        input_config: pixel normalisation.
        num_classes: K.
        seed: of everything random in a step.
        num_steps: optimiser steps of the whole run.
        start_step: steps already committed by earlier attempts.
        rank: of this process.
        num_micro: micro-batches per optimiser step.
        memory_format: of the activations.
        origin: context that labels the collectives inside it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        recipe: RecipeConfig,
        input_config: InputConfig,
        num_classes: int,
        seed: int,
        num_steps: int,
        start_step: int = 0,
        rank: int = 0,
        num_micro: int = 1,
        memory_format: torch.memory_format = torch.contiguous_format,
        origin: Origin = lambda _: nullcontext(),
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.normalizer = Normalizer(input_config)
        self.validation = ExactMetrics(num_classes)
        self.recipe = recipe
        self.seed = seed
        self.num_steps = num_steps
        self.committed_steps = start_step
        self.num_micro = num_micro
        self.activation_format = memory_format
        self.origin = origin
        self.num_classes = num_classes
        self.on_step: Callable[[StepResult], None] = lambda _: None
        """Told of every committed step. (Lightning calls callbacks before the module has counted it.)"""
        self.stop_asked: Callable[[], bool] = lambda: False
        """Whether this rank was asked to stop."""
        self.on_stop_in_validation: Callable[[], None] = lambda: None
        """Called on all ranks alike where a validation is to be broken off."""
        self.last_validation: dict[str, float | int] | None = None
        self.optimizer_state: dict[str, Any] | None = None
        self.warming_up = False
        self._rank = rank
        self._micro = 0
        self._sums = torch.zeros(3, dtype=torch.float64)  # loss, correct, pictures of this rank in this step
        self._sample_ids: list[Tensor] = []
        self._grad_norm = math.nan
        # Kept from nn.Module's registry: DDP must not see a second set of weights.
        self._average: list[AveragedModel] = []
        if recipe.ema_decay:
            average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
            self._average.append(average)

    @property
    def averaged_model(self) -> nn.Module:
        """The exponential moving average of the weights, or the weights themselves without one."""
        return self._average[0].module if self._average else self.model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over all parameters, biases decayed too, as the Caffe solver does."""
        recipe = self.recipe
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=learning_rate(recipe, self.committed_steps, self.num_steps),
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
            fused=True,  # the same arithmetic, bit for bit, in one pass over memory instead of five
        )
        if self.optimizer_state is not None:
            # Only the state is taken over: hyper-parameters come from the configuration, which may have been edited.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self.optimizer_state["state"], "param_groups": groups})
        return optimizer

    def on_fit_start(self) -> None:
        """The average follows the weights to their device."""
        for average in self._average:
            average.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this micro-step and set the learning rate of this step."""
        del batch, batch_idx
        words = np.random.SeedSequence((self.seed, self.committed_steps, self._micro, self._rank)).generate_state(2)
        self._seed_generators(int(words[0]) << 32 | int(words[1]))
        # Nothing of ours draws from these two; what a model of somebody's draws is the same after a resume.
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        if self._micro == 0:
            for group in cast(torch.optim.Optimizer, self.optimizers()).param_groups:
                group["lr"] = learning_rate(self.recipe, self.committed_steps, self.num_steps)

    def _seed_generators(self, seed: int) -> None:
        """The CPU's generator and this rank's device's.

        `torch.manual_seed` would also note the whole stack of who asked, for every kind of device that is absent: three
        times per micro-step (torch 2.14).
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, loaded: Any, batch_idx: int) -> Tensor:
        """Mean loss of the micro-batch on this rank."""
        del batch_idx
        batch = Batch.of(loaded)
        logits_BK = self.model(self.normalizer(batch.images_BCHW, self.activation_format))
        loss = F.cross_entropy(logits_BK.float(), batch.labels_B, label_smoothing=self.recipe.label_smoothing)
        if not self.warming_up:
            with torch.no_grad():
                num_correct = (logits_BK.argmax(1) == batch.labels_B).sum()
                size = len(batch.labels_B)
                step_sums = torch.stack([loss.detach() * size, num_correct, torch.full_like(loss, size)])
                self._sums = self._sums.to(loss.device) + step_sums
            self._sample_ids.append(batch.sample_ids_B)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a gradient that is not finite, before it reaches the weights; clip it if the recipe says so.

        The gradient is already reduced, so every rank sees the same norm and decides alike, without traffic.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        self._grad_norm = float(norm)
        if not math.isfinite(self._grad_norm):
            raise NonFiniteError(self._describe_non_finite())
        if self.recipe.grad_clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.grad_clip_norm, norm)

    def _describe_non_finite(self) -> str:
        """Step, ranks whose own loss is not finite, and this rank's sample ids. Collective."""
        mine = torch.isfinite(self._sums[0]).logical_not().to(torch.int32).reshape(1)
        flags = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            flags = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(flags, mine)
        ranks = [rank for rank, flag in enumerate(flags) if int(flag)]
        where = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "the reduced gradient"
        ids = torch.cat(self._sample_ids).tolist()
        shown = ", ".join(map(str, ids[:64])) + (", ..." if len(ids) > 64 else "")
        return (
            f"Step {self.committed_steps + 1}: {where} is not finite (NaN or infinity); stopped before the optimiser"
            f" step, the last checkpoint is sound. Lower recipe.lr, lengthen recipe.warmup_steps or set"
            f" recipe.grad_clip_norm. Sample ids of rank {self._rank} in this step: {shown}."
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last micro-batch: add the ranks' sums up and count the step as committed."""
        del outputs, batch, batch_idx
        self._micro += 1
        if self._micro < self.num_micro:
            return
        lr = learning_rate(self.recipe, self.committed_steps, self.num_steps)
        if self._average:
            self._average[0].update_parameters(self.model)
        # The wish to stop travels with the sums, which are exchanged in any case.
        sums = torch.cat([self._sums, self._sums.new_full((1,), float(self.stop_asked()))])
        with self.origin("metrics"):
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(sums)
        loss, correct, count, num_asked = sums.tolist()
        self.committed_steps += 1
        result = StepResult(self.committed_steps, loss / count, correct / count, lr, self._grad_norm, num_asked > 0)
        self._forget_step()
        self.on_step(result)

    def _forget_step(self) -> None:
        self._micro = 0
        self._sums = torch.zeros_like(self._sums)
        self._sample_ids = []

    @property
    def between_steps(self) -> bool:
        """True when no micro-batch of an unfinished step is pending."""
        return self._micro == 0

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew, with the same network on every rank."""
        self.validation.reset()
        self._share_averaged_buffers()

    def _share_averaged_buffers(self) -> None:
        """Rank 0's averaged buffers to all ranks. Collective, where there are any.

        Running statistics come from each rank's own pictures; DDP broadcasts those of the model itself, and nobody
        those of its average, of which the checkpoint holds rank 0's.
        """
        if self._average and dist.is_initialized() and dist.get_world_size() > 1:
            with self.origin("buffers"):
                for buffer in self._average[0].module.buffers():
                    dist.broadcast(buffer, src=0)

    def validation_step(self, loaded: Any, batch_idx: int) -> None:
        """Add one micro-batch to the sums."""
        batch = Batch.of(loaded)
        network = self.averaged_model
        network.eval()
        logits_BK = network(self.normalizer(batch.images_BCHW, self.activation_format))
        self.validation.update(logits_BK, batch)
        # Each rank has equally many micro-batches. A validation may be long, and who wants to stop cannot wait for it.
        if (batch_idx + 1) % STOP_EVERY_BATCHES == 0 and self._some_rank_was_asked():
            self.on_stop_in_validation()

    def _some_rank_was_asked(self) -> bool:
        """To stop. Collective."""
        asked = torch.tensor(int(self.stop_asked()), device=self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            with self.origin("metrics"):
                dist.all_reduce(asked)
        return bool(asked)

    def on_validation_epoch_end(self) -> None:
        """Add the ranks' sums up."""
        with self.origin("metrics"):
            self.last_validation = self.validation.compute()

    def extra_state(self) -> dict[str, Any]:
        """What the weights and the optimiser do not hold; plain types and tensors only."""
        return {"average": self._average[0].state_dict()} if self._average else {}

    def restore(self, state_dict: dict[str, Tensor], optimizer_state: dict[str, Any], extra: dict[str, Any]) -> None:
        """Take over a checkpoint. Call before the trainer starts.

        Args:
            state_dict: Lightning's, keys starting with `model.`.
            optimizer_state: of SGD, as saved.
            extra: what `extra_state` returned.
        """
        weights = {
            key.removeprefix(NAME_PREFIX): value for key, value in state_dict.items() if key.startswith(NAME_PREFIX)
        }
        self.model.load_state_dict(weights)
        self.optimizer_state = optimizer_state
        if self._average:
            # A run that had no average before starts it from the weights it has now.
            source = extra.get("average")
            if source is None:
                self._average[0].module.load_state_dict(weights)
            else:
                self._average[0].load_state_dict(source)
