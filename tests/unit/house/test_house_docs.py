"""README and docs/ hold: commands compose, targets, files, links and anchors exist, no generated page is stale.

Each check is a function from text to sentences about what is wrong, so that bad text can be planted.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.cli import compose, split_arguments
from pipeline.core.errors import ExitCode, UserError
from tests.pages import fenced, lines_of

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY / "docs"))  # as a script it stands there, outside every package

import generate  # noqa: E402

PAGES = sorted(
    path
    for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("*/README.md"))
    if path.parent.name != "shared"
)
LANGUAGES = ("bash", "python", "text", "")
MOST_LINES, MOST_WORDS, FIRST_COMMAND_LINE = 150, 1200, 25
# What a job script hands its arguments to.
SCRIPTS = {
    "train.sh": "train",
    "preflight.sh": "ready",
    "prepare.sh": "prepare",
    "compare.sh": "compare",
    "study.sh": "study",
}
OTHERS = {"conda", "wandb", "nsenter", "."}
"""Programs that are not ours; what follows is not looked at but for files."""


@cache
def make_targets() -> frozenset[str]:
    """Every target of the Makefile that people are meant to call."""
    return frozenset(re.findall(r"^\.PHONY: ([a-z-]+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


@cache
def schemas() -> Mapping[str, tuple[str, type[Any]]]:
    """Command -> (its configuration, its schema)."""
    return {name: (configuration, schema) for name, (_, configuration, schema) in generate.commands().items()}


def without_code(text: str) -> str:
    """The text with its blocks and code spans blanked out; lines stay where they are."""
    blank = re.sub(r"^```[\s\S]*?^```$", lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "code", blank)


# --- commands ---


@cache
def wrong_with_line(line: str) -> str:
    """What is wrong with a command line; empty if nothing is."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        return str(error)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return _wrong_with(words) if words else ""


def _wrong_with(words: Sequence[str]) -> str:
    match words:
        case ["make", *targets]:
            unknown = [target for target in targets if "=" not in target and target not in make_targets()]
            return f"no such target: {', '.join(unknown)}" if unknown else ""
        case ["python" | ".venv/bin/python", "-m", "pytest", *arguments] | ["pytest", *arguments]:
            return _missing_files(argument.partition("::")[0] for argument in arguments if "/" in argument)
        case ["python", "-m", module, *arguments] if module.startswith("benchmarks."):
            return _wrong_with_benchmark(module, arguments)
        case ["python", "-m", "pipeline.models.sqz.update", url, _] if url.startswith("http"):
            return ""  # the device's own; tests/unit/models/test_update.py runs it
        case ["python", "-m", module, *arguments] if module.startswith("pipeline."):
            return _wrong_with_command(module.removeprefix("pipeline."), arguments)
        case ["squeezewire", "models" | "--help", *_]:
            return ""
        case ["squeezewire", command, *arguments]:
            return _wrong_with_command(command, arguments)
        case ["torchrun", *arguments] if "--no-python" in arguments:
            return _wrong_with(arguments[arguments.index("--no-python") + 1 :])
        case ["python", script, *_] if script.endswith(".py"):
            return _missing_files([script])
        case ["sbatch", *arguments]:
            return _wrong_with_job(arguments)
        case ["conda", *arguments] if "-f" in arguments:
            return _missing_files([arguments[arguments.index("-f") + 1]])
        case ["conda", "activate", name]:
            known = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["name"]
            return "" if name == known else f"the environment is called {known}"
        case ["curl", "-LO", url] if url.startswith("https://"):
            return ""
        case [program, *_] if program in OTHERS:
            return ""
        case _:
            return "no test knows this program"


def _missing_files(names: Iterator[str] | Sequence[str]) -> str:
    missing = [name for name in names if not (REPOSITORY / name).exists()]
    return f"no such file: {', '.join(missing)}" if missing else ""


def _wrong_with_command(command: str, arguments: Sequence[str]) -> str:
    if command not in schemas():
        return f"no such command: {command}"
    configuration, schema = schemas()[command]
    if "--help" in arguments:
        answer = subprocess.run([sys.executable, "-m", f"pipeline.{command}", "--help"], cwd=REPOSITORY, timeout=120)
        return "" if answer.returncode == 0 else f"--help exits {answer.returncode}"
    own, inner = split_arguments(arguments)
    if command == "requeue":
        own = own[1:]
    try:
        compose(configuration, schema, own)
    except UserError as error:
        return str(error)
    if command == "meter" or not inner:  # what is metered is the reader's own
        return ""
    return _wrong_with(inner)


def _wrong_with_benchmark(module: str, arguments: Sequence[str]) -> str:
    path = REPOSITORY / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        return f"no such benchmark: {module}"
    known = path.read_text() + (REPOSITORY / "benchmarks/common.py").read_text()
    unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in known]
    return f"{module} has no {', '.join(unknown)}" if unknown else ""


