"""What must agree between runs before their numbers may stand side by side, and what is said about it."""

from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import ConfigError
from pipeline.report.runs import RunRecord, flat

_HOOK = "compression hook"
_POWERSGD_KEYS = ("powersgd_rank", "powersgd_start_step")


def conditions_of(run: RunRecord) -> dict[str, Any]:
    """The conditions of one run, by their names."""
    ledger, config = run.ledger, flat(run.config)
    environment = flat(run.environment)
    return {
        "pictures per step": ledger["global_batch"],
        "ranks": ledger["world_size"],
        "servers": ledger["num_servers"],
        "placement": ledger["placement"],
        "server of rank": ledger["server_of_rank"],
        "link of a server": run.link,
        "segmentation offloads": environment.get("lab.offloads"),
        "backend": ledger["backend"],
        "algorithm": ledger["algorithm"],
        _HOOK: ledger["hook"],
        **({key: config.get(f"comm.{key}") for key in _POWERSGD_KEYS} if ledger["hook"] == "powersgd" else {}),
        "bucket size in MiB": config.get("comm.bucket_megabytes"),
        "largest micro-batch per rank": config.get("batch.max_per_rank"),
        "shards": config.get("data.root"),
        **_conditions_of_a_rank(run),
        "hosts": list(dict.fromkeys(environment.get("hosts") or ())) or None,
    }


def _conditions_of_a_rank(run: RunRecord) -> dict[str, Any]:
    """Those that a rank alone shares with a rank among others."""
    config, environment = flat(run.config), flat(run.environment)
    return {
        "crop side in pixels": config.get("data.size") or config.get("model.input.size"),
        "classes": config.get("model.num_classes"),
        "arithmetic": environment.get("arithmetic") or config.get("trainer.precision"),
        "processor": ", ".join(environment.get("devices") or [environment.get("cpu.model") or "unknown"]),
        "threads per rank": environment.get("num_threads_per_rank"),
        "torch": environment.get("packages.torch"),
    }


def refuse_to_mix(runs: Mapping[str, RunRecord], *, hooks_may_differ: bool = False) -> None:
    """Raise ConfigError naming each condition in which the runs differ, by their labels.

    hooks_may_differ: the compression is compared too, so it may differ, but nothing else.
    """
    by_label = {label: conditions_of(run) for label, run in runs.items()}
    if hooks_may_differ:
        for hook in dict.fromkeys(conditions[_HOOK] for conditions in by_label.values()):
            _require_same({label: found for label, found in by_label.items() if found[_HOOK] == hook})
        varying = {_HOOK, *_POWERSGD_KEYS}
        by_label = {
            label: {key: value for key, value in found.items() if key not in varying}
            for label, found in by_label.items()
        }
    _require_same(by_label)


def _require_same(by_label: Mapping[str, Mapping[str, Any]]) -> None:
    if not by_label:
        return
    first_label, first = next(iter(by_label.items()))
    for label, conditions in by_label.items():
        for key in first.keys() | conditions.keys():
            here, there = first.get(key), conditions.get(key)
            if here != there:
                raise ConfigError(
                    f"The runs were made under different conditions: {key} is {here} for {first_label} and {there} for"
                    f" {label}. Compare runs that agree, or let `pipeline.compare models=[...]` make them anew."
                )


def footing_difference(run: RunRecord, alone: RunRecord) -> str:
    """Why a rank alone cannot be set against a rank of `run`, as a sentence; empty if it can."""
    if alone.ledger["world_size"] != 1:
        return f"{alone.directory} is no run of a single rank."
    per_rank = run.ledger["global_batch"] / run.ledger["world_size"]
    pairs = {"pictures per step and rank": (per_rank, alone.ledger["global_batch"])}
    mine, others = _conditions_of_a_rank(run), _conditions_of_a_rank(alone)
    pairs |= {key: (mine[key], others[key]) for key in mine}
    for key, (here, there) in pairs.items():
        if here != there:
            return f"The run on a single rank was made under different conditions: {key} is {there}, not {here}."
    return ""


def shared_conditions(runs: Mapping[str, RunRecord], alone: RunRecord | None) -> dict[str, Any]:
    """What stands above the table. runs: by label. alone: a run on a single rank, if there was one."""
    if not runs:
        return {}
    run = next(iter(runs.values()))
    conditions = {key: value for key, value in conditions_of(run).items() if value is not None}
    for key in ("server of rank", *_POWERSGD_KEYS):
        conditions.pop(key, None)
    hooks = list(dict.fromkeys(run.ledger["hook"] for run in runs.values()))
    conditions[_HOOK] = hooks[0] if len(hooks) == 1 else hooks
    if compressed := next((run for run in runs.values() if run.ledger["hook"] == "powersgd"), None):
        conditions["PowerSGD"] = _powersgd(flat(compressed.config))
    if shares_one_machine(run):
        conditions["all ranks share one machine"] = True
    if alone is not None:
        batch, threads = alone.ledger["global_batch"], alone.environment.get("num_threads_per_rank")
        conditions["one rank alone"] = f"pictures per step: {batch}, threads: {threads}, no network"
    steps = sorted({run.ledger["num_steps"] for run in runs.values()})
    conditions["steps per model"] = steps[0] if len(steps) == 1 else steps
    return conditions


def _powersgd(config: Mapping[str, Any]) -> str:
    rank, plain = config.get("comm.powersgd_rank"), config.get("comm.powersgd_start_step")
    if plain is None:
        return f"rank {rank}; payload is the mean of all steps"
    return f"rank {rank}, after {plain} plain steps; payload and egress are those of a compressed step"


def shares_one_machine(run: RunRecord) -> bool:
    """Whether the ranks share processors and memory: on one host, or in a lab, whose servers are one machine's."""
    hosts = set(run.environment.get("hosts") or ())
    return run.ledger["world_size"] > 1 and (len(hosts) == 1 or bool(run.environment.get("lab")))
