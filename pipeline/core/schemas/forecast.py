"""`forecast.json`: what the training of a measured run would take on other clusters."""

from typing import Literal, NotRequired, TypedDict


class ForecastBucketJson(TypedDict):
    """A bucket of gradients, as its step is forecast."""

    payload_bytes: int
    """Bytes that its all-reduce carries, compressed."""
    itemsize: int
    """Bytes per element on the wire."""
    ready_seconds: float
    """Seconds from the start of the step's last backward pass until its gradients are complete."""


class SourceJson(TypedDict):
    """What the forecast took from a measured run, or made of a model's name and speed."""

    run: str
    """Name of the run; the model's where none was run."""
    model: str
    """Name of the model."""
    readiness: Literal["measured", "alone", "estimated"]
    """How it is known when buckets are ready: `measured` on several ranks, `alone` on one that exchanges nothing,
    `estimated` from the model's multiply-adds and a speed."""
    num_ranks: int
    """Number of ranks."""
    batch_per_rank: int
    """Pictures of one micro-batch on a rank."""
    bandwidth_bits_per_second: float | None
    """Bits per second of a server's link; null: the links limited nothing."""
    forward_seconds: float
    """Seconds in the forward passes of a step's micro-batches."""
    backward_seconds: float
    """Seconds in the backward passes of a step's micro-batches: computation only."""
    other_seconds: float
    """Seconds of a step that are no pass, no exchange and no wait for data."""
    waiting_seconds: float
    """Seconds of a step for small exchanges and late ranks, which the buckets do not explain."""
    host_seconds_per_round: float
    """Seconds of one message between two idle hosts, beside its bytes."""
    host_seconds_per_byte: float
    """Seconds per byte that the hosts add while they also compute."""
    buckets: list[ForecastBucketJson]
    """Buckets in the order they are reduced."""


class SettingsJson(TypedDict):
    """What the forecast was asked for beside clusters."""

    exposed_share: float
    """Fraction of a step beyond which exposed communication counts as showing."""
    epochs: float
    """Epochs of the training whose time and cost are forecast."""
    num_images: int
    """Pictures of an epoch."""
    price_per_server_hour: float | None
    """Price of a server per hour, in any currency."""
    budget: float | None
    """Most that the training may cost."""
    local_bandwidth: str | None
    """Rate of a rank's link to the others of its server; null: never the limit."""
    servers_per_rack: int | None
    """Servers that share a switch; null: all do."""
    oversubscription: float
    """Rates of a rack's servers together over that of its switch's link to the others."""
    parameter_servers: int
    """How many share the variables, for the algorithm of that name."""


class ErrorJson(TypedDict):
    """Mean absolute error of the forecast's step time against measurements, as a fraction of the step."""

    bandwidth: float
    """Error over other bandwidths than the measured run's."""
    servers: float
    """Error over other numbers of servers."""


class ValidationJson(TypedDict):
    """What the forecast was compared with. Points outside are extrapolated."""

    bandwidth_bits_per_second: list[float]
    """Lowest and highest bandwidth in bits per second."""
    num_servers: list[int]
    """Lowest and highest number of servers."""
    error: ErrorJson
    """Errors that were found."""
    command: str
    """Command that repeats the comparison."""


class PointJson(TypedDict):
    """One cluster. A cluster that the algorithm does not fit has a `reason`, and nulls for all that is forecast."""

    model: str
    """Name of the model."""
    num_servers: int
    """Number of servers."""
    ranks_per_server: int
    """Ranks on each server."""
    bandwidth_bits_per_second: float | None
    """Bits per second of a server's link in each direction; null: the links limit nothing, as in the measured run."""
    latency_seconds: float
    """Seconds one way between servers, on top of the measured run's."""
    algorithm: str
    """How gradients are summed: `ring`, `hierarchical`, `tree`, `halving_doubling` or `parameter_server`."""
    hook: str
    """Gradient compression (`comm.hook`)."""
    batch_per_rank: int
    """Pictures of one micro-batch on a rank."""
    accumulate: int
    """Micro-batches of a step."""
    global_batch: int
    """Pictures per step over all ranks."""
    server_egress_bytes_per_step: int | None
    """Bytes that leave the busiest server per step."""
    step_seconds: float | None
    """Seconds of a step, without the wait for data."""
    exposed_seconds: float | None
    """Seconds of a step spent waiting for buckets, small exchanges and late ranks."""
    communication_seconds: float | None
    """Seconds of a step in which the servers' cards carry gradients, hidden behind computation or not."""
    scaling_efficiency: float | None
    """The step of a rank alone over this step, a fraction."""
    images_per_second: float | None
    """Pictures per second over all ranks."""
    sufficient_bandwidth_bits_per_second: float | None
    """Bits per second of a server's link above which at most `exposed_share` of a step is exposed."""
    training_seconds: float | None
    """Seconds of the whole training."""
    training_cost: float | None
    """Cost of the whole training, in the currency of the price."""
    validated: bool | None
    """Whether the point lies inside what was compared with measurements."""
    reason: NotRequired[str]
    """Why there is no forecast. Absent where there is one."""


class MethodJson(TypedDict):
    """Rounds of local steps on a cluster: the shortest with which their exchange does not show."""

    model: str
    """Name of the model."""
    num_servers: int
    """Number of servers."""
    ranks_per_server: int
    """Ranks on each server."""
    bandwidth_bits_per_second: float
    """Bits per second of a server's link in each direction."""
    latency_seconds: float
    """Seconds one way between servers, on top of the measured run's."""
    hook: str
    """Gradient compression that `bytes_share` compares with: the first that was asked for."""
    global_batch: int
    """Pictures per step over all ranks."""
    method: str
    """`local` (comm=local), or `local_bf16`, `local_int8`, `local_int4` (comm=local with that comm.codec)."""
    period: int
    """Fewest steps of a round (comm.period) of which at most `settings.exposed_share` is spent in its exchange."""
    exchange_seconds: float
    """Seconds of the exchange at a round's end, in which nothing is computed."""
    server_egress_bytes_per_exchange: int
    """Bytes that leave the busiest server at the end of a round."""
    bytes_share: float
    """Those of the exchanges over those of gradients in every step, a fraction."""
    step_seconds: float
    """Seconds of a step on average, without the wait for data."""
    scaling_efficiency: float
    """The step of a rank alone over this step, a fraction."""


class ForecastJson(TypedDict):
    """`forecast.json`: a grid of clusters, and what each would take."""

    schema: Literal[1]
    """Version of this format."""
    source_run: str
    """Name of the first measured run."""
    sources: list[SourceJson]
    """The measured runs, one of each model."""
    settings: SettingsJson
    """What was asked for beside clusters."""
    assumptions: list[str]
    """Sentences that hold for every point."""
    validation: ValidationJson
    """What the forecast was compared with."""
    points: list[PointJson]
    """Every cluster of the grid, for each model."""
    methods: list[MethodJson]
    """Rounds of local steps on the clusters of several servers, for the methods that were asked for."""
    best_for_budget: PointJson | None
    """The point that trains soonest within the budget; null: no budget, or none does."""
    null_reasons: dict[str, str]
    """Why a value of a point is null, by its dotted path (`points.0.training_cost`)."""
