"""Hydra's groups: what a command's configuration is made of, and the choices there are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pipeline.core.errors import ConfigError
from pipeline.core.typed import nearest

CONF_DIRECTORY = Path(__file__).resolve().parents[1] / "conf"
"""In a checkout a link to conf/ at its top; an installed package holds the files."""


def config_groups() -> dict[str, tuple[str, ...]]:
    """Return Hydra's groups (directories of conf/) and the choices in each: files, and what was registered."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    groups: dict[str, tuple[str, ...]] = {}
    for directory in sorted(path for path in CONF_DIRECTORY.iterdir() if path.is_dir()):
        registered = store.list(directory.name) if directory.name in store.repo else ()
        files = {*registered, *(path.name for path in directory.glob("*.yaml"))}
        groups[directory.name] = tuple(sorted(name.removesuffix(".yaml") for name in files))
    return groups


def check_choice(group: str, choice: str, groups: Mapping[str, tuple[str, ...]]) -> None:
    """Raise `ConfigError` for a choice that a group does not have."""
    known = groups[group]
    if choice not in known:
        raise ConfigError(f"{group}={choice!r} does not exist.{nearest(choice, known)} Known: {', '.join(known)}.")


def defaults(command: str, choices: Sequence[str] = ()) -> dict[str, Any]:
    """Return the configuration without overrides but choices of groups, missing values included as `???`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF_DIRECTORY), version_base="1.3"):
        container = OmegaConf.to_container(hydra_compose(command, list(choices)), resolve=False)
    assert isinstance(container, dict)
    return cast(dict[str, Any], container)
