"""Which folders are splits, which are classes: every layout that people have is read right, or refused with a key."""

import os
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import DataError
from pipeline.data.prepare.builtin import BuiltinPictures
from pipeline.data.prepare.opening import open_source
from pipeline.data.prepare.sources import PictureSource
from tests.making.pictures import tar_of, write_files

BUILTIN = BuiltinPictures(seed=0, num_classes=10)
Labels = dict[str, dict[str, str]]
"""Class by picture, by split."""


def opened(source: Path, **asked: Any) -> PictureSource:
    given = {"kind": None, "split": None, "classes": None, "devkit": None} | asked
    return open_source(str(source), builtin=BUILTIN, **given)


def labels(source: PictureSource) -> Labels:
    return {
        split: {image.name.rpartition("/")[2]: image.class_name for image in images}
        for split, images in source.splits.items()
    }


def made(root: Path, *names: str) -> Path:
    """Files of these names, all different. A name that ends with a slash is a folder."""
    for name in names:
        (root / name if name.endswith("/") else (root / name).parent).mkdir(parents=True, exist_ok=True)
    return write_files(root, {name: os.fsencode(name) for name in names if not name.endswith("/")})


def refusal(source: Path, **asked: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(source, **asked)
    return str(caught.value)


def of_classes(prefix: str, *classes: str, per_class: int = 2) -> list[str]:
    """Pictures whose names tell their split and class."""
    mark = prefix.strip("/").replace("/", "-")
    return [f"{prefix}{name}/{mark}-{name}-{n}.jpg" for name in classes for n in range(per_class)]


TRAIN, VAL = of_classes("train/", "ant", "bee"), of_classes("val/", "ant", "bee")
EXPECTED: Labels = {
    split: {f"{split}-{name}-{n}.jpg": name for name in ("ant", "bee") for n in range(2)} for split in ("train", "val")
}


# Splits by any name


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Test"),
        ("training", "validation"),
        ("TRAIN", "VAL"),
        ("train", "dev"),
        ("train", "eval"),
        ("training_set", "test_set"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("trainset", "valid"),
    ],
)
def test_a_split_is_known_however_it_is_spelled(tmp_path: Path, train: str, val: str) -> None:
    source = opened(made(tmp_path, *of_classes(f"{train}/", "ant", "bee"), *of_classes(f"{val}/", "ant", "bee")))
    assert source.classes == ("ant", "bee")
    assert {split: sorted(names) for split, names in labels(source).items()} == {
        "train": [f"{train}-{name}-{n}.jpg" for name in ("ant", "bee") for n in range(2)],
        "val": [f"{val}-{name}-{n}.jpg" for name in ("ant", "bee") for n in range(2)],
    }
    for folder, split in ((train, "train"), (val, "val")):
        assert folder == split or f"The folder {folder}/ becomes the split {split!r}." in source.notes


@pytest.mark.parametrize(
    ("split", "found"),
    [
        ("train", "train"),
        ("Train", "train"),
        ("test", "val"),
        ("Testing", "val"),
        ("val", "val"),
        ("validation", "val"),
    ],
)
def test_a_split_is_asked_for_by_any_of_its_names(tmp_path: Path, split: str, found: str) -> None:
    made(tmp_path, *of_classes("Train/", "ant", "bee"), *of_classes("Testing/", "ant", "bee"))
    assert set(opened(tmp_path, split=split).splits) == {found}
    assert "split=dev is not in" in refusal(tmp_path, split="dev")


def test_the_tree_says_what_was_taken_for_what(tmp_path: Path) -> None:
    source = opened(made(tmp_path, *TRAIN, *of_classes("val/", "ant"), *of_classes("test/images/", "")))
    assert source.tree == (
        "test/ 2 pictures without labels: not read",
        "train/ 4 pictures, split train, 2 classes: ant 2, bee 2",
        "val/ 2 pictures, split val, 1 classes: ant 2",
        "1 classes of train without a picture in val: bee",
        "labels, in the order of their names as text: 0 ant, 1 bee",
    )


