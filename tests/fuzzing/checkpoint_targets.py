"""Checkpoints and their sidecars, read as a resumed training and `evaluate` read them."""

import contextlib
import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from pipeline.comm.collectives import CollectiveMeter
from pipeline.comm.ledger.traffic import Placement
from pipeline.comm.timeline import Timeline
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.compute import choose_compute
from pipeline.core.errors import ConfigError, ExitCode
from pipeline.core.files import sha256_of_file
from pipeline.data.index import ShardIndex
from pipeline.run.checkpoint_files import SECTION, checkpoint_path, sidecar_path
from pipeline.run.directory import RunDirectory
from pipeline.run.launch.ranks import find_ranks
from pipeline.run.wrappers import unwrap
from pipeline.training import rank_states, scoring, steps
from pipeline.training.trained import load_trained
from pipeline.training.world import World
from tests.fuzzing.damage import damage_bytes, damage_json, damage_tree, odd_value
from tests.fuzzing.pool import Target, WrongResultError

CHECKPOINT_ERROR = frozenset({int(ExitCode.CHECKPOINT), int(ExitCode.CONFIG)})
"""A model that the weights do not fit, or classes that they do not name, are the configuration's too."""
NUM_STEPS = 2
MOST_ELEMENTS = 2**24
SMALL = ["model.metaparameters.base_e=8", "model.metaparameters.incr_e=8", "data.size=32", "batch.global_size=3"]


