"""A new model over the air: seconds from its publication to its first answer, on a device behind a slow link.

    python -m benchmarks.over_the_air --folder imagenet-sample --classes wnids.txt --weights squeezenet_v1_0.npz

The published weights of SqueezeNet v1.0 are the device's model; the same after an epoch of fine-tuning on the pictures
of `--folder` are the new one. In the lab (`pipeline.lab`), one server offers each file of the new one over HTTP, and on
the other the device (`pipeline.models.sqz.update`) asks every 0.2 s for what is new, fetches it, verifies it, puts it
in the older one's place, loads it and answers a picture. AlexNet's fp32, with weights as they were drawn, is the
yardstick. A file that would take longer than `--longest` to send is left out.
"""

import functools
import hashlib
import http.server
import json
import lzma
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from pipeline import load_model
from pipeline.models import zoo
from pipeline.models.sqz.update import MODEL, UpdateError, update

NAME = "over-the-air"
RATES = {"1mbit": 1e6, "60kbit": 60e3}
PORT = 8000
POLL_SECONDS = 0.2
ROWS = {
    "alexnet fp32": ("safetensors", ".safetensors"),
    "fp32": ("safetensors", ".safetensors"),
    "int8 ONNX": ("onnx_int8", ".onnx"),
    "int8 ONNX, xz -9": ("onnx_int8_xz", ".onnx"),
    "package": ("package", ".sqz"),
    "delta": ("package", ".sqz"),
}
"""What is sent -> its kind in latest.json, and how the file is called that is loaded."""
MOST_OVER_THE_WIRE = 1.25
"""Times bytes x 8 / rate, where that takes long: headers of packets and HTTP are the rest."""
MOST_SECONDS_BESIDE = 2.0
"""Where it is soon over: polling, verifying, decoding and loading."""
LARGEST_DELTA = 0.18


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Files from a directory, from a byte on if so asked."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing of it."""

    def do_GET(self) -> None:
        """Send the file, or the rest of it."""
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])


def make_files(options: Any, first_kinds: str = "package") -> dict[str, Path]:
    """The directories of both versions and of AlexNet, as `export` leaves them."""
    root, runs = common.SHARDS / NAME, common.RUNS
    common.run("prepare", f"source={options.folder}", f"classes={options.classes}", "split=train", f"out={root}")
    model, data = "model=squeezenet1_0_caffe", f"data.root={root}"
    common.run(
        "train", f"name={common.fresh(NAME)}", f"run_root={runs.parent}", data, model,
        f"init.checkpoint={options.weights}", "cluster=two_ranks", "batch.global_size=30", "recipe.lr=0.0002",
        "recipe.warmup_steps=2", "trainer.max_epochs=1", "trainer.validate_every_steps=0", "tracking=disabled",
    )  # fmt: skip
    export = (data, "data.split=train", f"run_root={runs}", "latency.num_windows=0")
    first, second, alexnet = (f"{NAME}-{name}" for name in ("first", "second", "alexnet"))
    package, all_kinds = f"formats=[{first_kinds}]", "formats=[safetensors,onnx_int8,package]"
    common.run("export", f"checkpoint={options.weights}", model, f"name={first}", package, "max_bytes=400000", *export)
    base = f"base={runs / first / 'model.sqz'}"
    common.run("export", f"checkpoint={runs / NAME}", f"name={second}", all_kinds, base, *export)
    drawn = runs / f"{alexnet}.pth"
    torch.save(zoo.build("alexnet", 1000).state_dict(), drawn)
    common.run(
        "export", f"checkpoint={drawn}", "model=alexnet", f"name={alexnet}", "formats=[safetensors]", f"run_root={runs}"
    )
    return {"first": runs / first, "second": runs / second, "alexnet": runs / alexnet}


def offer(directory: Path, row: str, made: dict[str, Path]) -> dict[str, Any]:
    """Put the files of one row where the server serves them; what latest.json is to say."""
    source = made["alexnet" if row.startswith("alexnet") else "second"]
    told = json.loads((source / "latest.json").read_text())
    kind, _ = ROWS[row]
    if kind == "onnx_int8_xz":
        content = lzma.compress((source / "model_int8.onnx").read_bytes(), preset=9 | lzma.PRESET_EXTREME)
        (directory / "model_int8.onnx.xz").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        told["files"] = {kind: {"file": "model_int8.onnx.xz", "num_bytes": len(content), "sha256": digest}}
        return told
    told["files"] = {name: file for name, file in told["files"].items() if name in (kind, row)}
    for file in told["files"].values():
        shutil.copyfile(source / file["file"], directory / file["file"])
    return told


