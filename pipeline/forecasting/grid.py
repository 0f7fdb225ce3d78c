"""From measured steps to forecast.json: a grid of clusters, and what each would take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import exp, log

from pipeline.comm import forecast as pure
from pipeline.comm.all_reduce import Network
from pipeline.comm.wire import algorithms, gloo
from pipeline.comm.wire.gloo import NotDerivable
from pipeline.config.hooks import ITEMSIZES
from pipeline.config.plan import PlanConfig
from pipeline.core.missing import Missing, known
from pipeline.core.units import bits_per_second
from pipeline.forecasting.source import Source

LOWEST, HIGHEST = 1e6, 1e14  # bit/s, between which a bandwidth is looked for
# What the forecast was compared with (python -m benchmarks.forecast); outside of it a point says so.
VALIDATED_BANDWIDTHS = (100e6, 2e9)
VALIDATED_SERVERS = (2, 4)


# --- one point ---


@dataclass(frozen=True)
class Cluster:
    """A cluster that the forecast is asked about, and how the model is trained on it."""

    num_servers: int
    ranks_per_server: int
    network: Network
    algorithm: str
    hook: str
    batch_per_rank: int
    """Pictures of one micro-batch on a rank."""
    num_micro_batches: int
    parameter_servers: int = 1
    """How many share the variables, where `algorithm` is that of parameter servers; each is a server of its own."""

    @property
    def server_of_rank(self) -> tuple[int, ...]:
        """Index of each rank's server: consecutive ranks share one."""
        return tuple(rank // self.ranks_per_server for rank in range(self.num_servers * self.ranks_per_server))

    @property
    def global_batch(self) -> int:
        """Pictures per optimiser step."""
        return self.num_servers * self.ranks_per_server * self.batch_per_rank * self.num_micro_batches


def step_on(source: Source, cluster: Cluster) -> pure.StepForecast | NotDerivable:
    """Forecast the run's step on that cluster."""
    step = source.step.accumulating(cluster.num_micro_batches).with_batch(
        cluster.batch_per_rank / source.batch_per_rank
    )
    itemsize = ITEMSIZES[cluster.hook]
    step = step.compressed(itemsize / ITEMSIZES[source.hook], itemsize)
    return pure.forecast(
        step,
        cluster.algorithm,
        cluster.server_of_rank,
        cluster.network,
        source.host,
        source.num_ranks,
        cluster.parameter_servers,
    )


def egress_bytes(source: Source, cluster: Cluster) -> int | NotDerivable:
    """Return what the busiest server sends in a step: gradients by the algorithm, all else by gloo's own, exactly."""
    placement = cluster.server_of_rank
    num_ranks = len(placement)
    if num_ranks == 1:
        return 0
    placed = algorithms.placed(cluster.algorithm, placement)
    per_server = [0] * (max(placed) + 1)
    factor = ITEMSIZES[cluster.hook] / ITEMSIZES[source.hook]
    if cluster.parameter_servers > 1:  # the one that holds most; a worker sends what it would send to one
        held = [
            sum(one.payload_bytes for one in queue)
            for queue in pure.queues(source.step, cluster.algorithm, cluster.parameter_servers)
        ]
        per_server = [cluster.ranks_per_server * round(sum(held) * factor)] * cluster.num_servers
        per_server.append(num_ranks * round(max(held) * factor))
    for call in source.calls:
        payload, itemsize, count = call["payload_bytes"], call["itemsize"], call["num_calls"]
        if call["origin"] == "gradients":
            if cluster.parameter_servers > 1:
                continue
            payload, itemsize = round(payload * factor), ITEMSIZES[cluster.hook]
        elif call["origin"] == "lightning":  # one broadcast before every micro-batch
            count = count * cluster.num_micro_batches // source.step.num_micro_batches
        if call["origin"] == "gradients" and cluster.algorithm != "ring":
            links = algorithms.links(cluster.algorithm, payload, itemsize, placement)
        else:
            links = gloo.links(call["op"], payload, itemsize, call["root"], num_ranks, "gloo")
        if isinstance(links, NotDerivable):
            return links
        for server, sent in enumerate(gloo.egress_bytes_per_server(links, placed)):
            per_server[server] += count * sent
    return max(per_server)


def sufficient_bandwidth(source: Source, cluster: Cluster, exposed_share: float) -> float | Missing:
    """Return the bits per second above which at most `exposed_share` of the step is exposed, or why there are none.

    Args:
        source: The measured run.
        cluster: The cluster, whose own bandwidth does not count.
        exposed_share: Fraction of the step.
    """

    def share(bandwidth: float | None) -> float:
        found = step_on(source, replace(cluster, network=replace(cluster.network, bandwidth_bits_per_second=bandwidth)))
        assert not isinstance(found, NotDerivable)
        return found.exposed_seconds / found.step_seconds

    if egress_bytes(source, cluster) == 0:
        return Missing("The server sends nothing to others: no link of a server is in the way.")
    if share(None) > exposed_share:
        local = ", the links inside servers" if cluster.network.local_bits_per_second is not None else ""
        return Missing(f"Latency{local} and the hosts' own work alone expose more than {exposed_share:.3g} of a step.")
    low, high = log(LOWEST), log(HIGHEST)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if share(exp(middle)) <= exposed_share else (middle, high)
    return exp(high)


def break_even_bandwidth(light: Source, heavy: Source) -> float | Missing:
    """Return the bits per second below which `light`, which sends less, trains faster per picture, and above `heavy`.

    Both on as many servers as they were measured on, with gloo's ring. Missing: one is faster on every link.
    """

    def lead(bandwidth: float | None) -> float:
        return _images_per_second(light, bandwidth) - _images_per_second(heavy, bandwidth)

    if lead(None) >= 0:
        return Missing(f"{light.model} trains faster per picture on every link.")
    if lead(LOWEST) <= 0:
        return Missing(f"{heavy.model} trains faster per picture on every link from {LOWEST / 1e6:g} Mbit/s.")
    low, high = log(LOWEST), log(HIGHEST)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if lead(exp(middle)) > 0 else (low, middle)
    return exp(low)


def _images_per_second(source: Source, bandwidth: float | None) -> float:
    """Forecast the pictures per second of the measured cluster with other links."""
    return source.global_batch / step_with_links(source, bandwidth).step_seconds


def step_with_links(source: Source, bandwidth: float | None) -> pure.StepForecast:
    """Forecast a step of the measured cluster, all as it was but the bits per second of every server's link."""
    cluster = Cluster(
        num_servers=source.num_ranks // source.ranks_per_server,
        ranks_per_server=source.ranks_per_server,
        network=replace(source.network, bandwidth_bits_per_second=bandwidth),
        algorithm="ring",
        hook=source.hook,
        batch_per_rank=source.batch_per_rank,
        num_micro_batches=source.step.num_micro_batches,
    )
    found = step_on(source, cluster)
    assert isinstance(found, pure.StepForecast)  # a ring of any cluster
    return found


# --- the grid ---


def clusters(config: PlanConfig, source: Source) -> Iterator[Cluster]:
    """Yield every combination that was asked for; what is left open is as in the measured run."""
    rates: Sequence[float | None] = [bits_per_second(rate) for rate in config.bandwidth]
    grid = product(
        rates or [source.network.bandwidth_bits_per_second],
        config.algorithm,
        config.hook or (source.hook,),
        config.ranks_per_server or (source.ranks_per_server,),
        config.servers,
    )
    num_micro_batches = config.accumulate or source.step.num_micro_batches
    for rate, algorithm, hook, per_server, servers in grid:
        batch = config.batch_per_rank or source.batch_per_rank
        if config.global_batch is not None:
            batch, rest = divmod(config.global_batch, servers * per_server * num_micro_batches)
            if rest or not batch:
                continue  # no such batch exists
        network = Network(
            rate,
            config.latency_seconds,
            None if config.local_bandwidth is None else bits_per_second(config.local_bandwidth),
            config.servers_per_rack,
            config.oversubscription,
        )
        num_holders = config.parameter_servers if algorithm == "parameter_server" else 1
        yield Cluster(servers, per_server, network, algorithm, hook, batch, num_micro_batches, num_holders)


POINT_VALUES = (
    "server_egress_bytes_per_step",
    "step_seconds",
    "exposed_seconds",
    "communication_seconds",
    "scaling_efficiency",
    "images_per_second",
    "sufficient_bandwidth_bits_per_second",
    "training_seconds",
    "training_cost",
    "validated",
)
"""What is forecast, of the keys of a point."""


def make_point(config: PlanConfig, source: Source, cluster: Cluster) -> dict[str, object]:
    """Return what is to become a `PointJson`, each `Missing` still in its place.

    Args:
        config: What was asked for.
        source: The measured run.
        cluster: The cluster of this point.
    """
    rate = cluster.network.bandwidth_bits_per_second
    asked: dict[str, object] = {
        "model": source.model,
        "num_servers": cluster.num_servers,
        "ranks_per_server": cluster.ranks_per_server,
        "bandwidth_bits_per_second": rate,
        "latency_seconds": cluster.network.latency_seconds,
        "algorithm": cluster.algorithm,
        "hook": cluster.hook,
        "batch_per_rank": cluster.batch_per_rank,
        "accumulate": cluster.num_micro_batches,
        "global_batch": cluster.global_batch,
    }
    found, egress = step_on(source, cluster), egress_bytes(source, cluster)
    for impossible in (found, egress):
        if isinstance(impossible, NotDerivable):
            return {**asked, **dict.fromkeys(POINT_VALUES, Missing(impossible.reason)), "reason": impossible.reason}
    assert isinstance(found, pure.StepForecast)
    alone = found.step_seconds - found.exposed_seconds
    training_seconds = config.num_images * config.epochs / cluster.global_batch * found.step_seconds
    price = config.price_per_server_hour
    return {
        **asked,
        "bandwidth_bits_per_second": known(rate, "As in the measured run, whose links limited nothing."),
        "server_egress_bytes_per_step": egress,
        "step_seconds": found.step_seconds,
        "exposed_seconds": found.exposed_seconds,
        "communication_seconds": found.communication_seconds,
        "scaling_efficiency": alone / found.step_seconds,
        "images_per_second": cluster.global_batch / found.step_seconds,
        "sufficient_bandwidth_bits_per_second": sufficient_bandwidth(source, cluster, config.exposed_share),
        "training_seconds": training_seconds,
        "training_cost": known(
            price and price * cluster.num_servers * training_seconds / 3600, "No price_per_server_hour was given."
        ),
        "validated": is_validated(source, cluster),
    }


def is_validated(source: Source, cluster: Cluster) -> bool:
    """Return whether the point lies inside what was compared with measurements."""
    rate = cluster.network.bandwidth_bits_per_second
    return (
        source.readiness == "measured"
        and cluster.algorithm == "ring"
        and cluster.hook == source.hook
        and cluster.ranks_per_server == 1
        and cluster.network == Network(rate)
        and cluster.batch_per_rank == source.batch_per_rank
        and VALIDATED_SERVERS[0] <= cluster.num_servers <= VALIDATED_SERVERS[1]
        and rate is not None
        and VALIDATED_BANDWIDTHS[0] <= rate <= VALIDATED_BANDWIDTHS[1]
    )
