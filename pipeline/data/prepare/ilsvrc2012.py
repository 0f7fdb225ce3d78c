"""ILSVRC2012 as it is handed out: a tar of 1000 per-class tars, a tar of 50,000 flat JPEGs, and the devkit.

    ILSVRC2012_img_train.tar        n01440764.tar ...  each holding n01440764_10026.JPEG ...
    ILSVRC2012_img_val.tar          ILSVRC2012_val_00000001.JPEG ...
    ILSVRC2012_devkit_t12.tar.gz    data/meta.mat, data/ILSVRC2012_validation_ground_truth.txt

The ground truth has one id per line, 1..1000, in the devkit's own order of synsets (`ILSVRC2012_ID`). That is not the
order of sorted wnids which everybody trains with, so ids are turned into wnids before anything else. The table is
ilsvrc2012_wnids.txt; meta.mat, which has held the same since 2012, must be there, byte for byte, and is not parsed.
"""

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipeline.core.errors import DataError
from pipeline.core.files import open_regular, read_regular
from pipeline.data.prepare.labelling import check_classes
from pipeline.data.prepare.listing import GuardedTar, is_hidden, is_image_name, tar_members
from pipeline.data.prepare.sources import PictureSource, SourceImage, chosen, read_image
from pipeline.data.prepare.tree import some

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT_NAMES = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar", "ILSVRC2012_devkit_t12")
VAL_PREFIX = "ILSVRC2012_val_"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
META_SHA256 = "e159ee2fe4bcc4d03e7429e7ff35e6ec553b2a901018b559f400a2b0ae117a30"
"""Hash of the devkit's own table of ids, of which ilsvrc2012_wnids.txt is a copy in text."""
MAX_DEVKIT_BYTES = 100_000_000
"""The one of 2012 unpacks to 4 MB."""
_WNID = re.compile(r"n[0-9]{8}")
WNIDS_FILE = Path(__file__).with_name("ilsvrc2012_wnids.txt")


def holds_archives(directory: Path) -> bool:
    """Whether ILSVRC2012's own archives lie in `directory`."""
    return any((directory / name).is_file() for name in (TRAIN_ARCHIVE, VAL_ARCHIVE))


def open_ilsvrc2012(
    path: Path, split: str | None, classes: tuple[str, ...] | None, devkit: Path | None
) -> PictureSource:
    """Training and validation pictures of ILSVRC2012.

    Args:
        path: one of the two archives, or the directory that holds them.
        split: the one wanted; null means every one whose archive is there.
        classes: wnids in index order; by default sorted, which is the usual order.
        devkit: archive or directory; by default looked for beside the validation archive.

    Raises:
        DataError: an archive is damaged, the devkit is missing or does not fit the pictures.
    """
    if not (archives := _archives(path)):
        raise DataError(f"source={path} holds neither {TRAIN_ARCHIVE} nor {VAL_ARCHIVE}, which kind=ilsvrc2012 reads.")
    splits: dict[str, list[SourceImage]] = {}
    found: set[str] = set()
    unread: list[str] = []
    for archive in archives:
        is_train = _is_train(archive)
        if split is not None and split != ("train" if is_train else "val"):
            continue
        if is_train:
            splits["train"] = list(_train_images(archive, unread))
            found |= {image.class_name for image in splits["train"]}
            _check_wnids(archive, found)
        else:
            wnids = wnids_by_id()
            truth = read_ground_truth(devkit or _devkit_beside(archive), wnids)
            splits["val"] = list(_val_images(archive, truth, unread))
            found |= set(wnids.values())
    if not splits:
        raise DataError(f"split={split} is not in source={path}, which holds {', '.join(a.name for a in archives)}.")
    return PictureSource(
        kind="ilsvrc2012",
        classes=check_classes(f"source={path}", found, classes),
        splits=chosen(path, splits, split),
        read=read_image,
        notes=(*([f"Not read: {len(unread):,} members ({some(unread)})."] if unread else []), *_beside(path)),
    )


def wnids_by_id() -> dict[int, str]:
    """Read the table of wnids by ILSVRC2012_ID, 1 to 1000."""
    lines = WNIDS_FILE.read_text(encoding="ascii").splitlines()
    return dict(enumerate((line for line in lines if not line.startswith("#")), 1))


def read_ground_truth(devkit: Path, wnids: dict[int, str]) -> list[str]:
    """Read the wnid of each validation picture, in the order of their numbers.

    Raises:
        DataError: A file is missing, the devkit numbers its synsets in another way, or an id is out of range.
    """
    files = _devkit_files(devkit)
    if (found := hashlib.sha256(files[META]).hexdigest()) != META_SHA256:
        raise DataError(
            f"devkit={devkit}: {META} is damaged or another year's (SHA-256 {found[:12]}..., of"
            f" ILSVRC2012_devkit_t12 {META_SHA256[:12]}...): its ids would name other classes. Fetch the devkit again."
        )
    lines = files[GROUND_TRUTH].decode("ascii", "replace").split()
    for line_number, line in enumerate(lines, 1):
        if not line.isdigit() or int(line) not in wnids:
            raise DataError(
                f"devkit={devkit}: line {line_number} of {GROUND_TRUTH} is {line!r}, which is the id of no synset "
                f"(they go from {min(wnids)} to {max(wnids)}). Fetch the devkit again."
            )
    return [wnids[int(line)] for line in lines]


def _archives(path: Path) -> list[Path]:
    if path.is_dir():
        return [path / name for name in (TRAIN_ARCHIVE, VAL_ARCHIVE) if (path / name).is_file()]
    return [path]


