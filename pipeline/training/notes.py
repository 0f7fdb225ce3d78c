"""A training in words: its conditions, for who started it and for its W&B run, and what came of it."""

import json
import sys

from pipeline.comm.codec import BLOCK, CODECS
from pipeline.comm.ledger.traffic import placement_warning
from pipeline.comm.wire import gloo
from pipeline.config.comm import CommConfig
from pipeline.config.hooks import COMPRESSIONS
from pipeline.config.pruning import PruneConfig
from pipeline.config.training import BatchSplit, RecipeConfig, TrainConfig
from pipeline.core.schemas.ledger import LedgerJson
from pipeline.core.text import fitted
from pipeline.core.units import format_bandwidth, format_bytes
from pipeline.data.fit import misfit_sentence, origin_sentence
from pipeline.run.launch.ranks import lab_conditions
from pipeline.training.pruning import make_schedule
from pipeline.training.setup import Setup
from pipeline.training.world import World


def training_notes(config: TrainConfig, world: World, batch: BatchSplit) -> str:
    """Where it runs and what a step is, in two sentences. No path, host or command: they are nobody's business."""
    comm = config.comm
    hook = COMPRESSIONS[comm.hook].words + (f" of rank {comm.powersgd_rank}" if comm.hook == "powersgd" else "")
    travels = f"gradients {hook} (comm.hook={comm.hook})" if comm.period is None else rounds_sentence(comm)
    return (
        f"{config.model.name} on {_counted(world.size, 'rank')}, {_servers(world)}, over {world.compute.backend}."
        f" A step is {batch.global_size} pictures ({_counted(batch.num_micro_batches, 'micro-batch', 'es')} of"
        f" {batch.per_rank} per rank), {world.compute.arithmetic}, {travels}."
    )


def rounds_sentence(comm: CommConfig) -> str:
    """Say when ranks that train by themselves exchange weights, and what becomes of them."""
    start = f", after {comm.local_start_step} steps that exchange gradients" if comm.local_start_step else ""
    length = f"at least {comm.period} and (alpha / lr)^2" if comm.rule == "qsr" else f"{comm.period}"
    rounds = f"rounds of {length} steps{start} (comm.rule={comm.rule})"
    if not comm.keeps_anchor:
        return f"weights averaged after {rounds}"
    outer = f"outer steps of lr {comm.outer_lr:g} and momentum {comm.outer_momentum:g}"
    late = f", arriving {_counted(comm.delay, 'step')} later" if comm.delay else ""
    return f"weights exchanged in {rounds}: {_counted(comm.fragments, 'fragment')} in {comm.codec}{late}, {outer}"


def _servers(world: World) -> str:
    lab = lab_conditions()
    servers = _counted(world.placement.num_servers, "server")
    if lab is not None:
        rate = lab["bandwidth_bits_per_second"]
        link = "unshaped links" if rate is None else f"links of {format_bandwidth(rate)}"
        return f"{servers} emulated on one machine with {link}"
    return servers if world.placement.measured else "each rank taken as a server"


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else plural}"


def _pruning_line(config: PruneConfig, num_steps: int) -> str:
    schedule = make_schedule(config, num_steps)
    if schedule is None:
        return ""
    return (
        f"  pruning     steps {schedule.begin_step} to {schedule.end_step}, to a density of {schedule.density:g}"
        f" ({config.scope}); gradients stay dense, and so do their bytes\n"
    )


def _rate(recipe: RecipeConfig) -> str:
    head = "" if recipe.head_lr_factor == 1 else f", of the head {recipe.peak_lr * recipe.head_lr_factor:g}"
    return f"lr {recipe.peak_lr:g} at most{head}"


def _owed(setup: Setup, owed_bytes: int) -> str:
    """What a step owes, with the number of times it does where not every step does."""
    rounds = setup.plan.rounds
    if rounds is None:
        return f"{owed_bytes:,} of gradients"
    return (
        f"none in most steps: {rounds_sentence(setup.config.comm)}, {len(rounds.ends)} times in"
        f" {setup.plan.num_steps} steps; in a round {_encoded_bytes(setup.config.comm, owed_bytes):,} of weights"
    )


