"""What a listing is: which folders are splits, which are classes, and what is not read. Worked out once, from names.

    <class>/picture                     classes, of one split
    <split>/<class>/picture             splits, however they are spelled: Train, training, valid, test ...
    <split>/picture                     pictures in no class: a file says their labels, or they are a test set without
    <split>/images/picture              the same
    around/all/of/it/...                folders that hold nothing else do not count

What could be read in two ways is refused, with the key that decides. Folders within a class are part of it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from pipeline.data.prepare.labelling import (
    Asked,
    Picture,
    classes_of,
    labelled,
    line_of_classes,
    lines_of_absent,
    notes_on_labels,
    refuse,
    refuse_split,
)
from pipeline.data.prepare.listing import IMAGE_SUFFIXES, Listed
from pipeline.data.prepare.spellings import SPLIT_ASKED_FOR, split_word
from pipeline.data.prepare.tree import Folder, shown, tree_of, unread

DEFAULT_SPLIT = "train"
NUM_SHOWN = 8


@dataclass(frozen=True)
class Layout:
    """What was worked out."""

    splits: dict[str, list[Picture]]
    classes: tuple[str, ...]
    """Names in index order."""
    tree: tuple[str, ...]
    """Lines that show it, with counts."""
    notes: tuple[str, ...]
    """Sentences on what is not read, and on what people may not expect."""


def work_out(entries: Sequence[Listed], asked: Asked) -> Layout:
    """The layout of a listing.

    Args:
        entries: Everything that is there, no name twice.
        asked: What the user says about it.

    Raises:
        DataError: It holds no pictures with labels, or can be read in two ways.
    """
    root, not_read = tree_of(entries), unread(entries)
    if not root.num_pictures:
        expected = f"holds no images. Expected <class>/<image> with {', '.join(IMAGE_SUFFIXES)}."
        refuse(asked, " ".join((expected, *not_read)))
    top = _unwrapped(root, asked)
    folders = _split_folders(top, asked)
    wanted = _wanted(folders, asked)
    splits: dict[str, list[Picture]] = {}
    tree = [
        f"{folder.shown} {folder.num_pictures:,} pictures, of no split asked for: not read"
        for folder in top.pictured.values()
        if not {top, folder} & set(folders.values())
    ]
    for name, folder in folders.items():
        splits[name] = labelled(folder, asked, is_wanted=name in wanted)
        tree.append(_line(folder, name, splits[name]))
    splits = {name: pictures for name, pictures in splits.items() if pictures}
    if not splits:
        refuse(
            asked, f"holds no picture with a label ({'; '.join(tree)}): move them into <class>/, or add labels=FILE."
        )
    classes = classes_of(splits, asked)
    renamed = [
        f"The folder {folder.name}/ becomes the split {name!r}."
        for name, folder in folders.items()
        if name in splits and folder is not top and folder.name != name
    ]
    return Layout(
        splits={name: splits[name] for name in wanted if name in splits},
        classes=classes,
        tree=(*tree, *lines_of_absent(splits, classes, asked), line_of_classes(classes, asked)),
        notes=(*renamed, *notes_on_labels(splits, classes, asked), *not_read),
    )


def _line(folder: Folder, split: str, pictures: Sequence[Picture]) -> str:
    """One split with the counts of its classes."""
    start = f"{folder.shown} {folder.num_pictures:,} pictures"
    if not pictures:
        return f"{start} without labels: not read"
    counts: dict[str, int] = {}
    for picture in pictures:
        counts[picture.class_name] = counts.get(picture.class_name, 0) + 1
    some = ", ".join(f"{shown(name)} {count:,}" for name, count in sorted(counts.items())[:NUM_SHOWN])
    more = f", ... ({min(counts.values()):,} to {max(counts.values()):,} each)" if len(counts) > NUM_SHOWN else ""
    return f"{start}, split {split}, {len(counts):,} classes: {some}{more}"


def _unwrapped(root: Folder, asked: Asked) -> Folder:
    """Without folders that lie around everything and are neither split nor class."""
    while len(root.pictured) == 1 and root.is_deep and not any(folder.may_be_lost for folder in root.folders.values()):
        ((name, child),) = root.pictured.items()
        is_sure = asked.layout is None or len(child.pictured) > 1
        if split_word(name) or not child.is_deep or not is_sure:
            break
        root = child
    return root


def _split_folders(top: Folder, asked: Asked) -> dict[str, Folder]:
    """The folder of each split by the split's name; `top` itself where there are no splits."""
    if not _has_splits(top, asked):
        return {asked.split or DEFAULT_SPLIT: top}
    if top.pictures:
        refuse(
            asked, f"holds splits, and the image {shown(top.pictures[0].name)} lies in no class folder. Move it away."
        )
    words = {name: split_word(name) for name in top.folders}
    if asked.layout == "splits":
        words = {name: word or (name if name in top.pictured else None) for name, word in words.items()}
    found: dict[str, Folder] = {}
    for name, word in words.items():
        if word is None:
            continue
        if not re.fullmatch("[A-Za-z0-9_]+", word):
            refuse(asked, f"has the folder {name!r}, and splits name files: use letters, digits and underscores.")
        split = "val" if word == "test" and "val" not in words.values() else word
        if split in found:
            both = f"{found[split].shown} and {top.folders[name].shown}"
            refuse(asked, f"holds {both}, both the split {split!r} by their names. Join them, or move one away.")
        found[split] = top.folders[name]
    return dict(sorted(found.items()))


