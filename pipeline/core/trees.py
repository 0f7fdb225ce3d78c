"""Nested mappings, flattened to dotted keys and made plain."""

from collections.abc import Iterator, Mapping
from typing import Any, cast


def flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested mappings by dotted key: `{"a": {"b": 1}}` gives `{"a.b": 1}`.

    An empty mapping is a leaf.
    """
    leaves: dict[str, object] = {}
    for key, inner in tree.items():
        if isinstance(inner, Mapping) and inner:
            leaves.update(flat(cast(Mapping[str, object], inner), f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = inner
    return leaves


def dotted_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every key of nested mappings, inner nodes included."""
    if isinstance(tree, Mapping):
        for key, inner in cast(Mapping[str, object], tree).items():
            yield f"{prefix}{key}"
            yield from dotted_keys(inner, f"{prefix}{key}.")


def plain(tree: Any) -> Any:
    """Return the tree with lists in place of tuples, as YAML and JSON give it back."""
    if isinstance(tree, Mapping):
        return {key: plain(inner) for key, inner in cast(Mapping[Any, Any], tree).items()}
    return [plain(inner) for inner in cast("list[Any]", tree)] if isinstance(tree, list | tuple) else tree
