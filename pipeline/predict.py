"""Pictures to class names and probabilities, by any weights that `evaluate` reads.

    python -m pipeline.predict checkpoint=runs/first source=pictures
    find . -name '*.jpg' | python -m pipeline.predict checkpoint=runs/first source=- top=1 format=csv > said.csv

A file that is no picture is named on stderr, the others are told, and the exit code is 3.
"""

from pipeline.config.predict import PredictConfig
from pipeline.core.cli import run_command
from pipeline.core.errors import ExitCode


def predict(config: PredictConfig) -> int:
    """Tell what is in each picture; returns the exit code."""
    from pipeline.training import prediction

    paths = prediction.find_pictures(config.source)
    predictor = prediction.load(config)
    num_bad = prediction.tell(predictor, paths, config)
    return ExitCode.DATA if num_bad else ExitCode.DONE


if __name__ == "__main__":
    run_command("predict", PredictConfig, predict)
