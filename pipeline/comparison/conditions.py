"""What must agree between runs before their numbers may stand side by side, and what is said about it."""

from collections.abc import Mapping, Sequence

from pipeline.core.errors import ConfigError
from pipeline.core.schemas.comparison import ConditionJson
from pipeline.reporting.runs import RunRecord

Conditions = dict[str, ConditionJson | None]
"""Conditions by their names in words; None: the run did not record it."""

SHARDS = "shards"
"""In environment.json: {sha256, classes} of the training split, the hash being its index's."""
NUM_NAMES_SHOWN = 10
_REMEDY = "Compare runs that agree, or let `pipeline.compare models=[...]` make them anew."
_HOOK = "compression hook"
_POWERSGD_KEYS = ("powersgd_rank", "powersgd_start_step")


def conditions_of(run: RunRecord) -> Conditions:
    """Return the conditions of one run."""
    ledger = run.ledger
    return {
        "pictures per step": ledger["global_batch"],
        "ranks": ledger["world_size"],
        "servers": ledger["num_servers"],
        "placement": ledger["placement"],
        "server of rank": ledger["server_of_rank"],
        "link of a server": run.link,
        "segmentation offloads": run.recorded("lab.offloads"),
        "backend": ledger["backend"],
        "algorithm": ledger["algorithm"],
        _HOOK: ledger["hook"],
        **({key: run.setting(f"comm.{key}") for key in _POWERSGD_KEYS} if ledger["hook"] == "powersgd" else {}),
        "bucket size in MiB": run.setting("comm.bucket_megabytes"),
        "largest micro-batch per rank": run.setting("batch.max_per_rank"),
        "shards": run.setting("data.root"),
        **_conditions_of_a_rank(run),
        "hosts": list(dict.fromkeys(run.recorded("hosts") or ())) or None,
    }


def _conditions_of_a_rank(run: RunRecord) -> Conditions:
    """Return those that a rank alone shares with a rank among others."""
    return {
        "crop side in pixels": run.crop,
        "classes": run.setting("model.num_classes"),
        "arithmetic": run.arithmetic,
        "processor": ", ".join(run.recorded("devices") or [run.recorded("cpu.model") or "unknown"]),
        "threads per rank": run.recorded("num_threads_per_rank"),
        "torch": run.recorded("packages.torch"),
    }


def refuse_to_mix(runs: Mapping[str, RunRecord], *, hooks_may_differ: bool = False) -> None:
    """Refuse runs, by label, whose conditions differ.

    Args:
        runs: Runs by the label of their row.
        hooks_may_differ: The compression is compared too, so it may differ, but nothing else.

    Raises:
        ConfigError: a condition differs; it is named with both values.
    """
    require_same_shards(runs)
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


def require_same_shards(runs: Mapping[str, RunRecord], remedy: str = _REMEDY) -> None:
    """Refuse runs over shards of other classes or another content; those that did not record them are passed over.

    Args:
        runs: Runs by label.
        remedy: What to do about it, as a sentence.

    Raises:
        ConfigError: two runs differ; both are named.
    """
    known = {label: run for label, run in runs.items() if run.recorded(f"{SHARDS}.sha256")}
    if not known:
        return
    first_label, first = next(iter(known.items()))
    for label, run in known.items():
        here, there = (of.recorded(f"{SHARDS}.classes") for of in (first, run))
        if here is not None and there is not None and list(here) != list(there):
            order = ", in another order" if set(here) == set(there) else ""
            raise ConfigError(
                f"A label means another class in each of the runs: {first_label} was trained on {_listed(here)},"
                f" {label} on {_listed(there)}{order}. {remedy}"
            )
        if run.recorded(f"{SHARDS}.sha256") != first.recorded(f"{SHARDS}.sha256"):
            raise ConfigError(
                f"The shards at {run.setting('data.root')} had another content for {label} than for {first_label}."
                f" {remedy}"
            )


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NUM_NAMES_SHOWN else ""
    return f"{len(names)} classes: {', '.join(map(repr, names[:NUM_NAMES_SHOWN]))}{more}"


def _require_same(by_label: Mapping[str, Conditions]) -> None:
    if not by_label:
        return
    first_label, first = next(iter(by_label.items()))
    for label, conditions in by_label.items():
        for key in first.keys() | conditions.keys():
            here, there = first.get(key), conditions.get(key)
            if here != there:
                raise ConfigError(
                    f"The runs were made under different conditions: {key} is {here} for {first_label} and {there} for"
                    f" {label}. {_REMEDY}"
                )


def footing_difference(run: RunRecord, alone: RunRecord) -> str:
    """Return why a rank alone cannot be set against a rank of `run`, as a sentence; empty if it can."""
    if alone.ledger["world_size"] != 1:
        return f"{alone.directory} is no run of a single rank."
    per_rank = run.global_batch / run.ledger["world_size"]
    mine: Conditions = {"pictures per step and rank": per_rank, **_conditions_of_a_rank(run)}
    others: Conditions = {"pictures per step and rank": alone.ledger["global_batch"], **_conditions_of_a_rank(alone)}
    for key, here in mine.items():
        if here != (there := others[key]):
            return f"The run on a single rank was made under different conditions: {key} is {there}, not {here}."
    return ""


def shared_conditions(runs: Mapping[str, RunRecord], alone: RunRecord | None) -> dict[str, ConditionJson]:
    """Return what stands above the table.

    Args:
        runs: Runs by the label of their row, which `refuse_to_mix` has passed.
        alone: A run on a single rank, if there was one.
    """
    if not runs:
        return {}
    run = next(iter(runs.values()))
    unsaid = ("server of rank", *_POWERSGD_KEYS)
    conditions = {key: value for key, value in conditions_of(run).items() if value is not None and key not in unsaid}
    hooks = list(dict.fromkeys(run.ledger["hook"] for run in runs.values()))
    conditions[_HOOK] = hooks[0] if len(hooks) == 1 else hooks
    if compressed := next((run for run in runs.values() if run.ledger["hook"] == "powersgd"), None):
        conditions["PowerSGD"] = _powersgd(compressed)
    if shares_one_machine(run):
        conditions["all ranks share one machine"] = True
    if alone is not None:
        batch, threads = alone.ledger["global_batch"], alone.recorded("num_threads_per_rank")
        conditions["one rank alone"] = f"pictures per step: {batch}, threads: {threads}, no network"
    steps = sorted({run.ledger["num_steps"] for run in runs.values()})
    conditions["steps per model"] = steps[0] if len(steps) == 1 else steps
    return conditions


def _powersgd(run: RunRecord) -> str:
    rank, plain = (run.setting(f"comm.{key}") for key in _POWERSGD_KEYS)
    if plain is None:
        return f"rank {rank}; payload is the mean of all steps"
    return f"rank {rank}, after {plain} plain steps; payload and egress are those of a compressed step"


def shares_one_machine(run: RunRecord) -> bool:
    """Return whether ranks share processors and memory: on one host, or in a lab, whose servers are one machine's."""
    hosts = set(run.recorded("hosts") or ())
    return run.ledger["world_size"] > 1 and (len(hosts) == 1 or bool(run.environment.get("lab")))
