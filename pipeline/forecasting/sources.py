"""What `plan` was given to start from: measured runs, runs on one rank, or a model's name."""

from pathlib import Path

from pipeline.config.plan import PlanConfig
from pipeline.core.typed import require
from pipeline.forecasting.alone import estimate_source, read_alone
from pipeline.forecasting.source import Source, read_source
from pipeline.reporting.runs import RunRecord, read_run


def read_sources(config: PlanConfig) -> list[Source]:
    """Return every run or model that is forecast, the first one first.

    Raises:
        ConfigError: a run did not measure what a forecast needs, or bandwidths are needed and none is given.
        DataError: there is no run.
    """
    if config.run is None:
        assert config.images_per_second is not None and config.batch_per_rank is not None  # else refused
        return [
            estimate_source(
                config.model,
                config.images_per_second,
                config.batch_per_rank,
                bucket_megabytes=config.bucket_megabytes,
                round_seconds=config.round_seconds,
            )
        ]
    compute = [read_run(Path(directory)) for directory in config.compute_runs]
    return [_read(config, read_run(Path(directory)), compute) for directory in (config.run, *config.beside)]


def _read(config: PlanConfig, run: RunRecord, compute: list[RunRecord]) -> Source:
    if run.ledger["world_size"] > 1:
        return read_source(run, config.measured_bandwidth, compute, config.round_seconds)
    require(
        config.measured_bandwidth is None,
        f"measured_bandwidth={config.measured_bandwidth}: {run.directory} ran on one rank alone and crossed no link.",
    )
    require(
        bool(config.bandwidth),
        f"{run.directory} ran on one rank alone and knows no link: give bandwidth=, such as [1gbit,10gbit].",
    )
    return read_alone(run, compute, config.round_seconds)