@pytest.mark.parametrize("around", ["", "./", "data/", "archive/images/"])
def test_what_lies_around_everything_does_not_count(tmp_path: Path, around: str) -> None:
    names = [f"{around}{name}" for name in (*TRAIN, *VAL)]
    assert labels(opened(made(tmp_path / "folder", *names))) == EXPECTED
    (tmp_path / "it.tar").write_bytes(tar_of(dict.fromkeys(names, b"x")))
    assert labels(opened(tmp_path / "it.tar")) == EXPECTED


def test_a_split_that_is_packed_twice_around_or_in_images(tmp_path: Path) -> None:
    made(tmp_path, *of_classes("seg_train/seg_train/", "ant", "bee"), *of_classes("seg_test/images/", "ant", "bee"))
    assert {split: set(found.values()) for split, found in labels(opened(tmp_path)).items()} == {
        "train": {"ant", "bee"},
        "val": {"ant", "bee"},
    }


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    made(tmp_path, *TRAIN, *of_classes("training/", "ant", "bee"))
    assert "train/ and training/, both the split 'train'" in refusal(tmp_path)


def test_a_folder_beside_splits_is_refused_until_a_key_decides(tmp_path: Path) -> None:
    made(tmp_path, *TRAIN, *VAL, *of_classes("extra/", "ant", "bee"))
    message = refusal(tmp_path)
    assert "holds train/ beside 'extra'" in message and "layout=classes" in message and "split=train" in message
    assert labels(opened(tmp_path, split="train")) == {"train": EXPECTED["train"]}
    assert "extra/ 4 pictures, of no split asked for: not read" in opened(tmp_path, split="val").tree
    assert set(opened(tmp_path, layout="splits").splits) == {"extra", "train", "val"}
    assert opened(tmp_path, layout="classes").classes == ("extra", "train", "val")


def test_a_split_without_a_picture_is_refused(tmp_path: Path) -> None:
    made(tmp_path, *TRAIN, "val/ant/1.webp")
    assert "has the split val/, which holds no picture but val/ant/1.webp" in refusal(tmp_path)
    assert labels(opened(tmp_path, split="train")) == {"train": EXPECTED["train"]}


# Classes of any name


def test_classes_may_be_called_train(tmp_path: Path) -> None:
    classes = ("apple", "telephone", "train", "trout")
    made(tmp_path / "flat", *of_classes("", *classes))
    assert opened(tmp_path / "flat").classes == classes
    made(tmp_path / "split", *of_classes("train/", *classes), *of_classes("test/", *classes))
    assert opened(tmp_path / "split").classes == classes
    assert set(opened(tmp_path / "split").splits) == {"train", "val"}
    source = opened(tmp_path / "split" / "train", split="train")
    assert source.classes == classes and set(source.splits) == {"train"}


def test_valid_and_invalid_are_classes(tmp_path: Path) -> None:
    assert opened(made(tmp_path, *of_classes("", "invalid", "valid"))).classes == ("invalid", "valid")


@pytest.mark.parametrize("names", [("train", "val"), ("train",), ("cats", "dogs", "test")])
def test_pictures_right_in_folders_called_like_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    made(tmp_path, *of_classes("", *names))
    assert "are these splits or classes? layout=classes takes every folder for a class" in refusal(tmp_path)
    assert opened(tmp_path, layout="classes").classes == names


def test_a_class_whose_pictures_are_of_a_kind_that_is_not_read(tmp_path: Path) -> None:
    made(tmp_path, *TRAIN, "train/cat/1.webp", "train/cat/2.webp")
    assert "the folder 'cat' with 2 .webp, which are not read" in refusal(tmp_path)
    source = opened(tmp_path, classes=("ant", "bee", "cat"))
    assert source.classes[2] == "cat"
    assert source.notes == ("Not read: 2 files or folders: 2 .webp (train/cat/1.webp, train/cat/2.webp).",)


