"""What errors advise: it names only what exists, and whoever follows it gets on.

Each row of REMEDIES makes an error, reads what the error says to do, does that, and the same thing works.
"""

import ast
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.compare import CompareConfig
from pipeline.config.dashboard import DashboardConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.export import ExportConfig
from pipeline.config.lab import LabConfig
from pipeline.config.model import InputConfig
from pipeline.config.plan import PlanConfig
from pipeline.config.predict import PredictConfig
from pipeline.config.prepare import PrepareConfig
from pipeline.config.study import StudyConfig
from pipeline.config.training import BatchConfig, TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import UserError
from pipeline.core.groups import config_groups
from pipeline.core.typed import leaf_hints
from pipeline.data.index import ShardIndex
from pipeline.data.prepare.builtin import BuiltinPictures
from pipeline.data.prepare.opening import open_source
from pipeline.data.prepare.write import prepare_shards
from pipeline.data.shards.foreign import find_split
from pipeline.models import zoo
from pipeline.run.checkpoint import find_latest, load_foreign
from pipeline.run.directory import validate_name
from tests.making.pictures import pictures, tar_of, write_files
from tests.making.shards import write_shards

PIPELINE = Path(__file__).resolve().parents[3] / "pipeline"
SCHEMAS = (
    TrainConfig,
    EvaluateConfig,
    ExportConfig,
    PredictConfig,
    PrepareConfig,
    CompareConfig,
    PlanConfig,
    StudyConfig,
    LabConfig,
    DashboardConfig,
)
RAISES = re.compile(r"\w*Error|require|one_of|_remedy|error")

# --- what is named exists ---