def checkpoint_targets(under: Path) -> list[Target]:
    """The targets; a real training leaves the sound checkpoint below `under`, over the shards `plain` there."""
    shards, runs = under / "plain", under / "runs"
    asked = [f"run_root={runs}", f"data.root={shards}", "name=run", f"trainer.max_steps={NUM_STEPS}", *SMALL]
    asked += ["cluster.accelerator=cpu", "recipe.ema_decay=0.5", "tracking=disabled", "data.num_workers=0"]
    trained = subprocess.run([sys.executable, "-m", "pipeline.train", *asked], capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    name = checkpoint_path(Path(), NUM_STEPS).name
    path = runs / "run" / "checkpoints" / name
    content = torch.load(path, weights_only=True)
    last, average = unwrap(content["state_dict"])[0], unwrap(content[SECTION]["learner"]["average"])[0]
    index = ShardIndex.open(shards, "train")
    training = compose("train", TrainConfig, [*asked, "trainer.max_steps=5"])
    evaluating = compose("evaluate", EvaluateConfig, [f"data.root={shards}", "data.size=32", "checkpoint=x"])
    world = _world()

    def resume(case: Path) -> None:
        """As `train` does up to its first step."""
        config = dataclasses.replace(training, run_root=str(case))
        run = RunDirectory(config.run_root, config.name)
        start = steps.find_start(config, world, run, index.index_hash, index.classes)
        opened = steps.Shards(index, None, index.num_classes)
        setup = steps.Setup(config, world, opened, steps.plan_steps(config, world, opened), run, start)
        learner = steps.make_learner(setup)
        learner.configure_optimizers()
        rank_states.make_powersgd(setup)
        steps.make_ledger(setup, learner, 2)
        if start.step != NUM_STEPS:
            raise WrongResultError(f"it starts at step {start.step}")
        _check_weights(learner.model.state_dict(), last)

    def score(path: Path) -> None:
        """As `evaluate` does up to its first picture."""
        config = dataclasses.replace(evaluating, checkpoint=str(path))
        weights = load_trained(Path(config.checkpoint), config.model, size=config.data.size)
        matched = scoring.match_outputs(weights, index)
        if weights.num_outputs < index.num_classes or (matched and max(matched) >= weights.num_outputs):
            raise WrongResultError(f"{weights.num_outputs} outputs, {matched}")
        _check_weights(weights.model.state_dict(), average)

    def reader(random: Random, case: Path) -> Callable[[], None]:
        saved = case / "run" / "checkpoints" / name
        read: list[Callable[[], None]] = [lambda: resume(case), lambda: score(saved), lambda: score(case / "run")]
        return random.choice(read)

    def copy(case: Path) -> Path:
        shutil.copytree(runs / "run" / "checkpoints", case / "run" / "checkpoints")
        (case / "run" / "checkpoints" / "best.ckpt").unlink(missing_ok=True)
        return case / "run" / "checkpoints" / name

    def checkpoint(random: Random, case: Path) -> Callable[[], object]:
        """Damaged bytes, proven by nothing: refused, or the same weights."""
        saved = copy(case)
        saved.write_bytes(damage_bytes(random, saved.read_bytes()))
        if random.random() < 0.3:
            sidecar_path(saved).unlink()
            return lambda: score(saved)
        return reader(random, case)

    def sidecar(random: Random, case: Path) -> Callable[[], object]:
        saved = copy(case)
        sidecar = sidecar_path(saved)
        sidecar.write_bytes(damage_json(random, sidecar.read_bytes()))
        return reader(random, case)

    def content_of_checkpoint(random: Random, case: Path) -> Callable[[], object]:
        """Another content that its sidecar proves, as another program or version would leave it."""
        saved = copy(case)
        buffer = io.BytesIO()
        changed = damage_tree(random, content, odd_part)
        if random.random() < 0.5 and isinstance(changed, dict):  # where most of our own code looks
            changed = {**content, SECTION: damage_tree(random, content[SECTION], odd_part)}
        torch.save(changed, buffer)
        saved.write_bytes(buffer.getvalue() if random.random() < 0.8 else damage_bytes(random, buffer.getvalue()))
        record = json.loads(sidecar_path(saved).read_text())
        record |= {"num_bytes": saved.stat().st_size, "sha256": sha256_of_file(saved)}
        sidecar_path(saved).write_text(json.dumps(record))
        return _without_checks(reader(random, case))

    resume(runs)  # what is sound passes, and is imported before the processes of the cases are forked
    score(path)
    torch.save({"weight": torch.ones(1, 1, 1, 1)}, under / "theirs.pth")
    with contextlib.suppress(ConfigError):  # every model is built once to see which is like it
        score(under / "theirs.pth")
    reading = {"checkpoint": checkpoint, "sidecar": sidecar, "content": content_of_checkpoint}
    return [Target(name, damage, CHECKPOINT_ERROR) for name, damage in reading.items()]


def _world() -> World:
    """Of one rank, which decides alone, so that no process group is needed."""
    ranks = find_ranks(1, {})
    assert ranks is not None
    timeline = Timeline(1)
    meter = CollectiveMeter(observers=[timeline])
    compute = choose_compute(accelerator="cpu", precision="fp32")
    return World(ranks, compute, meter, timeline, Placement.assumed(1), num_threads=1)


def _check_weights(found: dict[str, Any], saved: dict[str, Any]) -> None:
    for key, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteWeightsError(key)
        if not torch.equal(tensor, saved[key]):
            raise OtherWeightsError(key)


class OtherWeightsError(WrongResultError):
    """Weights that are not those of the training."""


class NonFiniteWeightsError(WrongResultError):
    """Weights that no model can compute with."""


def _without_checks(read: Callable[[], None]) -> Callable[[], None]:
    """What a content that is proven says of weights and steps is believed, if it makes sense."""

    def use() -> None:
        with contextlib.suppress(OtherWeightsError):
            read()

    return use


def odd_part(random: Random, value: Any) -> Any:
    """Another value in place of one in a checkpoint."""
    if not isinstance(value, torch.Tensor):
        return odd_value(random, value)
    if value.layout != torch.strided or value.is_meta or value.numel() > MOST_ELEMENTS:  # damaged once already
        return odd_value(random, 1.0)
    kinds = [torch.float16, torch.float64, torch.int8, torch.complex64, torch.bool, torch.bfloat16]
    return random.choice(
        [
            lambda: value.to(random.choice(kinds)),
            lambda: value.reshape(-1)[:-1],
            lambda: value.unsqueeze(0),
            lambda: torch.full_like(value, random.choice((math.nan, math.inf)), dtype=torch.float32),
            lambda: value.to_sparse() if value.dim() else value,
            lambda: torch.empty_like(value, device="meta"),
            lambda: torch.zeros(1).expand(2**33),
            lambda: torch.tensor(0.0),
            lambda: torch.empty(0),
            lambda: value.tolist() if value.numel() < 100 else None,
            lambda: torch.nn.Parameter(value) if value.is_floating_point() else value,
            lambda: odd_value(random, 1.0),
        ]
    )()