@pytest.mark.parametrize("names", [("bee/",), ("bee/.DS_Store",), ("bee/._1.jpg",), ("bee/more/",)])
def test_a_class_of_nothing_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    made(tmp_path, *of_classes("", "ant", "cat"), *names)
    assert "The folder bee is empty" in refusal(tmp_path)
    with tarfile.open(tmp_path / "it.tar", "w") as tar:
        for name in ("ant", "bee", "cat"):
            tar.add(tmp_path / name, name)
    assert "The folder bee is empty" in refusal(tmp_path / "it.tar")


def test_texts_beside_classes_are_no_class(tmp_path: Path) -> None:
    source = opened(made(tmp_path, *of_classes("", "ant", "bee"), "labels/1.txt", "README.md"))
    assert source.classes == ("ant", "bee")
    assert source.notes == ("Not read: 2 files or folders: 1 .md (README.md), 1 .txt (labels/1.txt).",)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_is_only_in_what_is_not_trained_on(tmp_path: Path, split: str) -> None:
    made(tmp_path, *TRAIN, *of_classes(f"{split}/", "ant", "bee", "cat"))
    assert "1 classes in val that are not in train (first: 'cat')" in refusal(tmp_path)
    assert opened(tmp_path, classes=("ant", "bee", "cat")).classes == ("ant", "bee", "cat")


SUMMER = unicodedata.normalize("NFC", "\u00e9t\u00e9")


@pytest.mark.parametrize(
    ("one", "other"), [(SUMMER, unicodedata.normalize("NFD", SUMMER)), ("Bee", "bee"), ("a bee", "a  bee")]
)
@pytest.mark.parametrize("where", [("train/", "val/"), ("train/", "train/")])
def test_two_spellings_of_a_class_are_refused(tmp_path: Path, one: str, other: str, where: tuple[str, str]) -> None:
    made(tmp_path, *of_classes("train/", "ant"), *of_classes(where[0], one), *of_classes(where[1], other))
    assert "two spellings of one name" in refusal(tmp_path)
    assert set(opened(tmp_path, classes=(one, "ant", other)).classes) == {"ant", one, other}
    assert "is another spelling" in refusal(tmp_path, classes=(one, "ant"))


def test_the_order_of_numbers_is_said(tmp_path: Path) -> None:
    source = opened(made(tmp_path, *of_classes("", *map(str, range(12)))))
    assert source.classes[2] == "10"
    assert source.notes[0].startswith("Numbers in names do not count: label 2 is '10' and not '2'.")
    assert source.tree[-1].endswith("as text: 0 0, 1 1, 2 10, 3 11, 4 2, 5 3, 6 4, 7 5, ... 11 9")
    made(tmp_path / "padded", *of_classes("", "n02", "n10"))
    assert opened(tmp_path / "padded").notes == ()


def test_known_classes_without_a_picture_are_named(tmp_path: Path) -> None:
    made(tmp_path, *TRAIN)
    assert "1 known classes without a picture: cat" in opened(tmp_path, classes=("cat", "ant", "bee")).tree


# Folders in classes


def test_a_folder_in_a_class_is_part_of_it(tmp_path: Path) -> None:
    made(tmp_path, "ant/1.jpg", "ant/more/2.jpg", "bee/images/3.jpg", "bee/images/deeper/4.jpg")
    assert labels(opened(tmp_path)) == {"train": {"1.jpg": "ant", "2.jpg": "ant", "3.jpg": "bee", "4.jpg": "bee"}}


@pytest.mark.parametrize(
    "names",
    [
        ("cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg", "dog/test/4.jpg"),
        ("fold1/cat/1.jpg", "fold1/dog/2.jpg", "fold2/cat/3.jpg", "fold2/dog/4.jpg"),
        ("train/animals/cat/1.jpg", "train/animals/dog/2.jpg", "val/animals/cat/3.jpg", "val/animals/dog/4.jpg"),
        ("test/train/cat/1.jpg", "test/val/cat/2.jpg"),
    ],
)
def test_classes_that_may_lie_one_level_further_down_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    made(tmp_path, *names)
    assert "layout=" in refusal(tmp_path)


