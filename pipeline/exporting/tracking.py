"""An export in W&B: one run of its own with the table of its files, and the files as artefacts.

Like every mirror it may fail in any way: the files are complete before it begins.
"""

from pathlib import Path
from typing import Any

from pipeline.config.training import TrackingConfig
from pipeline.core.schemas.artefacts import ArtefactsJson
from pipeline.reporting.dashboards import ARTEFACTS_BARS, ARTEFACTS_TABLE
from pipeline.run.record.tracking import mirror_of
from pipeline.run.record.wandb_mirror import table

ID_FILE = "export_wandb_id"
CONFIG = ("model", "num_parameters", "num_zeros", "fp32_bytes", "lossless_bytes", "bits_per_weight")
NUM_ALIAS_DIGITS = 12
"""Of the SHA-256 in artefacts.json, by which a version of a file is asked for."""


def flat_rows(content: ArtefactsJson) -> list[dict[str, Any]]:
    """Return a row per file with numbers, texts and nulls alone; what was judged stands under `judged_<key>`."""
    return [
        {
            **{key: value for key, value in row.items() if not isinstance(value, dict)},
            **{f"judged_{key}": value for key, value in (row["judged"] or {}).items()},
        }
        for row in content["artefacts"]
    ]


def mirror_artefacts(content: ArtefactsJson, name: str, directory: Path, tracking: TrackingConfig) -> None:
    """Log the content of `artefacts.json`, and keep its files, in the export's W&B run: the same one ever after.

    Each file is an artefact of its kind's type. Its aliases are `latest` and the first digits of its SHA-256.
    Bounded in time; a failure of W&B's is a warning.

    Args:
        content: Of `artefacts.json`.
        name: Name of the export.
        directory: Where its files lie.
        tracking: Whether and where W&B mirrors it.
    """
    mirror = mirror_of(
        directory,
        name,
        tracking,
        id_file=ID_FILE,
        group="export",
        job_type="export",
        record="artefacts.json",
        config={key: content[key] for key in CONFIG},
        names_host=False,
    )
    if mirror is None:
        return
    mirror.log_media(lambda: _media(content))
    for row in content["artefacts"]:
        mirror.keep(row["artefact"], directory / row["file"], [row["sha256"][:NUM_ALIAS_DIGITS]])
    mirror.finish()


def _media(content: ArtefactsJson) -> dict[str, Any]:
    import wandb

    rows = flat_rows(content)
    media: dict[str, Any] = {ARTEFACTS_TABLE: table(rows)}
    for key, (column, title) in ARTEFACTS_BARS.items():
        known = [row for row in rows if row.get(column) is not None]
        if known:
            media[key] = wandb.plot.bar(table(known, ["artefact", column]), "artefact", column, title=title)
    return media