def _beside(path: Path) -> list[str]:
    """A sentence on what else lies in the directory of the archives."""
    known = {TRAIN_ARCHIVE, VAL_ARCHIVE, *DEVKIT_NAMES}
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in known) if path.is_dir() else []
    return [f"Not read, beside the archives: {some(others)} (kind=folders reads folders)."] if others else []


def _is_train(archive: Path) -> bool:
    """By content, since people rename archives."""
    first = next((member for member in tar_members(archive) if member.isfile() and not _is_left_out(member)), None)
    return first is not None and first.name.endswith(".tar")


def _is_left_out(member: tarfile.TarInfo) -> bool:
    """Whether a system left it, as macOS does beside every member that it packs."""
    return any(is_hidden(part) for part in PurePosixPath(member.name).parts)


def _train_images(archive: Path, unread: list[str]) -> Iterator[SourceImage]:
    """Pictures of every per-class tar, read in place: a tar within a tar is a range of bytes.

    What is no such tar and no picture in one is added to `unread`. As in unpacking, a later tar of a class, and a later
    picture of a name, takes the place of the one before.
    """
    mtime_ns = archive.stat().st_mtime_ns
    images: dict[str, SourceImage] = {}
    for inner in tar_members(archive):
        if inner.isdir():
            continue
        if _is_left_out(inner) or not inner.isreg() or not inner.name.endswith(".tar"):
            unread.append(inner.name)
            continue
        wnid = PurePosixPath(inner.name).stem
        stop = inner.offset_data + inner.size
        for member in tar_members(archive, start=inner.offset_data, stop=stop):
            name = f"{wnid}/{PurePosixPath(member.name).name}"
            if member.isdir():
                continue
            if _is_left_out(member) or not member.isreg() or not is_image_name(name):
                unread.append(f"{inner.name}:{member.name}")
                continue
            if name in images:
                unread.append(f"an earlier {name}")
            images[name] = SourceImage(name, wnid, str(archive), member.offset_data, member.size, mtime_ns)
    yield from images.values()


def _check_wnids(archive: Path, found: set[str]) -> None:
    """Refuse a copy of a class's tar under another name, as in `n01440764 (1).tar`: it would be a class of its own."""
    others = sorted(name for name in found if not _WNID.fullmatch(name))
    if others and len(others) < len(found):
        raise DataError(
            f"source={archive} holds {others[0]}.tar among tars that are called by their wnids, as {min(found)}.tar is:"
            " is it a class? Pack the archive again without it, or with all names alike."
        )


def _val_images(archive: Path, truth: list[str], unread: list[str]) -> Iterator[SourceImage]:
    """The pictures with their classes; what a system left beside them is added to `unread`."""
    mtime_ns = archive.stat().st_mtime_ns
    seen: set[int] = set()
    for member in tar_members(archive):
        if member.isdir():
            continue
        if _is_left_out(member):
            unread.append(member.name)
            continue
        name = PurePosixPath(member.name).name
        match = re.fullmatch(VAL_PREFIX + r"(\d{8})\.JPEG", name)
        number = int(match[1]) if match and member.isreg() else 0
        if not 1 <= number <= len(truth) or number in seen:
            raise DataError(
                f"source={archive}: {member.name!r} is not a validation picture of its own among the {len(truth)} that "
                "the devkit labels (ILSVRC2012_val_00000001.JPEG and so on). Check that both are of 2012."
            )
        seen.add(number)
        yield SourceImage(name, truth[number - 1], str(archive), member.offset_data, member.size, mtime_ns)
    if len(seen) != len(truth):
        raise DataError(
            f"source={archive} holds {len(seen)} pictures and the devkit labels {len(truth)}: fetch the archive again."
        )


def labels_of_val(devkit: Path) -> dict[str, str]:
    """The wnid of each validation picture by its name without suffix. Raises DataError as `read_ground_truth`."""
    truth = read_ground_truth(devkit, wnids_by_id())
    return {f"{VAL_PREFIX}{number:08d}": wnid for number, wnid in enumerate(truth, 1)}


def _devkit_beside(archive: Path) -> Path:
    for name in DEVKIT_NAMES:
        if (archive.parent / name).exists():
            return archive.parent / name
    raise DataError(
        f"The labels of {archive.name} are in the devkit. Put {DEVKIT_NAMES[0]} beside it, or add devkit=PATH."
    )


def _devkit_files(devkit: Path) -> dict[str, bytes]:
    """Contents of meta.mat and of the ground truth."""
    try:
        if devkit.is_dir():
            return {name: read_regular(devkit / name, MAX_DEVKIT_BYTES) for name in (META, GROUND_TRUTH)}
        with open_regular(devkit) as opened, GuardedTar.open(fileobj=opened) as tar:
            files = {}
            for member in tar:
                wanted = next((name for name in (META, GROUND_TRUTH) if member.name.endswith(name)), None)
                if tar.offset > MAX_DEVKIT_BYTES:
                    raise tarfile.ReadError(f"it unpacks to more than {MAX_DEVKIT_BYTES:,} bytes")
                if wanted and (file := tar.extractfile(member)):
                    files[wanted] = file.read()
    except (OSError, EOFError, ArithmeticError, LookupError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"devkit={devkit} cannot be read: {error}. Fetch the devkit again.") from error
    if missing := {META, GROUND_TRUTH} - set(files):
        raise DataError(f"devkit={devkit} holds no {min(missing)}. Give ILSVRC2012_devkit_t12.tar.gz.")
    return files
