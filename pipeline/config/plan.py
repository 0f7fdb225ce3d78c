"""What `plan` may be told."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.hooks import ITEMSIZES
from pipeline.config.registry import IMAGENET_TRAINING_PICTURES
from pipeline.core.typed import PathText, one_of, require
from pipeline.core.units import bits_per_second

ALGORITHMS = ("ring", "hierarchical", "tree", "halving_doubling", "parameter_server")
"""How the bytes of an all-reduce may travel: those that `comm.forecast` can price."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Forecast what the training of a measured run would take on other clusters. Every assumption is printed."""

    name: str = "plan"
    """The forecast's directory under run_root."""
    run_root: PathText = "runs"
    run: PathText
    """Directory of a run on at least 2 ranks, its communication timed."""
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
    """Rate of a server's link in each direction: [100mbit,1gbit,25gbit]. Empty: as in the run."""
    latency_seconds: float = 0.0
    """One way between servers, on top of what the run had: 0.00002 within a hall, 0.001 within a city."""
    round_seconds: float = 1e-4
    """Seconds of one round of an all-reduce whose bytes do not count, between idle hosts of the measured run's kind."""
    algorithm: tuple[str, ...] = ("ring",)
    """How an all-reduce travels: ring, hierarchical, tree, halving_doubling, parameter_server."""
    hook: tuple[str, ...] = ()
    """Gradient compression: none, fp16, bf16. Empty: as in the run."""
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
        for rate in self.bandwidth:
            bits_per_second(rate)
        for algorithm in self.algorithm:
            one_of("algorithm", algorithm, ALGORITHMS)
        for hook in self.hook:
            one_of("hook", hook, tuple(ITEMSIZES))
        for key in ("servers", "ranks_per_server"):
            require(
                all(count >= 1 for count in getattr(self, key)), f"{key}={list(getattr(self, key))}: at least 1 each."
            )
        for key in ("servers", "algorithm"):
            require(bool(getattr(self, key)), f"{key}=[] leaves nothing to forecast.")
        for key in ("batch_per_rank", "global_batch", "accumulate", "epochs", "num_images", "price_per_server_hour"):
            value = getattr(self, key)
            require(value is None or value > 0, f"{key}={value} must be positive.")
        require(
            self.batch_per_rank is None or self.global_batch is None, "Give batch_per_rank or global_batch, not both."
        )
        for key in ("latency_seconds", "round_seconds"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must not be negative.")
        require(0 < self.exposed_share < 1, f"exposed_share={self.exposed_share} must be in (0, 1).")
        needs_price = self.budget is not None and self.price_per_server_hour is None
        require(not needs_price, f"budget={self.budget} needs price_per_server_hour.")

    @property
    def directory(self) -> Path:
        """Directory of the forecast."""
        return Path(self.run_root) / self.name
