"""Every kind of source is recognised, listed in full, and refused with a reason where it is not what it must be."""

import hashlib
import io
import os
import tarfile
from importlib.resources import files as files_of
from pathlib import Path

import pytest

from pipeline.core.errors import DataError
from pipeline.data.prepare.builtin import BuiltinPictures
from pipeline.data.prepare.ilsvrc2012 import read_ground_truth, wnids_by_id
from pipeline.data.prepare.label_files import read_labels
from pipeline.data.prepare.listing import tar_members
from pipeline.data.prepare.opening import open_source, read_classes, recognise
from pipeline.data.prepare.plan import plan_shards, shuffled
from pipeline.data.prepare.sources import Kind, PictureSource
from tests.fuzzing.damage import members_of, with_checksum
from tests.making.pictures import picture, pictures, tar_of, write_files

COUNTS = {"cat": 3, "dog": 2}
BUILTIN = BuiltinPictures(seed=0, num_classes=10)
# The devkit's order of synsets is not the sorted one.
WNIDS = {1: "n02119789", 2: "n02100735", 449: "n01440764"}
TRUTH = [449, 1, 1, 2]


def opened(
    source: Path | str,
    *,
    split: str | None = None,
    classes: tuple[str, ...] | None = None,
    devkit: Path | None = None,
) -> PictureSource:
    return open_source(str(source), kind=None, split=split, classes=classes, devkit=devkit, builtin=BUILTIN)


def listed(source: PictureSource) -> dict[str, dict[str, bytes]]:
    """Contents by split and name."""
    return {split: {image.name: source.read(image) for image in images} for split, images in source.splits.items()}


def test_class_folders(tmp_path: Path) -> None:
    files = pictures(COUNTS)
    files["dog/scan.PNG"] = picture(5, encoding="PNG")
    source = opened(write_files(tmp_path / "animals", files))
    assert (source.kind, source.classes, source.notes) == ("folders", ("cat", "dog"), ())
    assert listed(source) == {"train": files}
    assert {image.name: image.class_name for image in source.splits["train"]} == {n: n.split("/")[0] for n in files}


@pytest.mark.parametrize("wrapper", ["", "./", "cifar10/", "/data/cifar10/"])
def test_a_tar_of_split_and_class_folders(tmp_path: Path, wrapper: str) -> None:
    train, test = pictures(COUNTS), pictures({"dog": 2})
    files = {f"{wrapper}train/{n}": c for n, c in train.items()} | {f"{wrapper}test/{n}": c for n, c in test.items()}
    (tmp_path / "pictures.tar").write_bytes(tar_of(files))
    source = opened(tmp_path / "pictures.tar")
    assert (source.kind, source.classes) == ("tar", ("cat", "dog"))
    assert listed(source) == {"train": train, "val": test}
    assert source.notes == ("The folder test/ becomes the split 'val'.",)


def test_a_test_folder_beside_val_keeps_its_name(tmp_path: Path) -> None:
    write_files(
        tmp_path, {f"{split}/{n}": c for split in ("train", "val", "test") for n, c in pictures(COUNTS).items()}
    )
    source = opened(tmp_path)
    assert set(source.splits) == {"train", "val", "test"}
    assert source.notes == ()


def test_one_split_of_several(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{split}/{n}": c for split in ("train", "test") for n, c in pictures(COUNTS).items()})
    assert set(opened(tmp_path, split="val").splits) == {"val"}
    assert set(opened(tmp_path, split="test").splits) == {"val"}
    with pytest.raises(DataError, match=r"split=dev is not in.*train, val"):
        opened(tmp_path, split="dev")


def test_without_split_folders_the_split_is_named_by_the_caller(tmp_path: Path) -> None:
    assert set(opened(write_files(tmp_path, pictures(COUNTS)), split="val").splits) == {"val"}


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    source = opened(write_files(tmp_path, {**pictures(COUNTS), "cat/notes.txt": b"x", "cat/.hidden.jpg": b"x"}))
    (note,) = source.notes
    assert "2 files" in note and "cat/.hidden.jpg" in note
    assert len(source.splits["train"]) == 5


def test_classes_fix_the_index_and_may_be_absent(tmp_path: Path) -> None:
    write_files(tmp_path, pictures(COUNTS))
    assert opened(tmp_path, classes=("dog", "bird", "cat")).classes == ("dog", "bird", "cat")
    with pytest.raises(DataError, match=r"1 classes that are not among the 2 known.*'cat'"):
        opened(tmp_path, classes=("dog", "bird"))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "is empty"),
        ({"cat/x.txt": b""}, "holds no images"),
        ({"loose.jpg": b"x"}, "lies in no class folder"),
        ({"train/cat/1.jpg": b"x", "birds/1.jpg": b"x"}, "holds train/ beside 'birds'"),
    ],
)
def test_folders_that_are_none(tmp_path: Path, files: dict[str, bytes], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        opened(write_files(tmp_path, files))


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, pictures(COUNTS))
    (tmp_path / "bird").mkdir()
    with pytest.raises(DataError, match=r"folder .*bird is empty"):
        opened(tmp_path)


