"""PowerSGD (Vogels et al. 2019, arXiv 1905.13727): gradients as low-rank matrices, with what that loses carried over.

The arithmetic is torch's `powerSGD_hook`. Around it is what torch leaves to the caller: an order of collectives that
every rank shares, a state that survives restarts, warm-up passes that leave no trace in it, and layers whose gradient
vanishes for a while (behind dead ReLUs).

The vanished gradient. torch normalises columns by their length: one of zeros becomes NaN, and all weights with it. A
small number added to the length prevents that (orthogonalization_epsilon), but then the matrix that the next step
starts from is zero too, and the layer stays without a gradient for ever. So such columns start again from fixed random
ones, the same on every rank.

The order. torch's hook sends three all-reduces per bucket, the second and third from callbacks, each of which waits for
its own. NCCL completes futures when work is queued, so the callbacks run inside the hook, in order. Gloo runs them in
its two worker threads when work is done: with two buckets under way each rank issues in an order of its own, and gloo
pairs up the wrong ones ("Received data size doesn't match expected size"), or both threads wait and nobody works. So on
gloo one bucket is under way at a time: the hook first waits for the bucket before it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_powersgd

from pipeline.comm.buckets import stack_on_first
from pipeline.comm.hooks import GradientFuture, average
from pipeline.core.errors import CheckpointError

# What is added to lengths before dividing by them: torch's own proposal. Columns shorter than that tell no direction.
EPSILON = 1e-8

Layout = list[list[list[int]]]
"""Of every bucket, by index: the shapes of its gradients in their order."""


class PowerSGD:
    """The hook with its state. Register `reduce`; `MeteredDDP` does.

    rank: of the approximation; n x m gradients travel as rank x (n + m) numbers where that is at most half of them.
    start_step: optimiser steps that reduce plainly before the first compressed one, at least 2 (torch's rule).
    seed: of the first matrices; the same on all ranks.
    step: optimiser steps the run has committed so far.
    device: of the gradients.
    waiting: context around what the hook waits for (Timeline.waiting).
    """

    def __init__(
        self,
        *,
        rank: int,
        start_step: int,
        seed: int = 0,
        step: int = 0,
        device: torch.device | None = None,
        waiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._state = torch_powersgd.PowerSGDState(
            None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=start_step,
            random_seed=seed % 2**32,  # what numpy's generator takes
            orthogonalization_epsilon=EPSILON,  # pyright: ignore[reportArgumentType] # torch's default of 0 is an int
        )
        self._seed = seed
        self._fresh_starts: dict[int, list[torch.Tensor]] = {}
        # A hook call per bucket and step: torch's count of iterations is the number of steps.
        self._state.iter = step
        self._device = device or torch.device("cpu")
        self._waiting = waiting
        self._is_resting = False
        self._under_way: GradientFuture | None = None
        self._layout: dict[int, list[list[int]]] = {}
        self._saved_layout: Layout | None = None

    def reduce(self, state: object, bucket: GradBucket) -> GradientFuture:
        """The communication hook."""
        del state
        if self._is_resting:
            self._note_layout(bucket)
            return average(None, bucket)
        if self._state.iter < self._state.start_powerSGD_iter:
            self._state.maybe_increase_iter(bucket)
            return average(None, bucket)
        self._wait()
        self._revive(bucket)
        future = torch_powersgd.powerSGD_hook(self._state, bucket)
        if dist.get_backend() == "gloo":
            self._under_way = future
            if bucket.is_last():  # nothing is left to compute meanwhile, and DDP's own collectives may follow
                self._wait()
        return future

    def _wait(self) -> None:
        if self._under_way is not None:
            with self._waiting():
                self._under_way.wait()
            self._under_way = None

    def _revive(self, bucket: GradBucket) -> None:
        """Give vanished columns of the bucket's Q, from which its step starts, a direction again.

        Nothing is asked of the values here (a GPU would have to be waited for), and all ranks have the same Q.
        """
        memory = self._state.q_memory_dict.get(bucket.index())
        if memory is None:
            return
        fresh = self._fresh_starts.get(bucket.index())
        if fresh is None:  # the layout of a bucket is settled once it has a Q: nothing is worked out in later steps
            generator = torch.Generator().manual_seed((self._seed + bucket.index()) % 2**63)
            fresh = [torch.randn(shape, generator=generator).to(memory) for shape in self._shapes_of_qs(bucket)]
            self._fresh_starts[bucket.index()] = fresh
        for q, fresh_q in zip(memory.split([q.numel() for q in fresh]), fresh, strict=True):
            columns = q.view_as(fresh_q)
            length = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
            columns.copy_(torch.where(length < EPSILON, fresh_q, columns))

    def _shapes_of_qs(self, bucket: GradBucket) -> list[torch.Size]:
        """(layers, columns of the layer, rank) of every Q in torch's memory: layers of one shape lie together."""
        state = self._state
        num_layers: Counter[tuple[int, int]] = Counter()
        for gradient in bucket.gradients():
            rows, columns = gradient.view(gradient.shape[0], -1).shape
            rank = min(rows, columns, state.matrix_approximation_rank)
            if torch_powersgd._should_compress(rows, columns, rank, state.min_compression_rate)[0]:
                num_layers[rows, columns] += 1
        return [
            torch.Size((count, columns, min(rows, columns, state.matrix_approximation_rank)))
            for (rows, columns), count in num_layers.items()
        ]

    # --- warm-up ---

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Buckets inside are averaged plainly and leave no trace in the state; their layout is learnt.

        Raises CheckpointError if it is not the layout of the state that was loaded.
        """
        self._is_resting = True
        try:
            yield
        finally:
            self._is_resting = False
        if self._saved_layout is not None and self._saved_layout != self._present_layout():
            raise CheckpointError(
                "The checkpoint's PowerSGD state is of other gradient buckets than this run's:"
                " set comm.bucket_megabytes back to resume, or give another name= for a new run."
            )

    def _note_layout(self, bucket: GradBucket) -> None:
        if bucket.index() == 0:  # the first pass may have more buckets than the last
            self._layout.clear()
        self._layout[bucket.index()] = [list(gradient.shape) for gradient in bucket.gradients()]

    def _present_layout(self) -> Layout:
        return [shapes for _, shapes in sorted(self._layout.items())]

    # --- over restarts ---

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, in plain types and tensors on the CPU. Collective; complete on rank 0.

        Error memories are of the size of the gradients and differ by rank: rank 0 gets them all.
        """
        state = self._state
        _, keys, position, *_ = state.rng.get_state(legacy=True)
        return {
            "rank": state.matrix_approximation_rank,
            "layout": self._present_layout(),
            "errors": {index: stack_on_first(error) for index, error in sorted(state.error_dict.items())},
            "p": {index: tensor.cpu().clone() for index, tensor in state.p_memory_dict.items()},
            "q": {index: tensor.cpu().clone() for index, tensor in state.q_memory_dict.items()},
            "rng_keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "rng_position": int(position),
        }

    def load_state_dict(self, saved: dict[str, Any], rank: int, num_ranks: int) -> None:
        """Go on from a checkpoint, before the warm-up, as rank `rank` of `num_ranks`.

        On another number of ranks every rank takes the mean of the saved error memories. What PowerSGD owes the weights
        is that mean: a step adds each rank's error to its gradient and applies (a compression of) the mean of the sums.
        So nothing is lost or applied twice, whatever the number of ranks; only which rank held what is forgotten.

        Raises CheckpointError if the state is of another rank of approximation.
        """
        state = self._state
        if saved["rank"] != state.matrix_approximation_rank:
            raise CheckpointError(
                f"The checkpoint's PowerSGD state is of rank {saved['rank']}, the run's is"
                f" {state.matrix_approximation_rank}: set comm.powersgd_rank={saved['rank']} to resume, or give another"
                " name= for a new run."
            )
        for index, errors in saved["errors"].items():
            mine = errors[rank] if len(errors) == num_ranks else errors.mean(0)
            state.error_dict[index] = mine.clone().to(self._device)
        for name, memory in (("p", state.p_memory_dict), ("q", state.q_memory_dict)):
            memory.update({index: tensor.clone().to(self._device) for index, tensor in saved[name].items()})
        keys = saved["rng_keys"].numpy().astype(np.uint32)
        state.rng.set_state(("MT19937", keys, saved["rng_position"], 0, 0.0))
        self._layout = dict(enumerate(saved["layout"]))  # kept as it is where no hook runs, in a world of one
        # Without a compressed step so far there is nothing that another layout could break.
        self._saved_layout = saved["layout"] if saved["errors"] else None
