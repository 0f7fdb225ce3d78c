"""What `plan` may be told."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.hooks import ITEMSIZES
from pipeline.config.model import ModelConfig
from pipeline.config.registry import IMAGENET_TRAINING_PICTURES
from pipeline.core.typed import PathText, one_of, require
from pipeline.core.units import bits_per_second

ALGORITHMS = ("ring", "hierarchical", "tree", "halving_doubling", "parameter_server")
"""How the bytes of an all-reduce may travel: those that `comm.forecast` can price."""
METHODS = {"local": "fp32", "local_bf16": "bf16", "local_int8": "int8", "local_int4": "int4"}
"""Ways to exchange weights after rounds of local steps, by name: comm=local with this comm.codec."""
POSITIVE = (
    "batch_per_rank", "global_batch", "accumulate", "epochs", "num_images", "price_per_server_hour",
    "images_per_second", "bucket_megabytes", "servers_per_rack", "parameter_servers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Forecast what a training would take on other clusters. Every assumption is printed."""

    name: str = "plan"
    """The forecast's directory under run_root."""
    run_root: PathText = "runs"
    run: PathText | None = None
    """Directory of a run whose buckets were timed, on several ranks or on one alone. Null: give model,
    images_per_second and batch_per_rank."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name=""))
    """In place of a run, model=NAME: when its gradients are ready is estimated from its layers' multiply-adds on
    pictures of model.input.size."""
    images_per_second: float | None = None
    """With model: pictures per second that one rank alone trains, measured or published, with batch_per_rank."""
    bucket_megabytes: float | None = 1.0
    """With model: DDP's bucket_cap_mb, in MiB, as comm.bucket_megabytes. Null: torch's default."""
    beside: tuple[PathText, ...] = ()
    """Further runs, of other models say, forecast for the same clusters."""
    compute_runs: tuple[PathText, ...] = ()
    """Runs on one rank each, made side by side under the same conditions: their computing replaces that of `run`, and a
    step lasts as long as the slowest of them. For ranks that share cores."""
    measured_bandwidth: str | None = None
    """Rate of a server's link in `run`, such as 10gbit, where the run does not know it itself (the lab's runs do)."""
    servers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    ranks_per_server: tuple[int, ...] = ()
    """Empty: as in the run."""
    bandwidth: tuple[str, ...] = ()
    """Rate of a server's link in each direction: [100mbit,1gbit,25gbit]. Empty: as in the run, if it had links."""
    latency_seconds: float = 0.0
    """One way between servers, on top of what the run had: 0.00002 within a hall, 0.001 within a city."""
    round_seconds: float | None = None
    """Seconds of one round of an all-reduce whose bytes do not count, between idle hosts of the measured run's kind.
    Null: as `ready` measured, or 0.0001, gloo's."""
    ready: PathText | None = None
    """What `ready` printed on the cluster, kept as a file: half of its longest round trip is
    round_seconds, and its slowest link that of a bandwidth that neither bandwidth= nor the run says."""
    local_bandwidth: str | None = None
    """Rate of a rank's link to the others of its server, such as 100gbit. Null: never the limit."""
    servers_per_rack: int | None = None
    """Servers that share a switch. Null: all do. A parameter server stands beside the last of the servers, in a rack of
    its own where that one's is full."""
    oversubscription: float = 1.0
    """With servers_per_rack: what the links of a rack's servers carry together over what its switch's link to the other
    racks carries."""
    algorithm: tuple[str, ...] = ("ring",)
    """How an all-reduce travels: ring, hierarchical, tree, halving_doubling, parameter_server."""
    parameter_servers: int = 1
    """With algorithm=[parameter_server]: how many share the variables, each of which lies on one of them whole."""
    hook: tuple[str, ...] = ()
    """Gradient compression: none, fp16, bf16. Empty: as in the run."""
    methods: tuple[str, ...] = ()
    """Exchanges of weights after rounds of local steps, beside the ring in every step: local (comm=local), local_bf16,
    local_int8, local_int4 (comm=local comm.codec=int4). Of each the shortest round is told with which at most
    exposed_share shows, where several servers share a link of known bandwidth."""
    batch_per_rank: int | None = None
    """Pictures of a micro-batch on a rank. Null: as in the run, so that the global batch grows with the ranks."""
    global_batch: int | None = None
    """Pictures of a step over all ranks, kept whatever their number. Null: batch_per_rank decides."""
    accumulate: int | None = None
    """Micro-batches of a step. Null: as in the run."""
    exposed_share: float = 0.05
    """Communication shows where it is exposed for more than this share of a step."""
    epochs: float = 90
    """Epochs of the training whose time and cost are reported."""
    num_images: int = IMAGENET_TRAINING_PICTURES
    """Pictures of an epoch."""
    price_per_server_hour: float | None = None
    """Price of a server for an hour, in any currency."""
    budget: float | None = None
    """Most that the training may cost; the forecast names the cluster that trains soonest for it."""

    def __post_init__(self) -> None:
        self._check_source()
        for rate in (*self.bandwidth, *([self.local_bandwidth] if self.local_bandwidth is not None else [])):
            bits_per_second(rate)
        for algorithm in self.algorithm:
            one_of("algorithm", algorithm, ALGORITHMS)
        for hook in self.hook:
            one_of("hook", hook, tuple(ITEMSIZES))
        for method in self.methods:
            one_of("methods", method, tuple(METHODS))
        require(
            not self.methods or "ring" in self.algorithm,
            f"methods={list(self.methods)} are gloo's exchanges: add ring to algorithm={list(self.algorithm)}.",
        )
        require(
            not self.methods or max(self.servers, default=2) > 1,
            f"methods={list(self.methods)} need several servers, between which weights travel, and"
            f" servers={list(self.servers)}: ask for 2 or more.",
        )
        for key in ("servers", "ranks_per_server"):
            require(
                all(count >= 1 for count in getattr(self, key)), f"{key}={list(getattr(self, key))}: at least 1 each."
            )
        for key in ("servers", "algorithm"):
            require(bool(getattr(self, key)), f"{key}=[] leaves nothing to forecast.")
        for key in POSITIVE:
            value = getattr(self, key)
            require(value is None or value > 0, f"{key}={value} must be positive.")
        require(
            self.batch_per_rank is None or self.global_batch is None or self.run is None,
            "Give batch_per_rank or global_batch, not both.",
        )
        for key in ("latency_seconds", "round_seconds"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"{key}={value} must not be negative.")
        require(
            self.ready is None or self.round_seconds is None,
            f"round_seconds={self.round_seconds} beside ready={self.ready}, which tells it: give one of the two.",
        )
        require(
            self.oversubscription >= 1,
            f"oversubscription={self.oversubscription} must be at least 1: a switch's link to others is no faster than"
            " those of its servers together.",
        )
        self._check_racks_and_parameter_servers()
        needs_racks = self.oversubscription > 1 and self.servers_per_rack is None
        require(not needs_racks, f"oversubscription={self.oversubscription} needs servers_per_rack.")
        require(0 < self.exposed_share < 1, f"exposed_share={self.exposed_share} must be in (0, 1).")
        needs_price = self.budget is not None and self.price_per_server_hour is None
        require(not needs_price, f"budget={self.budget} needs price_per_server_hour.")

    def _check_racks_and_parameter_servers(self) -> None:
        """Refuse those that do not go together, and those that would have no effect."""
        has_holders = "parameter_server" in self.algorithm
        require(
            self.parameter_servers == 1 or has_holders,
            f"parameter_servers={self.parameter_servers} needs algorithm=[parameter_server].",
        )
        if self.servers_per_rack is None:
            return
        require(
            self.parameter_servers == 1,
            f"parameter_servers={self.parameter_servers} with servers_per_rack={self.servers_per_rack}: which racks"
            " they would stand in is not known. Leave one of the two out.",
        )
        require(
            max(self.servers) + has_holders > self.servers_per_rack,
            f"servers_per_rack={self.servers_per_rack} has no effect on servers={list(self.servers)}, which share one"
            " switch: leave it out, or ask for more servers.",
        )

    def _check_source(self) -> None:
        """Refuse a run beside a model, neither, and a model of which too little is known."""
        require(
            (self.run is None) != (not self.model.name),
            "Give run=DIRECTORY, or model= with images_per_second= and batch_per_rank=: one of the two.",
        )
        if self.run is None:
            for key in ("images_per_second", "batch_per_rank", "bandwidth"):
                is_given = bool(getattr(self, key)) or (key == "bandwidth" and self.ready is not None)
                require(is_given, f"model={self.model.name} needs {key}=, which no run tells here.")
            for key in ("measured_bandwidth", "compute_runs", "beside"):
                require(not getattr(self, key), f"{key}= belongs to a run: leave it out, or give run=.")
        else:
            require(self.images_per_second is None, "images_per_second= belongs to model=: a run tells its own.")

    @property
    def directory(self) -> Path:
        """Directory of the forecast."""
        return Path(self.run_root) / self.name