def test_what_is_written_of_a_source_stays_the_same(tmp_path: Path) -> None:
    """Digests that determine the shards' bytes, of version 0.2.0."""
    files = {
        f"{split}/{name}/{n}.jpg": bytes([n] * (100 * n + 1))
        for split in ("train", "test")
        for name in "ab"
        for n in range(5)
    }
    (tmp_path / "set.tar").write_bytes(tar_of(files))
    os.utime(tmp_path / "set.tar", (1, 1))
    for name in files:
        path = write_files(tmp_path / "set", {name: files[name]}) / name
        os.utime(path, (1, 1))
    for source in (tmp_path / "set.tar", tmp_path / "set"):
        found = opened(source)
        index = {name: label for label, name in enumerate(found.classes)}
        digests = [
            shard.digest
            for split, images in sorted(found.splits.items())
            for shard in plan_shards(
                shuffled(images, 0, split), split, index, shard_bytes=8000, sample_bytes=None, settings={"kind": "any"}
            )
        ]
        assert (
            hashlib.sha256("".join(digests).encode()).hexdigest()
            == "571bc7d211f66c48e370904ec3d78661d14e0737b3d67ba54cdb17b4f9ac261a"
        )


def test_a_source_that_does_not_exist() -> None:
    with pytest.raises(DataError, match=r"source=no/such/place does not exist.*source=builtin"):
        opened("no/such/place")


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(tar_of(pictures(COUNTS), "w:gz"))
    with pytest.raises(DataError, match="gunzip"):
        opened(tmp_path / "x.tar.gz")


def test_a_tar_cut_short_is_refused(tmp_path: Path) -> None:
    whole = tar_of(pictures(COUNTS))
    (tmp_path / "x.tar").write_bytes(whole[:4000])
    with pytest.raises(DataError, match="not a whole"):
        opened(tmp_path / "x.tar")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    content = bytearray(tar_of(pictures(COUNTS)))
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    third = list(tar_members(path))[2]
    content[third.offset + 5] ^= 1  # one bit of its name: the header's checksum no longer fits
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"damaged at byte {third.offset}"):
        opened(path)


def before_the_end(files: dict[str, bytes]) -> bytes:
    """A tar of the files without its end mark."""
    content = tar_of(files)
    return content[: members_of(content)[-1][1]]


def with_header(of: bytes, *, kind: bytes = b"0", size: bytes | None = None) -> bytes:
    """The first member with another kind and size."""
    header = of[:124] + (size or of[124:136]) + of[136:156] + kind + of[157:512]
    return with_checksum(header) + of[512:]