def test_folds_of_any_name_are_splits_if_that_is_said(tmp_path: Path) -> None:
    made(tmp_path, "fold1/cat/1.jpg", "fold1/dog/2.jpg", "fold2/cat/3.jpg", "fold2/dog/4.jpg")
    assert labels(opened(tmp_path, layout="splits")) == {
        "fold1": {"1.jpg": "cat", "2.jpg": "dog"},
        "fold2": {"3.jpg": "cat", "4.jpg": "dog"},
    }
    assert set(labels(opened(tmp_path, layout="classes"))["train"].values()) == {"fold1", "fold2"}


def test_images_is_no_class(tmp_path: Path) -> None:
    made(tmp_path, "train/images/1.jpg", "train/labels/1.txt", "val/images/2.jpg", "val/labels/2.txt")
    assert "1.jpg lies in no class folder" in refusal(tmp_path)
    made(tmp_path / "beside", "images/1.jpg", "cat/2.jpg")
    assert "images/ among its classes" in refusal(tmp_path / "beside")
    assert opened(tmp_path / "beside", classes=("cat", "images")).classes == ("cat", "images")


# Pictures in no class folder


def tiny_imagenet(root: Path) -> Path:
    """tiny-imagenet-200 as it is downloaded, with three classes."""
    wnids = ("n01443537", "n01629819", "n01641577")
    truth = "".join(f"val_{n}.JPEG\t{wnids[2 - n % 3]}\t0\t32\t44\t62\n" for n in range(6))
    made(
        root,
        *(f"train/{wnid}/images/{wnid}_{n}.JPEG" for wnid in wnids for n in range(2)),
        *(f"train/{wnid}/{wnid}_boxes.txt" for wnid in wnids),
        *(f"val/images/val_{n}.JPEG" for n in range(6)),
        *(f"test/images/test_{n}.JPEG" for n in range(3)),
        "words.txt",
    )
    return write_files(root, {"val/val_annotations.txt": truth.encode(), "wnids.txt": "\n".join(wnids[::-1]).encode()})


TINY = {f"val_{n}.JPEG": ("n01641577", "n01629819", "n01443537")[n % 3] for n in range(6)}


@pytest.mark.parametrize("is_tar", [False, True])
def test_tiny_imagenet_as_it_is_downloaded(tmp_path: Path, is_tar: bool) -> None:
    root = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    if is_tar:
        with tarfile.open(tmp_path / "it.tar", "w") as tar:
            tar.add(root, root.name)
    source = opened(tmp_path / "it.tar" if is_tar else root)
    assert source.classes == ("n01443537", "n01629819", "n01641577")
    found = labels(source)
    assert set(found) == {"train", "val"} and found["val"] == TINY
    assert found["train"] == {f"{wnid}_{n}.JPEG": wnid for wnid in source.classes for n in range(2)}
    assert any(line.endswith("test/ 3 pictures without labels: not read") for line in source.tree)


def test_labels_that_do_not_fit_tiny_imagenet(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path)
    annotations = root / "val" / "val_annotations.txt"
    whole = annotations.read_text()
    annotations.write_text(whole.replace("n01641577", "n09999999"))
    assert "1 classes in val that are not in train (first: 'n09999999')" in refusal(root)
    annotations.write_text(whole.partition("\n")[2])
    assert "6 pictures in val/images/, and of 1 of them" in refusal(root)
    annotations.write_text(whole + "val_0.JPEG\tn01443537\n")
    assert "gives 'val_0' the class 'n01443537', and one before gave 'n01641577'" in refusal(root)
    annotations.write_text(whole + "val_9.JPEG\tn01443537\n")
    assert any("has 1 labels of no picture (val_9)" in note for note in opened(root).notes)
    annotations.unlink()
    assert "labels=FILE" in refusal(root)
    assert set(opened(root, split="train").splits) == {"train"}
    (tmp_path / "mine.csv").write_text("file_name,class\n" + "".join(f"{n},{wnid}\n" for n, wnid in TINY.items()))
    assert labels(opened(root, labels=tmp_path / "mine.csv"))["val"] == TINY


