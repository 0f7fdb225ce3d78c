"""One bucket under way: the mean over the ranks of its values, or of their changes in fewer bits.

An exchange leaves, turns, and arrives. In fp32 it is one all-reduce of the weights, which need not turn. In fewer bits
it is a reduction by an all-to-all, in which each rank adds up its share of the values as numbers, and when it turns an
all-gather of the sums, encoded again: 2(n - 1)/n of the encoded bytes per rank, as in a ring, however many ranks there
are. Shares are added in the order of the ranks, so that the mean depends on nothing else.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipeline.comm.buckets import FlatBucket, stack_on_first
from pipeline.comm.codec import Codec, shard_values
from pipeline.comm.collectives import Call

Exchanging = Callable[[str], AbstractContextManager[Any]]
"""Context that labels the collectives inside it by their origin, and counts their time as waiting."""


def leaving_call(bucket: FlatBucket, codec: Codec | None, num_ranks: int) -> Call:
    """Return the collective that a bucket owes when it leaves."""
    if codec is None:
        return Call("train", bucket.origin, "all_reduce", bucket.num_bytes, bucket.itemsize, -1)
    share_bytes = codec.num_bytes(shard_values(bucket.num_values, num_ranks))
    return Call("train", bucket.origin, "all_to_all", num_ranks * share_bytes, 1, -1)


def turning_call(bucket: FlatBucket, codec: Codec, num_ranks: int) -> Call:
    """Return the collective that a bucket owes when it turns."""
    share_bytes = codec.num_bytes(shard_values(bucket.num_values, num_ranks))
    return Call("train", bucket.origin, "all_gather", share_bytes, 1, -1)


class Exchange(Protocol):
    """A bucket under way."""

    has_turned: bool

    def turn(self) -> None:
        """Send back what was reduced. Collective, where it is an exchange of its own."""
        ...

    def settle(self) -> None:
        """Wait for what is under way, so that no byte is."""
        ...

    def result(self) -> Tensor:
        """Wait for the mean and return it, flat."""
        ...

    def known(self) -> Tensor:
        """Return all that has been reduced so far, flat, for a checkpoint; on rank 0. Collective."""
        ...


class WholeExchange:
    """The mean of flat values by an all-reduce, which may run while the ranks train on.

    Multiplied by 1/n before the sum, as DDP does.

    Args:
        flat: This rank's values, which are overwritten.
        exchanging: As of `Exchanging`, of the right origin.
        is_mean: They are the mean already, from a checkpoint.
    """

    has_turned = False

    def __init__(
        self, flat: Tensor, exchanging: Callable[[], AbstractContextManager[Any]], *, is_mean: bool = False
    ) -> None:
        self._flat, self._exchanging = flat, exchanging
        self._work: dist.Work | None = None
        if not is_mean:
            flat.mul_(1.0 / dist.get_world_size())
            with exchanging():
                self._work = dist.all_reduce(flat, async_op=True)

    def turn(self) -> None:
        """Do nothing: an all-reduce sends back by itself."""

    def settle(self) -> None:
        """Wait for the sum."""
        if self._work is not None:
            with self._exchanging():
                self._work.wait()
            self._work = None

    def result(self) -> Tensor:
        """Return the mean."""
        self.settle()
        return self._flat

    known = result


class CodedExchange:
    """The mean of flat values by way of a codec, of which each rank keeps what its encoding lost.

    Over all ranks nothing is lost: the mean of what was owed is the mean that arrives and the mean of the errors.

    Args:
        owed: This rank's values, of fp32.
        errors: Takes what of them was not sent, in place; the rank that adds a share up also keeps there what encoding
            the sum loses.
        codec: Encodes.
        exchanging: As of `Exchanging`, of the right origin.
        leaves: Whether it leaves now; else `arrived` says how far it had come.
    """

    def __init__(
        self,
        owed: Tensor,
        errors: Tensor,
        codec: Codec,
        exchanging: Callable[[], AbstractContextManager[Any]],
        *,
        leaves: bool = True,
    ) -> None:
        self._num_values, self._errors = len(owed), errors
        self._codec, self._exchanging = codec, exchanging
        self._num_ranks, self._rank = dist.get_world_size(), dist.get_rank()
        self._width = shard_values(self._num_values, self._num_ranks)
        self.has_turned = False
        self._work: dist.Work | None = None
        if leaves:
            encoded = codec.encode(self._shares(owed))
            errors.copy_(owed - codec.decode(encoded).view(-1)[: self._num_values])
            self._received = torch.empty_like(encoded)
            with exchanging():
                self._work = dist.all_to_all(list(self._received), list(encoded), async_op=True)

    @classmethod
    def arrived(
        cls,
        known: Tensor,
        errors: Tensor,
        codec: Codec,
        exchanging: Callable[[], AbstractContextManager[Any]],
        *,
        has_turned: bool,
    ) -> "CodedExchange":
        """Return an exchange as far as it had come when `known` was saved; other ranks may be in it now.

        Args:
            known: As `known` returned it.
            errors: As of the class.
            codec: As of the class.
            exchanging: As of the class.
            has_turned: Whether it had turned.
        """
        exchange = cls(known, errors, codec, exchanging, leaves=False)
        exchange.has_turned, exchange._mean = has_turned, known
        exchange._share = exchange._shares(known)[exchange._rank]
        return exchange

    def _shares(self, flat: Tensor) -> Tensor:
        """Return values as a row for each rank, padded with zeros."""
        padded = functional.pad(flat, (0, self._num_ranks * self._width - self._num_values))
        return padded.view(self._num_ranks, self._width)

    def settle(self) -> None:
        """Wait, and decode what has come: the sum of this rank's share, or the mean."""
        if self._work is None:
            return
        with self._exchanging():
            self._work.wait()
        self._work = None
        decoded = self._codec.decode(self._received)
        if self.has_turned:
            self._mean = decoded.view(-1)[: self._num_values]
            return
        share = decoded[0].clone()
        for other in decoded[1:]:
            share += other
        self._share = share.mul_(1.0 / self._num_ranks)

    def turn(self) -> None:
        """Send this rank's share of the mean to all others. Collective."""
        if self.has_turned:
            return
        self.settle()
        encoded = self._codec.encode(self._share.unsqueeze(0))
        # The others will never know: n times, for a mean over n ranks that this one alone tells the rest of.
        lost = (self._share - self._codec.decode(encoded)[0]) * self._num_ranks
        own = self._errors[self._rank * self._width :][: self._width]
        own += lost[: len(own)]
        self._received = encoded.new_empty(self._num_ranks, encoded.shape[1])
        with self._exchanging():
            self._work = dist.all_gather(list(self._received), encoded[0], async_op=True)
        self.has_turned = True

    def result(self) -> Tensor:
        """Return the mean."""
        self.turn()
        self.settle()
        return self._mean

    def known(self) -> Tensor:
        """Return the mean, or before it has turned what all ranks have added up, on rank 0. Collective."""
        self.settle()
        return self._mean if self.has_turned else stack_on_first(self._share).view(-1)[: self._num_values]
