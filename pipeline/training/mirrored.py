"""What W&B is told of a run beside its rows: what the configuration became, and what came of it."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from pipeline.config.privacy import published
from pipeline.core.schemas.ledger import LedgerJson
from pipeline.run.directory import RunDirectory
from pipeline.run.provenance import versions
from pipeline.run.record.tracking import Tracker
from pipeline.training.notes import training_notes
from pipeline.training.setup import Setup


def make_tracker(setup: Setup, model: nn.Module) -> Tracker:
    """The record of this attempt, cut back to the rows that stand."""
    config, world = setup.config, setup.world
    return Tracker(
        setup.run,
        config.tracking,
        rank=world.rank,
        model=config.model.name,
        config={**published(setup.meant), **facts(setup, model)},
        notes=training_notes(config, world, setup.plan.batch),
        resume_step=setup.start.num_recorded,
        names_host=not config.is_private,
    )


def facts(setup: Setup, model: nn.Module) -> dict[str, object]:
    """Return what the configuration does not say, or leaves open, for W&B's page of the run. No host, path or command.

    Empty on every rank but the first.

    Args:
        setup: What was settled before the first step; the run's environment.json is written.
        model: The network, frozen as it is trained.
    """
    world, plan, shards, config = setup.world, setup.plan, setup.shards, setup.config
    if not world.is_rank_zero:
        return {}
    git = json.loads(setup.run.environment.read_text())["git"]
    return {
        "world_size": world.size,
        "num_nodes": world.ranks.num_nodes,
        "ranks_per_node": world.ranks.local_world_size,
        "num_servers": world.placement.num_servers,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_trained_parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "num_classes": shards.num_classes,
        "dataset_sha256": shards.training.index_hash,
        "num_training_pictures": shards.training.num_samples,
        "became": {
            "accelerator": world.compute.accelerator,
            "precision": world.compute.precision,
            "memory_format": "channels_last" if world.compute.channels_last else "contiguous",
            "backend": world.compute.backend,
            "num_threads": world.num_threads,
            "num_workers": world.reader(config.data.num_workers).num_workers,
            "max_steps": plan.num_steps,
            "validate_every_steps": plan.validate_every_steps,
            "checkpoint_every_steps": plan.checkpoint_every_steps,
        },
        "versions": versions(),
        "commit": git["commit"],
        "commit_is_dirty": git["dirty"],
    }


def conclude(setup: Setup, tracker: Tracker, summary: Mapping[str, float | int | str | None]) -> None:
    """Tell W&B what came of a run that is over, and have it keep the files that were asked for. Rank 0 alone.

    Args:
        setup: What was settled before the first step.
        tracker: Takes it.
        summary: What the attempt itself knows.
    """
    if setup.world.is_rank_zero:
        tracker.summarize({**summary, **results(setup.run)})
        tracker.keep(files(setup.run, setup.config.tracking.artifacts))


def results(run: RunDirectory) -> dict[str, float | int | str | None]:
    """Return what the ledger says of a run that is over; what was not measured is None."""
    ledger: LedgerJson = json.loads(run.ledger.read_text())
    transport, times = ledger["transport"], ledger["time"]
    sent = transport["measured_bytes_per_rank"] or transport["predicted_bytes_per_rank"]
    return {
        "ledger_closed": ledger["closed"],
        "total_bytes": None if sent is None else sum(sent),
        "communication_seconds_p50": times["communication_seconds"],
        "exposed_seconds_p50": times["exposed_seconds"],
    }


def files(run: RunDirectory, names: tuple[str, ...]) -> dict[str, Path]:
    """Return the files that W&B shall keep, by the names of `tracking.artifacts`; those that are there."""
    places = {
        "ledger": run.ledger,
        "config": run.config,
        "report": run.report,
        "best": run.checkpoints / "best.ckpt",
    }
    return {name: places[name] for name in names if places[name].is_file()}