def _has_splits(top: Folder, asked: Asked) -> bool:
    """Whether the folders right in `top` are splits rather than classes."""
    if asked.layout is not None:
        return asked.layout == "splits"
    spelled = [name for name in top.pictured if split_word(name)]
    others = [name for name in top.pictured if name not in spelled]
    deep = [name for name in spelled if top.folders[name].is_deep]
    if not spelled:
        return False
    is_asked_for = asked.split is not None and _is_among(asked.split, spelled)
    are_splits = (not others or is_asked_for) if deep else bool(not others and asked.labels)
    # Without class folders within, train is the name of a class among others.
    are_classes = not deep and others and not any(name.casefold() in ("val", "test") for name in spelled)
    if not are_splits and not are_classes:
        _refuse_both(asked, others, deep or spelled, has_deep=bool(deep))
    return are_splits


def _refuse_both(asked: Asked, others: Sequence[str], spelled: Sequence[str], *, has_deep: bool) -> NoReturn:
    """Refuse folders of which some are called like splits."""
    first = spelled[0]
    beside = repr(min(others)) if others else "no folder that holds class folders"
    alone = f", split={split_word(first)} reads that one alone" if has_deep else ""
    refuse(
        asked,
        f"holds {first}/ beside {beside}: are these splits or classes? layout=classes takes every folder for a class,"
        f" layout=splits for a split{alone}; or move the rest away.",
    )


def _is_among(split: str, folders: Iterable[str]) -> bool:
    """Whether `split=` means one of these folders."""
    words = {split_word(split), SPLIT_ASKED_FOR[split]} if split in SPLIT_ASKED_FOR else set()
    return any(name == split or split_word(name) in words for name in folders)


def _wanted(folders: Mapping[str, Folder], asked: Asked) -> tuple[str, ...]:
    """The splits asked for: by their names, by their folders' names, or as people say it."""
    if asked.split is None:
        return tuple(folders)
    by_folder = {folder.name: split for split, folder in folders.items()}
    meant = (asked.split, by_folder.get(asked.split, ""), SPLIT_ASKED_FOR.get(asked.split, ""))
    found = [name for name in meant if name in folders]
    if not found:
        refuse_split(asked.where, asked.split, folders)
    return (found[0],)
