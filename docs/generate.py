"""The generated pages: commands.md, results.md, schemas.md, surface.txt, and the marked tables of other pages.

    python docs/generate.py            write them (`make docs`)
    python docs/generate.py --check    write nothing; name those that are stale, and exit 1 if any is

Each is a pure function of the repository: of the commands' help, of `benchmarks/results/*.json`, of the TypedDicts in
`pipeline/core/schemas/`, of the registry of models. A table inside a hand-written page stands between
`<!-- generated: NAME -->` and `<!-- end of NAME -->`.
"""

import argparse
import ast
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from results_page import (
    NOTE,
    REPOSITORY,
    faltering_table,
    fine_tuning_table,
    hostile_table,
    links_table,
    models_table,
    peers_table,
    results_page,
    table,
)

from pipeline.__main__ import COMMANDS
from pipeline.core import groups, help, schemas
from pipeline.core.errors import ExitCode

METRIC = re.compile(r"^(train|val|perf|comm|trainer|comparison)/[a-z0-9_]+$|^samples$|^lr$|^best_val_top1$")


# --- commands.md ---


def prose(docstring: str) -> str:
    """Return a module's docstring as Markdown: its indented or bare command lines become blocks."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n".join(f"{_block(text)}\n" for text in paragraphs)


def _block(text: str) -> str:
    lines = text.splitlines()
    if not all(line.startswith("    ") or line.lstrip().startswith(("python -m", "sbatch")) for line in lines):
        return text
    # What follows a command after a gap explains it.
    lines = [re.sub(r"(?<=\S)\s{2,}(?=[^\s#])", "  # ", line.strip()) for line in lines]
    is_shell = all(re.match(r"(python -m|sbatch|make) ", line) for line in lines)
    is_complete = is_shell and not any(re.search(r"\.\.\.|\[--|[A-Z]{4,}_", line) for line in lines)
    return "\n".join([f"```{'bash' if is_complete else 'text'}", *lines, "```"])


def commands() -> dict[str, tuple[str, str, type[Any]]]:
    """Return command -> (docstring, name of its configuration, schema), read from each `run_command(...)`."""
    found: dict[str, tuple[str, str, type[Any]]] = {}
    for path in (REPOSITORY / "pipeline").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_command" and len(node.args) == 3:
                module = importlib.import_module(f"pipeline.{path.stem}")
                schema = getattr(module, ast.unparse(node.args[1]))
                found[path.stem] = (ast.get_docstring(tree) or "", ast.literal_eval(node.args[0]), schema)
    order = {name: position for position, name in enumerate(COMMANDS)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


@cache
def help_of(name: str, schema: type[Any]) -> str:
    """Return what `--help` of the command prints."""
    return help.help_text(name, schema)


def commands_page() -> str:
    """Return every command: what it does, and what `--help` prints."""
    parts = [
        "# Commands\n",
        NOTE.format(source="a command's docstring or the dataclasses in `pipeline/config/`"),
        "All are Hydra applications: `python -m pipeline.COMMAND key=value ...`. `--help` prints what stands here, a\n"
        "mistyped key names the nearest right one, `--cfg job` prints the composed configuration. What the exit codes\n"
        "mean: [survival.md](survival.md#exit-codes).\n",
    ]
    known = commands()
    parts.append("".join(f"- [{name}](#{name}): {_first_sentence(entry[0])}\n" for name, entry in known.items()))
    for name, (docstring, configuration, schema) in known.items():
        parts.append(f"## {name}\n\n{prose(docstring)}")
        if configuration == name:
            parts.append(f"```text\n{help_of(name, schema)}\n```\n")
        else:
            parts.append(f"Its keys are those of [{configuration}](#{configuration}).\n")
    return "\n".join(parts)


def _first_sentence(docstring: str) -> str:
    return re.split(r"(?<=[.?])\s", " ".join(docstring.split("\n\n")[0].split()))[0]


# --- schemas.md and surface.txt ---


def schema_modules() -> list[Any]:
    """Return the modules of `pipeline/core/schemas/`."""
    names = sorted(module.name for module in pkgutil.iter_modules(schemas.__path__))
    return [importlib.import_module(f"{schemas.__name__}.{name}") for name in names]


def typed_dicts(module: Any) -> dict[str, Any]:
    """Return the TypedDicts that `module` defines, in its order."""
    return {
        name: value
        for name, value in vars(module).items()
        if typing.is_typeddict(value) and value.__module__ == module.__name__
    }


def schemas_page() -> str:
    """Return the files that runs leave and other programs read, key by key."""
    parts = ["# The JSON files\n", NOTE.format(source="the TypedDicts in `pipeline/core/schemas/`")]
    parts.append(f"{inspect.cleandoc(schemas.__doc__ or '')}\n")
    for module in schema_modules():
        title = re.match(r"`([^`]+)`", module.__doc__ or "")
        parts.append(f"## {title[1] if title else module.__name__.rpartition('.')[2]}\n")
        parts.append(f"{inspect.cleandoc(module.__doc__ or '')}\n")
        known = typed_dicts(module)
        for name in sorted(known, key=lambda name: name not in _roots(known)):
            parts.append(f"### {name}\n\n{inspect.cleandoc(known[name].__doc__ or '')}\n")
            parts.append(table(("key", "type", "meaning"), list(_fields(known[name], known))))
    return "\n".join(parts)


def _fields(schema: Any, known: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    (tree,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(schema))).body
    assert isinstance(tree, ast.ClassDef)
    for field, text in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            said = text.value.value if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) else ""
            annotation = ast.unparse(field.annotation).replace("'", '"')
            linked = re.sub(r"\w+", lambda word: _link(word[0], known), annotation)
            yield f"`{ast.unparse(field.target)}`", linked, " ".join(str(said).split())


def _link(word: str, known: Mapping[str, Any]) -> str:
    return f"[{word}](#{word.lower()})" if word in known else word


def _roots(known: Mapping[str, Any]) -> set[str]:
    """The TypedDicts that no other one contains: a whole file each."""
    inner = {part.__name__ for schema in known.values() for hint in _hints(schema).values() for part in _parts(hint)}
    return set(known) - inner


def _hints(schema: Any) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _parts(hint: Any) -> Iterator[Any]:
    if typing.is_typeddict(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _parts(argument)


def _paths(schema: Any) -> Iterator[str]:
    """Yield every key below a TypedDict by its dotted path, `[]` for the items of a list, `*` for any key."""
    for key, hint in _hints(schema).items():
        yield key
        for mark, inner in _below(hint):
            yield from (f"{key}{mark}.{path}" for path in _paths(inner))


def _below(hint: Any, mark: str = "") -> Iterator[tuple[str, Any]]:
    if typing.is_typeddict(hint):
        yield mark, hint
    origin = typing.get_origin(hint)
    own = {list: "[]", tuple: "[]", dict: ".*"}.get(origin, "")
    for argument in typing.get_args(hint):
        yield from _below(argument, mark + own)


def surface() -> str:
    """Return what other people's commands, programs and dashboards may depend on, one line each, sorted."""
    lines = {f"exit code {code.value} {code.name}" for code in ExitCode}
    for group, choices in groups.config_groups().items():
        lines.update(f"choice {group}={choice}" for choice in choices)
    for name, (_, configuration, schema) in commands().items():
        lines.add(f"command {name}")
        if configuration == name:
            lines.update(f"key {name} {key}" for key in re.findall(r"^  ([\w.]+)=", help_of(name, schema), re.M))
    for path in (REPOSITORY / "pipeline").rglob("*.py"):
        strings = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        lines.update(f"metric {text}" for text in strings if isinstance(text, str) and METRIC.match(text))
    for module in schema_modules():
        known = typed_dicts(module)
        file = module.__name__.rpartition(".")[2]
        for name in _roots(known):
            lines.update(f"json {file} {path}" for path in _paths(known[name]))
    return "\n".join(sorted(lines)) + "\n"