def _encoded_bytes(comm: CommConfig, num_bytes: int) -> int:
    """About what fp32 weights of so many bytes are on the wire."""
    codec = CODECS.get(comm.codec)
    return num_bytes if codec is None else codec.num_bytes(num_bytes // 4 // BLOCK * BLOCK)


def announce(setup: Setup, owed_bytes: int) -> str:
    """Print what a step will be, before the first, and warn of what will cost more than it need.

    Returns:
        What was printed.
    """
    config, world, shards, start = setup.config, setup.world, setup.shards, setup.start
    plan, batch = setup.plan, setup.plan.batch
    travels = owed_bytes if plan.rounds is None else _encoded_bytes(config.comm, owed_bytes)
    ring = gloo.gloo_ring_all_reduce(travels, 4, world.size)
    sent_bytes = gloo.sent_bytes_per_rank(ring, world.size)[0]
    origin = origin_sentence(shards.training)
    said = (
        f"{config.name}: {config.model.name}, {shards.num_classes} classes, {config.input.size} px,"
        f" {world.size} rank{'s' if world.size > 1 else ''} ({world.compute.backend})\n"
        f"  arithmetic  {world.compute.sentence}; {world.num_threads} thread(s) per rank\n"
        f"  a step      {batch.global_size} pictures = {world.size} ranks x {batch.num_micro_batches} micro-batches"
        f" x {batch.per_rank}; {_rate(config.recipe)}\n"
        + (f"  the shards  {origin}\n" if origin else "")
        + f"  its bytes   {_owed(setup, owed_bytes)}; about {sent_bytes:,} sent by each rank (ring)\n"
        + _pruning_line(config.recipe.prune, plan.num_steps)
        + f"  the run     steps {start.step} to {plan.num_steps}, {plan.epoch_sentence}"
        + (f"; resumed from {start.info.path.name}" if start.info else "")
        + "".join(f"\n  changed     {change}" for change in start.changes)
    )
    world.say(said)
    interleaved = placement_warning(owed_bytes, world.placement, world.compute.backend)
    misfit = misfit_sentence(
        shards.training,
        config.data,
        global_batch=batch.global_size,
        local_world_size=world.ranks.local_world_size,
        world_size=world.size,
    )
    unvalidated = (
        shards.why_not_validated and f"nothing is validated, and no checkpoint is the best: {shards.why_not_validated}"
    )
    warnings = [f"warning: {warning}" for warning in (unvalidated, interleaved, misfit) if warning]
    for warning in warnings if world.is_rank_zero else ():
        print(fitted(warning, sys.stderr), file=sys.stderr, flush=True)
    return "\n".join((said, *warnings))


def conclusion(setup: Setup, learnt: str, speed: str, quarantine: str, report: str) -> str:
    """Return what a finished run has learnt, how fast, what it sent, and where its report is; empty but on rank 0.

    Args:
        setup: What was settled before the first step.
        learnt: Losses and accuracies in a sentence.
        speed: Where the time went, in a sentence.
        quarantine: A line on pictures that were replaced; empty if none were.
        report: Where the report is.
    """
    if not setup.world.is_rank_zero:
        return ""
    return (
        f"{setup.config.name}: {setup.plan.num_steps} steps done. {speed}\n"
        + (f"  learnt      {learnt}\n" if learnt else "")
        + f"  the wire    {_wire(setup.world.size, json.loads(setup.run.ledger.read_text()))}\n"
        + f"{quarantine}  report      {report}"
    )


def _wire(world_size: int, ledger: LedgerJson) -> str:
    """What all committed steps sent, and whether the ledger closed."""
    if world_size == 1:
        return "nothing was sent: one rank has its gradients to itself"
    measured = ledger["transport"]["measured_bytes_per_rank"]
    sent = "not measured" if measured is None else f"{format_bytes(sum(measured))} sent in training by all ranks"
    verdicts = {
        True: "as predicted, to the byte: the ledger closed",
        False: "not what was predicted: the ledger is not closed, see the report",
        None: "so that the ledger has nothing to compare",
    }
    return f"{sent}, {verdicts[ledger['closed']]}"
