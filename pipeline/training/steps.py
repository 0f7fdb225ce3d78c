"""The steps of `train.py`, one function each: open the run, open the shards, find where it stands, fit, report."""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import yaml
from torch.utils.data import DataLoader

from pipeline.comm.ddp import gradient_bytes_by_parameter
from pipeline.comm.ledger.ledger import Ledger
from pipeline.comm.ledger.reconcile import Reconciler
from pipeline.config.privacy import published, published_environment
from pipeline.config.training import TrainConfig
from pipeline.core.compute import choose_compute
from pipeline.core.errors import ConfigError, DataError
from pipeline.data.batches import LoadedBatch
from pipeline.data.index import ShardIndex, open_split
from pipeline.data.loader import evaluation_loader, training_loader
from pipeline.data.shards.manifest import NoSplitError
from pipeline.models.external import source_sha256
from pipeline.run import checkpoint as checkpoints
from pipeline.run.directory import RunDirectory
from pipeline.run.launch.preempt import StopRequest
from pipeline.run.launch.ranks import RankInfo
from pipeline.run.provenance import describe
from pipeline.run.record.tracking import ID_FILE
from pipeline.run.record.wandb_variables import check_variables
from pipeline.training import mirrored, rank_states, resume
from pipeline.training.attempt import Attempt
from pipeline.training.bad_samples import BadSamples
from pipeline.training.begin import make_model, sha256_of_beginning
from pipeline.training.best import Validated
from pipeline.training.learner import Learner
from pipeline.training.lightning import BucketWarmUp, make_trainer
from pipeline.training.narrator import narrating
from pipeline.training.notes import announce, conclusion
from pipeline.training.plan import StepPlan, make_plan, make_rounds, require_compression
from pipeline.training.preflight import check_model
from pipeline.training.reporter import outcome_record, reporting
from pipeline.training.same_run import facts_of, state_facts
from pipeline.training.setup import Setup, Shards, Start
from pipeline.training.timing import TimedLoader
from pipeline.training.watchdog import StepWatchdog
from pipeline.training.world import World, join_group


@contextlib.contextmanager
def join(
    config: TrainConfig, ranks: RankInfo, stop: StopRequest | None = None, *, command: str = "train"
) -> Iterator[World]:
    """Join the other ranks, who must be the same run, with the device and precision this run computes in.

    Args:
        config: of the run.
        ranks: the place of this process.
        stop: listening to signals; None: signals are not looked after.
        command: name of the command.
    """
    cluster, trainer = config.cluster, config.trainer
    choose = functools.partial(
        choose_compute,
        accelerator=cluster.accelerator,
        precision=trainer.precision,
        memory_format=trainer.memory_format,
    )
    if trainer.deterministic:
        torch.use_deterministic_algorithms(True)
    facts = functools.partial(facts_of, command, config, world_size=ranks.world_size)
    root = config.run_root
    with join_group(ranks, choose, cluster, config.comm, stop=stop, facts=facts, run_root=root) as joined:
        yield joined


def open_run(config: TrainConfig, world: World) -> RunDirectory:
    """Rank 0 makes the run directory, takes its lock and proves that it can be written.

    Raises:
        ConfigError: it cannot, another job has it, or W&B's variables contradict it.
        Preempted: an earlier start of this job still has it.
    """
    directory = RunDirectory(config.run_root, config.name)

    def open_first() -> None:
        check_variables(config.tracking, directory.path / ID_FILE, os.environ)
        directory.open(world.timeout_seconds / 2)  # the others wait for its word, as long as for any collective

    world.first_decides(open_first)
    return directory


def begin_attempt(setup: Setup) -> int:
    """Write down what this attempt is made of; returns its number, from 1. A finished run does not come here."""
    config, world, run, start, index = setup.config, setup.world, setup.run, setup.start, setup.shards.training
    hosts, private = world.gather_hosts(), config.is_private

    def begin() -> int:
        with run.writing():
            run.write_config(yaml.safe_dump(published(setup.meant), sort_keys=False))
            environment = describe(world.ranks, hosts=hosts, num_threads=world.num_threads)
            command = ["python", "-m", "pipeline.train", *sys.argv[1:]]
            shards = {"sha256": index.index_hash, "classes": None if index.classes is None else list(index.classes)}
            more = {"command": command, "arithmetic": world.compute.arithmetic, "shards": shards}
            run.write_environment(published_environment(config, {**environment, **more}))
            told = {"world_size": world.size, "start_step": start.step}
            return run.begin_attempt(**told, changed=start.changes, names_host=not private)

    return world.first_decides(begin)


def open_validation(config: TrainConfig, leads: bool) -> tuple[ShardIndex | None, str]:
    """(the split to validate on, why there is none although nobody forbade it).

    Args:
        config: Of the command.
        leads: Whether this rank is the first of its machine.

    Raises:
        DataError: it is damaged; or it is missing, and the configuration says when to validate.
    """
    every = config.trainer.validate_every_steps
    if every == 0:
        return None, ""
    try:
        return open_split(config.data, config.data.val_split, is_local_leader=leads), ""
    except NoSplitError as error:
        if every is not None:
            raise
        return None, str(error)


