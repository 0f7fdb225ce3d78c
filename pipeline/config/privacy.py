"""What a run says of where it was made, in what people hand on: its report, its copy on W&B, its checkpoints."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pipeline.config.training import TrainConfig
from pipeline.core.trees import plain

_WHOLE = re.compile(r"([\w.+]*=)?(['\"]?)~?/.*?([^/]*)", re.DOTALL)
"""A path, or an argument whose value is one: blanks and commas belong to it."""
_FOLDERS = re.compile(r"(?<![\w.~])~?/(?:[^/\s'\",]+/)+")


def without_places(tree: Any) -> Any:
    """Return plain values with `.../name` for each path that begins at the root or at home, in whatever text."""
    if isinstance(tree, Mapping):
        return {key: without_places(inner) for key, inner in cast(Mapping[Any, Any], tree).items()}
    if isinstance(tree, list | tuple):
        return [without_places(inner) for inner in cast(list[Any], tree)]
    if not isinstance(tree, str):
        return tree
    home = str(Path.home())
    text = tree if home == "/" else re.sub(rf"{re.escape(home)}(?![\w.-])", "~", tree)
    if whole := _WHOLE.fullmatch(text):
        return f"{whole[1] or ''}{whole[2]}.../{whole[3]}"
    return _FOLDERS.sub(".../", text)


def published(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration in plain values, as `privacy` lets it be kept in files that are handed on."""
    values = plain(dataclasses.asdict(config))
    return without_places(values) if config.is_private else values


def published_environment(config: TrainConfig, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return environment.json as `privacy` lets it be: servers by number in place of the names of hosts."""
    if not config.is_private:
        return dict(environment)
    hosts: Sequence[str] = environment["hosts"]
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    ranks = {**environment["ranks"], "master_addr": None}
    named = {**environment, "hosts": [f"server {numbers[host]}" for host in hosts], "ranks": ranks}
    return without_places(named)
