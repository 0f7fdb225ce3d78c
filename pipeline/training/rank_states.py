"""What differs from rank to rank and must survive: the state of a compression, and of ranks that train by themselves.

Rank 0's checkpoint holds that of all ranks, gathered when it is written. Where readers look for weights and optimiser,
it holds what stands for all: the weights that the ranks have in common as of their last arrival, where there are such
(averaging.Averaging.anchor), and of all else the mean over the ranks.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from pipeline.comm.buckets import fill, flatten, stack_on_first
from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.powersgd import PowerSGD
from pipeline.run import checkpoint as checkpoints
from pipeline.run.checkpoint_checks import unusable
from pipeline.training.learner import NAME_PREFIX, Learner
from pipeline.training.momenta import MOMENTA
from pipeline.training.setup import Setup

Stacks = dict[str, Tensor]
"""By name: a row of every rank."""
SUMS = "sums"


def make_powersgd(setup: Setup) -> PowerSGD | None:
    """The compression with its state from the checkpoint; None for any other `comm.hook`.

    A run that was not compressed before starts it without a debt.

    Raises:
        CheckpointError: the state is of another rank of approximation.
    """
    config, world, start = setup.config, setup.world, setup.start
    saved = None if start.section is None else start.section.get("powersgd")
    if config.comm.hook != "powersgd":
        if saved is not None and start.info is not None:
            with checkpoints.taking("the state of PowerSGD", start.info.path):
                if saved["errors"]:
                    world.say(f"warning: comm.hook={config.comm.hook} drops what PowerSGD still owed the weights.")
        return None
    powersgd = PowerSGD(
        rank=config.comm.powersgd_rank,
        start_step=config.comm.powersgd_start_step,
        seed=config.seed,
        step=start.step,
        device=world.device,
        waiting=world.timeline.waiting,
    )
    if saved is not None and start.info is not None:
        with checkpoints.taking("the state of PowerSGD", start.info.path):
            powersgd.load_state_dict(saved, world.rank, world.size)
    return powersgd


def gather_all(
    meter: CollectiveMeter, learner: Learner, powersgd: PowerSGD | None, checkpoint: dict[str, Any]
) -> "StatesJson":
    """Return what differs from rank to rank, and goes with it, for a checkpoint. Collective, and traffic of its own.

    Args:
        meter: Counts it.
        learner: What is trained.
        powersgd: The compression, if there is one.
        checkpoint: As of `gather`.
    """
    with meter.phase("checkpoint"), meter.origin("parameters"):
        states, outer = gather(learner, checkpoint), learner.averaging.state_dict()
    with meter.phase("checkpoint"), meter.origin("gradients"):
        return {"powersgd": powersgd and powersgd.state_dict(), "rank_states": states, "outer": outer}


class StatesJson(TypedDict):
    """Parts of a checkpoint's section."""

    powersgd: dict[str, Any] | None
    rank_states: Stacks
    outer: dict[str, Any]


# --- local steps ---


def gather(learner: Learner, checkpoint: dict[str, Any]) -> Stacks:
    """Return the state of every rank, complete on rank 0, where what stands for all replaces its own in `checkpoint`.

    Momenta differ once the first round has begun; weights, buffers and sums where ranks are not synchronised.
    Collective, where they do.

    Args:
        learner: What is trained.
        checkpoint: As Lightning makes it; its tensors are the living ones, and are not written to.
    """
    rounds, averaging = learner.rounds, learner.averaging
    if rounds is None or rounds.exchanges_gradients(learner.committed_steps):
        return {}
    (optimizer_state,) = checkpoint["optimizer_states"]
    mine = {name: flatten(some) for name, some in _momenta(optimizer_state["state"]).items()}
    if not learner.is_synchronised:
        mine |= _weights_and_sums(learner)
    stacks = {name: stack_on_first(flat) for name, flat in (mine | averaging.rank_state()).items()}
    if learner.global_rank == 0:
        means = {name: stack.mean(0, dtype=torch.float64).to(stack.dtype) for name, stack in stacks.items()}
        # A deep copy: tensors that are one stay one.
        checkpoint["optimizer_states"] = [copy.deepcopy(optimizer_state)]
        for name, momenta in _momenta(checkpoint["optimizer_states"][0]["state"]).items():
            fill(momenta, means[name])
        if not learner.is_synchronised:
            if averaging.anchor:
                means["parameters"] = flatten(averaging.anchor.values())
            state = checkpoint["state_dict"] = copy.deepcopy(checkpoint["state_dict"])
            for origin, tensors in averaging.tensors().items():
                # What is not in a state dict has no other place than the stacks.
                copies = [state.get(NAME_PREFIX + name, one.clone()) for name, one in tensors.items()]
                if copies:
                    fill(copies, means[origin])
    return stacks