def open_shards(config: TrainConfig, world: World) -> Shards:
    """Index and verify the shards: the first rank of each machine, then the others from the index it leaves.

    Raises:
        DataError: missing, damaged or mislabelled shards, or labels that the classifier has no output for.
        ConfigError: model.num_classes is smaller than the manifest's number of classes.
    """

    def open_both(leads: bool) -> Shards:
        training = open_split(config.data, config.data.train_split, is_local_leader=leads)
        validation, missing = open_validation(config, leads)
        num_classes = config.model.num_classes or training.num_classes
        if training.classes is not None and num_classes < training.num_classes:
            raise ConfigError(
                f"model.num_classes={num_classes}, but the shards have {training.num_classes} classes:"
                f" set it to at least that, or to null."
            )
        if num_classes < 2:
            raise DataError(
                f"The split {config.data.train_split!r} has one class alone, of which nothing can be learnt: prepare"
                " shards of two or more, or set model.num_classes=2 for a model with an output that no picture has."
            )
        told = "model.num_classes=" if config.model.num_classes else "the number of classes of the training split is "
        for index in (training, validation):
            if index is not None:
                index.require_labels(
                    num_classes,
                    f"and {told}{num_classes}: prepare the shards again with the right classes into an empty out=, or"
                    " set model.num_classes to more than the highest label.",
                )
        return Shards(training, validation, num_classes, missing)

    shards = world.locally_first(open_both)
    hashes = [index.index_hash for index in (shards.training, shards.validation) if index is not None]
    world.require_same(
        " ".join(hashes),
        f"The ranks see different shards at data.root={config.data.root}: every server must be given the same ones.",
    )
    return shards


def plan_steps(config: TrainConfig, world: World, shards: Shards) -> StepPlan:
    """How many steps, and what is due when."""

    def plan() -> StepPlan:
        check_model(config, world.size)
        made = make_plan(
            config.trainer,
            config.batch,
            shards.training.num_samples,
            world.size,
            validate=shards.validation is not None,
            tail=config.data.tail,
        )
        require_compression(config.comm, made, world.compute)
        rounds = make_rounds(config.comm, config.recipe, made.num_steps)
        # One rank alone has the mean in its weights.
        return made if world.size == 1 else replace(made, rounds=rounds)

    return world.agree(plan)


def find_start(
    config: TrainConfig, world: World, run: RunDirectory, shards_hash: str, classes: Sequence[str] | None
) -> Start:
    """The newest sound checkpoint, chosen by rank 0 and proven by every rank.

    Raises:
        CheckpointError: none of several is sound, or it belongs to a run with other must-match fields.
    """
    directory = run.checkpoints

    def choose() -> str | None:
        checkpoints.AtomicCheckpointIO().sweep(directory)
        info = checkpoints.find_latest(directory)
        return None if info is None else info.path.name

    chosen = world.first_decides(choose)
    if chosen is None:
        return Start()

    def load() -> Start:
        path = directory / chosen
        info, content = checkpoints.load_proven(path)
        section = checkpoints.section_of(content, path, info.step)
        with checkpoints.taking("what it says of its run", path):
            resume.refuse_drift(config, shards_hash, classes, section, path)
            resumed = resume.at_its_rate(config, section)
            return Start(info.step, info, content, tuple(resume.changes(resumed, world.size, section, info.versions)))

    return world.agree(load)


def make_learner(setup: Setup) -> Learner:
    """Build the model, the same weights on every rank, and take over the checkpoint's state if there is one.

    Raises:
        CheckpointError: the checkpoint holds another model.
        ConfigError: another rank has built another model, or goes on from another checkpoint.
    """
    config, world, shards, plan, start = setup.config, setup.world, setup.shards, setup.plan, setup.start
    torch.manual_seed(config.seed)

    def make() -> Learner:
        is_fresh = start.content is None
        model, frozen = make_model(config, shards, world.say, num_ranks=world.size, is_fresh=is_fresh)
        learner = Learner(
            model,
            recipe=config.recipe,
            input_config=config.input,
            num_classes=shards.num_classes,
            seed=config.seed,
            num_steps=plan.num_steps,
            start_step=start.step,
            rank=world.rank,
            num_micro_batches=plan.batch.num_micro_batches,
            compare_every_steps=config.trainer.compare_weights_every_steps,
            memory_format=world.compute.memory_format,
            origin=world.exchanging,
            frozen=frozen,
            outcomes=outcome_record(shards.validation),
            rounds=plan.rounds,
            comm=config.comm,
        )
        if start.content is not None and start.info is not None and start.section is not None:
            with checkpoints.taking("the weights or the optimiser's state", start.info.path):
                checkpoints.require_same_model(
                    learner.state_dict(),
                    start.content["state_dict"],
                    path=start.info.path,
                    model=config.model.name,
                    found_model=start.info.model,
                    remedy="give the model it was saved from, or another name= for a new run",
                )
                (optimizer_state,) = start.content["optimizer_states"]
                learner.restore(start.content["state_dict"], optimizer_state, start.section["learner"])
                rank_states.require_complete(start.section, learner)
        return learner

    learner = world.agree(make)
    origin = start.info.sha256 if start.info else world.agree(lambda: sha256_of_beginning(config))
    source = source_sha256(config.model.name, allow_code=config.model.allow_code)
    world.require_same_run(state_facts(learner.state_dict(), origin, source))
    return learner