def cls_loc(root: Path) -> Path:
    """Kaggle's archive, with two classes. Returns the folder of pictures."""
    places = root / "ILSVRC" / "Data" / "CLS-LOC"
    made(
        places,
        *(f"train/{wnid}/{wnid}_{n}.JPEG" for wnid in ("n01440764", "n01443537") for n in range(2)),
        *(f"val/ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 4)),
        *(f"test/ILSVRC2012_test_{n:08d}.JPEG" for n in range(1, 3)),
    )
    made(root / "ILSVRC", "Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml", "ImageSets/CLS-LOC/val.txt")
    return places


SOLUTION = """ImageId,PredictionString
ILSVRC2012_val_00000003,n01440764 1 2 3 4 n01440764 5 6 7 8
ILSVRC2012_val_00000001,n01443537 85 1 499 272
ILSVRC2012_val_00000002,n01440764 85 1 499 272
"""
OF_VAL = {
    "ILSVRC2012_val_00000001.JPEG": "n01443537",
    "ILSVRC2012_val_00000002.JPEG": "n01440764",
    "ILSVRC2012_val_00000003.JPEG": "n01440764",
}


def test_kaggles_cls_loc(tmp_path: Path) -> None:
    places = cls_loc(tmp_path)
    assert "of 3 of them no file says the class" in refusal(places)
    assert set(labels(opened(places, split="train"))) == {"train"}
    (tmp_path / "LOC_val_solution.csv").write_text(SOLUTION)
    for source in (tmp_path, tmp_path / "ILSVRC", places):
        found = opened(source)
        assert found.classes == ("n01440764", "n01443537")
        assert set(found.splits) == {"train", "val"} and labels(found)["val"] == OF_VAL
        assert len(labels(found)["train"]) == 4


def test_labels_for_what_needs_none_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "source", *TRAIN)
    (tmp_path / "labels.csv").write_text("train-ant-0,bee\n")
    assert "leave it out" in refusal(tmp_path / "source", labels=tmp_path / "labels.csv")


def test_two_splits_do_not_share_labels(tmp_path: Path) -> None:
    made(tmp_path / "source", *TRAIN, "val/1.jpg", "test/1.jpg")
    (tmp_path / "labels.csv").write_text("1.jpg,bee\n")
    assert "two pictures named '1'" in refusal(tmp_path / "source", labels=tmp_path / "labels.csv")


# What is no picture


def test_what_systems_leave_does_not_count(tmp_path: Path) -> None:
    made(
        tmp_path,
        *(*TRAIN, *VAL),
        *("train/ant/.ipynb_checkpoints/", "lost+found/", ".snapshot/hourly.0/train/ant/1.jpg", "train/ant/._1.jpg"),
        *(
            "val/@eaDir/",
            "val/bee/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
            "val/bee/Thumbs.db",
            "__MACOSX/train/ant/._2.jpg",
        ),
    )
    source = opened(tmp_path)
    assert labels(source) == EXPECTED and source.classes == ("ant", "bee")
    assert source.notes[0].startswith("Not read: 8 files or folders: 8 hidden, or left by a system (.snapshot, ")


def test_out_within_the_source_is_no_part_of_it(tmp_path: Path) -> None:
    made(tmp_path, *TRAIN, *VAL, "shards/")
    assert "The folder shards is empty" not in str(opened(tmp_path, out=tmp_path / "shards").notes)
    assert labels(opened(tmp_path, out=tmp_path / "shards")) == EXPECTED
    made(tmp_path, "flat/ant/1.jpg", "flat/bee/2.jpg", "flat/my/shards/")
    assert opened(tmp_path / "flat", out=tmp_path / "flat/my/shards").classes == ("ant", "bee")
    for left in ("manifest.json", "train-000000.tar"), (".prepare/",), (".sources.json",):
        made(tmp_path / "later" / left[0].strip("/."), *TRAIN, *(f"shards/{name}" for name in left))
        assert labels(opened(tmp_path / "later" / left[0].strip("/."))) == {"train": EXPECTED["train"]}


