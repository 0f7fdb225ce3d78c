"""What is typed arrives: text through Hydra's grammar, as it was typed or as a refusal says how to type it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pipeline.config.compare import CompareConfig
from pipeline.config.dashboard import DashboardConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.prepare import PrepareConfig
from pipeline.config.training import TrainConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError
from pipeline.core.overrides import QUOTED, as_typed, literal
from pipeline.core.typed import build

BASE = ("name=x", "data.root=somewhere", "trainer.max_steps=1")
# What a number, a word or a piece of the grammar looks like, and everything else that people type.
PIECES = ["2024_11_29", "1e5", "12e4567", "null", "true", "inf", "~", "~/", "${", "${seed}", "}", "'", '"', "\\", "="]
PIECES += ["[", "]", "{", ",", "#", "%", "$", ";", ":", " ", "  ", "(", ")", "|", "&", "*", "\t", "\n", "é", "日", "x"]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join),
    st.text(st.characters(exclude_characters="\0"), max_size=8),
)  # no argument holds a character of value 0
WORDS = ["2024_11_29", "1_1", "1e5", "12e4567", "45e9999", "007", "0x10", "1.10", "1.100", "true", "no", "2026-11-29"]
WORDS += [
    "10:30",
    "a,b",
    "x y",
    "inf",
    "nan",
    "False",
    "1_000",
    "+5",
    ".5",
    "5.",
    "-3",
    "0b1",
    "@",
    "a(b)",
    "choice(a,b)",
]
PATHS = [
    "b (copy)",
    "b,c",
    "b#1",
    "b%20c",
    "b@1",
    "b&c",
    "b:c",
    "b~1",
    "b$c",
    "b[1]",
    "b'c",
    "b{x}",
    "b;c",
    "b!c",
    "b=c",
]
PATHS += [
    'b"c',
    "b\\c",
    "[b]",
    "{b}",
    "läufe/été",
    "日本",
    "two  spaces",
    " b ",
    "b\nc",
    "b\\",
    "'b' and 'c'",
    "(b)",
    "b|c",
]
PATHS += [
    "train-{0000..1023}.tar",
    "runs/x/checkpoints/step=000000012.ckpt",
    "null",
    "2024_11_29",
    "proc.env/my_target_x",
]


@dataclass(frozen=True)
class Named:
    """A schema."""

    name: str


def typed(key: str, text: str) -> str | None:
    """What `key` of the command with the fewest keys is when `text` is typed as its value."""
    return getattr(compose("dashboard", DashboardConfig, [f"{key}={text}"]), key)


@pytest.mark.parametrize("name", [*WORDS, "null", "NULL"])
def test_a_name_is_what_was_typed(name: str) -> None:
    assert typed("name", name) == name


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_what_was_typed(path: str) -> None:
    assert typed("run_root", path) == path


@pytest.mark.not_quick
@given(key=st.sampled_from(["name", "run_root", "entity"]), text=TEXTS)
@example("name", "a${seed")
@example("entity", "~")
@example("run_root", "~nobody-of-this-name/x")
@example("name", "${name}")
@example("entity", "${x:y}")
@example("entity", "${x}\\${y}\\\\${z}\\")
@settings(max_examples=25, deadline=None)
def test_any_text_arrives_or_the_refusal_says_how(key: str, text: str) -> None:
    """What is pasted from a refusal is read by a shell, and then arrives as the text that was meant."""
    if QUOTED.fullmatch(text) or "${seed}" in text or re.search(r"\\\$\{", text):
        return  # these say something else: text between quotes, another key's value, an escaped `${`
    if (key, text.lower()) == ("entity", "null") or (key, text) == ("run_root", ""):
        return  # no value, and an empty path, which is refused
    try:
        found = typed(key, text)
    except ConfigError as error:
        (correction,) = shlex.split(re.split("For the text itself: |of that name write ", str(error))[-1])
        found = typed(*correction.split("=", 1))
        found = found.removeprefix("./") if found and not text.startswith("./") else found
    meant = str(Path(text).expanduser()) if key == "run_root" and re.match("~(/|$)", text) else text
    assert found == meant


@given(TEXTS)
@settings(deadline=None)
def test_what_a_program_writes_arrives(text: str) -> None:
    """For keys that take text, and for those of which nothing is known."""
    for key in ("name", "data.root", "model.metaparameters.anything"):
        (override,) = as_typed([f"{key}={literal(text)}"], TrainConfig)
        assert _value(override) == text


@given(st.lists(TEXTS.filter(str.strip), max_size=3, unique=True))
@settings(max_examples=25, deadline=None)
def test_lists_of_text_arrive(texts: list[str]) -> None:
    (override,) = as_typed([f"tracking.tags={literal(texts)}"], TrainConfig)
    assert _value(override) == texts


def _value(override: str) -> object:
    """What Hydra and OmegaConf make of an override's value."""
    value = OverridesParser.create().parse_override(override).value()
    container = OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)
    assert isinstance(container, dict)
    return container["value"]


