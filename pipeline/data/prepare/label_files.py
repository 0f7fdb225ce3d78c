"""Files that say the classes of pictures which lie in no class folder: Kaggle's, tiny-imagenet's, and their like.

ILSVRC2012_val_00000001,n01751748 111 108 431 202      LOC_val_solution.csv
val_0.JPEG<tab>n03444034<tab>0<tab>32<tab>44<tab>62    val_annotations.txt
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pipeline.core.errors import DataError
from pipeline.core.files import open_regular
from pipeline.data.prepare.labelling import Asked
from pipeline.data.prepare.listing import Listed, is_image_name
from pipeline.data.prepare.tree import some

KNOWN_NAMES = ("LOC_val_solution.csv", "val_annotations.txt")
"""Looked for among the pictures, and in the folders above them."""
NUM_FOLDERS_ABOVE = 3
"""From CLS-LOC up to where Kaggle's archive has its tables."""
MAX_BYTES = 256 * 1024**2
_HEADER = re.compile(r"(image|img|file|picture)?[ _]?(id|name|path|file|image)s?", re.IGNORECASE)
_WNID_FIRST = re.compile(r"n[0-9]{8}(?= )")


def labels_beside(asked: Asked, entries: Sequence[Listed], root: Path | None) -> Asked:
    """`asked` with the labels of the files of known names, unless it has labels.

    Args:
        asked: What the user says about the source.
        entries: Everything in the source.
        root: Its directory; None: it is an archive.

    Raises:
        DataError: Such a file cannot be read, or two of them contradict one another.
    """
    if asked.labels:
        return asked
    places = [e for e in entries if PurePosixPath(e.name).name in KNOWN_NAMES and not e.left_out and not e.problem]
    if root is not None:
        above = [folder / KNOWN_NAMES[0] for folder in root.resolve().parents[:NUM_FOLDERS_ABOVE]]
        places += [Listed(str(p), str(p), 0, p.stat().st_size) for p in above if not places and p.is_file()]
    labels: dict[str, str] = {}
    for place in places:
        with open_regular(Path(place.path)) as file:
            file.seek(place.offset)
            found = parse_labels(file.read(min(place.num_bytes, MAX_BYTES)), place.name)
        if differing := [name for name in found if labels.get(name, found[name]) != found[name]]:
            raise DataError(
                f"{some([place.name for place in places])} give different classes to {some(differing)}: say with"
                " labels= which of these files counts."
            )
        labels |= found
    return replace(asked, labels=labels, labels_from=some([place.name for place in places]) or asked.labels_from)


def read_labels(path: Path) -> dict[str, str]:
    """Class by the name of a picture without suffix, from the file given as labels=.

    Raises:
        DataError: It cannot be read, or says nothing.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES)
    except OSError as error:
        raise DataError(f"labels={path} cannot be read: {error.strerror or error}. Give a text file.") from error
    return parse_labels(content, f"labels={path}")


def parse_labels(content: bytes, where: str) -> dict[str, str]:
    """Class by name without suffix: of each line the first two words, parted by commas, tabs or blanks.

    A first line that names columns does not count.

    Raises:
        DataError: it is no text, a line has one word only, or a picture has two classes.
    """
    labels: dict[str, str] = {}
    for number, words in _lines(content, where):
        name = PurePosixPath(words[0]).name
        name = PurePosixPath(name).stem if is_image_name(name) else name
        if len(words) < 2 or not words[1]:
            raise DataError(
                f"{where}: line {number} is {words[0]!r} alone. Each line must name a picture and its class."
            )
        if labels.setdefault(name, words[1]) != words[1]:
            raise DataError(
                f"{where}: line {number} gives {name!r} the class {words[1]!r}, and one before gave"
                f" {labels[name]!r}. A picture has one class: mend that file."
            )
    if not labels:
        raise DataError(f"{where} holds no labels. Each line must name a picture and its class.")
    return labels


def _lines(content: bytes, where: str) -> Iterator[tuple[int, list[str]]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not text in UTF-8: {error}. Give the file that names pictures and classes."
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        # Names may hold blanks, where something else parts words.
        words = [word.strip() for word in (re.split(r"[,;\t]", line) if re.search(r"[,;\t]", line) else line.split())]
        if len(words) > 1 and (wnid := _WNID_FIRST.match(words[1])):
            words[1] = wnid[0]  # boxes follow
        if any(words) and not (number == 1 and _HEADER.fullmatch(words[0])):
            yield number, words
