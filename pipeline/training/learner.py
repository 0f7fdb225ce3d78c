"""The LightningModule: loss, optimiser, schedule, finite guard, exact validation.

Shape suffixes: B pictures of a micro-batch, C channels, H W pixels, K classes.

Everything random in a step comes from a generator seeded with (seed, step, micro-batch, rank), and the learning rate is
a function of the step, so neither needs saving: a resumed run draws and steps as the uninterrupted one does.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.comm.averaging import Averaging
from pipeline.comm.collectives import Call
from pipeline.comm.rounds import Rounds
from pipeline.config.comm import CommConfig
from pipeline.config.model import InputConfig
from pipeline.config.training import RecipeConfig
from pipeline.core.compute import has_peers
from pipeline.core.errors import NonFiniteError
from pipeline.data.batches import LoadedBatch
from pipeline.models.normalizer import Normalizer
from pipeline.models.scoring import ExactMetrics
from pipeline.models.zoo import head_of
from pipeline.run.checkpoint_checks import unusable
from pipeline.training import arithmetic, drift
from pipeline.training.confusions import OutcomeRecord, Outcomes
from pipeline.training.momenta import check_momenta
from pipeline.training.pruning import Pruner, make_schedule
from pipeline.training.step_result import StepResult

NAME_PREFIX = "model."  # of the network's parameters inside a learner, and so inside a checkpoint
Origin = Callable[[str], AbstractContextManager[Any]]


class Learner(pl.LightningModule):
    """Trains `model` for the steps start_step .. num_steps - 1 of a run of `num_steps`.

    Args:
        model: maps images_BCHW (float32, normalised) to logits_BK.
        recipe: optimiser and schedule.
        input_config: pixel normalisation.
        num_classes: K.
        seed: seed of everything random in a step.
        num_steps: optimiser steps of the whole run.
        start_step: steps already committed by earlier attempts.
        rank: rank of this process.
        num_micro_batches: micro-batches per optimiser step.
        compare_every_steps: ranks compare their weights after so many steps; 0: never.
        memory_format: memory layout of the activations.
        origin: context that labels the collectives inside it.
        frozen: modules whose parameters are not trained; they compute as in evaluation.
        outcomes: records what a validation says of each picture; None: nothing does.
        rounds: when ranks that train by themselves average their weights; None: gradients are exchanged in every step.
        comm: how weights travel, where ranks train by themselves.

    Raises:
        ConfigError: the recipe's pruning does not fit the run or the model, or comm does not fit the model.
    """

    frozen: tuple[nn.Module, ...]
    average: AveragedModel | None
    """Exponential moving average of the weights; None without one (recipe.ema_decay=0)."""

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
        num_micro_batches: int = 1,
        compare_every_steps: int = 0,
        memory_format: torch.memory_format = torch.contiguous_format,
        origin: Origin = lambda _: nullcontext(),
        frozen: Sequence[nn.Module] = (),
        outcomes: OutcomeRecord | None = None,
        rounds: Rounds | None = None,
        comm: CommConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.normalizer = Normalizer(input_config)
        self.validation = ExactMetrics(num_classes)
        self.recipe = recipe
        self.seed = seed
        self.num_steps = num_steps
        self.committed_steps = start_step
        self.num_micro_batches = num_micro_batches
        self.compare_every_steps = compare_every_steps
        self.activation_format = memory_format
        self.origin = origin
        self.num_classes = num_classes
        self.last_validation: dict[str, float | int] = {}
        """Results of the last validation; empty before the first."""
        self.outcomes = outcomes
        self.last_outcomes: Outcomes | None = None
        self.optimizer_state: dict[str, Any] | None = None
        self.warming_up = False
        self.rounds = rounds
        self.averaging = Averaging(self.model, comm or CommConfig(), origin, frozen)
        self._rank = rank
        self._micro = 0
        self.sums = torch.zeros(3, dtype=torch.float64)
        """Loss, correct, pictures of this rank since the ranks last added theirs up."""
        self._sample_ids: list[Tensor] = []
        self._grad_norm = math.nan
        schedule = make_schedule(recipe.prune, num_steps)
        self.pruner = schedule and Pruner(self.model, schedule, recipe.prune.scope, step=start_step)
        average = None
        if recipe.ema_decay:
            average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
        # Past nn.Module's registry: DDP must not see a second set of weights.
        object.__setattr__(self, "average", average)
        object.__setattr__(self, "frozen", tuple(frozen))  # of the model already

    @property
    def head(self) -> list[nn.Parameter]:
        """Parameters of the layer that gives the classes."""
        name = f"{head_of(self.model, self.num_classes)}."
        return [parameter for at, parameter in self.model.named_parameters() if at.startswith(name)]

    @property
    def averaged_model(self) -> nn.Module:
        """The exponential moving average of the weights, or the weights themselves without one."""
        return self.model if self.average is None else self.average.module

    @property
    def may_be_best(self) -> bool:
        """Whether the weights are what the run is for: denser ones than were asked for are not."""
        return self.pruner is None or self.pruner.is_done

    def weights(self) -> dict[str, Tensor]:
        """All parameters that must be the same on every rank, the averaged ones included."""
        found = {name: parameter.detach() for name, parameter in self.model.named_parameters()} | self.averaging.anchor
        if self.average is not None:
            found |= {f"average of {name}": value.detach() for name, value in self.average.module.named_parameters()}
        return found

    @property
    def exchanges_gradients(self) -> bool:
        """Whether the step under way does, or is one of a round."""
        return self.rounds is None or self.rounds.exchanges_gradients(self.committed_steps + 1)

    @property
    def is_synchronised(self) -> bool:
        """Whether the ranks have the same weights after the committed steps."""
        return self.rounds is None or self.rounds.is_synchronised(self.committed_steps)

    @property
    def is_comparable(self) -> bool:
        """Whether `weights` must be the same on every rank after the committed steps."""
        return self.is_synchronised or bool(self.averaging.anchor)

    def is_under_way(self, step: int) -> bool:
        """Whether bytes may be, between the ranks, at the end of step `step`."""
        return self.rounds is not None and self.rounds.under_way(step) is not None

    def owed(self, step: int) -> Counter[Call] | None:
        """Return the collectives of step `step` (from 1); None: DDP's buckets of gradients and what goes with them."""
        num_sums = drift.num_sums(is_compared=bool(self.compare_every_steps))
        return self.rounds and self.averaging.owed(self.rounds, step, num_sums, dist.get_world_size())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD or AdamW, going on from the state that was saved."""
        lr = self.recipe.learning_rate(self.committed_steps, self.num_steps)
        optimizer = arithmetic.make_optimizer(self.model.parameters(), self.recipe, lr, self.head)
        if self.optimizer_state is not None:
            # Only the state is taken over: hyper-parameters come from the configuration, which may have been edited.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self.optimizer_state["state"], "param_groups": groups})
        return optimizer

    def on_fit_start(self) -> None:
        """The average and the masks of the pruning follow the weights to their device."""
        if self.average is not None:
            self.average.to(self.device)
        if self.pruner is not None:
            self.pruner.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this micro-step and set the learning rate of this step."""
        del batch, batch_idx
        for module in self.frozen:  # Lightning puts the whole model into training at each start and after validations
            module.eval()
        numbers = (self.seed, self.committed_steps, self._micro, self._rank)
        arithmetic.seed_generators(numbers, self.device)
        if self._micro == 0:
            lr = self.recipe.learning_rate(self.committed_steps, self.num_steps)
            arithmetic.set_learning_rate(cast(torch.optim.Optimizer, self.optimizers()), lr)

    def training_step(self, batch: LoadedBatch, batch_idx: int) -> Tensor:
        """Mean loss of the micro-batch on this rank."""
        del batch_idx
        loss, sums = arithmetic.micro_batch(
            self.model,
            self.normalizer,
            batch.images_BCHW,
            batch.labels_B,
            memory_format=self.activation_format,
            label_smoothing=self.recipe.label_smoothing,
        )
        if not self.warming_up:
            self.sums = self.sums.to(loss.device) + sums
            self._sample_ids.append(batch.sample_ids_B)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a gradient that is not finite, before it reaches the weights; clip it if the recipe says so.

        A reduced gradient has the same norm on every rank, so all decide alike, without traffic. Within a round it is
        the rank's own, and so is the decision: the others lose a peer that says why.
        """
        if self.pruner is not None:
            self.pruner.clear_gradients()
        parameters, norm = arithmetic.reduced_gradient(optimizer)
        self._grad_norm = float(norm)
        if not math.isfinite(self._grad_norm):
            raise NonFiniteError(self._describe_non_finite())
        arithmetic.clip(parameters, norm, self.recipe.grad_clip_norm)

    def _describe_non_finite(self) -> str:
        """Step, ranks whose own loss is not finite, and this rank's sample ids. Collective, where gradients are."""
        mine = torch.isfinite(self.sums[0]).logical_not().to(torch.int32).reshape(1)
        flags, first, what = [mine], 0, "the reduced gradient"
        if not self.exchanges_gradients:
            first, what = self._rank, f"the gradient of rank {self._rank}"
        elif has_peers():
            flags = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(flags, mine)
        ranks = [rank for rank, flag in enumerate(flags, first) if int(flag)]
        where = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else what
        ids = torch.cat(self._sample_ids).tolist()
        shown = ", ".join(map(str, ids[:64])) + (", ..." if len(ids) > 64 else "")
        return (
            f"Step {self.committed_steps + 1}: {where} is not finite (NaN or infinity); stopped before the optimiser"
            f" step, the last checkpoint is sound. Lower recipe.lr, lengthen recipe.warmup_steps or set"
            f" recipe.grad_clip_norm. Sample ids of rank {self._rank} in this step: {shown}."
        )

    def end_micro_batch(self, *, stop_asked: bool) -> StepResult | None:
        """After the last micro-batch of a step: add the ranks' sums up and count the step as committed.

        `stop_asked`: whether this rank was asked to stop. The wish travels with the sums, which are exchanged anyway.
        Returns None amid a step. Collective at its end; within a round only where the weights are exchanged.
        """
        self._micro += 1
        if self._micro < self.num_micro_batches:
            return None
        step = self.committed_steps + 1
        lr = self.recipe.learning_rate(self.committed_steps, self.num_steps)
        if self.pruner is not None:
            self.pruner.step_done(step)
        if self.average is not None:
            self.average.update_parameters(self.model)
            if self.pruner is not None:
                self.pruner.clear(dict(self.average.module.named_parameters()))
        if self.rounds is not None:
            self.averaging.end_step(self.rounds, step)
            if not self.rounds.meets(step):
                self.committed_steps = step
                self._forget_step()
                return StepResult(step, lr)
        ends_round = self.rounds is not None and self.rounds.ends_round(step)
        parts = [self.sums, self.sums.new_full((1,), float(stop_asked))]
        if ends_round:
            parts.append(self.sums.new_full((1,), self._grad_norm))
        every = self.compare_every_steps
        if every and (ends_round or step % every == 0) and has_peers():
            parts.append(drift.to_sums(drift.checksum(self.weights().values())))
        sums = torch.cat(parts)
        with self.origin("metrics"):
            if has_peers():
                dist.all_reduce(sums)
        # With `float(norm)` above: two waits for the device a step on a GPU; not measured on one yet.
        loss, correct, count, num_asked, *of_weights = sums.tolist()
        self.committed_steps = step
        result = StepResult(
            step,
            lr,
            loss=loss / count,
            top1=correct / count,
            grad_norm=of_weights.pop(0) / dist.get_world_size() if ends_round else self._grad_norm,
            stop=num_asked > 0,
            drifted=bool(of_weights) and not drift.are_same(of_weights, dist.get_world_size()),
            density=None if self.pruner is None else self.pruner.density,
        )
        self.sums = torch.zeros_like(self.sums)
        self._forget_step()
        return result

    def _forget_step(self) -> None:
        self._micro = 0
        self._sample_ids = []

    @property
    def between_steps(self) -> bool:
        """True when no micro-batch of an unfinished step is pending."""
        return self._micro == 0

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew, with the same network on every rank."""
        self.validation.reset()
        if self.outcomes is not None:
            self.outcomes.reset()
        self._share_averaged_buffers()

    def _share_averaged_buffers(self) -> None:
        """Rank 0's averaged buffers to all ranks. Collective, where there are any.

        Running statistics come from each rank's own pictures; DDP broadcasts those of the model itself, and nobody
        those of its average, of which the checkpoint holds rank 0's.
        """
        if self.average is not None and has_peers():
            with self.origin("buffers"):
                for buffer in self.average.module.buffers():
                    dist.broadcast(buffer, src=0)

    def validation_step(self, batch: LoadedBatch, batch_idx: int) -> None:
        """Add one micro-batch to the sums."""
        del batch_idx
        network = self.averaged_model
        network.eval()
        images_BCHW = self.normalizer(batch.images_BCHW, self.activation_format)
        if anchor := self.averaging.anchor:  # what the ranks have in common, where these are not the network's own
            logits_BK = torch.func.functional_call(network, anchor, (images_BCHW,))
        else:
            logits_BK = network(images_BCHW)
        self.validation.update(logits_BK, batch.labels_B, batch.sample_ids_B)
        if self.outcomes is not None:
            self.outcomes.update(batch.images_BCHW, logits_BK, batch.labels_B, batch.sample_ids_B)

    def some_rank_says(self, yes: bool) -> bool:
        """Whether any rank says yes. Collective."""
        answers = torch.tensor(int(yes), device=self.device)
        if has_peers():
            with self.origin("metrics"):
                dist.all_reduce(answers)
        return bool(answers)

    def on_validation_epoch_end(self) -> None:
        """Add the ranks' sums up."""
        with self.origin("metrics"):
            self.last_validation = self.validation.compute()
            self.last_outcomes = None if self.outcomes is None else self.outcomes.gather()

    def extra_state(self) -> dict[str, Any]:
        """What the weights and the optimiser do not hold; plain types and tensors only."""
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return average if self.pruner is None else {**average, "masks": self.pruner.masks}

    def restore(self, state_dict: dict[str, Tensor], optimizer_state: dict[str, Any], extra: dict[str, Any]) -> None:
        """Take over a checkpoint. Call before the trainer starts.

        Args:
            state_dict: Lightning's, keys starting with `model.`.
            optimizer_state: state of the optimiser, as saved.
            extra: what `extra_state` returned.

        Raises:
            ValueError: the optimiser's state, the average or the masks of the pruning do not fit the weights.
        """
        weights = {
            key.removeprefix(NAME_PREFIX): value for key, value in state_dict.items() if key.startswith(NAME_PREFIX)
        }
        self.model.load_state_dict(weights)
        check_momenta(optimizer_state, list(self.model.parameters()))
        self.optimizer_state = optimizer_state
        if self.pruner is not None:
            self.pruner.load_masks(extra.get("masks"))
        if self.average is not None:
            # A run that had no average before starts it from the weights it has now.
            source = extra.get("average")
            if source is None:
                self.average.module.load_state_dict(weights)
            else:
                expected = self.average.state_dict()
                if wrong := next(filter(None, (unusable(key, source[key], expected[key]) for key in expected)), ""):
                    raise ValueError(f"in the averaged weights {wrong}")
                self.average.load_state_dict(source)
