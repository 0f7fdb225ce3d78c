"""Making the runs a comparison is made of: one `pipeline.train` per model, each under the same overrides."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import compose
from pipeline.comparison import Outcome, choose_baseline, metered_gradient_bytes, refuse_to_mix
from pipeline.config import TrainConfig, require
from pipeline.errors import DataError, ExitCode, LedgerError, UserError
from pipeline.lab import LabConfig
from pipeline.models import zoo
from pipeline.preflight import check_root
from pipeline.report.records import RunRecord, flat, read_run
from pipeline.run.directory import validate_name
from pipeline.run.ranks import LAB_VARIABLE

if TYPE_CHECKING:
    from pipeline.compare import CompareConfig

# Ranks that belong to whoever started `compare` must not be taken for those of the runs it starts.
_RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    LAB_VARIABLE,
)
LONGEST_REASON = 300  # characters of a run's last words


@dataclass(frozen=True)
class Candidate:
    """A model of the comparison before its run."""

    model: str
    num_parameters: int
    parameter_bytes: int
    overrides: tuple[str, ...]
    """Of `pipeline.train`, without the shards."""

    @property
    def slug(self) -> str:
        """Its directory below the comparison's: the spec in the characters a run's name may have."""
        spec = self.model.replace(":", "@", 1)
        return "".join(character if character.isalnum() or character in "._-=,@+" else "_" for character in spec)


# --- before the first run ---


def quote_models(arguments: Sequence[str]) -> list[str]:
    """`models=[squeezenet1_0:sr=0.5,alexnet]` as Hydra's grammar wants it: specs with a colon in quotes.

    A comma inside brackets or before `key=value` continues the spec; anything else is left as it is.
    """
    return [_quote_list(argument) if argument.startswith("models=[") else argument for argument in arguments]


def _quote_list(argument: str) -> str:
    key, _, listed = argument.partition("=")
    if not listed.endswith("]") or ":" not in listed or "'" in listed or '"' in listed:
        return argument
    specs: list[str] = []
    for item in zoo.split_outside_brackets(listed[1:-1]):
        continues = specs and "=" in item and ":" not in item.partition("=")[0]
        if continues:
            specs[-1] += f",{item.strip()}"
        else:
            specs.append(item.strip())
    return f"{key}=[{','.join(_literal(spec) for spec in specs)}]"


def check_candidates(config: "CompareConfig") -> list[Candidate]:
    """Every model, known to exist, to accept its metaparameters and to be trainable under these conditions.

    Raises:
        ConfigError: unknown model or metaparameter, impossible conditions, or a directory that is already in use.
    """
    choose_baseline(config.baseline, config.models)
    candidates = [_check_candidate(config, spec) for spec in config.models]
    slugs = [candidate.slug for candidate in candidates]
    require(len(set(slugs)) == len(slugs), f"Two of models={list(config.models)} would share a directory; rename one.")
    for candidate in candidates:
        directory = config.directory / candidate.slug
        require(
            not directory.exists() or _log_path(directory).exists(),
            f"{directory} exists and was not made by a comparison: choose another name=.",
        )
    return candidates


def _check_candidate(config: "CompareConfig", spec: str) -> Candidate:
    import torch

    name, metaparameters = zoo.parse_spec(spec)
    plain = replace(Candidate(spec, 0, 0, ()), model=zoo.format_spec(name, metaparameters))
    overrides = tuple(_overrides(config, plain, name, metaparameters))
    train = compose("train", TrainConfig, [*overrides, "data.root=checked-later"])
    validate_name(train.name)
    train.batch.split(config.num_ranks)
    compose("lab", LabConfig, _lab_overrides(config, train.name))
    with torch.device("meta"):  # the shapes, without the memory
        model = zoo.build(train.model.name, config.num_classes, **train.model.metaparameters)
    parameters = list(model.parameters())
    return replace(
        plain,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters if parameter.requires_grad),
        overrides=overrides,
    )


def _overrides(config: "CompareConfig", candidate: Candidate, name: str, metaparameters: dict[str, Any]) -> list[str]:
    """The training command's overrides: the comparison's own conditions, nothing left to a default that may differ."""
    groups = {key: asdict(getattr(config, key)) for key in ("data", "batch", "cluster", "comm")}
    groups["data"].pop("root")
    groups["tracking"] = asdict(config.tracking)
    is_tracked, mode = groups["tracking"].pop("trainings"), groups["tracking"].pop("mode")
    values = {
        "name": f"{config.name}/{candidate.slug}",
        "run_root": config.run_root,
        "seed": config.seed,
        "model.num_classes": config.num_classes,
        **{f"model.metaparameters.{key}": value for key, value in metaparameters.items()},
        **flat(groups),
        "trainer.max_steps": config.steps,
        "trainer.validate_every_steps": 0,
        "trainer.checkpoint_every_steps": 0,
        "trainer.precision": config.precision,
    }
    tracking = f"tracking={mode if is_tracked else 'disabled'}"
    return [f"model={name}", tracking, *(f"{key}={_literal(value)}" for key, value in values.items())]


def _lab_overrides(config: "CompareConfig", name: str) -> list[str]:
    """The lab's overrides: lab.json goes to the run's own directory."""
    if config.lab.servers is None:
        return []
    values = {
        "name": name,
        "run_root": config.run_root,
        **asdict(config.lab),
        "num_threads": config.cluster.num_threads,
    }
    return [f"{key}={_literal(value)}" for key, value in values.items()]


def _literal(value: Any) -> str:
    """A value in Hydra's override grammar."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return "'" + value.replace("'", "\\'") + "'" if not value.replace("_", "").isalnum() else value
        case list() | tuple():
            return f"[{','.join(map(_literal, value))}]"
        case _:
            return str(value)


