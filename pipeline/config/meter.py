"""What `meter` may be told."""

from dataclasses import dataclass

from pipeline.core.typed import PathText, one_of

PLACEMENTS = ("host", "rank")


@dataclass(frozen=True, kw_only=True)
class MeterConfig:
    """Run the command that follows `--`, unchanged, and account for every byte that its ranks exchange.

    For programs that use torch.distributed, under any launcher. The exit code is the command's.
    """

    name: str
    """The directory of the run under run_root."""
    run_root: PathText = "runs"
    placement: str = "host"
    """What a server is. `host`: a machine since its boot, whatever the launcher calls its nodes; `rank`: each rank is
    taken as a server of its own, so that what would leave it is predicted on one machine, too."""

    def __post_init__(self) -> None:
        one_of("placement", self.placement, PLACEMENTS)
