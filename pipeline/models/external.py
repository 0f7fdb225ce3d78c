"""Networks that others wrote: timm's, the rest of torchvision's, and those of a person's own factory.

Named `timm:NAME`, `torchvision:NAME`, `package.module:factory` or `path/to/file.py:factory`. A factory is code, which
runs only where `model.allow_code` says so: a checkpoint, too, may name one. Nothing here imports torch at the top.
"""

import functools
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.config.registry import PublishedAccuracy
from pipeline.core.errors import ConfigError
from pipeline.core.typed import nearest, require

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("timm", "torchvision")
FORMS = "timm:NAME, torchvision:NAME, package.module:factory or path/to/file.py:factory"
INSTALL_TIMM = "pip install 'timm>=1.0.31'"
_NAME = re.compile(r"(?P<place>[^:]+):(?P<what>[A-Za-z_][\w.-]*)", re.ASCII)
_OF_WEIGHTS = re.compile(r"pretrained.*|weights.*|checkpoint_path|cache_dir")
"""Arguments by which a library would fetch weights, or read a file of them."""


def is_external(name: str) -> bool:
    """Return whether a model's name is that of somebody else's."""
    return ":" in name


def parse(name: str) -> tuple[str, str]:
    """Return the place, `timm` or a file, and what is asked of it, of a name such as `timm:resnet10t`.

    Raises:
        ConfigError: It is not of this form.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"{name!r} names no model: write {FORMS}, and what is given to it as model.metaparameters.KEY=VALUE."
        )
    return match["place"], match["what"]


def check(name: str, metaparameters: Iterable[str]) -> None:
    """Refuse what is no name, and arguments that would bring weights along.

    Raises:
        ConfigError: As said.
    """
    place, _ = parse(name)
    for key in metaparameters if place in LIBRARIES else ():
        require(
            not _OF_WEIGHTS.fullmatch(str(key)),
            f"{name} takes no weights from {place} ({key}): give a file with them as init.checkpoint=FILE.",
        )


def build(name: str, num_classes: int, metaparameters: Mapping[str, Any], *, allow_code: bool) -> "nn.Module":
    """Return a freshly initialised network.

    Args:
        name: As `parse` reads it.
        num_classes: Outputs of the classifier.
        metaparameters: Keyword arguments of the model or factory.
        allow_code: Whether a factory may run.

    Raises:
        ConfigError: There is no such model, library, file or factory; a factory that may not run, or raises, or returns
            something else than a network.
    """
    check(name, metaparameters)
    make = _maker(name, allow_code=allow_code)
    with _as_sentence(f"{name}, called with num_classes={num_classes}{_shown(metaparameters)},"):
        made = make(num_classes=num_classes, **metaparameters)
    from torch import nn

    require(
        isinstance(made, nn.Module),
        f"{name} returned {type(made).__name__}, not a torch.nn.Module: a factory returns the network.",
    )
    return made


def source_sha256(name: str, *, allow_code: bool) -> str | None:
    """Return the SHA-256 of the code a factory comes from, as it was when this process read it; None: a library's.

    Raises:
        ConfigError: There is no such factory, or it may not run.
    """
    if not is_external(name) or parse(name)[0] in LIBRARIES:
        return None
    return _factory(name, allow_code)[1]


def published_accuracy(name: str) -> PublishedAccuracy | None:
    """Return what torchvision says of the first weights it has for a model; None: nothing is known.

    Raises:
        ConfigError: torchvision has no such model.
    """
    place, what = parse(name)
    if place != "torchvision":
        return None
    import torchvision

    _maker(name, allow_code=False)
    weights = getattr(torchvision.models.get_model_weights(what), "IMAGENET1K_V1", None)
    told = {} if weights is None else weights.meta["_metrics"].get("ImageNet-1K", {})
    source = f"torchvision {'.'.join(torchvision.__version__.split('.')[:2])}, weights IMAGENET1K_V1"
    return PublishedAccuracy(round(told["acc@1"] / 100, 5), round(told["acc@5"] / 100, 5), source) if told else None


# --- where networks come from ---


def _maker(name: str, *, allow_code: bool) -> "Callable[..., nn.Module]":
    place, what = parse(name)
    if place == "timm":
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ConfigError(f"{name} needs timm, which is not installed here: {INSTALL_TIMM}.") from error
        _require_known(name, what, timm.is_model(what), lambda: timm.list_models())
        return functools.partial(timm.create_model, what, pretrained=False)
    if place == "torchvision":
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        _require_known(name, what, what in known, lambda: known)
        return functools.partial(torchvision.models.get_model, what, weights=None)
    return _factory(name, allow_code)[0]


def _require_known(name: str, what: str, is_known: bool, known: Callable[[], list[str]]) -> None:
    place = name.partition(":")[0]
    require(is_known, f"{place} has no classifier {what!r}." + ("" if is_known else nearest(what, known())))


@functools.cache  # what one process builds several times is the same code, whatever becomes of the file
def _factory(name: str, allow_code: bool) -> tuple[Callable[..., Any], str]:
    """Return the factory, and the SHA-256 of its code."""
    place, what = parse(name)
    require(
        allow_code,
        f"{name} is code that is not squeezewire's, and runs only where you say that it may: add model.allow_code=true"
        " (to compare: allow_code=true).",
    )
    module = _module_of_file(Path(place).expanduser()) if place.endswith(".py") else _module(name, place)
    factory: Any = getattr(module, what, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{place} has no function {what!r}.{nearest(what, public)} It has {', '.join(public)}.")
    return factory, _sha256(module)


def _module(name: str, place: str) -> ModuleType:
    """Import a module that is installed, or that lies in the working directory."""
    parts = place.split(".")
    require(all(part.isidentifier() for part in parts), f"{name!r} names no model: write {FORMS}.")
    with _last_on_path(Path.cwd()):
        require(
            parts[0] in sys.modules or importlib.util.find_spec(parts[0]) is not None,
            f"{name}: there is no module {parts[0]!r}, neither installed nor in {Path.cwd()}: install it, or give the"
            " file as path/to/file.py:factory.",
        )
        with _as_sentence(f"Importing {place}"):
            return importlib.import_module(place)


def _module_of_file(path: Path) -> ModuleType:
    """Run a file as a module of its own; it may import what lies beside it."""
    require(path.is_file(), f"There is no file {path} with a model (looked for from {Path.cwd()}).")
    path = path.resolve()
    digest = hashlib.sha256(bytes(path)).hexdigest()[:12]
    name = f"_model_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{digest}"  # `random.py` stands for nobody's else
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with _last_on_path(path.parent), _as_sentence(f"Running {path}"):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _last_on_path(folder: Path) -> Iterator[None]:
    """Have modules of a folder found after all others, so that none stands in for the standard library's or ours."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _sha256(module: ModuleType) -> str:
    """Hash a module's file with those it has loaded from its own package or from beside it.

    Of an installed package all files: which of them are loaded, others decide too.
    """
    origin = Path(str(module.__file__)).resolve()
    root = _folder_of_top(module.__name__, origin) or origin.parent
    if "site-packages" in root.parts and root != origin.parent:
        files = {*(root / module.__name__.partition(".")[0]).rglob("*.py")}
    else:
        loaded = [(name, Path(file).resolve()) for name, file in _loaded_files() if not name.startswith("pipeline")]
        files = {origin, *(path for name, path in loaded if _folder_of_top(name, path) == root)}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _loaded_files() -> Iterator[tuple[str, str]]:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and file.endswith(".py"):
            yield name, file


def _folder_of_top(name: str, path: Path) -> Path | None:
    """Return the folder that the topmost package, or the module itself, lies in."""
    levels = name.count(".") + (path.name == "__init__.py")
    return path.parents[levels] if levels < len(path.parents) else None


def _shown(metaparameters: Mapping[str, Any]) -> str:
    return "".join(f", {key}={value!r}" for key, value in metaparameters.items())


@contextmanager
def _as_sentence(what: str) -> Iterator[None]:
    """Turn whatever somebody else's code raises into a `ConfigError` that says where."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{what} raised {type(error).__name__}{f' ({said})' if said else ''} at {last.filename}:{last.lineno}."
        ) from error
