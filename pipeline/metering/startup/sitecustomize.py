"""Python runs this before a metered program, whose PYTHONPATH names its folder (`pipeline.metering.door`).

Nothing happens here but a look-out for torch.distributed: not before the program makes a process group is the meter
imported, and then under a name that no program has: whatever it calls `pipeline`, now or later, stays its own. A
`sitecustomize` of the machine's own, which this one hides, runs as it would have. A Python too old for the meter runs
its program all the same: what is here is no newer than Python 3.8, and no annotation is evaluated.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
PACKAGE = os.path.dirname(os.path.dirname(HERE))  # noqa: PTH120
OURS = os.path.basename(PACKAGE)  # noqa: PTH119
PRIVATE = "_squeezewire_metering"
WATCHED = "torch.distributed.distributed_c10d"
MAKING = "_new_process_group_helper"


class PrivatePackage(importlib.abc.MetaPathFinder):
    """Finds our package under its private name, in which all of it imports the rest of it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Return where a module of ours is; None for any other name."""
        if fullname.partition(".")[0] != PRIVATE:
            return None
        if fullname == PRIVATE:
            file = os.path.join(PACKAGE, "__init__.py")  # noqa: PTH118
            places = [PACKAGE]
            loader = PrivateLoader(fullname, file)
            return importlib.util.spec_from_file_location(
                fullname, file, loader=loader, submodule_search_locations=places
            )
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = PrivateLoader(spec.loader.name, spec.loader.path)
        return spec


class PrivateLoader(importlib.machinery.SourceFileLoader):
    """Loads a module of ours, compiled as ever, with the private name where it imports one by the public name."""

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the module's code."""
        code = super().get_code(fullname)
        return code and renamed(code)


def renamed(code: CodeType) -> CodeType:
    """Return code whose imports of our package name the private one. A name with a dot is an import's."""
    constants = tuple(renamed(value) if isinstance(value, type(code)) else value for value in code.co_consts)
    names = tuple(PRIVATE + name[len(OURS) :] if name.startswith(OURS + ".") else name for name in code.co_names)
    return code.replace(co_consts=constants, co_names=names)


class LookOut(importlib.abc.MetaPathFinder):
    """Waits for the module in which process groups are made."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Return how the others would load it, with an eye on it."""
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader)
        return spec


class Loader(importlib.abc.Loader):
    """Loads it as another loader does, and then sees to it that its first group brings the meter."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the other loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then put the look-out in place."""
        self.loader.exec_module(module)
        original = getattr(module, MAKING, None)
        if original is None:
            tell("this torch has no " + MAKING + ", so nothing is metered: torch 2.14 has")
            return

        def first(*arguments: object, **more: object) -> object:
            setattr(module, MAKING, original)
            bring_meter()
            return getattr(module, MAKING)(*arguments, **more)

        setattr(module, MAKING, first)


def bring_meter() -> None:
    """Put the meter in place, or say why not: the program goes on in any case."""
    sys.meta_path.insert(0, PrivatePackage())
    try:
        importlib.import_module(PRIVATE + ".metering.door").enter()
    except Exception as error:
        told = type(error).__name__ + ": " + str(error)
        tell("nothing is metered: " + told + ". The program's Python needs torch 2.14, numpy and psutil")


def tell(text: str) -> None:
    """Say something beside the program's own output."""
    sys.stderr.write("meter: " + text + ".\n")
    sys.stderr.flush()


def run_hidden() -> None:
    """Run the sitecustomize that Python would have found without us."""
    elsewhere = [path for path in sys.path if os.path.abspath(path or ".") != HERE]  # noqa: PTH100
    sys.path[:] = elsewhere
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("SQUEEZEWIRE_METER"):
    sys.meta_path.insert(0, LookOut())
run_hidden()
