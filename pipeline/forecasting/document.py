"""forecast.json put together: the points of the grid, rounds of local steps, what was asked for and what is assumed."""

from collections.abc import Sequence
from dataclasses import asdict
from math import inf

from pipeline.config.plan import PlanConfig
from pipeline.core.errors import ConfigError
from pipeline.core.missing import Missing, to_json
from pipeline.core.schemas.forecast import (
    ErrorJson,
    ForecastBucketJson,
    ForecastJson,
    MethodJson,
    PointJson,
    SourceJson,
)
from pipeline.core.typed import require
from pipeline.forecasting.grid import VALIDATED_BANDWIDTHS, VALIDATED_SERVERS, clusters, make_point
from pipeline.forecasting.source import Readiness, Source

SCHEMA = 1
VALIDATED_ERRORS: ErrorJson = {"bandwidth": 0.052, "servers": 0.059}
"""What that comparison found."""
ASSUMPTIONS = (
    "Every server has one link to a switch, and nothing else is on it; a switch is never the limit, but for its link to"
    " others where servers_per_rack says that there are some.",
    "A rank computes as long as was measured, in proportion to its pictures; all ranks compute equally fast.",
    "The wait for data is left out: no loader holds training back.",
    "Buckets cross a server's card one after the other.",
    "A round costs round_seconds and latency_seconds.",
    "Ranks of one server have consecutive numbers, as have servers of one rack; what ranks of one server exchange costs"
    " no time unless local_bandwidth is given.",
    "Each variable lies whole on one parameter server: in the model's order, on the one that holds least so far. A lone"
    " parameter server stands beside the last server, in a rack of its own where that one's is full.",
    "fp16 and bf16 halve what travels; compressing and decompressing take no time.",
    "A larger global batch takes as many pictures to the same accuracy.",
)
NO_NETWORK = "no rank is late, and hosts add nothing to the bytes on their links while they compute."
ASSUMPTIONS_BY_READINESS: dict[Readiness, str] = {
    "measured": "{}: buckets are those of the run; while ranks compute, an all-reduce takes longer by what the run"
    " shows of it, in proportion to its bytes; late ranks are waited for as long as there.",
    "alone": "{}: measured on one rank alone, whose buckets are ready when its own backward pass says; " + NO_NETWORK,
    "estimated": "{}: an ESTIMATE from the model alone: a third of a step is forward, and in the backward pass a layer"
    " takes as long as its share of the multiply-adds; buckets are filled as DDP fills them; " + NO_NETWORK,
}
ASSUMPTIONS_OF_METHODS = (
    "Rounds of local steps: all weights leave at a round's end and arrive before the next step begins"
    " (comm.fragments=1, comm.delay=0); late ranks are waited for as long as in one step of the run, though uneven"
    " steps add up; encoding and decoding take no time.",
    "What longer rounds or fewer bits cost in accuracy is not forecast (docs/local-sgd.md).",
)


def forecast(config: PlanConfig, sources: Sequence[Source]) -> ForecastJson:
    """Return the content of forecast.json.

    Raises:
        ConfigError: no cluster of the grid has the global batch that was asked for, or two runs are of one model.
    """
    models = [source.model for source in sources]
    require(len(set(models)) == len(models), f"Two runs are of the same model ({', '.join(models)}): give one of each.")
    points = [make_point(config, source, cluster) for source in sources for cluster in clusters(config, source)]
    if not points:
        raise ConfigError(
            f"global_batch={config.global_batch} divides evenly among none of servers={list(config.servers)}: choose a"
            " multiple of the ranks."
        )
    content, reasons = to_json(
        {
            "points": points,
            "best_for_budget": Missing("No budget was given.") if config.budget is None else None,
        }
    )
    result: ForecastJson = {
        "schema": SCHEMA,
        "source_run": sources[0].name,
        "sources": [_source_json(source) for source in sources],
        "settings": {
            "exposed_share": config.exposed_share,
            "epochs": config.epochs,
            "num_images": config.num_images,
            "price_per_server_hour": config.price_per_server_hour,
            "budget": config.budget,
            "local_bandwidth": config.local_bandwidth,
            "servers_per_rack": config.servers_per_rack,
            "oversubscription": config.oversubscription,
            "parameter_servers": config.parameter_servers,
        },
        "assumptions": [
            *ASSUMPTIONS,
            *(ASSUMPTIONS_BY_READINESS[source.readiness].format(source.model) for source in sources),
            *(ASSUMPTIONS_OF_METHODS if config.methods else ()),
        ],
        "validation": {
            "bandwidth_bits_per_second": list(VALIDATED_BANDWIDTHS),
            "num_servers": list(VALIDATED_SERVERS),
            "error": VALIDATED_ERRORS,
            "command": "python -m benchmarks.forecast",
        },
        "points": content["points"],
        "methods": _methods(config, sources, content["points"]),
        "best_for_budget": content["best_for_budget"],
        "null_reasons": reasons,
    }
    if config.budget is not None:
        result["best_for_budget"] = best_for_budget(result["points"], config.budget)
    return result


def _methods(config: PlanConfig, sources: Sequence[Source], points: Sequence[PointJson]) -> list[MethodJson]:
    if not config.methods:
        return []
    from pipeline.forecasting.methods import method_rows  # imports torch

    return method_rows(config, sources, points)


def _source_json(source: Source) -> SourceJson:
    return {
        "run": source.name,
        "model": source.model,
        "readiness": source.readiness,
        "num_ranks": source.num_ranks,
        "batch_per_rank": source.batch_per_rank,
        "bandwidth_bits_per_second": source.network.bandwidth_bits_per_second,
        "forward_seconds": source.step.forward_seconds,
        "backward_seconds": source.step.backward_seconds,
        "other_seconds": source.step.other_seconds,
        "waiting_seconds": source.step.waiting_seconds,
        "host_seconds_per_round": source.host.seconds_per_round,
        "host_seconds_per_byte": source.host.seconds_per_byte,
        "buckets": [ForecastBucketJson(**asdict(bucket)) for bucket in source.step.buckets],
    }


def best_for_budget(points: Sequence[PointJson], budget: float) -> PointJson | None:
    """Return the point that trains soonest among those that cost no more than `budget`; None: none does."""
    affordable = [row for row in points if row["training_cost"] is not None and row["training_cost"] <= budget]
    return min(affordable, key=lambda row: row["training_seconds"] or inf, default=None)
