"""How seldom ranks would have to exchange weights for the exchange not to show: local SGD and DiLoCo, on paper.

In a round of H steps each rank trains by itself; at its end all of the weights leave and arrive at once, on hosts that
wait for nothing else. With one exchange of E seconds and steps that compute for C, a round lasts H C + E, of which at
most the share s shows from

    H = ceil(E (1 - s) / (s C))

on. What an exchange owes is what a training itself is held to (`comm.averaging`), to the byte. What longer rounds cost
in accuracy, a forecast does not know.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.comm.all_reduce import AllReduce, all_reduce, exchange
from pipeline.comm.averaging import Averaging
from pipeline.comm.collectives import Call
from pipeline.comm.rounds import plan_rounds
from pipeline.comm.wire.gloo import NotDerivable
from pipeline.config.comm import CommConfig
from pipeline.config.plan import METHODS, PlanConfig
from pipeline.core.errors import ConfigError
from pipeline.core.schemas.forecast import MethodJson, PointJson
from pipeline.forecasting.grid import Cluster, clusters
from pipeline.forecasting.source import Source
from pipeline.training.drift import num_sums

if TYPE_CHECKING:
    from torch import nn


def method_rows(config: PlanConfig, sources: Sequence[Source], points: Sequence[PointJson]) -> list[MethodJson]:
    """Return, for gloo's ring on several servers, the shortest round of each method that does not show.

    Args:
        config: What was asked for.
        sources: Of the points.
        points: What the same clusters take with gradients in every step, in the order of `sources` and `clusters`.

    Raises:
        ConfigError: A run did not train all of its model, or knows no link, and none is given.
    """
    for source in sources:
        _require_whole(source)
    asked = [(source, cluster) for source in sources for cluster in clusters(config, source)]
    return [
        _row(config, source, cluster, point, method)
        for (source, cluster), point in zip(asked, points, strict=True)
        if cluster.algorithm == "ring" and cluster.num_servers > 1
        if cluster.hook == (config.hook or (source.hook,))[0]
        for method in config.methods
    ]


def _row(config: PlanConfig, source: Source, cluster: Cluster, point: PointJson, method: str) -> MethodJson:
    rate, in_every_step = cluster.network.bandwidth_bits_per_second, point["server_egress_bytes_per_step"]
    if rate is None:
        raise ConfigError(f"methods= needs a link, and {source.name} knows none: give bandwidth=, such as [1gbit].")
    calls = exchange_calls(source.shapes, METHODS[method], source.bucket_megabytes, len(cluster.server_of_rank))
    costs = list(_costs(calls, cluster))
    seconds = source.step.waiting_seconds
    seconds += sum(count * cost.seconds(cluster.network, source.host) for cost, count in costs)
    step = source.step.accumulating(cluster.num_micro_batches)
    compute = step.with_batch(cluster.batch_per_rank / source.batch_per_rank).compute_seconds
    share = config.exposed_share
    period = max(1, math.ceil(seconds * (1 - share) / (share * compute)))
    egress = sum(count * cost.egress_bytes for cost, count in costs)
    assert in_every_step, "a ring fits any cluster, and several servers send"
    return {
        "model": source.model,
        "num_servers": cluster.num_servers,
        "ranks_per_server": cluster.ranks_per_server,
        "bandwidth_bits_per_second": rate,
        "latency_seconds": cluster.network.latency_seconds,
        "hook": cluster.hook,
        "global_batch": cluster.global_batch,
        "method": method,
        "period": period,
        "exchange_seconds": seconds,
        "server_egress_bytes_per_exchange": egress,
        "bytes_share": egress / period / in_every_step,
        "step_seconds": compute + seconds / period,
        "scaling_efficiency": compute / (compute + seconds / period),
    }


def exchange_calls(network: "nn.Module", codec: str, bucket_megabytes: float | None, num_ranks: int) -> Counter[Call]:
    """Return the collectives of a whole round, as a training with this codec owes them.

    Args:
        network: The model, all of it trained; without memory, if need be.
        codec: comm.codec.
        bucket_megabytes: comm.bucket_megabytes.
        num_ranks: At least 2.
    """
    comm = CommConfig(period=1, codec=codec, bucket_megabytes=bucket_megabytes)
    calls = Averaging(network, comm).owed(plan_rounds(1, lambda _: 1), 1, num_sums(is_compared=True), num_ranks)
    assert calls is not None, "no step of this plan exchanges gradients"
    return calls


def _require_whole(source: Source) -> None:
    """Refuse a run of which a part was frozen: what it would exchange is not known."""
    exchanged = sum(one.payload_bytes // one.itemsize for one in source.step.buckets)
    num_weights = sum(one.numel() for one in source.shapes.parameters())
    if exchanged != num_weights:
        raise ConfigError(
            f"methods= needs a run that trains its whole model: {source.name} exchanged {exchanged:,} gradients, and"
            f" {source.model} has {num_weights:,} weights. Give a run without init.freeze that timed all its buckets,"
            " or leave methods= out."
        )


def _costs(calls: Counter[Call], cluster: Cluster) -> Iterator[tuple[AllReduce, int]]:
    """Yield what each collective asks of cards and hosts, and how many there are of it."""
    placement, racks = cluster.server_of_rank, cluster.network.servers_per_rack
    for call, count in calls.items():
        if call.op == "all_reduce":
            found = all_reduce("ring", call.payload_bytes, call.itemsize, placement, racks)
        else:
            found = exchange(call.op, call.payload_bytes, call.itemsize, placement, racks)
        assert not isinstance(found, NotDerivable), "gloo's ring and its exchanges fit any cluster"
        yield found, count
