"""Pictures held out for validation: a share of each class, no bytes on both sides, the same ones each time."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.prepare import PrepareConfig
from pipeline.core.errors import ConfigError, DataError
from pipeline.data.prepare.holdout import hold_out
from pipeline.data.prepare.sources import PictureSource, SourceImage
from pipeline.data.prepare.write import prepare_shards
from pipeline.data.shards.manifest import Manifest
from tests.making.pictures import pictures, stored_samples, write_files


def source_of(contents: dict[str, bytes]) -> PictureSource:
    """Of pictures `<class>/<name>` with these bytes, whose reader counts what it reads."""
    images = [SourceImage(name, name.partition("/")[0], name, 0, len(content)) for name, content in contents.items()]
    classes = tuple(sorted({image.class_name for image in images}))
    return PictureSource("folders", classes, {"train": images}, lambda image: contents[image.name])


def names(source: PictureSource) -> dict[str, list[str]]:
    return {split: [image.name for image in images] for split, images in source.splits.items()}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32),
)
def test_every_class_is_on_both_sides_and_no_bytes_are(
    drawn: list[tuple[str, int]], fraction: float, seed: int
) -> None:
    """Drawn: class and content, of which equal ones are copies. Two of its own each class has in any case."""
    contents = {f"{name}/{number}": str(value).encode() for number, (name, value) in enumerate(drawn)}
    contents |= {f"{name}/own{number}": f"{name}{number}".encode() for name in "abc" for number in (0, 1)}
    source = source_of(contents)
    split = hold_out(source, fraction, seed)
    sides = names(split)
    assert sorted(sides["train"] + sides["val"]) == sorted(contents)
    held = {name: {contents[one] for one in of_side} for name, of_side in sides.items()}
    assert not held["train"] & held["val"]
    total = Counter(name[0] for name in contents)
    for of_side in sides.values():
        assert {name[0] for name in of_side} == set(total)
    turned = PictureSource(source.kind, source.classes, {"train": [*source.splits["train"]][::-1]}, source.read)
    assert {name: set(of_side) for name, of_side in names(hold_out(turned, fraction, seed)).items()} == {
        name: set(of_side) for name, of_side in sides.items()
    }


def test_shares_are_of_each_class_and_only_pictures_of_one_size_are_read() -> None:
    contents = {f"{name}/{number}": b"x" * (1000 * place + number) for place, name in enumerate("ab", 1)
                for number in range(30 * place)}  # fmt: skip
    read: list[str] = []
    source = source_of(contents)
    counting = PictureSource(source.kind, source.classes, source.splits, lambda image: read.append(image.name) or b"")
    split = names(hold_out(counting, 0.1, 0))
    assert Counter(name[0] for name in split["val"]) == {"a": 3, "b": 6} and not read
    assert names(hold_out(source, 0.1, 1)) != split


def test_what_cannot_be_held_out_is_refused() -> None:
    alone = source_of({"a/1": b"1", "a/2": b"22", "b/1": b"x", "b/2": b"x"})
    with pytest.raises(DataError, match=r"leaves 1 of 2 classes without pictures on one side \(b\)"):
        hold_out(alone, 0.5, 0)
    both = PictureSource("folders", ("a",), {"train": alone.splits["train"], "val": ()}, alone.read)
    with pytest.raises(DataError, match=r"this one has train, val: leave val_fraction= out"):
        hold_out(both, 0.5, 0)
    for fraction, split in ((1.0, None), (0.1, "train")):
        with pytest.raises(ConfigError, match=r"val_fraction="):
            PrepareConfig(source="x", out="y", val_fraction=fraction, split=split)


def test_one_folder_becomes_two_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And another share, into the same folder, is another set."""
    files = pictures({"cat": 8, "dog": 6})
    files["dog/copy.jpg"] = files["dog/0000.jpg"]
    source = write_files(tmp_path / "animals", files)

    def prepare(fraction: float) -> None:
        prepare_shards(
            PrepareConfig(source=str(source), out=str(tmp_path / "out"), num_workers=1, val_fraction=fraction)
        )

    prepare(0.25)
    said = capsys.readouterr().out
    assert "pictures are held out as the split 'val'. 1 have the bytes of another one" in said
    manifest = Manifest.load(tmp_path / "out")
    assert {name: split.num_samples for name, split in manifest.splits.items()} in (
        {"train": 11, "val": 4},
        {"train": 10, "val": 5},
    )
    samples = {split: {sample.jpeg for sample in stored_samples(tmp_path / "out", split)} for split in manifest.splits}
    assert not samples["train"] & samples["val"]
    prepare(0.25)
    assert capsys.readouterr().out.startswith("Finished already: train, val")
    with pytest.raises(DataError, match=r"made otherwise: .*val_fraction"):
        prepare(0.5)
