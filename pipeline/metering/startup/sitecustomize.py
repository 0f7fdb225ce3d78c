"""Python runs this before a metered program, whose PYTHONPATH names its folder (`pipeline.metering.door`).

Nothing happens here but a look-out for torch.distributed: not before the program makes a process group is the meter
imported. A `sitecustomize` of the machine's own, which this one hides, runs as it would have.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
PACKAGE = os.path.dirname(os.path.dirname(HERE))  # noqa: PTH120
WATCHED = "torch.distributed.distributed_c10d"
MAKING = "_new_process_group_helper"


class OwnPackage(importlib.abc.MetaPathFinder):
    """Finds our package where no other of its name is found: the program's search path stays as it is."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return where our package is; None for any other name."""
        if fullname != "pipeline":
            return None
        beginning = os.path.join(PACKAGE, "__init__.py")  # noqa: PTH118
        return importlib.util.spec_from_file_location(fullname, beginning, submodule_search_locations=[PACKAGE])


class LookOut(importlib.abc.MetaPathFinder):
    """Waits for the module in which process groups are made."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
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
            tell(f"this torch has no {MAKING}, so nothing is metered: torch 2.14 has")
            return

        def first(*arguments: object, **more: object) -> object:
            setattr(module, MAKING, original)
            bring_meter()
            return getattr(module, MAKING)(*arguments, **more)

        setattr(module, MAKING, first)


def bring_meter() -> None:
    """Put the meter in place, or say why not: the program goes on in any case."""
    sys.meta_path.append(OwnPackage())
    try:
        from pipeline.metering.door import enter
    except Exception as error:
        tell(
            f"nothing is metered: {type(error).__name__}: {error}. The program's Python needs torch 2.14, numpy and"
            " psutil, and no module of its own that is called pipeline"
        )
        return
    enter()


def tell(text: str) -> None:
    """Say something beside the program's own output."""
    print(f"meter: {text}.", file=sys.stderr, flush=True)


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