# --- all of them ---


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"models": models_table},
    "docs/comparing.md": {"links": links_table},
    "docs/exactness.md": {"peers": peers_table},
    "docs/fine-tuning.md": {"fine_tuning": fine_tuning_table},
    "docs/survival.md": {"faltering": faltering_table},
    "SECURITY.md": {"hostile": hostile_table},
}


def filled(text: str, name: str, content: str) -> str:
    """Return a page with the marked table replaced."""
    start, end = f"<!-- generated: {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"No {start.strip()} ... {end}.")
    return f"{before}{start}{content}{end}{after}"


def read(path: str, root: Path = REPOSITORY) -> str:
    """Return a page as it is; empty if there is none."""
    file = root / path
    return file.read_text() if file.is_file() else ""


def pages() -> dict[str, str]:
    """Return path -> content of everything that is generated."""
    made = {
        "docs/commands.md": commands_page(),
        "docs/results.md": results_page(),
        "docs/schemas.md": schemas_page(),
        "docs/surface.txt": surface(),
    }
    for path, tables in TABLES.items():
        text = read(path)
        for name, content in tables.items():
            text = filled(text, name, content())
        made[path] = text
    return made


def stale(made: Mapping[str, str], root: Path = REPOSITORY) -> list[str]:
    """Return the pages that are not what they would be made now."""
    return [path for path, text in made.items() if read(path, root) != text]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or check them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    options = parser.parse_args(arguments)
    made = pages()
    found = stale(made)
    for path in found:
        print(f"{path} is stale: run `make docs`." if options.check else path)
        if not options.check:
            (REPOSITORY / path).write_text(made[path])
    return int(options.check and bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
