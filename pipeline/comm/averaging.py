"""What ranks have in common that train by themselves: weights averaged now and then, in place, fragment by fragment.

Local SGD takes the mean of the weights. DiLoCo (Douillard et al. 2023, arXiv 2311.08105) takes the weights that the
ranks had in common, here the anchor, and moves them by an outer step of SGD with Nesterov momentum against the change
(anchor - mean). With an outer learning rate of 1 and no momentum that is the mean, bit for bit. Fragments that arrive
steps after they left (Streaming DiLoCo, Douillard et al. 2025, arXiv 2501.18512) meet weights that have moved since:
what the rank has done meanwhile is added to what arrives, and nothing is thrown away.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.comm.buckets import FlatBucket, Sizes, fill, flat_buckets, flatten, share_out
from pipeline.comm.codec import CODECS, Codec
from pipeline.comm.collectives import Call
from pipeline.comm.exchange import CodedExchange, Exchange, Exchanging, WholeExchange, leaving_call, turning_call
from pipeline.comm.rounds import Rounds
from pipeline.config.comm import CommConfig
from pipeline.core.errors import ConfigError

SUM_BYTES = 8
"""Sums for the metrics travel as float64."""


def owed_calls(
    rounds: Rounds,
    step: int,
    fragments: Sequence[Sequence[FlatBucket]],
    buffers: Sequence[FlatBucket],
    *,
    codec: Codec | None,
    num_sums: int,
    world_size: int,
) -> Counter[Call] | None:
    """Return the collectives that a step owes in the phase `train`, or None where it owes DDP's buckets of gradients.

    Args:
        rounds: Of the run.
        step: From 1.
        fragments: Buckets of the weights, by fragment.
        buffers: Buckets of the statistics, which are averaged at the end of a round.
        codec: Of the weights; None: fp32.
        num_sums: Numbers that the ranks add up at the end of a round, for the metrics.
        world_size: Number of ranks.
    """
    if world_size == 1:
        return Counter()
    if rounds.exchanges_gradients(step):
        return None
    leaving = [bucket for fragment in rounds.leaving(step) for bucket in fragments[fragment]]
    calls = Counter(leaving_call(bucket, codec, world_size) for bucket in leaving)
    if codec is not None:
        turning = [bucket for fragment in rounds.turning(step) for bucket in fragments[fragment]]
        calls.update(turning_call(bucket, codec, world_size) for bucket in turning)
    if rounds.ends_round(step):
        calls.update(leaving_call(bucket, None, world_size) for bucket in buffers)
        calls[Call("train", "metrics", "all_reduce", SUM_BYTES * num_sums, SUM_BYTES, -1)] += 1
    return calls


@dataclass
class _UnderWay:
    """A bucket that has left and not arrived."""

    bucket: FlatBucket
    exchange: Exchange
    left_with: Tensor | None
    """This rank's values when it left, flat; None: it arrives before they change."""


