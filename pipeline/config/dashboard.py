"""What `dashboard` may be told."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.training import check_project
from pipeline.core.typed import PathText


@dataclass(frozen=True, kw_only=True)
class DashboardConfig:
    """Build the W&B workspace and report page of a project, as files; with publish=true on the server too."""

    name: str = "dashboard"
    """The directory of the files under run_root."""
    run_root: PathText = "runs"
    project: str = "squeezewire"
    """The W&B project whose runs are shown: tracking.project of the trainings."""
    entity: str | None = None
    """The W&B user or team the project belongs to. Null: the default of the user who publishes."""
    publish: bool = False
    """Save both to the server. Needs a login: `wandb login`, or WANDB_API_KEY."""

    def __post_init__(self) -> None:
        check_project("project", self.project)

    @property
    def directory(self) -> Path:
        """Directory of the files."""
        return Path(self.run_root) / self.name