def _wrong_with_job(arguments: Sequence[str]) -> str:
    at = next((place for place, word in enumerate(arguments) if word.endswith(".sh")), None)
    if at is None or Path(arguments[at]).name not in SCRIPTS:
        return "no job script of slurm/"
    if not (REPOSITORY / arguments[at]).is_file():
        return f"no such file: {arguments[at]}"
    return _wrong_with_command(SCRIPTS[Path(arguments[at]).name], _named(arguments[at + 1 :]))


def _named(overrides: Sequence[str]) -> list[str]:
    """A sweep's line of the file gives the name that the command line leaves out."""
    has_name = any(override.startswith(("name=", "experiment=")) for override in overrides)
    return [*overrides] if has_name or not any("trainer." in word for word in overrides) else ["name=x", *overrides]


def wrong_with_script(body: str) -> list[str]:
    """What a block of Python takes from the project and does not find there."""
    return [
        f"{node.module} has no {name.name}"
        for node in ast.walk(ast.parse(body))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline")
        for name in node.names
        if not hasattr(importlib.import_module(node.module or ""), name.name)
    ]


def wrong_with_commands(text: str) -> list[str]:
    """What is wrong with the blocks of a page, and with the commands it names in passing."""
    found = []
    for number, language, body in fenced(text):
        if language not in LANGUAGES:
            found.append(f"line {number}: a block of `{language}`")
        if language == "bash":
            found += [f"line {number}: {line}: {wrong}" for line in lines_of(body) if (wrong := wrong_with_line(line))]
        if language == "python":
            found += [f"line {number}: {wrong}" for wrong in wrong_with_script(body)]
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```[\s\S]*?^```$", "", text, flags=re.MULTILINE)):
        if match := re.match(r"python -m ((?:pipeline|benchmarks)\.[a-z_][\w.]*)", span):
            if not (REPOSITORY / f"{match[1].replace('.', '/')}.py").is_file():
                found.append(f"`{span}`: no such module")
        elif match := re.fullmatch(r"make ([a-z][a-z -]*)", span):
            found += [f"`{span}`: no target {name}" for name in match[1].split() if name not in make_targets()]
    return found


@pytest.mark.not_quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_command_would_run(page: Path) -> None:
    assert wrong_with_commands(page.read_text()) == []


