"""What `report` may be told."""

from dataclasses import dataclass

from pipeline.core.typed import PathText


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write the report of a run as it stands."""

    run: PathText
    """Directory of a run or of a comparison; report.html is written there."""
