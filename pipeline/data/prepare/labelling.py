"""The class of every picture of a split: its folder, or what a file says of it; and the classes of all splits."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NoReturn

from pipeline.core.errors import DataError
from pipeline.data.prepare.listing import Listed, suffix
from pipeline.data.prepare.spellings import is_no_class, spelling, split_word
from pipeline.data.prepare.tree import Folder, shown, some

NUM_SHOWN = 8
_CLASSES_REMEDY = "Mend the names, or list all classes in a text file and add classes=FILE."


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and its class."""

    name: str
    """Below the folder of its split."""
    class_name: str
    listed: Listed


@dataclass(frozen=True)
class Asked:
    """What the user says about a source."""

    where: str
    """The source, as messages name it."""
    split: str | None = None
    """The split wanted; None: all."""
    classes: tuple[str, ...] | None = None
    """Names in index order; None: those of the folders, sorted."""
    layout: str | None = None
    """`classes` or `splits`: what the outermost folders are; None: recognised."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Class by file name without suffix, for pictures that lie in no class folder."""
    labels_from: str = "no file"
    """Where `labels` stand, for messages."""


def refuse(asked: Asked, what: str) -> NoReturn:
    """Raise the DataError about a source of which `what` is a clause and the remedy."""
    raise DataError(f"{asked.where} {what}")


def refuse_split(where: str, split: str, there: Iterable[str]) -> NoReturn:
    """Raise the DataError for a split that is not there."""
    raise DataError(f"split={split} is not in {where}; it has {', '.join(sorted(there))}. Choose one of them.")


def labelled(folder: Folder, asked: Asked, *, is_wanted: bool) -> list[Picture]:
    """The pictures of a split with their classes.

    Args:
        folder: The split's.
        asked: What the user says about the source.
        is_wanted: Whether the split is to be written. One that is not needs no labels.

    Returns:
        All of them; none if they have no labels and need none, as test sets do.

    Raises:
        DataError: What is a class and what is not can be read in two ways, or labels are missing.
    """
    if not folder.num_pictures:
        if is_wanted:
            there = f" but {some([other.name for other in folder.others])}" if folder.others else ""
            refuse(asked, f"has the split {folder.shown}, which holds no picture{there}. Put some there, or remove it.")
        return []
    inner = _inner(folder)
    if (flat := _flat(inner, asked)) is not None:
        return _labelled_by_file(folder, flat, asked, is_wanted=is_wanted)
    if inner.pictures:
        first = shown(inner.pictures[0].name)
        refuse(asked, f"holds class folders, and the image {first} lies in no class folder. Move it into <class>/.")
    _check_lost(inner, asked)
    _check_nested(inner, asked, is_split=bool(split_word(folder.name)) or asked.layout == "splits")
    start = len(inner.path) + 1 if inner.path else 0
    return [
        # A class's name once, not once per picture.
        Picture(listed.name[start:], sys.intern(name), listed)
        for name, of_class in inner.pictured.items()
        for listed in of_class.inside()
    ]


def _inner(folder: Folder) -> Folder:
    """Without a folder that lies around all classes: train/train/..., train/images/..."""
    while len(folder.pictured) == 1 and not folder.pictures:
        ((name, child),) = folder.pictured.items()
        word = split_word(name)
        is_around = is_no_class(name) or (word is not None and word == split_word(folder.name))
        if not child.is_deep or not is_around:
            break
        folder = child
    return folder


def _flat(folder: Folder, asked: Asked) -> Folder | None:
    """The folder whose pictures are those of the split and lie in no class folder; None: there are class folders."""
    if folder.pictures and not folder.pictured and not any(lost.may_be_lost for lost in folder.folders.values()):
        return folder
    if folder.pictures or len(folder.pictured) != 1:
        return None
    ((name, child),) = folder.pictured.items()
    is_flat = is_no_class(name) and not child.pictured and name not in (asked.classes or ())
    return child if is_flat else None