def make_ledger(setup: Setup, learner: Learner, attempt: int) -> Ledger:
    """The ledger of this attempt, with what earlier attempts left in the checkpoint and in ledger.json. Collective."""
    config, world = setup.config, setup.world
    reconciler = None
    if world.counter is not None:
        strict = world.compute.backend == "gloo" if config.comm.strict is None else config.comm.strict
        reconciler = Reconciler(world.counter, world.rank, world.placement, strict=strict)
        reconciler.start()
    owed = gradient_bytes_by_parameter(learner.model)
    ledger = Ledger(
        world.meter,
        owed,
        placement=world.placement,
        attempt=attempt,
        rank=world.rank,
        reconciler=reconciler,
        owed=learner.owed,
        is_under_way=learner.is_under_way,
    )
    if setup.start.section is not None and setup.start.info is not None:
        previous = None
        with contextlib.suppress(OSError, ValueError):
            previous = json.loads(setup.run.ledger.read_text())
        with checkpoints.taking("the accounts, with ledger.json beside it,", setup.start.info.path):
            ledger.load_state_dict(setup.start.section["ledger"], previous)
    return ledger


def fit(setup: Setup) -> None:
    """Train the steps that remain; leave metrics.jsonl, ledger.json, checkpoints and report.html behind.

    Raises:
        NonFiniteError, DataError, CheckpointError, LedgerError: as they say. What was recorded until then is kept.
    """
    config, world, run = setup.config, setup.world, setup.run
    learner = make_learner(setup)
    powersgd = rank_states.make_powersgd(setup)
    ledger = make_ledger(setup, learner, begin_attempt(setup))
    announced = announce(setup, ledger.gradient_bytes)
    telling = functools.partial(narrating, best=Validated.of_section(setup.start.section), is_teller=world.is_rank_zero)
    with (
        run.writing(),
        mirrored.make_tracker(setup, learner.model) as tracker,
        telling(config.name, setup.plan, setup.start.step, also=tracker.say) as narrator,
        reporting(setup) as reporter,
    ):
        tracker.say(announced)
        watchdog = StepWatchdog(world, learner, config.step_timeout_seconds)
        loader = TimedLoader(make_training_loader(setup))
        attempt = Attempt(
            setup,
            learner,
            ledger=ledger,
            powersgd=powersgd,
            tracker=tracker,
            loader=loader,
            watchdog=watchdog,
            narrator=narrator,
            reporter=reporter,
        )
        bad_samples = BadSamples(setup.shards.training, config.data.max_bad_fraction, run.quarantine)
        # The order matters. The watchdog watches the warm-up's collectives and is patient before a checkpoint is
        # written; the attempt's clock starts after the warm-up; a stop amid a validation comes before its verdict.
        callbacks = [watchdog, BucketWarmUp(world, config.input.size), attempt, bad_samples]
        trainer = make_trainer(setup, learner, callbacks=callbacks, io=attempt.io, powersgd=powersgd)
        with attempt.recorded():
            trainer.fit(learner, loader, make_validation_loader(setup))
        report = reporter.finish()
        mirrored.conclude(setup, tracker, attempt.summary())
        concluded = conclusion(setup, narrator.outcome(), attempt.sentence(), bad_samples.sentence(), report)
        tracker.say(concluded)
    world.say(concluded)


def make_training_loader(setup: Setup) -> DataLoader[LoadedBatch]:
    """This rank's micro-batches, beginning at the first step not yet committed."""
    config = setup.config
    return training_loader(
        setup.shards.training,
        config.data,
        config.input,
        setup.world.reader(config.data.num_workers),
        setup.plan.batch,
        seed=config.seed,
        start_step=setup.start.step,
        num_steps=setup.plan.num_steps,
    )


def make_validation_loader(setup: Setup) -> DataLoader[LoadedBatch] | None:
    """This rank's share of the validation split; None where there is none or none is wanted."""
    config, index = setup.config, setup.shards.validation
    if index is None:
        return None
    reader = setup.world.reader(config.data.num_workers)
    return evaluation_loader(index, config.input, reader, batch_size=config.trainer.evaluation_batch_per_rank)