@pytest.mark.parametrize(
    ("size", "kind", "said"),
    [
        ((-512 % 2**96).to_bytes(12), b"0", "a member of -512 bytes"),  # base 256
        (b"-0000001000\0", b"0", "a member of -512 bytes"),
        (b"\x80" + (2**80).to_bytes(11), b"0", "a member of 1208925819614629174706176 bytes"),
        (b"\x80" + (2**33).to_bytes(11), b"x", "an extended header of 8589934592 bytes"),
        (b"\x80" + (2**33).to_bytes(11), b"L", "an extended header of 8589934592 bytes"),
    ],
)
def test_a_tar_of_impossible_sizes_is_refused_at_once(size: bytes, kind: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "pictures.tar"
    path.write_bytes(before_the_end({"a/1.jpg": b"x"}) + with_header(tar_of({"a/3.jpg": b""}), kind=kind, size=size))
    with pytest.raises(DataError, match=said):
        opened(path)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_headers_by_the_thousand_are_refused(kind: bytes, tmp_path: Path) -> None:
    content = b"16 path=a/4.jpg\n" if kind == b"x" else b"a/4.jpg\0"
    header = with_header(before_the_end({"name": content}), kind=kind)
    path = tmp_path / "pictures.tar"
    path.write_bytes(header * 5000 + tar_of({"a/1.jpg": picture(1)}))
    with pytest.raises(DataError, match="more than 16 headers before one member"):
        opened(path)
    path.write_bytes(header * 3 + tar_of({"a/1.jpg": picture(1)}))
    assert listed(opened(path)) == {"train": {"a/4.jpg": picture(1)}}


def test_a_size_of_pax_that_leads_back_is_refused(tmp_path: Path) -> None:
    header = with_header(before_the_end({"name": b"14 size=-1024\n"}), kind=b"x")
    path = tmp_path / "pictures.tar"
    path.write_bytes(header + tar_of({"a/1.jpg": picture(1)}))
    with pytest.raises(DataError, match="ends before it begins"):
        opened(path)


def test_a_file_that_pax_calls_sparse_is_not_read(tmp_path: Path) -> None:
    header = with_header(before_the_end({"name": b"22 GNU.sparse.size=99\n"}), kind=b"x")
    path = tmp_path / "pictures.tar"
    path.write_bytes(before_the_end({"a/0.jpg": picture(0)}) + header + tar_of({"a/1.jpg": picture(1)}))
    (image,) = (image for image in opened(path).splits["train"] if image.name == "a/1.jpg")
    assert image.problem == "is a sparse file"


def test_links_of_a_tar_that_multiply_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "linked.tar"
    path.write_bytes(tar_of({f"a/{number}.jpg": b"x" for number in range(100)}))
    with tarfile.open(path, "a") as tar:
        for number in range(200):
            link = tarfile.TarInfo(f"link{number}")
            link.type, link.linkname = tarfile.SYMTYPE, "a"
            tar.addfile(link)
    with pytest.raises(DataError, match="in very many ways"):
        opened(path)


def test_a_devkit_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.prepare.ilsvrc2012.MAX_DEVKIT_BYTES", 10_000)
    path = tmp_path / "devkit.tar.gz"
    path.write_bytes(tar_of({"data/meta.mat": bytes(20_000)}, "w:gz"))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_ground_truth(path, wnids_by_id())


@pytest.mark.parametrize("key", ["classes", "labels"])
def test_a_fifo_is_not_waited_for(key: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match=f"{key}=.* cannot be read.*regular file"):
        (read_classes if key == "classes" else read_labels)(tmp_path / "fifo")


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(pictures(COUNTS)))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("cat/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        tar.addfile(link)
    assert len(opened(path).splits["train"]) == 5


@pytest.mark.parametrize("is_hard", [True, False])
def test_links_in_a_tar_are_what_they_lead_to(tmp_path: Path, is_hard: bool) -> None:
    write_files(tmp_path / "set", files := pictures({"ant": 4, "bee": 4}))
    for number in range(2):
        path, target = tmp_path / "set/bee" / f"{number:04d}.jpg", tmp_path / "set/ant" / f"{number:04d}.jpg"
        path.unlink()
        path.hardlink_to(target) if is_hard else path.symlink_to(Path("../ant") / target.name)
        files[f"bee/{path.name}"] = target.read_bytes()
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    for source in (opened(tmp_path / "set.tar"), opened(tmp_path / "set")):
        assert listed(source) == {"train": files} and source.classes == ("ant", "bee")
        assert "2 pictures are used under two names by links: 2 in two classes (first: " in source.notes[0]


def linked(path: Path, **links: str) -> Path:
    """A tar with symbolic links more."""
    path.write_bytes(tar_of(pictures(COUNTS)))
    with tarfile.open(path, "a") as tar:
        for name, target in links.items():
            link = tarfile.TarInfo(name.replace("__", "/").replace("_jpg", ".jpg"))
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    return path


def test_links_to_folders_of_a_tar(tmp_path: Path) -> None:
    source = opened(linked(tmp_path / "x.tar", bird="cat", cat__up=".", dog__ring="../dog/ring"))
    assert source.classes == ("bird", "cat", "dog")
    assert [image.name for image in source.splits["train"]][:3] == [f"bird/000{n}.jpg" for n in range(3)]
    assert len(source.splits["train"]) == 8
    assert "1 a link to a folder above it (cat/up)" in source.notes[-1]


def test_links_of_a_tar_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="The folder bird is empty"):
        opened(linked(tmp_path / "x.tar", bird="nowhere"))
    source = opened(linked(tmp_path / "y.tar", cat__gone_jpg="nowhere.jpg", cat__ring_jpg="ring.jpg"))
    for image in source.splits["train"]:
        if image.name in ("cat/gone.jpg", "cat/ring.jpg"):
            with pytest.raises(OSError, match="is a link to nothing"):
                source.read(image)