class Averaging:
    """The mean over all ranks of a model's trainable parameters and of its buffers that are not integers.

    Only values change: addresses and strides stay, so that optimiser and DDP keep what they refer to. Buffers of frozen
    modules, which are the same on all ranks, stay as they are: a mean would round them.

    Args:
        module: The model.
        comm: How weights travel, and what becomes of them.
        exchanging: Context that labels the collectives inside it.
        frozen: Modules whose statistics do not change.

    Raises:
        ConfigError: There are fewer buckets of weights than fragments, or weights that comm.codec cannot encode.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: CommConfig,
        exchanging: Exchanging = lambda _: nullcontext(),
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        self._module, self._comm, self._exchanging, self._frozen = module, comm, exchanging, frozen
        self._codec = CODECS.get(comm.codec)
        self._under_way: list[_UnderWay] = []
        self.anchor: dict[str, Tensor] = {}
        """By name: the weights that the ranks have in common, each as of its last arrival; empty where the mean of the
        weights is all there is."""
        self.momentum: Tensor | None = None
        """Of the outer steps, of all parameters, flat; None without."""
        self.errors: Tensor | None = None
        """What the codec has kept from the others of this rank's changes, of all parameters, flat; None in fp32."""
        num_buckets = len(self._buckets["parameters"])
        if comm.fragments > max(1, num_buckets):
            raise ConfigError(
                f"comm.fragments={comm.fragments}, but the weights travel in {num_buckets} buckets, which are not cut:"
                f" set comm.fragments to at most {num_buckets}, or comm.bucket_megabytes to less."
            )
        if self._codec is not None and (other := self._types() - {torch.float32}):
            raise ConfigError(
                f"comm.codec={comm.codec} encodes weights of float32, and the model also has some of"
                f" {', '.join(sorted(map(str, other)))}: set comm.codec=fp32."
            )

    def _types(self) -> set[torch.dtype]:
        return {one.dtype for one in self.tensors()["parameters"].values()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what is averaged, by origin and name, in the model's order."""
        of_frozen = {id(one) for module in self._frozen for one in module.buffers()}
        parameters = {name: one.detach() for name, one in self._module.named_parameters() if one.requires_grad}
        buffers = {
            name: one
            for name, one in self._module.named_buffers()
            if one.is_floating_point() and id(one) not in of_frozen
        }
        return {"parameters": parameters, "buffers": buffers}

    def owed(self, rounds: Rounds, step: int, num_sums: int, world_size: int) -> Counter[Call] | None:
        """Return what `owed_calls` says of this model."""
        return owed_calls(
            rounds,
            step,
            self._fragments,
            self._buckets["buffers"],
            codec=self._codec,
            num_sums=num_sums,
            world_size=world_size,
        )

    # --- the life of a round ---

    def begin(self) -> None:
        """Take the present weights, the same on every rank, for those in common."""
        if not self._comm.keeps_anchor:
            return
        # A clone keeps the strides.
        self.anchor = {name: one.clone() for name, one in self.tensors()["parameters"].items()}
        if self._comm.outer_momentum and self.momentum is None:
            self.momentum = torch.zeros_like(flatten(self.anchor.values()))
        if self._codec is not None and self.errors is None:
            self.errors = torch.zeros_like(flatten(self.anchor.values()))

    @torch.no_grad()
    def end_step(self, rounds: Rounds, step: int) -> None:
        """Let fragments leave, turn and arrive, and average the buffers, as far as the step owes it. Collective."""
        if rounds.exchanges_gradients(step):
            if step == rounds.num_synchronous:
                self.begin()
            return
        if rounds.turning(step):
            self._turn()
        if rounds.arriving(step):
            self._arrive()
        is_immediate = rounds.delay == 0 or step == rounds.ends[-1]
        leaving = [bucket for fragment in rounds.leaving(step) for bucket in self._fragments[fragment]]
        self._under_way += [self._leave(bucket, is_immediate=is_immediate) for bucket in leaving]
        statistics = self._buckets["buffers"] if rounds.ends_round(step) else []
        averages = [self._leave(bucket, is_immediate=True) for bucket in statistics]
        if is_immediate:
            self._turn()
            self._arrive()
        for one in averages:
            fill(self._tensors_of(one.bucket), one.exchange.result())

    def settle(self) -> None:
        """Wait until no byte is under way; what has come arrives at its step none the less."""
        for one in self._under_way:
            one.exchange.settle()

    def _leave(self, bucket: FlatBucket, *, is_immediate: bool) -> _UnderWay:
        values = flatten(self._tensors_of(bucket))
        left_with = None if is_immediate else values.clone()
        exchanging = functools.partial(self._exchanging, bucket.origin)
        if self._codec is None or bucket.origin == "buffers":
            return _UnderWay(bucket, WholeExchange(values, exchanging), left_with)
        errors = self._slice(self.errors, bucket)
        owed = flatten(self._anchor_of(bucket)) - values + errors
        return _UnderWay(bucket, CodedExchange(owed, errors, self._codec, exchanging), left_with)

    def _turn(self) -> None:
        for one in self._under_way:
            one.exchange.turn()

    def _arrive(self) -> None:
        for one in self._under_way:
            result, is_change = one.exchange.result(), self._codec is not None
            self._take(one.bucket, result, one.left_with, is_change=is_change)
        self._under_way = []

    def _take(self, bucket: FlatBucket, result: Tensor, left_with: Tensor | None, *, is_change: bool) -> None:
        """Make the outer step that a mean of weights, or of their changes, asks for."""
        tensors = self._tensors_of(bucket)
        if self.anchor:
            anchor = self._anchor_of(bucket)
            before = flatten(anchor)
            change, mean = (result, before - result) if is_change else (before - result, result)
            result = self._outer_step(bucket, change, mean)
            fill(anchor, result)
            if left_with is not None:
                result = result + (flatten(tensors) - left_with)
        fill(tensors, result)

    def _outer_step(self, bucket: FlatBucket, change: Tensor, mean: Tensor) -> Tensor:
        """Return anchor - lr (change + momentum v), v being the outer momentum, which is moved.

        Written from the mean, which is anchor - change: a step of lr 1 without momentum is the mean bit for bit.
        """
        lr, momentum = self._comm.outer_lr, self._comm.outer_momentum
        stepped = mean if lr == 1 else mean + (1 - lr) * change
        if not momentum:
            return stepped
        moved = self._slice(self.momentum, bucket).mul_(momentum).add_(change)
        return stepped - (lr * momentum) * moved

    # --- over restarts ---

    def state_dict(self) -> dict[str, Any]:
        """Return what the ranks have in common beside the anchor; complete on rank 0. Collective.

        What is under way does not arrive for it: it is waited for, and kept as it came.
        """
        if not self.anchor:
            return {}
        known = [one.exchange.known() for one in self._under_way]
        under_way = None
        if known:
            under_way = {
                "parameters": [self._under_way[0].bucket.first, self._under_way[-1].bucket.end],
                "codec": self._comm.codec,
                "has_turned": self._under_way[0].exchange.has_turned,
                "values": torch.cat([one.cpu() for one in known]),
            }
        return {"momentum": self.momentum, "under_way": under_way}

    def rank_state(self) -> dict[str, Tensor]:
        """Return what this rank has to itself beside its weights: its errors, and what it left with."""
        left = [one.left_with for one in self._under_way if one.left_with is not None]
        found = {"errors": self.errors, "left_with": torch.cat(left) if left else None}
        return {name: value for name, value in found.items() if value is not None}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Any], own: Mapping[str, Tensor], rounds: Rounds, step: int) -> bool:
        """Go on from what was saved, after `begin` and with this rank's weights.

        What was under way goes on, if by `rounds` it would be; else it arrives now.

        Args:
            saved: As of `state_dict`.
            own: As of `rank_state`; those of the mean on another number of ranks.
            rounds: Of the run.
            step: Steps committed.

        Returns:
            Whether all that `rounds` has under way is.
        """
        if self.momentum is not None and saved.get("momentum") is not None:
            self.momentum.copy_(saved["momentum"])
        if self.errors is not None and "errors" in own:
            self.errors.copy_(own["errors"])
        left, under_way = rounds.under_way(step), saved.get("under_way")
        if under_way is None:
            return left is None
        values, left_with = under_way["values"], own["left_with"]
        expected = [] if left is None else self._fragments[rounds.leaving(left)[0]]
        should_turn = self._codec is not None and left is not None and rounds.has_turned(left, step)
        is_as_planned = expected and (
            under_way["parameters"] == [expected[0].first, expected[-1].end]
            and under_way["codec"] == self._comm.codec
            and under_way["has_turned"] == should_turn
        )
        if not is_as_planned:
            first, end = under_way["parameters"]
            num_bytes = sum(size for size, _ in self._sizes["parameters"][first:end])
            bucket = FlatBucket("parameters", first, end, num_bytes, self._sizes["parameters"][first][1])
            device = self._tensors_of(bucket)[0].device
            self._take(bucket, values.to(device), left_with.to(device), is_change=under_way["codec"] != "fp32")
            return left is None
        self._under_way = self._resumed(expected, values, left_with, has_turned=should_turn)
        return True

    def _resumed(
        self, buckets: Sequence[FlatBucket], values: Tensor, left_with: Tensor, *, has_turned: bool
    ) -> list[_UnderWay]:
        """Return exchanges of buckets, as far as they had come when they were saved."""
        sizes = [bucket.num_values for bucket in buckets]
        found = []
        for bucket, known, start in zip(buckets, values.split(sizes), left_with.split(sizes), strict=True):
            device = self._tensors_of(bucket)[0].device
            exchanging, known = functools.partial(self._exchanging, bucket.origin), known.to(device, copy=True)
            if self._codec is None:
                exchange: Exchange = WholeExchange(known, exchanging, is_mean=True)
            else:
                errors = self._slice(self.errors, bucket)
                exchange = CodedExchange.arrived(known, errors, self._codec, exchanging, has_turned=has_turned)
            found.append(_UnderWay(bucket, exchange, start.to(device, copy=True)))
        return found

    # --- its parts ---

    def _tensors_of(self, bucket: FlatBucket) -> list[Tensor]:
        return list(self.tensors()[bucket.origin].values())[bucket.first : bucket.end]

    def _anchor_of(self, bucket: FlatBucket) -> list[Tensor]:
        return list(self.anchor.values())[bucket.first : bucket.end]

    def _slice(self, flat: Tensor | None, bucket: FlatBucket) -> Tensor:
        """Return the part of a flat tensor over all parameters that belongs to a bucket of them."""
        assert flat is not None
        begin = sum(num_bytes // itemsize for num_bytes, itemsize in self._sizes["parameters"][: bucket.first])
        return flat[begin : begin + bucket.num_values]

    @functools.cached_property
    def _sizes(self) -> Sizes:
        """Asked for in every step, and the same in all."""
        return {
            origin: [(one.nbytes, one.itemsize) for one in some.values()] for origin, some in self.tensors().items()
        }

    @functools.cached_property
    def _buckets(self) -> dict[str, list[FlatBucket]]:
        """By origin."""
        buckets = flat_buckets(self._sizes, self._comm.bucket_megabytes)
        return {origin: [bucket for bucket in buckets if bucket.origin == origin] for origin in self._sizes}

    @functools.cached_property
    def _fragments(self) -> list[list[FlatBucket]]:
        """Of the weights, in the order in which they leave."""
        return share_out(self._buckets["parameters"], self._comm.fragments)