def require_complete(section: checkpoints.SectionJson, learner: Learner) -> None:
    """Refuse a checkpoint of ranks that trained by themselves, if it does not hold the state of each of them.

    Args:
        section: Our part of it.
        learner: With the weights and the optimiser's state from it.

    Raises:
        ValueError: Something is missing, or of another shape.
    """
    stacks, num_ranks = section.get("rank_states"), section["world_size"]
    settings = section.get("free_fields") or {}
    num_synchronous = settings.get("comm.local_start_step")
    is_within = not isinstance(num_synchronous, int) or section["step"] > num_synchronous
    has_begun = settings.get("comm.period") is not None and is_within
    if not stacks and not (has_begun and num_ranks > 1):
        return
    if stacks is None:
        raise ValueError(f"the states of its {num_ranks} ranks are missing")
    assert learner.optimizer_state is not None
    expected = {name: flatten(some) for name, some in _momenta(learner.optimizer_state["state"]).items()}
    weights = _weights_and_sums(learner)
    under_way = _require_outer(section, settings, learner)
    if settings.get("comm.codec", "fp32") != "fp32":
        expected["errors"] = weights["parameters"]
    if under_way is not None:
        expected["left_with"] = under_way
    if stacks.keys() - expected.keys():  # saved within a round
        expected |= weights
    for name in sorted(stacks.keys() | expected.keys()):
        stack, own = stacks.get(name), expected.get(name)
        shape = None if own is None else (num_ranks, len(own))
        if own is None or not isinstance(stack, Tensor) or (stack.shape, stack.dtype) != (shape, own.dtype):
            raise ValueError(f"the states of its {num_ranks} ranks are not complete ({name})")
        if wrong := unusable(name, stack, own.expand(num_ranks, -1)):
            raise ValueError(f"in the states of its {num_ranks} ranks {wrong}")


def _require_outer(section: checkpoints.SectionJson, settings: Mapping[str, object], learner: Learner) -> Tensor | None:
    """Refuse outer momenta, or a fragment under way, that do not fit the weights; return the values of the latter."""
    outer = section.get("outer") or {}
    sizes = [one.numel() for one in learner.averaging.tensors()["parameters"].values()]
    momentum, under_way = outer.get("momentum"), outer.get("under_way")
    if settings.get("comm.outer_momentum"):
        _require_values("the outer momentum", momentum, sum(sizes))
    if under_way is None:
        return None
    first, end = under_way["parameters"]
    _require_values("the fragment under way", under_way["values"], sum(sizes[first:end]))
    return under_way["values"]


def _require_values(what: str, found: object, num_values: int) -> None:
    expected = torch.zeros(num_values)
    if wrong := unusable(what, found, expected):
        raise ValueError(wrong)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        raise ValueError(f"{what} does not fit the weights")


def take_own(setup: Setup, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Go on from this rank's own state, where the checkpoint has it and the next step is local; else from the mean.

    After DDP has given rank 0's weights to all: those that the ranks have in common.

    Args:
        setup: Holds the checkpoint.
        learner: With the means.
        optimizer: The same.
    """
    section, world, averaging = setup.start.section, setup.world, learner.averaging
    if not learner.exchanges_gradients:
        averaging.begin()
    if section is None:
        return
    stacks, outer = section.get("rank_states") or {}, section.get("outer") or {}
    if section["world_size"] == world.size and not learner.exchanges_gradients:
        own = {name: stack[world.rank] for name, stack in stacks.items()}
    else:
        own = {name: stack.mean(0, dtype=torch.float64).to(stack.dtype) for name, stack in stacks.items()}
        if SUMS in stacks:
            own[SUMS] = stacks[SUMS].sum(0) * world.is_rank_zero
        if stacks:
            world.say(f"The weights and momenta are the mean of those of {section['world_size']} ranks.")
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    numbered = {number: optimizer.state[one] for number, one in enumerate(parameters) if one in optimizer.state}
    weights = {origin: list(some.values()) for origin, some in averaging.tensors().items()}
    for name, tensors in {**_momenta(numbered), **weights}.items():
        if name in own:
            fill(tensors, own[name])
    learner.sums = own.get(SUMS, learner.sums).to(learner.sums)
    _go_on(setup, learner, outer, own)


def _go_on(setup: Setup, learner: Learner, outer: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """Take over outer momentum, errors and the fragment under way, as far as there is a use for them."""
    rounds, averaging, step = learner.rounds, learner.averaging, learner.committed_steps
    has_use = {
        "the outer momentum": averaging.momentum is not None or outer.get("momentum") is None,
        "what comm.codec still owed the weights": averaging.errors is not None or "errors" not in own,
        "the fragment under way": bool(averaging.anchor) or outer.get("under_way") is None,
    }
    for what in (what for what, is_used in has_use.items() if not is_used):
        setup.world.say(f"warning: {what} is dropped: what comm says now has no use for it.")
    if rounds is None or not averaging.anchor:
        return
    if not averaging.load(outer, own, rounds, step):
        learner.rounds = replace(rounds, nothing_before=step)


def _weights_and_sums(learner: Learner) -> Stacks:
    """By origin: what differs within a round, as one row; what a model has none of is left out."""
    weights = {origin: flatten(list(some.values())) for origin, some in learner.averaging.tensors().items() if some}
    return {**weights, SUMS: learner.sums}


def _momenta(state: Mapping[int, Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """By name: the momenta of all parameters that have them, in order."""
    found = {key: [kept[key] for _, kept in sorted(state.items()) if kept.get(key) is not None] for key in MOMENTA}
    return {key: momenta for key, momenta in found.items() if momenta}
