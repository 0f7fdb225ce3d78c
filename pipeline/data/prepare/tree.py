"""A listing as folders within folders: what is in each, and what is read nowhere."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline.core.errors import DataError
from pipeline.data.prepare.listing import NAME_OUT, NO_PICTURES, SHARDS, Listed, suffix

NUM_EXAMPLES = 3


@dataclass(eq=False)
class Folder:
    """A folder of the listing."""

    path: str
    """Its name below the root; empty for the root."""
    folders: dict[str, "Folder"] = field(default_factory=dict)
    pictures: list[Listed] = field(default_factory=list)
    """Those right in it."""
    others: list[Listed] = field(default_factory=list)
    """Files in it, at any depth, that are not read."""
    num_pictures: int = 0
    """At any depth."""
    has_shards: bool = False
    """Shards lie in it, at any depth."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.path).name

    @property
    def shown(self) -> str:
        """Its path for a line of text."""
        return shown(self.path or ".") + "/"

    @property
    def pictured(self) -> dict[str, "Folder"]:
        """The folders right in it that hold pictures, at any depth."""
        return {name: folder for name, folder in self.folders.items() if folder.num_pictures}

    @property
    def is_deep(self) -> bool:
        """Whether it holds pictures, all of them in folders of its own."""
        return bool(self.num_pictures) and not self.pictures

    @property
    def may_be_lost(self) -> bool:
        """Whether it may be meant to hold pictures, and holds none that is read."""
        is_text = bool(self.others) and all(suffix(other.name) in NO_PICTURES for other in self.others)
        return not self.num_pictures and not is_text and not self.has_shards

    def inside(self) -> Iterator[Listed]:
        """Every picture in it, at any depth."""
        for folder in self.below():
            yield from folder.pictures

    def below(self) -> Iterator["Folder"]:
        """It, and every folder in it."""
        waiting: list[Folder] = [self]
        while waiting:
            folder = waiting.pop()
            yield folder
            waiting.extend(reversed(folder.folders.values()))


def tree_of(entries: Iterable[Listed]) -> Folder:
    """The root of what is listed.

    Raises:
        DataError: The name of a picture is not UTF-8.
    """
    root = Folder("")
    for listed in entries:
        is_file = not listed.is_folder and not listed.left_out
        if listed.left_out == NAME_OUT:
            continue
        path = [root]
        for name in listed.name.split("/")[: None if listed.is_folder else -1]:
            above = path[-1]
            if name and name not in above.folders:
                above.folders[name] = Folder(f"{above.path}/{name}".lstrip("/"))
            path.append(above.folders[name] if name else above)
        if listed.is_picture:
            _check_name(listed.name)
            path[-1].pictures.append(listed)
        for folder in path:
            folder.num_pictures += listed.is_picture
            folder.has_shards |= listed.left_out == SHARDS
            if is_file and not listed.is_picture:
                folder.others.append(listed)
    return root


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"The name {name!r} is not UTF-8, and shards and labels must name it: rename it (convmv does), or move it"
            " out of the source."
        ) from None


def unread(entries: Iterable[Listed]) -> list[str]:
    """One sentence on everything that is no picture: how many of each sort, and the first of them. Or none."""
    sorts: dict[str, list[str]] = {}
    for listed in entries:
        if listed.left_out or (listed.problem and not listed.is_picture):
            sorts.setdefault(listed.left_out or listed.problem, []).append(listed.name)
        elif listed.is_folder and listed.is_empty:
            sorts.setdefault("empty", []).append(f"{listed.name}/")
        elif not listed.is_folder and not listed.is_picture:
            sorts.setdefault(suffix(listed.name) or "without a suffix", []).append(listed.name)
    total = sum(len(names) for names in sorts.values())
    said = (f"{len(names):,} {sort} ({some(names)})" for sort, names in sorts.items())
    return [f"Not read: {total:,} files or folders: {', '.join(said)}."] if sorts else []


def some(names: Sequence[str], most: int = NUM_EXAMPLES) -> str:
    """The first of the names."""
    return ", ".join(map(shown, names[:most])) + (", ..." if len(names) > most else "")


def shown(name: str) -> str:
    """A name for a line of text."""
    return name if name.isprintable() else repr(name)
