"""Manifests, indexes, tars and labels, read as `train` and `evaluate` open a split."""

import contextlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from pipeline.core.errors import DataError, ExitCode
from pipeline.core.files import sha256_of_file
from pipeline.data.index import ShardIndex
from pipeline.data.local import CACHE_DIRECTORY
from pipeline.data.prepare.label_files import parse_labels
from pipeline.data.shards.table import ARRAYS
from tests.fuzzing.damage import NUMBERS, TEXTS, damage_bytes, damage_json, damage_tar
from tests.fuzzing.pool import Target, WrongResultError
from tests.making.pictures import tar_of
from tests.making.shards import CLASSES, add_index, samples_of, write_shards

Truth = dict[str, tuple[int, bytes]]
"""Label and picture by key."""
DATA_ERROR = frozenset({int(ExitCode.DATA)})
COUNTS = {"train": (4, 3), "val": (3,)}


def shard_targets(under: Path) -> list[Target]:
    """The targets; sound shards are made below `under`."""
    plain = write_shards(under / "plain", train=COUNTS["train"], val=COUNTS["val"])
    indexed = add_index(write_shards(under / "indexed", train=COUNTS["train"], val=COUNTS["val"]), "train", "val")
    cached = write_shards(under / "cached", train=COUNTS["train"], val=COUNTS["val"])
    ShardIndex.open(cached, "train")
    foreign = write_shards(under / "foreign", train=COUNTS["train"], val=COUNTS["val"])
    (foreign / "manifest.json").unlink()
    total = sum(map(sum, COUNTS.values()))
    truth = {s["__key__"]: (int(s["cls"]), s["jpg"]) for s in samples_of(0, total)}

    def manifest(random: Random, case: Path) -> Callable[[], object]:
        root = _copy(random.choice((plain, indexed)), case)
        path = root / "manifest.json"
        path.write_bytes(damage_json(random, path.read_bytes()))
        return lambda: _check(_open(random, root), truth)

    def index(random: Random, case: Path) -> Callable[[], object]:
        root = _copy(random.choice((indexed, cached)), case)
        path = next(iter([*root.glob("train.index.npz"), *(root / CACHE_DIRECTORY).glob("*.npz")]))
        path.write_bytes(random.choice((damage_bytes, _damage_arrays))(random, path.read_bytes()))
        return lambda: _check(_open(random, root), truth, is_whole=True)

    def believed_index(random: Random, case: Path) -> Callable[[], object]:
        """The manifest names the damaged index as the right one: labels in range are believed, nothing else is."""
        root = _copy(indexed, case)
        path = root / "train.index.npz"
        path.write_bytes(random.choice((damage_bytes, _damage_arrays))(random, path.read_bytes()))
        manifest = json.loads((root / "manifest.json").read_text())
        manifest["splits"]["train"]["index"] |= {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        (root / "manifest.json").write_text(json.dumps(manifest))
        return lambda: _check(_open(random, root), None)

    def tar(random: Random, case: Path) -> Callable[[], object]:
        root = _copy(random.choice((plain, indexed)), case)
        path = root / "train-000000.tar"
        content = path.read_bytes()
        changed = damage_tar(random, content)
        path.write_bytes(changed)
        verify = random.choice(("size", "sha256"))

        def use() -> None:
            opened = ShardIndex.open(root, "train", verify=verify)
            if verify == "sha256" and changed != content:
                raise WrongResultError("other bytes than the manifest's passed as verified")
            if root.name == indexed.name:  # the labels are the index's, the pictures what lies there now
                _check(opened, {key: (label, b"") for key, (label, _) in truth.items()})
            else:
                _check(opened, truth, read_otherwise=_read_by_tarfile(root))

        return use

    def foreign_tar(random: Random, case: Path) -> Callable[[], object]:
        root = _copy(foreign, case)
        path = root / "train-000000.tar"
        path.write_bytes(damage_tar(random, path.read_bytes()))
        return lambda: _check(_open(random, root), truth, read_otherwise=_read_by_tarfile(root))

    def label(random: Random, case: Path) -> Callable[[], object]:
        if random.random() < 0.3:
            return _label_file(random)
        files: dict[str, bytes] = {}
        expected: dict[str, int | None] = {}
        for number in range(4):
            kind, content, value = _odd_label(random) if number else ("cls", b"1", 1)
            files |= {f"{number}.jpg": b"picture", f"{number}.{kind}": content}
            expected[str(number)] = value
        (case / "train-0.tar").write_bytes(tar_of(files))

        def use() -> None:
            opened = _open(random, case)
            found = {opened.sample_key(i): opened.label(i) for i in range(opened.num_samples)}
            if found != expected:
                raise WrongResultError(f"{files}: labels {found}, not {expected}")

        return use

    reading = (manifest, index, believed_index, tar, foreign_tar, label)
    return [Target(read.__name__.replace("_", "-"), read, DATA_ERROR) for read in reading]


def _copy(root: Path, case: Path) -> Path:
    return Path(shutil.copytree(root, case / root.name))


def _open(random: Random, root: Path) -> ShardIndex:
    return ShardIndex.open(root, "train", verify=random.choice(("size", "sha256")))


def _check(
    index: ShardIndex, truth: Truth | None, *, read_otherwise: Truth | None = None, is_whole: bool = False
) -> None:
    """Raise WrongResultError unless every sample is one of the truth, and every picture can be asked for.

    Args:
        index: Of what was damaged.
        truth: Of what lies there; empty pictures are not compared. None: the index alone says what is there.
        read_otherwise: What another reader finds in the damaged files, where it does not stop early.
        is_whole: Whether all of the training split must be there.
    """
    if is_whole and index.num_samples != sum(COUNTS["train"]):
        raise WrongResultError(f"{index.num_samples} samples")
    for sample in range(index.num_samples):
        label, key = index.label(sample), index.sample_key(sample)
        if not 0 <= label < index.num_classes:
            raise WrongResultError(f"label {label} of {index.num_classes} classes")
        try:
            picture = index.read(sample)
        except DataError:
            continue
        expected = [known[key] for known in (read_otherwise or {}, truth or {}) if key in known]
        if truth is not None and not any(label == right and held in (b"", picture) for right, held in expected):
            raise WrongResultError(f"sample {key} with label {label}, not {[right for right, _ in expected]}")


def _damage_arrays(random: Random, content: bytes) -> bytes:
    """The index as an archive of other arrays: other types, shapes, values, some missing, compressed enormously."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name in random.sample(ARRAYS, random.choice((1, 1, 2))):
        array = arrays[name]
        what = random.randrange(10)
        if what == 0:
            del arrays[name]
        elif what == 1:
            arrays[name] = array[: random.randrange(len(array))]
        elif what == 2:
            arrays[name] = array.reshape(1, -1)
        elif what == 3:
            arrays[name] = array.astype(random.choice(("S40", "U8")) if name == "key" else random.choice("fdbqIe"))
        elif what == 4:
            arrays[name] = np.array(array[0])
        elif what == 5:
            arrays[name] = np.repeat(array, random.choice((2, 1000, 2_000_000)))
        elif what == 6:
            arrays[name] = np.zeros((2**28,), np.uint8)
        elif what == 7 and name != "key":
            arrays[name] = array.copy()
            arrays[name][random.randrange(len(array))] = random.choice((-1, 2**31 - 1, 0, 3, 511, 2**30, -(2**31)))
        elif what == 8:
            arrays[name] = array[::-1].copy()
        else:
            arrays[name] = np.roll(array, 1)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays) if random.random() < 0.7 else np.savez(
        buffer, allow_pickle=False, **arrays
    )
    return buffer.getvalue()


def _read_by_tarfile(root: Path) -> Truth:
    """What Python's own reader finds in the training shards: it stops where a field that we do not read is damaged."""
    members: dict[str, bytes] = {}
    for path in sorted(root.glob("train-*.tar")):
        with contextlib.suppress(tarfile.ReadError), tarfile.open(path, errors="backslashreplace") as archive:
            for member in archive:
                if member.isreg() and (file := archive.extractfile(member)) is not None:
                    members.setdefault(member.name, file.read())
    truth: Truth = {}
    for name, content in members.items():
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = folder + slash + stem
        if extension.lower() in ("jpg", "jpeg", "png") and (label := members.get(f"{key}.cls")) is not None:
            truth[key] = (int(label) if re.fullmatch(rb"\s*[+-]?\d+\s*", label) else -1, content)
    return truth


def _odd_label(random: Random) -> tuple[str, bytes, int | None]:
    """(extension, content, label or None where it must be refused)."""
    number = random.choice([*range(4), *NUMBERS])
    if random.random() < 0.5:
        forms = (
            b"%d",
            b" %d\n",
            b"+%d",
            b"0%d",
            b"%d.0",
            b"%d ",
            b"\xef\xbb\xbf%d",
            b"1_%d",
            b"0x%d",
            b"%d\0",
            b"%d,1",
        )
        form = random.choice(forms)
        content = form.replace(b"%d", str(number).encode())
        value = int(content) if re.fullmatch(rb"\s*[+-]?[0-9]+\s*", content) and len(content) <= 32 else None
        return "cls", content, value
    text = random.choice(["label", "Label", "cls"])
    value = random.choice([number, number, str(number), None, True, [number], float("nan"), "९"])
    content = random.choice([lambda: json.dumps({text: value}), lambda: json.dumps(value), lambda: '{"label": 1'])()
    sound = content.startswith('{"label"') and type(value) is int and content.endswith("}")
    return "json", content.encode(), value if sound and type(value) is int else None


def _label_file(random: Random) -> Callable[[], object]:
    """The tables of Kaggle and tiny-imagenet: every picture read has the class that its line says."""
    names = {f"val_{number}": random.choice(CLASSES) for number in range(5)}
    lines = [f"{name}.JPEG{random.choice(['	', ',', ' '])}{label}" for name, label in names.items()]
    content = "\n".join(["ImageId,PredictionString", *lines]).encode()
    for _ in range(random.choice((1, 2))):
        if random.random() < 0.5:
            content = damage_bytes(random, content)
        else:
            line = random.choice(lines)
            other = random.choice([f"{line} 0 0", line.replace(".JPEG", ""), line.split(".")[0], "", *TEXTS])
            content = content.replace(line.encode(), other.encode(errors="surrogatepass"))

    def use() -> None:
        found = parse_labels(content, "labels.csv")
        text = content.decode("utf-8-sig")
        for name, label in found.items():
            if not any(name in line and label in line for line in text.splitlines()):
                raise WrongResultError(f"{name} is {label}, which no line says")

    return use
