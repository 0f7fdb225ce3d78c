"""Files made to harm, now and before: how long a command takes with each, how much memory, and what it says.

    python -m benchmarks.hostile_files [--before 4fadb52]

Each file is what the tests make. A command of the commit `--before` and of this one reads it, each in a process of its
own;
memory is the process's peak of resident memory above the same command's with a harmless file. A command that has not
ended after `--patience` seconds is ended.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import common

T = TypeVar("T")
NAME = "hostile_files"
SWOLLEN_BYTES = 2**30
"""What most of the files become where they are believed."""
MOST_SECONDS, MOST_BYTES = 10.0, 100_000_000
"""Above the harmless file."""
PREPARE = ("prepare", "source={file}", "out={out}", "num_workers=1")
EVALUATE = ("evaluate", "name=hostile", "run_root={out}", "data.size=32", "data.num_workers=0", "cluster.num_threads=1")
INDEX = (*EVALUATE, "model=squeezenet1_1", "model.num_classes=4", "data.root={file}", "checkpoint={weights}")
CHECKPOINT = (*EVALUATE, "model=squeezenet1_1", "model.num_classes=4", "data.root={shards}", "checkpoint={file}")
CAFFE = (*EVALUATE, "model=squeezenet1_0_caffe", "data.root={shards}", "checkpoint={file}")


@dataclass(frozen=True)
class Hostile:
    """A file, who reads it, and how it is made."""

    what: str
    kind: str
    command: tuple[str, ...]
    make: Callable[[Path], Path]
    """Makes it in an empty folder; returns what the command is given."""
    then: Callable[[Path], None] | None = None
    """Done to it once the command has read it, after which it is read again."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--before", default="4fadb52", help="the commit to compare with (%(default)s)")
    parser.add_argument("--patience", type=float, default=60, help="seconds (%(default)s)")
    return parser.parse_args(arguments)


def small_shards(folder: Path) -> Path:
    """With the index of `prepare`."""
    from tests.making.shards import add_index, write_shards

    return add_index(write_shards(folder / "shards"), "train", "val")