def _labelled_by_file(folder: Folder, flat: Folder, asked: Asked, *, is_wanted: bool) -> list[Picture]:
    names = [PurePosixPath(listed.name) for listed in flat.pictures]
    classes = [asked.labels.get(name.name) or asked.labels.get(name.stem) for name in names]
    missing = [str(name) for name, class_name in zip(names, classes, strict=True) if class_name is None]
    is_test = split_word(folder.name) == "test" and asked.split is None
    if len(missing) == len(names) and (is_test or not is_wanted):
        return []
    if missing:
        others = "" if asked.split or not folder.path else ", or read another split alone with split="
        refuse(
            asked,
            f"has {len(names):,} pictures in {flat.shown}, and of {len(missing):,} of them {asked.labels_from} says the"
            f" class: the image {shown(missing[0])} lies in no class folder. Move them into <class>/, or give the file"
            f" that says their classes as labels=FILE (of ILSVRC2012: LOC_val_solution.csv){others}.",
        )
    start = len(folder.path) + 1 if folder.path else 0
    return [
        Picture(listed.name[start:], sys.intern(class_name), listed)
        for listed, class_name in zip(flat.pictures, classes, strict=True)
        if class_name is not None
    ]


def _check_lost(folder: Folder, asked: Asked) -> None:
    """Refuse a folder beside class folders that may be a class and would be none."""
    for name, child in folder.folders.items():
        if not child.may_be_lost or asked.classes is not None:
            continue
        remedy = "remove it, or name the classes that count with classes=FILE"
        if not child.others:
            raise DataError(f"The folder {shown(child.path)} is empty ({asked.where}). Put images there, {remedy}.")
        sorts = ", ".join(
            f"{n:,} {sort}"
            for sort, n in Counter(suffix(o.name) or "file without suffix" for o in child.others).items()
        )
        refuse(asked, f"has the folder {shown(name)!r} with {sorts}, which are not read. Convert them, {remedy}.")


def _check_nested(folder: Folder, asked: Asked, *, is_split: bool) -> None:
    """Refuse class folders that are none by their names, or in which the classes may lie."""
    for name, child in folder.pictured.items():
        if is_no_class(name) and name not in (asked.classes or ()):
            refuse(
                asked,
                f"has the folder {child.shown} among its classes, by its name a folder of pictures of any class. Move"
                " its pictures into class folders, or name it in a file of class names given as classes=FILE.",
            )
    if asked.layout is not None:
        return
    layout = "splits" if is_split else "classes"
    for name, child in folder.pictured.items():
        splits = [sub for sub in child.pictured if split_word(sub)]
        if splits or (child.is_deep and split_word(name)):
            within = child.folders[splits[0]].shown if splits else child.shown
            refuse(
                asked,
                f"has {within} within what may be a class: are there splits within classes? layout={layout} takes all"
                f" of {child.shown} for one class; or give the folder that holds the splits as source=.",
            )
    inner = Counter(sub for child in folder.pictured.values() for sub in child.pictured)
    common = [sub for sub, count in inner.items() if count > 1]
    are_deep = all(child.is_deep for child in folder.pictured.values())
    if are_deep and ((len(folder.pictured) == 1 and len(inner) > 1) or (not is_split and len(common) > 1)):
        first, *_ = folder.pictured.values()
        refuse(
            asked,
            f"may have its classes in {folder.shown} ({some(list(folder.pictured))}) or below ({some(list(inner))})."
            f" layout={layout} takes {first.shown} for {'one' if is_split else 'a'} class"
            + ("; else move what lies in it up." if is_split else ", layout=splits for a split."),
        )


# All splits together


def classes_of(splits: Mapping[str, Sequence[Picture]], asked: Asked) -> tuple[str, ...]:
    """The classes in index order.

    Raises:
        DataError: One name is spelled in two ways, a class is in no training split, or is not among `asked.classes`.
    """
    of_split = {name: {picture.class_name for picture in pictures} for name, pictures in splits.items()}
    found = set().union(*of_split.values())
    if asked.classes is None:
        by_spelling: dict[str, str] = {}
        for name in sorted(found):
            if (other := by_spelling.setdefault(spelling(name), name)) != name:
                both = f"the classes {other!a} and {name!a}"
                refuse(asked, f"has {both}, two spellings of one name. {_CLASSES_REMEDY}")
        for split, names in of_split.items():
            if unknown := sorted(names - of_split.get("train", names)):
                refuse(
                    asked,
                    f"has {len(unknown)} classes in {split} that are not in train (first: {shown(unknown[0])!r}), so"
                    f" that nothing would learn them. {_CLASSES_REMEDY}",
                )
    return check_classes(asked.where, found, asked.classes)


