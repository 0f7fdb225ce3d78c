"""Lightning's own loggers as further mirrors of metrics.jsonl."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger


def make_logger(name: str, directory: Path, resume_step: int) -> "Logger":
    """Return a logger that writes below the directory of a run.

    Args:
        name: `csv`: `csv/version_<n>/metrics.csv`, one for each attempt; or `tensorboard`: event files.
        directory: Of the run.
        resume_step: Committed steps of the checkpoint this attempt starts from. What TensorBoard was told of later ones
            it drops.
    """
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    if name == "csv":
        return CSVLogger(directory, name="csv")
    own = f".from{resume_step}"  # its files are named by the second, and must not fall on each other
    return TensorBoardLogger(directory, name="tensorboard", version="", purge_step=resume_step + 1, filename_suffix=own)