@pytest.mark.parametrize("is_picture", [True, False])
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path)]
)
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], Any], is_picture: bool) -> None:
    made(tmp_path, *of_classes("", "ant", "bee"))
    make(tmp_path / "ant" / ("pipe.jpg" if is_picture else "pipe.txt"))
    source = opened(tmp_path)
    if is_picture:
        (image,) = [image for image in source.splits["train"] if image.name == "ant/pipe.jpg"]
        with pytest.raises(OSError, match=r"is a (FIFO|link to nothing)"):
            source.read(image)
    else:
        assert "ant/pipe.txt" in source.notes[0]


def test_links_to_folders(tmp_path: Path) -> None:
    made(tmp_path, *of_classes("", "ant", "bee"))
    (tmp_path / "bee" / "up").symlink_to("..")
    (tmp_path / "bee" / "ring").symlink_to(".")
    (tmp_path / "bee" / "out").symlink_to("../..")
    source = opened(tmp_path)
    assert len(source.splits["train"]) == 4
    assert source.notes == ("Not read: 3 files or folders: 3 a link to a folder above it (bee/out, bee/ring, bee/up).",)
    (tmp_path / "wasp").symlink_to("bee")
    source = opened(tmp_path)
    assert source.classes == ("ant", "bee", "wasp") and len(source.splits["train"]) == 6
    assert source.notes[0].startswith("2 pictures are used under two names by links: 2 in two classes (first: wasp/")
    (tmp_path / "gone").symlink_to("nowhere")
    assert "The folder gone is empty" in refusal(tmp_path)


def test_a_folder_called_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    source = opened(made(tmp_path, "ant/1.jpg", "ant/oops.jpg/", "bee/2.jpg/3.jpg", "bee/4.jpg"))
    assert labels(source) == {"train": {"1.jpg": "ant", "3.jpg": "bee", "4.jpg": "bee"}}
    assert source.notes == ("Not read: 1 files or folders: 1 empty (ant/oops.jpg/).",)


def test_a_folder_that_cannot_be_looked_into_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, *TRAIN, *VAL)
    scandir = os.scandir

    def denied(path: str) -> Any:
        if str(path).endswith("val/bee"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "val/bee cannot be looked into (Permission denied)" in refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a folder of somebody else")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    made(tmp_path, *TRAIN)
    (tmp_path / "train" / "bee").chmod(0o600)  # its names can be listed, and nothing more
    os.chown(tmp_path / "train" / "bee", 12345, 12345)
    code = f"from tests.unit.data.test_layout import *; opened(Path({str(tmp_path)!r}))"
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "train/bee cannot be looked into (Permission denied)" in done.stderr


@pytest.mark.parametrize("where", ["ant/\udcff.jpg", "\udcff/1.jpg"])
def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path, where: str) -> None:
    made(tmp_path, *of_classes("", "ant", "bee"), where)
    assert r"\udcff" in refusal(tmp_path) and "rename it" in refusal(tmp_path)


# Any tree of folders

SPELLED = {"train": "train", "Train": "train", "training": "train", "val": "val", "VALID": "val", "dev": "val"}
SPELLED |= dict.fromkeys(("test", "Testing"), "test")
HIDDEN = (".git", ".5.jpg", "@eaDir", "Thumbs.db", "lost+found")
CLASSES = (
    "ant",
    "Ant",
    "bee",
    SUMMER,
    unicodedata.normalize("NFD", SUMMER),
    "train",
    "test",
    "10",
    "2",
    "images",
    ".git",
)
FILES = (
    *("1.jpg", "2.PNG", "3.JPEG", "more/6.jpg", "train/7.jpg", "2.jpg/8.jpg", "4.webp", "notes.txt", "no_suffix"),
    *(".5.jpg", "Thumbs.db", ".git/7.jpg", "@eaDir/8.jpg", "lost+found/", "nothing/"),
    *("pipe.jpg", "gone.jpg", "alias.jpg", "ring.jpg", "up", "gone"),
)