def test_a_member_that_was_replaced(tmp_path: Path) -> None:
    path, files = tmp_path / "x.tar", pictures(COUNTS)
    path.write_bytes(tar_of(files))
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("./cat/0000.jpg")
        member.size = len(files["dog/0001.jpg"])
        tar.addfile(member, io.BytesIO(files["dog/0001.jpg"]))
    source = opened(path)
    assert listed(source) == {"train": {**files, "cat/0000.jpg": files["dog/0001.jpg"]}}
    assert "1 members give way to later ones of the same name" in source.notes[-1]


META = b"MATLAB 5.0 MAT-file"


@pytest.fixture(autouse=True)
def the_devkits_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real meta.mat is not ours to hand out: a stand-in takes its place, by its hash."""
    monkeypatch.setattr("pipeline.data.prepare.ilsvrc2012.META_SHA256", hashlib.sha256(META).hexdigest())


def test_a_devkit_that_numbers_its_synsets_in_another_way_is_refused(tmp_path: Path) -> None:
    root = ilsvrc2012(tmp_path, devkit_as="directory")
    (root / "ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(META + b"!")
    with pytest.raises(DataError, match=r"meta.mat is damaged or another year's .* Fetch the devkit again"):
        opened(root)


def ilsvrc2012(root: Path, truth: list[int] = TRUTH, *, devkit_as: str = "tar.gz") -> Path:
    """ILSVRC2012's three archives in miniature. Returns their directory."""
    train = {f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": picture(i) for i in range(2)}) for wnid in WNIDS.values()}
    val = {f"ILSVRC2012_val_{number:08d}.JPEG": picture(100 + number) for number in (4, 2, 3, 1)}
    devkit = {
        "data/meta.mat": META,
        "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
    }
    write_files(root, {"ILSVRC2012_img_train.tar": tar_of(train), "ILSVRC2012_img_val.tar": tar_of(val)})
    if devkit_as == "directory":
        write_files(root / "ILSVRC2012_devkit_t12", devkit)
    else:
        packed = tar_of({f"ILSVRC2012_devkit_t12/{name}": content for name, content in devkit.items()}, "w:gz")
        (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(packed)
    return root


APPLE = b"\0\5\x16\7" + bytes(100)


@pytest.mark.parametrize("folder", ["", "train/"])
def test_archives_packed_again_on_a_mac(tmp_path: Path, folder: str) -> None:
    """Side files beside the tars of classes and within them, a text, a folder around, and one tar twice."""
    whole = opened(ilsvrc2012(tmp_path / "whole"))
    root = ilsvrc2012(tmp_path / "again")
    with tarfile.open(tmp_path / "whole" / "ILSVRC2012_img_train.tar") as tar:
        classes = [(member.name, tar.extractfile(member).read()) for member in tar]  # pyright: ignore
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("._first.tar", APPLE), *classes, classes[-1], ("README", b"x")):
            member = tarfile.TarInfo(f"{folder}{name}")
            inner = content
            if name == classes[0][0]:
                with tarfile.open(fileobj=io.BytesIO(content)) as old:
                    files = {m.name: old.extractfile(m).read() for m in old}  # pyright: ignore
                inner = tar_of({"._" + next(iter(files)): APPLE, **files, "notes.txt": b"x"})
            member.size = len(inner)
            tar.addfile(member, io.BytesIO(inner))
    (root / "ILSVRC2012_img_train.tar").write_bytes(buffer.getvalue())
    again = opened(root)
    assert listed(again) == listed(whole) and again.classes == whole.classes
    assert again.notes == (
        f"Not read: 6 members ({folder}._first.tar, {folder}{classes[0][0]}:._n02119789_0.JPEG,"
        f" {folder}{classes[0][0]}:notes.txt, ...).",
    )


def test_a_copy_of_a_classs_tar_under_another_name_is_refused(tmp_path: Path) -> None:
    train = {f"{name}.tar": tar_of({"1.JPEG": picture(1)}) for name in ("n01440764", "n01440764 (1)")}
    write_files(tmp_path, {"ILSVRC2012_img_train.tar": tar_of(train)})
    with pytest.raises(DataError, match=r"holds n01440764 \(1\).tar among tars that are called by their wnids"):
        opened(tmp_path)


def test_what_lies_beside_the_archives_is_named(tmp_path: Path) -> None:
    write_files(ilsvrc2012(tmp_path), {"train/n01440764/1.JPEG": b"x"})
    assert opened(tmp_path).notes == ("Not read, beside the archives: train (kind=folders reads folders).",)


@pytest.mark.parametrize("devkit_as", ["tar.gz", "directory"])
def test_the_archives_of_ilsvrc2012(tmp_path: Path, devkit_as: str) -> None:
    source = opened(ilsvrc2012(tmp_path, devkit_as=devkit_as))
    assert source.kind == "ilsvrc2012"
    assert source.classes == tuple(sorted(wnids_by_id().values())) and len(source.classes) == 1000
    assert {image.name: source.read(image) for image in source.splits["train"]} == {
        f"{wnid}/{wnid}_{i}.JPEG": picture(i) for wnid in WNIDS.values() for i in range(2)
    }
    assert {image.name: image.class_name for image in source.splits["val"]} == {
        f"ILSVRC2012_val_{position:08d}.JPEG": WNIDS[number] for position, number in enumerate(TRUTH, 1)
    }
    assert all(source.read(image) == picture(100 + int(image.name[15:23])) for image in source.splits["val"])


def test_each_archive_alone_is_recognised(tmp_path: Path) -> None:
    ilsvrc2012(tmp_path)
    assert set(opened(tmp_path / "ILSVRC2012_img_train.tar").splits) == {"train"}
    val = (tmp_path / "ILSVRC2012_img_val.tar").rename(tmp_path / "renamed.tar")
    assert set(opened(val, classes=tuple(sorted(wnids_by_id().values()))).splits) == {"val"}
    with pytest.raises(DataError, match="split=train is not in"):
        opened(val, split="train")


def test_the_validation_set_needs_the_devkit(tmp_path: Path) -> None:
    (ilsvrc2012(tmp_path) / "ILSVRC2012_devkit_t12.tar.gz").rename(tmp_path / "kit.tar.gz")
    with pytest.raises(DataError, match="devkit=PATH"):
        opened(tmp_path)
    assert set(opened(tmp_path, split="train").splits) == {"train"}
    assert set(opened(tmp_path, devkit=tmp_path / "kit.tar.gz").splits) == {"train", "val"}


@pytest.mark.parametrize(
    ("truth", "sentence"),
    [
        ([3, 1, 1001, 2], "line 3 .* is '1001', which is the id of no synset .*from 1 to 1000"),
        ([3, 1, 0, 2], "line 3 .* is '0'"),
        ([3, 1, 2], "not a validation picture of its own among the 3"),
        ([3, 1, 2, 1, 1], "holds 4 pictures and the devkit labels 5"),
    ],
)
def test_ground_truth_that_does_not_fit(tmp_path: Path, truth: list[int], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        opened(ilsvrc2012(tmp_path, truth))


def test_a_devkit_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "kit.tar.gz").write_bytes(tar_of({"readme": b""}, "w:gz"))
    with pytest.raises(DataError, match=r"holds no data/"):
        read_ground_truth(tmp_path / "kit.tar.gz", WNIDS)
    with pytest.raises(DataError, match="cannot be read"):
        read_ground_truth(tmp_path / "nowhere.tar.gz", WNIDS)


def test_the_devkits_ids_are_those_of_ilsvrc2012() -> None:
    wnids = wnids_by_id()
    # By the devkit the first five validation pictures are of these ids. What they show is known from other lists.
    ids = (490, 361, 171, 822, 297)
    assert [wnids[number] for number in ids] == ["n01751748", "n09193705", "n02105855", "n04263257", "n03125729"]
    assert (min(wnids), max(wnids)) == (1, 1000)
    usual = files_of("timm").joinpath("data/_info/imagenet_synsets.txt").read_text().split()
    assert sorted(wnids.values()) == usual
    in_order = "".join(f"{wnids[number]}\n" for number in range(1, 1001))
    assert (
        hashlib.sha256(in_order.encode()).hexdigest()
        == "e85e4969a881deb8a8ba329357d033f7a664de8f1e099f593ad723bcf79bbfe5"
    )


def test_classes_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffdog\r\n cat\n\n")
    assert read_classes(path) == ("dog", "cat")
    for content, sentence in (("", "is empty"), ("a\n\nb", "empty line"), ("a\nb\na\n", "'a' twice")):
        path.write_text(content)
        with pytest.raises(DataError, match=sentence):
            read_classes(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_classes(tmp_path / "none")


def test_the_kinds() -> None:
    assert recognise("builtin") == "builtin"
    with pytest.raises(DataError, match="exclude each other"):
        open_source("builtin", kind="tar", split=None, classes=None, devkit=None, builtin=BUILTIN)


@pytest.mark.parametrize(
    ("kind", "sentence"), [("tar", "is not a file"), ("ilsvrc2012", "holds neither ILSVRC2012_img_train.tar")]
)
def test_a_kind_that_the_source_is_not(tmp_path: Path, kind: Kind, sentence: str) -> None:
    write_files(tmp_path, pictures(COUNTS))
    with pytest.raises(DataError, match=sentence):
        open_source(str(tmp_path), kind=kind, split=None, classes=None, devkit=None, builtin=BUILTIN)