def check_classes(where: str, found: set[str], classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes in index order: those given, which must cover what was found, or what was found, sorted."""
    if classes is None:
        return tuple(sorted(found))
    if unknown := sorted(found - set(classes)):
        alike = [name for name in classes if spelling(name) == spelling(unknown[0])]
        hint = f" {alike[0]!a} is another spelling: rename one of them." if alike else ""
        raise DataError(
            f"{where} holds {len(unknown)} classes that are not among the {len(classes)} known ones "
            f"(first: {unknown[0]!r}).{hint} Add them to the file given as classes=, or leave them out of the source."
        )
    return classes


def lines_of_absent(splits: Mapping[str, Sequence[Picture]], classes: tuple[str, ...], asked: Asked) -> list[str]:
    """Lines on classes without a picture: known ones in any split, those of the training split in another."""
    of_split = {name: {picture.class_name for picture in pictures} for name, pictures in splits.items()}
    found = set().union(*of_split.values())
    absent = {name: sorted(of_split.get("train", names) - names) for name, names in of_split.items()}
    unseen = [name for name in classes if name not in found] if asked.classes else []
    lines = [f"{len(unseen):,} known classes without a picture: {some(unseen)}"] if unseen else []
    return lines + [
        f"{len(names):,} classes of train without a picture in {split}: {some(names)}"
        for split, names in absent.items()
        if names
    ]


def line_of_classes(classes: tuple[str, ...], asked: Asked) -> str:
    """Which label is which class."""
    some = ", ".join(f"{label} {shown(name)}" for label, name in enumerate(classes[:NUM_SHOWN]))
    rest = f", ... {len(classes) - 1} {shown(classes[-1])}" if len(classes) > NUM_SHOWN else ""
    order = "in the order given" if asked.classes else "in the order of their names as text"
    return f"labels, {order}: {some}{rest}"


def notes_on_labels(splits: Mapping[str, Sequence[Picture]], classes: tuple[str, ...], asked: Asked) -> list[str]:
    """Sentences on what is as it must be and perhaps not as people think."""
    notes = []
    if asked.classes is None and list(classes) != (counted := sorted(classes, key=_as_counted)):
        at = next(label for label, (one, other) in enumerate(zip(classes, counted, strict=True)) if one != other)
        notes.append(
            f"Numbers in names do not count: label {at} is {classes[at]!r} and not {counted[at]!r}. For another order"
            " list the names in a text file and add classes=FILE."
        )
    return notes + _under_two_names(splits) + _unused_labels(splits, asked)


def _as_counted(name: str) -> list[tuple[int, int | str]]:
    """Sorts as people count: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if part.isdecimal() and part.isascii() else (1, part) for part in parts if part]


def _under_two_names(splits: Mapping[str, Sequence[Picture]]) -> list[str]:
    """A sentence on pictures that links show a second time."""
    seen: dict[tuple[int, int], tuple[str, Picture]] = {}
    twice: Counter[str] = Counter()
    first = ""
    for split, pictures in splits.items():
        for picture in pictures:
            if picture.listed.identity is None:
                continue
            other_split, other = seen.setdefault(picture.listed.identity, (split, picture))
            if other is not picture:
                is_elsewhere = other_split != split
                is_other = other.class_name != picture.class_name
                twice["in two splits" if is_elsewhere else "in two classes" if is_other else "in one class"] += 1
                first = first or f"{shown(picture.listed.name)} is {shown(other.listed.name)}"
    if not twice:
        return []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(twice.items()))
    return [f"{sum(twice.values()):,} pictures are used under two names by links: {kinds} (first: {first})."]


def _unused_labels(splits: Mapping[str, Sequence[Picture]], asked: Asked) -> list[str]:
    """A sentence on labels without a picture; refuses labels that are those of two."""
    used: Counter[str] = Counter()
    for pictures in splits.values():
        for picture in pictures:
            path = PurePosixPath(picture.name)
            if not picture.name.startswith(f"{picture.class_name}/"):
                used[path.name if path.name in asked.labels else path.stem] += 1
    if name := next((name for name, count in used.items() if count > 1), None):
        refuse(
            asked,
            f"has two pictures named {name!r} to which {asked.labels_from} gives one label. Read one split alone with"
            " split=, or rename them.",
        )
    if not used and asked.labels_from.startswith("labels="):
        refuse(asked, f"has a class folder for every picture, and {asked.labels_from} would not be read: leave it out.")
    unused = [name for name in asked.labels if name not in used]
    return (
        [f"{asked.labels_from} has {len(unused):,} labels of no picture ({some(unused)})."] if used and unused else []
    )