def specified(names: list[str]) -> dict[str, tuple[str, str, int]]:
    """Split, class and label of each picture: what the layout of a folder means, in few lines."""
    pictures = [name.split("/") for name in names if name.lower().endswith((".jpg", ".png", ".jpeg"))]
    pictures = [parts for parts in pictures if not any(part in HIDDEN for part in parts)]
    at = 0  # folders around everything
    while len({parts[at] for parts in pictures}) == 1 and all(len(parts) > at + 2 for parts in pictures):
        if pictures[0][at] in SPELLED:
            break
        at += 1
    # A test set without labels.
    tests = [parts for parts in pictures if SPELLED.get(parts[at]) == "test"]
    if all(parts[at + 1 : -1] in ([], ["images"]) for parts in tests):
        pictures = [parts for parts in pictures if parts not in tests]
    has_splits = all(parts[at] in SPELLED and len(parts) > at + 2 for parts in pictures)
    split_of = {parts[at]: SPELLED[parts[at]] if has_splits else "train" for parts in pictures}
    if "val" not in split_of.values():
        split_of = {folder: "val" if split == "test" else split for folder, split in split_of.items()}
    classes = sorted({parts[at + has_splits] for parts in pictures})
    return {
        "/".join(parts): (split_of[parts[at]], parts[at + has_splits], classes.index(parts[at + has_splits]))
        for parts in pictures
    }


def planted(root: Path, names: list[str]) -> None:
    """Files, folders and links of these names, by what they are called."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if path.name in ("gone.jpg", "gone"):
            path.symlink_to("nowhere")
        elif path.name == "ring.jpg":
            path.symlink_to(path.name)
        elif path.name == "up":
            path.symlink_to("..")
        elif path.name == "pipe.jpg":
            os.mkfifo(path)
        elif path.name == "alias.jpg":
            path.symlink_to("1.jpg")
        elif not name.endswith("/"):
            path.write_bytes(name.encode())


def found_in(root: Path) -> dict[str, tuple[str, str, int]]:
    """As `specified`, by the program."""
    source = opened(root)
    return {
        image.path.removeprefix(f"{root}/"): (split, image.class_name, source.classes.index(image.class_name))
        for split, images in source.splits.items()
        for image in images
    }


def a_set(of: Any, *, most: int = 4) -> Any:
    return st.lists(st.sampled_from(of), min_size=1, max_size=most, unique=True)


@given(st.data())
def test_any_tree_gives_the_labels_of_the_specification_or_is_refused(data: st.DataObject) -> None:
    splits = data.draw(st.just([""]) | a_set([f"{name}/" for name in (*SPELLED, "extra")], most=3))
    names = {
        f"{split}{name}/{file}"
        for split in splits
        for name in data.draw(a_set(CLASSES))
        for file in data.draw(a_set(FILES, most=5))
    }
    names |= {
        f"{data.draw(st.sampled_from(splits))}{file}"
        for file in data.draw(st.lists(st.sampled_from(FILES), max_size=1))
    }
    with tempfile.TemporaryDirectory() as directory:
        planted(Path(directory), sorted(names))
        try:
            found = found_in(Path(directory))
        except DataError as error:
            assert str(error).rstrip().endswith((".", "]")), error
        else:
            assert found == specified(sorted(names))


@given(st.data())
def test_a_sound_tree_is_never_refused(data: st.DataObject) -> None:
    pool = [*(["train/"], ["Train/", "dev/"], ["training/", "VALID/", "Testing/"], ["train/", "test/"]), [""]]
    splits = data.draw(st.sampled_from(pool))
    classes = data.draw(a_set(("ant", "bee", SUMMER, "10", "2", "trout")))
    others = [file for file in FILES if file not in ("train/7.jpg", "2.jpg/8.jpg")]
    names = {f"{split}{name}/{n}.jpg" for split in splits for name in classes for n in range(2)}
    names |= {f"{split}{name}/{file}" for split in splits for name in classes for file in data.draw(a_set(others))}
    with tempfile.TemporaryDirectory() as directory:
        planted(Path(directory), sorted(names))
        assert found_in(Path(directory)) == specified(sorted(names))