@cache
def messages() -> list[tuple[str, str]]:
    """(place, text) of every text that an error is made of; `{}` stands for what is put in."""
    found = []
    for path in sorted(PIPELINE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if RAISES.fullmatch(name):
                text = " ".join(map(text_of, node.args))
                found.append((f"{path.relative_to(PIPELINE)}:{node.lineno}", text))
    return found


def text_of(node: ast.AST) -> str:
    """The literal parts of an expression."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(text_of(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        case ast.BinOp() | ast.IfExp() | ast.BoolOp():
            return " ".join(map(text_of, ast.iter_child_nodes(node)))
        case _:
            return ""


def test_messages_are_found() -> None:
    assert len(messages()) > 300


@cache
def keys() -> set[str]:
    dotted = {key for schema in SCHEMAS for key, _ in leaf_hints(schema)}
    inner = {part for key in dotted for part in (key.rpartition(".")[2], key)}
    groups = {".".join(key.split(".")[:count]) for key in dotted for count in range(1, key.count(".") + 1)}
    return inner | groups | set(config_groups()) | {field.name for field in fields(InputConfig)}


NOT_OURS = {"key", "image_size", "batch_size"}
"""What stands for any key, and the arguments of a function for whoever calls it from Python."""


def test_every_key_that_an_error_names_exists() -> None:
    wrong = []
    for place, text in messages():
        with_group = re.findall(
            r"(?<![\w./-])((?:data|model|batch|trainer|cluster|comm|tracking|recipe|lab)\.[a-z_][a-z0-9_.]*[a-z0-9_])",
            text,
        )
        assigned = re.findall(r"(?<![\w.{}/-])([a-z][a-z0-9_.]*)=(?!=)", text)
        wrong += [f"{place}: {key}" for key in {*with_group, *assigned} - NOT_OURS - keys()]
    assert wrong == []


def test_every_command_and_script_that_an_error_names_exists() -> None:
    commands = {path.stem for path in PIPELINE.glob("*.py")} - {"__init__"}
    for place, text in messages():
        for command in re.findall(r"pipeline\.([a-z]+)\b", text):
            assert command in commands, place
        for script in re.findall(r"slurm/[a-z]+\.sh", text):
            assert (PIPELINE.parent / script).is_file(), place


# --- what is advised works ---


class Remedy:
    """One error: how it is made, what it must say to do, and doing that."""

    def __init__(self, says: str, attempt: Callable[..., object], *, remedy: Callable[[Any], object]) -> None:
        self.says, self.attempt, self.remedy = says, attempt, remedy

    def try_out(self) -> None:
        with pytest.raises(UserError) as raised:
            self.attempt()
        found = re.search(self.says, str(raised.value))
        assert found, f"{raised.value} does not say {self.says}"
        self.remedy(found)


BASES: dict[Any, tuple[str, list[str]]] = {
    TrainConfig: ("train", ["name=x", "data.root=y", "trainer.max_steps=1"]),
    EvaluateConfig: ("evaluate", ["data.root=y", "checkpoint=z"]),
    PrepareConfig: ("prepare", ["source=builtin", "out=y"]),
    CompareConfig: ("compare", ["models=[alexnet]"]),
    PlanConfig: ("plan", ["run=x"]),
    LabConfig: ("lab", []),
}


def composed(schema: Any, *overrides: str, without: Sequence[str] = ()) -> Any:
    command, base = BASES[schema]
    return compose(command, schema, [*(text for text in base if text.split("=")[0] not in without), *overrides])


# (schema, what is asked, what the message says to do, overrides instead; `{1}` is what the message named)
OVERRIDES: list[tuple[Any, str, str, str]] = [
    (TrainConfig, "trainer.max_step=4", r"Did you mean '([\w.]+)'", "{1}=4"),
    (TrainConfig, "max_steps=4", r"Did you mean '([\w.]+)'", "{1}=4"),
    (TrainConfig, "modle=alexnet", r"Did you mean '(\w+)'", "{1}=alexnet"),
    (TrainConfig, "model=alexnett", r"Did you mean '(\w+)'", "model={1}"),
    (TrainConfig, "recipe.decay=linaer", r"Did you mean '(\w+)'", "recipe.decay={1}"),
    (TrainConfig, "data.verify=sha", r"Did you mean '(\w+)'", "data.verify={1}"),
    (TrainConfig, "comm.hook=bf", r"Did you mean '(\w+)'", "comm.hook={1}"),
    (TrainConfig, "recipe.lr=[1", r"as in ([\w.=]+)\.", "{1}"),
    (TrainConfig, "recipe.lr=inf", r"give a finite one", "recipe.lr=1"),
    (TrainConfig, "name=${nothing", r"For the text itself: (.+)$", "{1}"),
    (TrainConfig, "tracking.tags=x", r"must be a list in brackets: (.+)\.$", "{1}"),
    (TrainConfig, "data.size=x", r"of type int", "data.size=64"),
    (TrainConfig, "recipe.momentum=null", r"is null: give it a value", "recipe.momentum=0.9"),
    (TrainConfig, "run_root=~nobody-of-this-name/x", r"of that name write (\S+)$", "{1}"),
    (TrainConfig, "run_root=", r"give a path, or leave run_root= out", ""),
    (TrainConfig, "name=x y", r"put both in quotes: (.+)\.$", "{1}"),
    (TrainConfig, "recipe.nesterov=true recipe.momentum=0", r"set recipe.momentum above 0", "recipe.nesterov=true"),
    (
        TrainConfig,
        "comm.nccl_algorithm=ring",
        r"set both, or neither",
        "comm.nccl_algorithm=ring comm.nccl_protocol=simple",
    ),
    (TrainConfig, "comm.nccl_algorithm=ring", r"set both, or neither", ""),
    (
        TrainConfig,
        "comm.hook=powersgd comm.find_unused_parameters=true",
        r"set (comm\S+false)",
        "comm.hook=powersgd {1}",
    ),
    (TrainConfig, "comm.bucket_megabytes=0", r"or (null) for torch's default", "comm.bucket_megabytes={1}"),
    (TrainConfig, "trainer.keep_checkpoints=1", r"at least (2)", "trainer.keep_checkpoints={1}"),
    (TrainConfig, "model.num_classes=1", r"at least 2, or (null)", "model.num_classes={1}"),
    (TrainConfig, "data.shuffle_groups=3", r"must divide batch.global_size=256", "data.shuffle_groups=2"),
    (TrainConfig, "cluster.step_timeout_seconds=700", r"=600.0, or (null)", "cluster.step_timeout_seconds={1}"),
    (TrainConfig, "data.root=https://a:b@c/d", r"as (%40)", "data.root=https://c/d{1}"),
    (TrainConfig, "model.input.size=300", r"raise it to that", "model.input.size=300 model.input.resize_side=300"),
    (PrepareConfig, "verify=true", r"leave out source=builtin, or verify=", ""),
    (PrepareConfig, "split=a-b", r"use letters, digits and underscores", "split=a_b"),
    (PrepareConfig, "num_images=4", r"at least (40)", "num_images={1}"),
    (PrepareConfig, "kind=folder", r"Did you mean '(\w+)'", "kind={1}"),
    (CompareConfig, "alone_runs=[x]", r"belongs to runs=\[\.\.\.\]", "runs=[y] alone_runs=[x]"),
    (CompareConfig, "comm.meter=false", r"set it to (true)", "comm.meter={1}"),
    (CompareConfig, "hooks=[bf16,bf16]", r"names a hook twice", "hooks=[bf16]"),
    (PlanConfig, "batch_per_rank=1 global_batch=2", r"not both", "global_batch=2"),
    (PlanConfig, "budget=5", r"needs (price_per_server_hour)", "budget=5 {1}=2"),
    (PlanConfig, "oversubscription=4", r"needs (servers_per_rack)", "oversubscription=4 {1}=16"),
    (PlanConfig, "bandwidth=[fast]", r"such as (1gbit)", "bandwidth=[{1}]"),
    (LabConfig, "servers=0", r"must be from (1) to", "servers={1}"),
    (LabConfig, "bandwidth=fast", r"such as (1gbit)", "bandwidth={1}"),
]


@pytest.mark.not_quick
@pytest.mark.parametrize(("schema", "asked", "says", "instead"), OVERRIDES, ids=lambda value: str(value)[:40])
def test_a_corrected_command_line_is_taken(schema: Any, asked: str, says: str, instead: str) -> None:
    def remedy(found: re.Match[str]) -> None:
        named = shlex.split(found[1]) if found.groups() else [""]  # as a shell reads what was pasted
        composed(schema, *(text.replace("{1}", named[0]) for text in instead.split()))

    Remedy(says, lambda: composed(schema, *asked.split()), remedy=remedy).try_out()


@pytest.mark.parametrize(
    ("schema", "missing", "says"),
    [
        (TrainConfig, "name", r"add (name=)"),
        (TrainConfig, "trainer.max_steps", r"set trainer.max_steps or (trainer.max_epochs)"),
        (TrainConfig, "data.root", r"data\.root is not set: give the directory"),
        (EvaluateConfig, "checkpoint", r"add (checkpoint=)"),
        (PrepareConfig, "out", r"add (out=)"),
        (PrepareConfig, "source", r"add (source=)"),
        (PlanConfig, "run", r"Give (run=)DIRECTORY"),
        (CompareConfig, "models", r"give (models=)\[\.\.\.\] or runs="),
    ],
)
def test_a_key_that_was_not_set_is_named_and_can_be(schema: Any, missing: str, says: str) -> None:
    asked = ["models=[]"] if missing == "models" else []
    value = "[alexnet]" if missing == "models" else "1" if "max" in missing else "x"

    def remedy(found: re.Match[str]) -> None:
        key = (found[1] if found.groups() else missing).rstrip("=")
        composed(schema, f"{key}={value}", without=[missing])

    Remedy(says, lambda: composed(schema, *asked, without=[missing]), remedy=remedy).try_out()


def test_sizes_of_a_batch_that_are_named_divide() -> None:
    for size, ranks, most in ((10, 4, 256), (1009, 1, 100), (2 * 509, 2, 64)):
        with pytest.raises(UserError) as raised:
            BatchConfig(global_size=size, max_per_rank=most).split(ranks)
        below, above = re.findall(r"to (\d+) or (\d+)", str(raised.value))[0]
        for named in (below, above):
            BatchConfig(global_size=int(named), max_per_rank=most).split(ranks)
        if whole := re.search(r"batch\.max_per_rank to (\d+)", str(raised.value)):
            BatchConfig(global_size=size, max_per_rank=int(whole[1])).split(ranks)


@pytest.mark.parametrize("name", ["a b", "../x", "checkpoints/x", ".hidden", "a//b", "é?"])
def test_a_name_that_is_proposed_is_a_name(name: str) -> None:
    Remedy(r"such as name=(\S+)$", lambda: validate_name(name), remedy=lambda found: validate_name(found[1])).try_out()


@pytest.mark.parametrize(
    ("spec", "says", "instead"),
    [
        ("squeezenet", r"Did you mean '(\w+)'", "{1}"),
        ("squeezenet1_0:sr", r"as in (squeezenet1_0:sr=0\.5,bypass=simple)", "{1}"),
        ("squeezenet1_0:sr=0.5,sr=0.25", r"keep one", "squeezenet1_0:sr=0.5"),
        ("squeezenet1_0:srr=0.5", r"Did you mean '(\w+)'", "squeezenet1_0:{1}=0.5"),
        ("squeezenet1_0:bypass=simple,freq=1", r"Use (bypass='complex')", "squeezenet1_0:bypass=complex,freq=1"),
    ],
)
def test_a_model_that_is_proposed_can_be_built(spec: str, says: str, instead: str) -> None:
    def build(text: str) -> None:
        name, metaparameters = zoo.parse_spec(text)
        with torch.device("meta"):
            zoo.build(name, 10, allow_code=False, **metaparameters)

    Remedy(
        says,
        lambda: build(spec),
        remedy=lambda found: build(instead.replace("{1}", found[1] if found.groups() else "")),
    ).try_out()


# --- files ---


def prepared(out: Path, *overrides: str) -> None:
    prepare_shards(composed(PrepareConfig, f"out={out}", "num_images=20", "num_classes=2", "num_workers=1", *overrides))


def opened(root: Path, verify: str = "sha256", split: str = "train") -> None:
    ShardIndex.open(root, split, verify=verify)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that `prepare` made; nobody changes them."""
    root = tmp_path_factory.mktemp("sound")
    prepared(root)
    return root


def flipped(root: Path) -> None:
    content = bytearray((root / "train-000000.tar").read_bytes())
    content[-2000] ^= 1
    (root / "train-000000.tar").write_bytes(content)


Damage = tuple[str, Callable[[Path], object], str, Callable[[Path], object]]
DAMAGE: list[Damage] = [
    ("shard gone", lambda r: (r / "train-000000.tar").unlink(), r"or prepare the shards again", lambda r: None),
    ("shard cut", lambda r: (r / "train-000000.tar").write_bytes(b"x"), r"or prepare the shards again", lambda r: None),
    ("shard flipped", flipped, r"or remove it and prepare", lambda r: (r / "train-000000.tar").unlink()),
    ("manifest cut", lambda r: (r / "manifest.json").write_text("{"), r"again into an empty out=", shutil.rmtree),
    ("manifest foreign", lambda r: (r / "manifest.json").write_text("{}"), r"again into an empty out=", shutil.rmtree),
    ("no shards", lambda r: [path.unlink() for path in r.iterdir()], r"prepare (source=builtin)", lambda r: None),
]


@pytest.mark.not_quick
@pytest.mark.parametrize(("damage", "says", "first"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damaged_shards_are_mended_as_the_message_says(
    sound: Path, tmp_path: Path, damage: Callable[[Path], object], says: str, first: Callable[[Path], object]
) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "shards"))
    damage(root)

    def remedy(found: object) -> None:
        first(root)
        prepared(root)
        opened(root)

    Remedy(says, lambda: opened(root), remedy=remedy).try_out()


@pytest.mark.not_quick
def test_a_manifest_that_is_copied_again_is_sound(sound: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "shards"))
    (root / "manifest.json").write_text("[]")
    Remedy(
        "Copy it again",
        lambda: opened(root),
        remedy=lambda found: (shutil.copy(sound / "manifest.json", root), opened(root)),
    ).try_out()