def test_items_of_a_list_are_text() -> None:
    config = compose("train", TrainConfig, [*BASE, "tracking.tags=[007, 1e5,null,a b,x=1,'c,d']"])
    assert config.tracking.tags == ("007", "1e5", "null", "a b", "x=1", "c,d")


def test_a_list_without_brackets_is_shown_with_them() -> None:
    with pytest.raises(ConfigError, match=re.escape("must be a list in brackets: 'models=[alexnet,vgg11]'.")):
        compose("compare", CompareConfig, ["models=alexnet,vgg11"])


def test_null_is_no_value_where_a_key_may_have_none() -> None:
    config = compose("train", TrainConfig, [*BASE, "tracking.entity=null", "data.cache_dir='null'", "run_root=null"])
    assert (config.tracking.entity, config.data.cache_dir, config.run_root) == (None, "null", "null")


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("name=a,b", "name='a','b'"),
        ("name=1_1,'c,d',007", "name='1_1','c,d','007'"),
        ("name=choice(a,b)", "name=choice(a,b)"),
        ("name=s${seed}", "name='s${seed}'"),
        ("data.root=a,null", "data.root='a',null"),
        ("tracking.tags=[a,b],[c]", "tracking.tags=['a','b'],['c']"),
        ("recipe.lr=0.1,0.2", "recipe.lr=0.1,0.2"),
        ("model=alexnet,vgg11", "model=alexnet,vgg11"),
    ],
)
def test_commas_separate_under_multirun(argument: str, quoted: str) -> None:
    assert as_typed([argument], TrainConfig, is_sweep=True) == [quoted]


def test_home_is_found_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/my")
    prepare = compose("prepare", PrepareConfig, ["source=~/pics", "out=~", "classes=~/names.txt", "devkit=~/kit"])
    assert (prepare.source, prepare.out) == ("/my/pics", "/my")
    assert (prepare.classes, prepare.devkit) == ("/my/names.txt", "/my/kit")
    evaluate = compose("evaluate", EvaluateConfig, ["data.root=~/s", "checkpoint=~/w.pth", "run_root=~/r"])
    assert (evaluate.data.root, evaluate.checkpoint, evaluate.run_root) == (
        "/my/s",
        "/my/w.pth",
        "/my/r",
    )
    compare = compose("compare", CompareConfig, ["runs=[~/a, b/~/c]", "training_run=~/t"])
    assert (compare.runs, compare.training_run) == (("/my/a", "b/~/c"), "/my/t")


def test_a_number_of_a_yaml_file_is_no_text() -> None:
    with pytest.raises(ConfigError, match=r"name=20241129 stands without quotes .* put it in quotes"):
        build(Named, yaml.safe_load("name: 2024_11_29"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=[1,"], "seed='[1,' cannot be read: give a whole number, as in seed=0."),
        (["recipe.lr=[0.1"], "recipe.lr='[0.1' cannot be read: give a number, as in recipe.lr=0.1."),
        (["run_root=my", "runs"], "put both in quotes: 'run_root=my runs'."),
        (["seed"], "'seed' is not of the form key=value."),
        (["run_root="], "run_root= is empty: give a path"),
    ],
)
def test_what_cannot_be_read_is_shown_as_it_should_be(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose("train", TrainConfig, [*BASE, *arguments])
