"""The three floors: commands may import wings; wings never import one another; the ground imports only the ground."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
PIPELINE = REPOSITORY / "pipeline"
GROUND = {"config", "errors", "files", "typed", "unsafe"}
WINGS = {"data", "models", "comm", "run", "report"}
MODULES = sorted(PIPELINE.rglob("*.py"))
LONGEST_MODULE_LINES = 400
LONGEST_COMMAND_LINES = 120
# What a command may import before it knows that it will run: `--help` must not wait for torch.
LIGHT = {
    "pipeline.config.training",
    "pipeline.core.typed",
    "pipeline.core.cli",
    "pipeline.core.errors",
    "pipeline.config.compare",
    "pipeline.core.secrets",
}


@cache
def syntax(path: Path) -> ast.Module:
    """The parsed module."""
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    """pipeline/run/launch/supervisor.py -> pipeline.run.launch.supervisor"""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Full names of everything imported anywhere in `tree`, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rooms(path: Path) -> set[str]:
    """First rooms below pipeline that a module imports: `pipeline.comm.wire.gloo` -> `comm`."""
    names = (name.split(".") for name in imports(syntax(path), name_of(path)))
    return {parts[1] for parts in names if parts[0] == "pipeline" and len(parts) > 1}


def commands() -> list[Path]:
    """Modules that are run with `python -m`."""
    return [path for path in PIPELINE.glob("*.py") if "run_command(" in path.read_text() and path.stem != "cli"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    parts = path.relative_to(PIPELINE).with_suffix("").parts
    if parts[0] in GROUND:
        assert rooms(path) <= GROUND
    elif len(parts) > 1:
        assert parts[0] in WINGS, f"{parts[0]} is no wing of the house"
        assert rooms(path) <= GROUND | {parts[0]}


def test_the_rule_would_catch_a_wing_that_imports_another() -> None:
    tree = ast.parse("def f():\n    from ..comm import wire\n    import pipeline.run.launch.supervisor\n")
    assert set(imports(tree, "pipeline.data.index")) == {
        "pipeline.comm",
        "pipeline.comm.wire.gloo",
        "pipeline.run.launch.supervisor",
    }


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_stay_short(path: Path) -> None:
    limit = LONGEST_COMMAND_LINES if path in commands() else LONGEST_MODULE_LINES
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= limit


@pytest.mark.parametrize("path", commands(), ids=name_of)
def test_commands_import_nothing_heavy_at_the_top(path: Path) -> None:
    top = [node for node in syntax(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name for node in top for name in imports(node, name_of(path))}
    ours = {name for name in names if name.startswith("pipeline")}
    assert all(any(name == light or name.startswith(f"{light}.") for light in LIGHT) for name in ours), ours
    heavy = {"torch", "torchvision", "pytorch_lightning", "wandb", "matplotlib", "numpy", "PIL"}
    assert not {name.partition(".")[0] for name in names} & heavy


@pytest.mark.parametrize("folder", ["pipeline", "benchmarks"])
def test_nothing_is_unpickled_or_run(folder: str) -> None:
    """Every torch.load says weights_only=True, no array is loaded as objects, nothing else unpickles, no string is run.

    Tests may: some show what would happen otherwise.
    """
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(syntax(path)):
            if not isinstance(node, ast.Call):
                continue
            function, where = ast.unparse(node.func), f"{path}:{node.lineno}"
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            default = "unsaid" if function in ("torch.load", "load_state_dict_from_url") else "True"
            assert said.get("weights_only", default) == "True", where
            assert said.get("allow_pickle") in (None, "False"), where
            assert function not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), where
            assert function not in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"), where
            assert function not in ("eval", "exec", "os.system", "os.popen") and said.get("shell") is None, where
            assert function.rpartition(".")[2] not in ("instantiate", "get_class", "get_method"), where


def test_tests_mirror_the_house() -> None:
    folders = {
        path.name for path in (REPOSITORY / "tests/unit").iterdir() if path.is_dir() and path.name[0] not in "._"
    }
    assert folders <= WINGS
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
