"""Which classes a model takes for which, and the pictures of which it was most wrong: from validation.json."""

import math
import re
from dataclasses import dataclass

from pipeline.core.schemas.validation import ConfusionJson, ValidationJson
from pipeline.core.units import MISSING, format_count, format_percent
from pipeline.reporting.tables import Column, Table, make_table

NUM_PAIRS_SHOWN = 20
LONGEST_NAME = 18
"""Characters of a class's name beside the matrix; the table below it has the whole names."""
CELL_UNITS = 24
GAP_UNITS = 8
UNITS_PER_CHARACTER = 6.6
MOST_CELLS_WITH_NUMBERS = 12
LARGEST_JPEG_CHARACTERS = 100_000
BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


@dataclass(frozen=True)
class MatrixCell:
    """A square of the matrix: a class, what was said of it, and how often."""

    x: float
    y: float
    share: float
    """Of the pictures of its class, 0 to 1."""
    is_right: bool
    text: str
    """The number of pictures; empty where there is no room for it."""
    title: str


@dataclass(frozen=True)
class MatrixLabel:
    """A name beside or above the matrix."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class MatrixView:
    """The confusion matrix as it is drawn, in units of the drawing."""

    width: float
    height: float
    left: float
    top: float
    cell: float
    rows: list[MatrixLabel]
    columns: list[MatrixLabel]
    cells: list[MatrixCell]


@dataclass(frozen=True)
class PictureView:
    """A picture, its class and what was said."""

    source: str
    """A data URI."""
    label: str
    predicted: str
    loss: str
    key: str


@dataclass(frozen=True)
class MistakesView:
    """What was wrong at the last validation."""

    sentence: str
    matrix: MatrixView | None
    pairs: Table | None
    pictures: list[PictureView]


def mistakes_view(validation: ValidationJson) -> MistakesView:
    """Return what the page shows of a validation. Of more than 40 classes there is a table and no matrix."""
    num_samples, num_correct = validation["num_samples"], validation["num_correct"]
    wrong = [row for row in validation["confusions"] if row["label"] != row["predicted"]]
    sentence = (
        f"After step {validation['step']:,}, of {num_samples:,} pictures {num_samples - num_correct:,} were taken for"
        " another class."
    )
    has_matrix = validation["is_complete"] and num_samples > 0
    return MistakesView(
        sentence=sentence,
        matrix=_matrix(validation) if has_matrix else None,
        pairs=_pairs_table(validation, wrong[:NUM_PAIRS_SHOWN]) if wrong else None,
        pictures=_pictures(validation),
    )


def class_name(validation: ValidationJson, number: int) -> str:
    """Return the name of a class; its number where it has none."""
    return validation["class_names"].get(str(number)) or f"class {number}"


def _pairs_table(validation: ValidationJson, wrong: list[ConfusionJson]) -> Table:
    columns = (
        Column("label", "class"),
        Column("predicted", "taken for"),
        Column("num_pictures", "pictures", format_count),
        Column("share", "of its class", format_percent),
    )
    rows = [
        {
            "label": class_name(validation, row["label"]),
            "predicted": class_name(validation, row["predicted"]),
            "num_pictures": row["num_pictures"],
            "share": row["num_pictures"] / row["num_of_label"],
        }
        for row in wrong
    ]
    return make_table("", columns, rows)


def _matrix(validation: ValidationJson) -> MatrixView:
    """Rows are the classes, columns what was said, by number: the names stand once, at the rows."""
    num_classes = validation["num_classes"]
    names = [f"{_short(class_name(validation, number))}  {number}" for number in range(num_classes)]
    left = max(map(len, names)) * UNITS_PER_CHARACTER + GAP_UNITS
    top = CELL_UNITS
    cells = [
        MatrixCell(
            x=left + row["predicted"] * CELL_UNITS,
            y=top + row["label"] * CELL_UNITS,
            share=row["num_pictures"] / row["num_of_label"],
            is_right=row["label"] == row["predicted"],
            text=str(row["num_pictures"]) if num_classes <= MOST_CELLS_WITH_NUMBERS else "",
            title=f"{row['num_pictures']} of {row['num_of_label']} pictures of {class_name(validation, row['label'])}:"
            f" {class_name(validation, row['predicted'])}",
        )
        for row in validation["confusions"]
    ]
    middle = CELL_UNITS / 2
    return MatrixView(
        width=math.ceil(left + num_classes * CELL_UNITS + 1),
        height=top + num_classes * CELL_UNITS + 1,
        left=left,
        top=top,
        cell=CELL_UNITS,
        rows=[
            MatrixLabel(left - GAP_UNITS, top + number * CELL_UNITS + middle, name) for number, name in enumerate(names)
        ],
        columns=[
            MatrixLabel(left + number * CELL_UNITS + middle, top - GAP_UNITS, str(number))
            for number in range(num_classes)
        ],
        cells=cells,
    )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _pictures(validation: ValidationJson) -> list[PictureView]:
    """Return what can be shown: the file may have been changed, and nothing of it is loaded from elsewhere."""
    return [
        PictureView(
            source=f"data:image/jpeg;base64,{row['jpeg_base64']}",
            label=class_name(validation, row["label"]),
            predicted=class_name(validation, row["predicted"]),
            loss=MISSING if row["loss"] is None else f"{row['loss']:.2f}",
            key=row["key"],
        )
        for row in validation["worst"]
        if len(row["jpeg_base64"]) <= LARGEST_JPEG_CHARACTERS and BASE64.fullmatch(row["jpeg_base64"])
    ]