def shards_for(config: "CompareConfig") -> str:
    """Where the shards are: those asked for; without any, the built-in ones, made once under run_root.

    Raises:
        DataError: they are not there, or could not be made.
    """
    if config.data.root is not None:
        check_root(config.data, config.data.train_split)
        return config.data.root
    root = Path(config.run_root) / "builtin-shards"
    if not (root / "manifest.json").is_file():
        print(f"No data.root given: making the built-in shards in {root}", flush=True)
        made = subprocess.run(
            [sys.executable, "-m", "pipeline.prepare", "source=builtin", f"out={_literal(str(root))}"]
        )
        if made.returncode:
            raise DataError(f"`pipeline.prepare source=builtin` ended with exit code {made.returncode}; see above.")
    return str(root)


# --- the runs ---


def measure(config: "CompareConfig", candidates: Sequence[Candidate], shards: str) -> list[Outcome]:
    """One training run per candidate, one after another. A failure is an outcome with its reason."""
    # A comparison told to stop takes its run along: leaving `subprocess.run` by an exception kills the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    outcomes = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(candidates))
        for candidate in candidates:
            progress.update(task, description=candidate.model)
            outcome = _measure_one(config, candidate, shards)
            outcomes.append(outcome)
            progress.advance(task)
            progress.console.print(
                f"{candidate.model}: {'failed' if outcome.reason else 'done'}", highlight=False, markup=False
            )
    return outcomes


def _measure_one(config: "CompareConfig", candidate: Candidate, shards: str) -> Outcome:
    directory = config.directory / candidate.slug
    if directory.exists():  # of an earlier comparison of this name, as checked: what is reported is measured now
        shutil.rmtree(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipeline.train", *candidate.overrides, f"data.root={_literal(shards)}"]
    if config.lab.servers is not None:
        lab = _lab_overrides(config, f"{config.name}/{candidate.slug}")
        command = [sys.executable, "-m", "pipeline.lab", *lab, "--", *command]
    with _log_path(directory).open("w") as log:
        finished = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
    outcome = Outcome(candidate.model, candidate.num_parameters, candidate.parameter_bytes, command=_command_line())
    if finished.returncode:
        reason = _reason(finished.returncode, _log_path(directory))
        return replace(outcome, reason=reason, exit_code=max(finished.returncode, ExitCode.INTERNAL))
    return _with_run(outcome, directory)


def _with_run(outcome: Outcome, directory: Path) -> Outcome:
    """The outcome with its run, if the run's ledger stands up to the model's parameters."""
    try:
        run = read_run(directory)
        assert outcome.parameter_bytes is not None
        metered_gradient_bytes(run, outcome.parameter_bytes)
    except UserError as error:
        return replace(outcome, reason=str(error), exit_code=int(error.exit_code))
    return replace(outcome, run=run)


def _log_path(directory: Path) -> Path:
    """Beside the run, not in it: the run directory is made by the training command."""
    return directory.with_name(f"{directory.name}.log")


def _environment() -> dict[str, str]:
    """This process's, without ranks that are not the run's own: its ranks are started on this machine."""
    return {
        key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES and not key.startswith("SLURM_")
    }


def _reason(returncode: int, log: Path) -> str:
    """Why a training command failed: its own last error sentence, else the exception, else its last line."""
    number = -returncode if returncode < 0 else returncode - 128  # as a child or as a shell tells it
    if number in set(signal.Signals):
        name = signal.Signals(number).name
        hint = ", most likely for want of memory" if name == "SIGKILL" else ""
        return f"The run was killed by {name}{hint}; its output is in {log}."
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)]
    if errors:
        return f"{errors[-1]} (exit code {returncode})"
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    last_words = textwrap.shorten((exceptions or lines)[-1], LONGEST_REASON) if lines else "It said nothing"
    return f"{last_words} (exit code {returncode}; its output is in {log})"


def _command_line() -> str:
    return shlex.join(["python", "-m", "pipeline.compare", *sys.argv[1:]])


# --- runs already made ---


def read_outcomes(config: "CompareConfig") -> list[Outcome]:
    """The runs of `config.runs`.

    Raises:
        DataError: one is not a run. ConfigError: two of the same model, or different conditions.
        LedgerError: one's ledger does not carry what its model owes.
    """
    records = [read_run(Path(directory)) for directory in config.runs]
    models = [model_of(record) for record in records]
    for model in models:
        require(models.count(model) == 1, f"runs=[...] holds {model} more than once: keep one run of each model.")
    choose_baseline(config.baseline, models)
    refuse_to_mix(dict(zip(models, records, strict=True)))
    outcomes = [
        _with_run(_expected(model, record), record.directory) for model, record in zip(models, records, strict=True)
    ]
    for outcome in outcomes:
        if outcome.exit_code == ExitCode.LEDGER:
            raise LedgerError(outcome.reason)
    return outcomes


def model_of(record: RunRecord) -> str:
    """A run's model as a spec: its name and what its metaparameters add to it."""
    told = record.config.get("model") or {}
    return zoo.format_spec(told.get("name", record.ledger["model"]), told.get("metaparameters") or {})


def _expected(model: str, record: RunRecord) -> Outcome:
    import torch

    name, metaparameters = zoo.parse_spec(model)
    num_classes = (record.config.get("model") or {}).get("num_classes") or 1000
    with torch.device("meta"):
        network = zoo.build(name, num_classes, **metaparameters)
    parameters = list(network.parameters())
    return Outcome(
        model,
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.nbytes for parameter in parameters if parameter.requires_grad),
        command=_command_line(),
    )