def test_no_shell_block_hides_behind_another_language() -> None:
    for page in (REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")):
        for number, language, body in fenced(page.read_text()):
            assert language in ("bash", "python", "text"), f"{page.name}:{number}"
            if page.name not in ("results.md", "commands.md"):  # made from command lines with their machine's paths
                assert language == "bash" or not re.search(r"^(python -m|make|sbatch) ", body, re.MULTILINE), page.name


@pytest.mark.parametrize(
    "line",
    [
        "python -m pipeline.trane name=x data.root=x trainer.max_steps=1",
        "python -m pipeline.train name=x data.rot=x trainer.max_steps=1",
        "python -m pipeline.train name=x trainer.max_steps=1",
        "python -m pipeline.train experiment=demonstration",
        "python -m pipeline.lab servers=none -- python -m pipeline.train experiment=demo",
        "python -m pipeline.lab servers=2 -- python -m pipeline.train experiment=dmo",
        "python -m pipeline.compare models=[squeezenet1_0] data.root=x step=3",
        "sbatch slurm/trane.sh experiment=demo",
        "sbatch --nodes=2 slurm/train.sh experiment=imaginet",
        "SQUEEZEWIRE_SWEEP=sweep.txt sbatch slurm/train.sh trainer.max_epoch=90",
        "python -m benchmarks.lnks",
        "python -m benchmarks.links --batch-sizes",
        "make tset",
        "conda env create -f environment.yaml",
        "conda activate squeeze",
        "pytest tests/unit/house/test_no_such.py",
        "curl https://example.org | sh",
        "python -m pipeline.train 'name=x",
    ],
)
def test_a_planted_command_is_found(line: str) -> None:
    assert len(wrong_with_commands(f"text\n\n```bash\n{line}\n```\n")) == 1


@pytest.mark.parametrize(
    "span", ["make dmeo", "make lint tset", "python -m benchmarks.lnks", "python -m pipeline.trane x"]
)
def test_a_planted_span_is_found(span: str) -> None:
    assert len(wrong_with_commands(f"Run `{span}` first.\n")) == 1


# --- links ---


def anchors(text: str) -> set[str]:
    """The anchors a forge gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#{1,6} (.+)$", re.sub(r"^```[\s\S]*?^```$", "", text, flags=re.MULTILINE), re.MULTILINE
    ):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower()).replace(" ", "-")
        number = next(number for number in range(1000) if (f"{slug}-{number}" if number else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def wrong_with_links(text: str, page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if path and not file.exists():
            found.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(text if file == page else file.read_text()):
            found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert wrong_with_links(page.read_text(), page) == []


def test_a_planted_link_is_found() -> None:
    page = REPOSITORY / "docs/planted.md"
    text = "# A page\n\n[a](lab.md) [b](#a-page) [c](https://example.org) `[d](none.md)`\n"
    assert wrong_with_links(text, page) == []
    assert wrong_with_links(text + "[e](labb.md) [f](lab.md#no-such) [g](#nowhere)\n", page) == [
        "labb.md: no such file",
        "lab.md#no-such: no such heading",
        "#nowhere: no such heading",
    ]
    assert anchors("# A `b`, c-d!\n## Same\n## Same\n") == {"a-b-c-d", "same", "same-1"}


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {
        (REPOSITORY / target.partition("#")[0]).resolve() for target in links((REPOSITORY / "README.md").read_text())
    }
    assert set(REPOSITORY.glob("docs/*.md")) <= linked
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page.read_text())}
    assert set(REPOSITORY.glob("docs/*.png")) <= shown  # a picture that no page shows is left over


# --- modules that pages name ---


def wrong_with_paths(text: str) -> list[str]:
    """Python files named in a page that are not there, as from the root, from pipeline/ or from tests/."""
    named = sorted(set(re.findall(r"(?<![\w/.-])((?:[a-z_]+/)+[a-z_0-9]+\.py)\b", text)))
    roots = (REPOSITORY, REPOSITORY / "pipeline", REPOSITORY / "tests", REPOSITORY / "benchmarks")
    return [name for name in named if not any((root / name).is_file() for root in roots)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_named_module_exists(page: Path) -> None:
    if page.name != "CHANGELOG.md":
        assert wrong_with_paths(page.read_text()) == []


def test_a_planted_module_is_found() -> None:
    text = "`pipeline/data/order.py`, data/order.py and unit/run/test_lock.py; not data/ordre.py"
    assert wrong_with_paths(text) == ["data/ordre.py"]


# --- README, exit codes, what others need ---


def wrong_with_readme(text: str) -> list[str]:
    """How a README misses being read in two minutes."""
    lines, words = text.count("\n"), len(text.split())
    first = next((number for number, language, _ in fenced(text) if language == "bash"), 10**6)
    return [
        *([f"{lines} lines"] if lines > MOST_LINES else []),
        *([f"{words} words"] if words > MOST_WORDS else []),
        *([f"the first command in line {first}"] if first > FIRST_COMMAND_LINE else []),
    ]


def test_the_readme_is_read_in_two_minutes() -> None:
    assert wrong_with_readme((REPOSITORY / "README.md").read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nmake demo\n```\n" + "line\n" * 150,
        "```bash\nmake demo\n```\n" + "word " * 1200,
        "\n" * 30 + "```bash\nmake\n```\n",
    ],
)
def test_a_planted_long_readme_is_found(text: str) -> None:
    assert len(wrong_with_readme(text)) == 1


def test_the_exit_codes_of_the_page_are_the_programs() -> None:
    table = re.findall(r"^\| (\d+) \| ", (REPOSITORY / "docs/survival.md").read_text(), re.MULTILINE)
    assert [int(code) for code in table] == [code.value for code in ExitCode]


def test_the_licence_is_the_one_that_is_said() -> None:
    """Apache-2.0 word for word, but for the line that is there to be filled in."""
    text = (REPOSITORY / "LICENSE").read_text()
    given = text.replace("Copyright 2026 The squeezewire authors", "Copyright [yyyy] [name of copyright owner]")
    assert sha256(given.encode()).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert project["version"] == citation["version"]
    assert f"\n## {project['version']}\n" in (REPOSITORY / "CHANGELOG.md").read_text()


# --- generated pages ---


def test_no_generated_page_is_stale(tmp_path: Path) -> None:
    made = generate.pages()
    assert generate.stale(made) == [], "run `make docs`"
    for path, text in made.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    assert generate.stale(made, tmp_path) == []
    results = tmp_path / "docs/results.md"
    results.write_text(results.read_text().replace("58.2 ms", "58.1 ms"))
    (tmp_path / "docs/commands.md").unlink()
    assert generate.stale(made, tmp_path) == ["docs/commands.md", "docs/results.md"]


def test_a_table_inside_a_page_is_replaced_and_nothing_else() -> None:
    page = "before\n<!-- generated: x -->\nold\n<!-- end of x -->\nafter\n"
    assert generate.filled(page, "x", "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="generated: y"):
        generate.filled(page, "y", "new\n")
