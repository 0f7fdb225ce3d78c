"""What `plan` was given to start from: measured runs, runs on one rank, or a model's name."""

from dataclasses import replace
from pathlib import Path

from pipeline.comm.all_reduce import ROUND_SECONDS
from pipeline.comm.link import parse_links
from pipeline.config.plan import PlanConfig
from pipeline.core.errors import ConfigError
from pipeline.core.typed import require
from pipeline.forecasting.alone import estimate_source, read_alone
from pipeline.forecasting.source import Source, read_source
from pipeline.reporting.runs import RunRecord, read_run


def with_measured_links(config: PlanConfig) -> PlanConfig:
    """Return the configuration with what `ready` measured in it: time of a round, and a bandwidth where none is known.

    Raises:
        ConfigError: The file is not what `ready` printed on several servers.
    """
    if config.ready is None:
        return config
    try:
        text = Path(config.ready).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"ready={config.ready} cannot be read ({error}): give the file with its output.") from error
    try:
        links = parse_links(text)
    except ValueError as error:
        raise ConfigError(
            f"ready={config.ready}: {error}. Measure again, or give bandwidth= and round_seconds=."
        ) from error
    require(
        bool(links),
        f"ready={config.ready} names no link between servers: keep what `pipeline.ready` prints on two servers or more,"
        " as in `srun ... > ready.txt`.",
    )
    slowest = min(link.bits_per_second for link in links)
    knows_links = config.run is not None and read_run(Path(config.run)).ledger["world_size"] > 1
    return replace(
        config,
        ready=None,
        round_seconds=max(link.round_trip_microseconds for link in links) / 2e6,
        bandwidth=config.bandwidth or (() if knows_links else (f"{slowest:.0f}bit",)),
    )


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
                round_seconds=_round_seconds(config),
            )
        ]
    compute = [read_run(Path(directory)) for directory in config.compute_runs]
    return [_read(config, read_run(Path(directory)), compute) for directory in (config.run, *config.beside)]


def _read(config: PlanConfig, run: RunRecord, compute: list[RunRecord]) -> Source:
    if run.ledger["world_size"] > 1:
        return read_source(run, config.measured_bandwidth, compute, _round_seconds(config))
    require(
        config.measured_bandwidth is None,
        f"measured_bandwidth={config.measured_bandwidth}: {run.directory} ran on one rank alone and crossed no link.",
    )
    require(
        bool(config.bandwidth),
        f"{run.directory} ran on one rank alone and knows no link: give bandwidth=, such as [1gbit,10gbit].",
    )
    return read_alone(run, compute, _round_seconds(config))


def _round_seconds(config: PlanConfig) -> float:
    """Return the seconds of a round between idle hosts: gloo's on one machine where nothing was said."""
    return ROUND_SECONDS if config.round_seconds is None else config.round_seconds
