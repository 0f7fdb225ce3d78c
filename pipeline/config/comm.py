"""The keys of `comm`."""

from dataclasses import dataclass

from pipeline.config.hooks import HOOKS
from pipeline.core.typed import one_of, require

RULES = ("constant", "post_local", "qsr")
CODECS = ("fp32", "bf16", "int8", "int4")
PLAIN_AVERAGE: dict[str, float | str] = {
    "outer_lr": 1.0,
    "outer_momentum": 0.0,
    "fragments": 1,
    "delay": 0,
    "codec": "fp32",
}
"""Of local SGD: all of the weights become their mean at the end of a round."""


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How gradients travel, or weights in their place."""

    meter: bool = True
    """Record every collective. Off only to measure what the recording costs."""
    timeline: bool = True
    """Time each step's communication, and how much of it is exposed. Needs the meter. Off only to measure its cost."""
    bucket_megabytes: float | None = 1.0
    """DDP's bucket_cap_mb, in MiB as torch counts it, for every bucket. Null: torch's default, a first bucket of 1 MiB
    and 25 MiB after it. 1 was measured: the last bucket, which nothing hides, is small, and large models lose nothing
    on gloo (python -m benchmarks.links --batches)."""
    strict: bool | None = None
    """Fail with exit code 6 when bytes measured and predicted differ. Null: yes on gloo, whose bytes are exact."""
    hook: str = "none"
    """Compression of gradients on the wire: `none`, `fp16`, `bf16`, `powersgd`."""
    powersgd_rank: int = 1
    """powersgd: rank of the matrices that stand for a layer's gradient. Higher: closer to it, and more bytes."""
    powersgd_start_step: int = 1000
    """powersgd: optimiser steps of the run that reduce plainly before the first compressed one, at least 2."""
    period: int | None = None
    """Local SGD: each rank trains by itself, and after so many steps the ranks average their weights. Null: gradients
    are exchanged in every step."""
    rule: str = "constant"
    """With period: `constant`, a round is that many steps; `post_local`, the same after local_start_step steps that
    exchange gradients; `qsr`, a round is as long as qsr_alpha says, and at least that many steps."""
    local_start_step: int = 0
    """With period: optimiser steps of the run that exchange gradients before the first local one."""
    qsr_alpha: float | None = None
    """qsr: a round that begins at learning rate lr is (qsr_alpha / lr)^2 steps, rounded down."""
    outer_lr: float = 1.0
    """With period, DiLoCo: at the end of a round the weights that the ranks had in common move by this times the change
    to the mean of the ranks. 1: to the mean, which is local SGD."""
    outer_momentum: float = 0.0
    """With period: Nesterov momentum of these moves, 0 up to but not 1. 0: none."""
    fragments: int = 1
    """With period: parts of the weights, of whole buckets, that leave at different steps of a round, evenly spread."""
    delay: int = 0
    """With period: steps after which a fragment that has left arrives. Ranks train on meanwhile."""
    codec: str = "fp32"
    """With period: what travels. `fp32`: weights; `bf16`, `int8`, `int4`: their change in so many bits, and what that
    loses with the next one."""
    find_unused_parameters: bool = False
    nccl_algorithm: str | None = None
    """Hold NCCL to `ring` or `tree`, and to one channel, so that its bytes can be predicted. Null: it chooses at run
    time."""
    nccl_protocol: str | None = None
    """With nccl_algorithm: `simple`, or `ll`, which sends every byte twice to save latency."""

    def __post_init__(self) -> None:
        require(
            (self.nccl_algorithm is None) == (self.nccl_protocol is None),
            "comm.nccl_algorithm and comm.nccl_protocol belong together: set both, or neither.",
        )
        if self.nccl_algorithm is not None and self.nccl_protocol is not None:
            one_of("comm.nccl_algorithm", self.nccl_algorithm, ("ring", "tree"))
            one_of("comm.nccl_protocol", self.nccl_protocol, ("simple", "ll"))
        one_of("comm.hook", self.hook, HOOKS)
        for key, least in (("powersgd_rank", 1), ("powersgd_start_step", 2)):
            require(getattr(self, key) >= least, f"comm.{key}={getattr(self, key)} must be at least {least}.")
        require(
            self.hook != "powersgd" or not self.find_unused_parameters,
            "comm.hook=powersgd cannot compress the zero gradients of unused parameters:"
            " set comm.find_unused_parameters=false, or another comm.hook.",
        )
        self._check_rounds()
        require(
            self.bucket_megabytes is None or self.bucket_megabytes > 0,
            f"comm.bucket_megabytes={self.bucket_megabytes} must be positive, or null for torch's default.",
        )

    def _check_rounds(self) -> None:
        one_of("comm.rule", self.rule, RULES)
        start, alpha = self.local_start_step, self.qsr_alpha
        require(start >= 0, f"comm.local_start_step={start} must not be negative.")
        if self.period is None:
            given = {"rule": self.rule != "constant", "local_start_step": start > 0, "qsr_alpha": alpha is not None}
            given |= {key: getattr(self, key) != plain for key, plain in PLAIN_AVERAGE.items()}
            for key in (key for key, is_given in given.items() if is_given):
                require(False, f"comm.{key}={getattr(self, key)} is about local steps: set comm.period= too.")
            return
        require(self.period >= 1, f"comm.period={self.period} must be at least 1, or null for no local steps.")
        require(
            self.hook == "none",
            f"comm.hook={self.hook} compresses gradients, and local steps (comm.period={self.period}) send none:"
            " set comm.hook=none, or comm.period=null.",
        )
        require(
            not self.find_unused_parameters,
            "comm.find_unused_parameters=true does not go with local steps: a rank that has not used a parameter yet"
            " has no momentum of it, and the others have. Set it to false, or comm.period=null.",
        )
        require(
            self.rule != "post_local" or start > 0,
            "comm.rule=post_local needs comm.local_start_step=, the steps that exchange gradients first: recipe.decay"
            " lowers the learning rate in every step, so that there is no first decay to begin after.",
        )
        require(
            self.rule != "qsr" or (alpha is not None and alpha > 0),
            f"comm.rule=qsr with comm.qsr_alpha={alpha}: a round that begins at learning rate lr is (qsr_alpha / lr)^2"
            " steps, so set it to a positive number; with recipe.lr times the root of comm.period, rounds grow as soon"
            " as the learning rate falls.",
        )
        require(
            self.rule == "qsr" or alpha is None,
            f"comm.qsr_alpha={alpha} is of comm.rule=qsr, not of comm.rule={self.rule}.",
        )
        self._check_outer_steps(self.period)

    def _check_outer_steps(self, period: int) -> None:
        one_of("comm.codec", self.codec, CODECS)
        require(self.outer_lr > 0, f"comm.outer_lr={self.outer_lr} must be positive; 1 is the mean of the ranks.")
        require(
            0 <= self.outer_momentum < 1,
            f"comm.outer_momentum={self.outer_momentum} must be at least 0, for none, and less than 1.",
        )
        require(self.fragments >= 1, f"comm.fragments={self.fragments} must be at least 1.")
        require(
            self.fragments <= period,
            f"comm.fragments={self.fragments} cannot leave at as many steps of a round of comm.period={period}: set it"
            f" to at most {period}.",
        )
        require(self.delay >= 0, f"comm.delay={self.delay} must not be negative.")
        between = period // self.fragments
        require(
            self.delay < between,
            f"comm.delay={self.delay} must be less than the {between} steps from a fragment to the next one"
            f" (comm.period={period}, comm.fragments={self.fragments}): set it to at most {between - 1}.",
        )

    @property
    def keeps_anchor(self) -> bool:
        """Whether the weights that ranks have in common are kept beside each rank's own."""
        return any(getattr(self, key) != plain for key, plain in PLAIN_AVERAGE.items())