def serve(folder: Path, made: dict[str, Path], rows: Sequence[str]) -> None:
    """Publish one row after the other, each when the device has answered with the one before."""
    handler = functools.partial(RangeHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("0.0.0.0", PORT), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (folder / "serving").touch()
        wait_for(folder / "ready")
        for row in rows:
            directory = folder / place_of(row)
            directory.mkdir()
            told = offer(directory, row, made)
            (directory / "latest.new").write_text(json.dumps(told))
            published = time.monotonic()  # of all processes of this machine
            (directory / "latest.new").rename(directory / "latest.json")
            wait_for(directory / "answered")
            answered = json.loads((directory / "answered").read_text())
            seconds = answered["at"] - published
            line = {
                "row": row,
                "received_bytes": answered["received_bytes"],
                "seconds": seconds,
                "answer": answered["answer"],
            }
            with (folder / "rows.jsonl").open("a") as sink:
                sink.write(json.dumps(line) + "\n")
        server.shutdown()


def wait_for(path: Path) -> None:
    """Wait until there is a file, which is how the two programs tell one another."""
    while not path.exists():
        time.sleep(POLL_SECONDS / 10)


def be_device(folder: Path, made: dict[str, Path], rows: Sequence[str], address: str) -> None:
    """Have the older model in use, and take each newer one when it is there."""
    picture = next(Path(os.environ["AIR_PICTURES"]).rglob("*.JPEG"))
    load_model(made["first"] / "model.sqz").predict(picture, top=1)  # the device runs already
    wait_for(folder / "serving")
    (folder / "ready").touch()
    for row in rows:
        name = place_of(row)
        kind, suffix = ROWS[row]
        device = folder / "device" / name
        device.mkdir(parents=True)
        shutil.copyfile(made["first"] / "model.sqz", device / MODEL)
        while True:
            try:
                done = update(f"http://{address}:{PORT}/{name}", device, kind)
            except UpdateError:
                time.sleep(POLL_SECONDS)
                continue
            break
        loaded = device / f"loaded{suffix}"
        content = (device / MODEL).read_bytes()
        loaded.write_bytes(lzma.decompress(content) if kind.endswith("_xz") else content)
        ((answer,),) = load_model(loaded).predict(picture, top=1)
        answered = {"at": time.monotonic(), "received_bytes": done.received_bytes, "answer": answer.label}
        new = folder / name / "answered.new"
        new.write_text(json.dumps(answered))
        new.rename(folder / name / "answered")


def place_of(row: str) -> str:
    """The directory of a row, on the server and on the device."""
    return row.replace(" ", "_").replace(",", "")


def main(arguments: Sequence[str]) -> int:
    """Files, two links, the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="class folders of JPEGs")
    parser.add_argument("--classes", type=Path, required=True, help="1000 class names, one per line, in index order")
    parser.add_argument("--weights", type=Path, required=True, help="v1.0's published weights, as .npz")
    parser.add_argument("--longest", type=float, default=1000.0, help="seconds that a file may take (%(default)s)")
    options = parser.parse_args(arguments)
    common.print_conditions()
    made = make_files(options)
    sizes = sizes_of(made)
    result = common.Result("over_the_air", {**vars(options), "rates": RATES, "poll_seconds": POLL_SECONDS})
    result.figures["package_bytes"] = sizes["package"]
    result.figures["links"] = links = {}
    for bandwidth, rate in RATES.items():
        rows = [row for row, size in sizes.items() if size * 8 / rate <= options.longest]
        folder = (common.RUNS / f"{NAME}-{bandwidth}-served").absolute()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.environ["AIR_PICTURES"] = str(options.folder.absolute())
        lab = [f"name={common.fresh(f'{NAME}-{bandwidth}')}", "servers=2", f"bandwidth={bandwidth}"]
        common.run("lab", *lab, "--", "python", "-m", "benchmarks.over_the_air", "--inside", str(folder), *rows)
        links[bandwidth] = {}
        for line in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
            row = line.pop("row")
            line["seconds_of_the_bytes"] = line["received_bytes"] * 8 / rate
            links[bandwidth][row] = line
            common.show(f"{bandwidth} {row}", line)
            wire = line["seconds_of_the_bytes"]
            most = MOST_OVER_THE_WIRE * wire + MOST_SECONDS_BESIDE
            result.floors.append(common.Floor(f"{row} at {bandwidth}: seconds", line["seconds"], at_most=most))
    share = sizes["delta"] / sizes["package"]
    result.floors.append(common.Floor("delta over package", share, at_most=LARGEST_DELTA))
    return result.finish(options.results)


def sizes_of(made: dict[str, Path]) -> dict[str, int]:
    """Bytes to be sent, by row; of xz's, those before."""
    sizes = {}
    for row, (kind, _) in ROWS.items():
        told = json.loads((made["alexnet" if row.startswith("alexnet") else "second"] / "latest.json").read_text())[
            "files"
        ]
        sizes[row] = told[row if row in told else kind.removesuffix("_xz")]["num_bytes"]
    return sizes


def inside(folder: Path, rows: Sequence[str]) -> int:
    """One of the lab's two ranks."""
    made = {name: common.RUNS / f"{NAME}-{name}" for name in ("first", "second", "alexnet")}
    if os.environ["RANK"] == "0":
        serve(folder, made, rows)
    else:
        be_device(folder, made, rows, os.environ["MASTER_ADDR"])
    return 0


if __name__ == "__main__":
    sys.exit(inside(Path(sys.argv[2]), sys.argv[3:]) if sys.argv[1:2] == ["--inside"] else main(sys.argv[1:]))