def swollen_index(folder: Path) -> Path:
    """Keys that are zeros, well packed; the manifest names its hash."""
    import numpy as np

    from pipeline.core.files import sha256_of_file
    from pipeline.data.shards.manifest import Manifest
    from pipeline.data.shards.table import INDEX_KEY, index_name

    root = small_shards(folder)
    path = root / index_name("val")
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{**arrays, "key": np.zeros(SWOLLEN_BYTES // 64, "S64")})
    manifest = Manifest.load(root)
    described = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    manifest.split("val").extra[INDEX_KEY] = described
    manifest.save(root)
    return root


def shards_alone(folder: Path) -> Path:
    """Without an index: the command keeps one of its own."""
    from tests.making.shards import write_shards

    return write_shards(folder / "shards")


def swell_kept_index(root: Path) -> None:
    """Keys that are zeros, well packed, in the index that the command has left for the next one."""
    import numpy as np

    (path,) = (root / ".squeezewire").glob("*.npz")
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{**arrays, "key": np.zeros(SWOLLEN_BYTES // 64, "S64")})


def saved(folder: Path, content: dict[str, Any], *, num_zeros: int | None = None) -> Path:
    """A state dict; with `num_zeros`, packed, and so many zeros in place of its tensors."""
    import torch

    from tests.unit.run.test_checkpoint import packed

    path = folder / "weights.pt"
    torch.save(content, path)
    if num_zeros is not None:
        packed(path, num_zeros=num_zeros)
    return path


def harmless_weights(folder: Path) -> Path:
    """Of a model of four classes."""
    from pipeline.models import zoo

    return saved(folder, zoo.build("squeezenet1_1", 4).state_dict())


def swollen_weights(folder: Path) -> Path:
    """A tensor of a gigabyte of zeros, which zip packs to a thousandth."""
    import torch

    return saved(folder, {"weight": torch.ones(8)}, num_zeros=SWOLLEN_BYTES)


def swollen_pickle(folder: Path) -> Path:
    """Few bytes of pickle that say: a gigabyte."""
    from tests.unit.run.test_checkpoint import Swollen

    return saved(folder, {"weight": Swollen()})


def swollen_npz(folder: Path) -> Path:
    """An array of a gigabyte of zeros, packed."""
    import numpy as np

    path = folder / "weights.npz"
    np.savez_compressed(path, conv1_w=np.zeros(SWOLLEN_BYTES // 4, "<f4"))
    return path


def tar(folder: Path, content: bytes) -> Path:
    """Of pictures."""
    path = folder / "pictures.tar"
    path.write_bytes(content)
    return path


def harmless_tar(folder: Path) -> Path:
    """One picture."""
    from tests.making.pictures import coloured
    from tests.unit.data.test_sources import tar_of

    return tar(folder, tar_of({"a/1.jpg": coloured(1, 1)}))


def negative_size(folder: Path) -> Path:
    """A member of -512 bytes: the next header is this one."""
    from tests.unit.data.test_sources import before_the_end, tar_of, with_header

    size = (-512 % 2**96).to_bytes(12)
    return tar(folder, before_the_end({"a/1.jpg": b"x"}) + with_header(tar_of({"a/3.jpg": b""}), size=size))


def pax_headers(folder: Path) -> Path:
    """Ten thousand before one member."""
    from tests.making.pictures import coloured
    from tests.unit.data.test_sources import before_the_end, tar_of, with_header

    header = with_header(before_the_end({"name": b"16 path=a/4.jpg\n"}), kind=b"x")
    return tar(folder, header * 10_000 + tar_of({"a/1.jpg": coloured(1, 1)}))


def many_scans(folder: Path) -> Path:
    """A progressive JPEG of 206 scans over 16 million pixels."""
    from tests.unit.data import test_hostile_pictures
    from tests.unit.data.test_sources import tar_of

    return tar(folder, tar_of({"a/1.jpg": test_hostile_pictures.many_scans()}))


HARMLESS = {
    INDEX: Hostile("", "", INDEX, small_shards),
    CHECKPOINT: Hostile("", "", CHECKPOINT, harmless_weights),
    CAFFE: Hostile("", "", CHECKPOINT, harmless_weights),
    PREPARE: Hostile("", "", PREPARE, harmless_tar),
}
FILES = [
    Hostile("index beside the shards whose keys swell to 1 GiB", "index", INDEX, swollen_index),
    Hostile("index kept in .squeezewire/, the same", "index", INDEX, shards_alone, swell_kept_index),
    Hostile("state dict whose tensor swells to 1 GiB", "checkpoint", CHECKPOINT, swollen_weights),
    Hostile("state dict whose pickle makes a bytearray of 1 GiB", "checkpoint", CHECKPOINT, swollen_pickle),
    Hostile(".npz whose array swells to 1 GiB", "checkpoint", CAFFE, swollen_npz),
    Hostile("tar with a member of -512 bytes", "source", PREPARE, negative_size),
    Hostile("tar with 10,000 pax headers before a member", "source", PREPARE, pax_headers),
    Hostile("progressive JPEG of 206 scans", "source", PREPARE, many_scans),
]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """None: it had to be ended."""
    said: str
    seconds: float
    peak_bytes: int


def read(hostile: Hostile, code: Path, scratch: Path, patience_seconds: float) -> tuple[Ended, int]:
    """Let the command of the code read a fresh file. Returns how it ended, and the size of what it read in bytes."""
    folder, out = scratch / "file", scratch / "out"
    for one in (folder, out):
        shutil.rmtree(one, ignore_errors=True)
        one.mkdir()
    file = apart(hostile.make, folder)
    given = {"file": file, "out": out, "shards": scratch / "shards", "weights": scratch / "weights.pt"}
    words = [word.format(**given) for word in hostile.command]
    if hostile.then is not None:
        run(words, code, patience_seconds)
        apart(hostile.then, file)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return run(words, code, patience_seconds), size


def apart(work: Callable[[Path], T], path: Path) -> T:
    """Do work in a process of its own: the peak of a child begins at what its parent holds."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(work, path).result()


def run(words: Sequence[str], code: Path, patience_seconds: float) -> Ended:
    """A command of the code in a process of its own."""
    name, *arguments = words
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", f"pipeline.{name}", *arguments],
        cwd=code,
        env={**os.environ, "PYTHONPATH": str(code)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(patience_seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    is_late = process.returncode == -signal.SIGKILL
    lines = [line for line in said.splitlines() if "error: " in line or "warning: " in line]
    told = "traceback" if "Traceback" in said else next(iter(sorted(lines)), "")  # the error first
    return Ended(None if is_late else process.returncode, told, time.monotonic() - began, usage.ru_maxrss * 1024)


def main(arguments: Sequence[str]) -> int:
    """Before and now, one after another."""
    options = parse(arguments)
    common.print_conditions()
    result = common.Result(NAME, {"before": options.before, "patience_seconds": options.patience})
    rows: list[dict[str, Any]] = [{"file": hostile.what, "kind": hostile.kind} for hostile in FILES]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        apart(small_shards, root)
        apart(harmless_weights, root)
        before = root / "before"
        git = ["git", "-C", str(common.CODE_ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), options.before], check=True)
        try:
            for prefix, code in (("before_", before), ("", common.CODE_ROOT)):
                plain = {command: read(one, code, root, options.patience)[0] for command, one in HARMLESS.items()}
                for hostile, row in zip(FILES, rows, strict=True):
                    ended, row["file_bytes"] = read(hostile, code, root, options.patience)
                    harmless = plain[hostile.command]
                    row[f"{prefix}exit_code"], row[f"{prefix}said"] = ended.code, ended.said.replace(scratch, "...")
                    row[f"{prefix}seconds"] = ended.seconds
                    row[f"{prefix}harmless_seconds"] = harmless.seconds
                    row[f"{prefix}more_bytes"] = max(0, ended.peak_bytes - harmless.peak_bytes)
                    common.show(prefix, row)
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    result.figures["files"] = rows
    more_seconds = max(row["seconds"] - row["harmless_seconds"] for row in rows)
    result.floors = [
        common.Floor("seconds more than with a harmless file, now", more_seconds, at_most=MOST_SECONDS),
        common.Floor("bytes more, now", max(row["more_bytes"] for row in rows), at_most=MOST_BYTES),
    ]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