@pytest.mark.not_quick
def test_shards_that_were_made_otherwise_give_way(sound: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "shards"))
    for where in (tmp_path / "another", root):
        Remedy(
            r"Choose another out=, or remove it",
            lambda: prepared(root, "seed=1"),
            remedy=lambda found, where=where: (shutil.rmtree(where, ignore_errors=True), prepared(where, "seed=1")),
        ).try_out()


def test_splits_that_are_named_can_be_opened(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", train=(3,), val=(2,))
    Remedy(
        r"there is: (\w+), (\w+)", lambda: opened(root, split="test"), remedy=lambda found: opened(root, split=found[2])
    ).try_out()
    (root / "manifest.json").unlink()
    inner = tmp_path / "outer"
    inner.mkdir()
    (root).rename(inner / "folder")
    Remedy(
        r"as in 'data.train_split=\"(.+?)\"'",
        lambda: find_split(inner, "train"),
        remedy=lambda found: find_split(inner, found[1]),
    ).try_out()


def read(source: Path, kind: Any = None) -> None:
    options = {"split": None, "classes": None, "devkit": None, "builtin": BuiltinPictures(0, 2, 8)}
    open_source(str(source), kind=kind, **options)


def test_sources_are_corrected_as_the_message_says(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "folder", pictures({"ant": 1, "bee": 1}))
    for says, instead in ((r"Give a (directory)", folder), (r"or source=(builtin)", Path("builtin"))):
        Remedy(says, lambda: read(tmp_path / "no"), remedy=lambda found, instead=instead: read(instead)).try_out()
    empty = tmp_path / "empty"
    empty.mkdir()
    Remedy(
        "Put images there",
        lambda: read(empty),
        remedy=lambda found: (shutil.copytree(folder, empty, dirs_exist_ok=True), read(empty)),
    ).try_out()
    tar = tmp_path / "t.tar"
    tar.write_bytes(tar_of(pictures({"ant": 1, "bee": 1})))
    Remedy("so kind=folders cannot read it", lambda: read(tar, "folders"), remedy=lambda found: read(tar)).try_out()
    Remedy("so kind=tar cannot read it", lambda: read(folder, "tar"), remedy=lambda found: read(folder)).try_out()


def test_checkpoints_that_cannot_be_trusted_give_way(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / "step=000000001.ckpt").write_bytes(b"x")
    Remedy(
        r"or remove (\S+) to train from the start",
        lambda: find_latest(directory, lambda _: None),
        remedy=lambda found: (shutil.rmtree(found[1]), find_latest(directory, lambda _: None)),
    ).try_out()


def test_weights_are_given_as_the_message_says(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    torch.save(model, tmp_path / "whole.pth")
    Remedy(
        r"saved by torch\.save\(model\.state_dict\(\), \.\.\.\)",
        lambda: load_foreign(tmp_path / "whole.pth"),
        remedy=lambda found: (torch.save(model.state_dict(), tmp_path / "w.pth"), load_foreign(tmp_path / "w.pth")),
    ).try_out()
