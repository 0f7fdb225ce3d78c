"""What `export` makes beside what others make of the same weights: int8, packages, and deltas.

    make export-peers
    .venv-export-peers/bin/python -m benchmarks.export_peers --folder imagenet-sample --classes wnids.txt \\
        --weights squeezenet_v1_0.npz --nncodec .venv-nncodec/bin/python

SqueezeNet v1.0's published weights, calibrated on 256 pictures of `--folder`, judged on the others: int8 by `export`,
by ONNX Runtime's own static quantisation and by NNCF, each as it comes, and after zstd -19; a package of `export` and
bitstreams of NNCodec, which uses no pictures. Then a newer version, an epoch of fine-tuning later: the delta of
`export`, and what bsdiff4 and zstd with the older file as its dictionary (as `zstd --patch-from`) make of the packages,
of the int8 files and of the fp32 files.
"""

import copy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bsdiff4  # pyright: ignore[reportMissingImports]
import nncf  # pyright: ignore[reportMissingImports]
import numpy as np
import onnx
import torch
import zstandard  # pyright: ignore[reportMissingImports]
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import nn

from benchmarks import common
from benchmarks.export_sizes import MODEL, row_of
from benchmarks.over_the_air import LARGEST_DELTA, NAME, make_files
from pipeline.config.data import DataConfig
from pipeline.config.export import CalibrationConfig
from pipeline.config.model import ModelConfig
from pipeline.config.registry import preset_input
from pipeline.data.index import open_split
from pipeline.exporting import onnx_files
from pipeline.exporting.judging import Pictures, judge, logits_of, split_pictures
from pipeline.models.onnx_network import INPUT, OnnxNetwork, session_of
from pipeline.models.sqz.decoder import decode
from pipeline.training.trained import Trained, load_trained

PUBLISHED_BYTES = 675_763
"""Of the authors' own file, from which the published weights were decoded."""
QPS = (-38, -32, -28)
"""NNCodec's parameter of quantisation: the default of its `compress`, that of its `encode`, and a coarser one."""
LEVEL, WINDOW_LOG = 19, 24
PAIRS = {"package": "model.sqz", "int8 ONNX": "model_int8.onnx", "fp32": "model.safetensors"}


class Reader(CalibrationDataReader):
    """Pictures one by one, for ONNX Runtime."""

    def __init__(self, pictures: Pictures) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = ({INPUT: one.numpy()} for one in pictures.batches(1))

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
        """The next picture; None: no more."""
        return next(self._feeds, None)


def quantised_by_others(trained: Trained, calibration: Pictures) -> dict[str, bytes]:
    """int8 ONNX by ONNX Runtime's defaults, and by NNCF's."""
    model = onnx_files.to_onnx(trained)
    feeds = nncf.Dataset([{INPUT: one.numpy()} for one in calibration.batches(1)])
    by_nncf = nncf.quantize(copy.deepcopy(model), feeds, subset_size=len(calibration))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, source)
        quantize_static(source, target, Reader(calibration))
        by_runtime = target.read_bytes()
    return {"int8 ONNX, ONNX Runtime": by_runtime, "int8 ONNX, NNCF": by_nncf.SerializeToString()}


def with_weights(model: nn.Module, state: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of the network with other weights."""
    network = copy.deepcopy(model)
    network.load_state_dict({name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()})
    return network


def through_nncodec(python: Path, model: nn.Module) -> dict[str, tuple[int, nn.Module]]:
    """Bytes and decoded network of each QP."""
    found: dict[str, tuple[int, nn.Module]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "weights.npz"), Path(folder, "decoded.npz")
        np.savez(source, **{name: value.numpy() for name, value in model.state_dict().items()})  # type: ignore[arg-type]
        for qp in QPS:
            command = [python, "benchmarks/peers/nncodec_pack.py", source, target, str(qp)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            with np.load(target) as arrays:
                decoded = with_weights(model, {name: arrays[name] for name in arrays.files})
            found[f"NNCodec, QP {qp}"] = int(done.stdout.split()[-1]), decoded
    return found


def zstd(content: bytes, older: bytes | None = None) -> int:
    """Bytes after zstd -19, with the older file as its dictionary; decompressed and compared."""
    known = None if older is None else zstandard.ZstdCompressionDict(older, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    parameters = zstandard.ZstdCompressionParameters.from_level(LEVEL, window_log=WINDOW_LOG, enable_ldm=True)
    packed = zstandard.ZstdCompressor(dict_data=known, compression_params=parameters).compress(content)
    assert zstandard.ZstdDecompressor(dict_data=known, max_window_size=1 << WINDOW_LOG).decompress(packed) == content
    return len(packed)


def bsdiff(older: bytes, newer: bytes) -> int:
    """Bytes of bsdiff4's patch; applied and compared."""
    patch = bsdiff4.diff(older, newer)
    assert bsdiff4.patch(older, patch) == newer
    return len(patch)


def files(options: Any, first: Path, trained: Trained) -> dict[str, dict[str, Any]]:
    """Each file's bytes, and what it loses on the pictures that calibrated none."""
    index = open_split(DataConfig(root=str(common.SHARDS / NAME)), "train")
    everything = Pictures(trained, index, tuple(range(index.num_samples)))
    wanted = CalibrationConfig().num_images
    calibration, judged = split_pictures(everything, min(wanted, len(everything) - 1))  # as `export` draws them
    reference_NK, labels_N = logits_of(trained.model, judged), judged.labels()

    def row(num_bytes: int, network: nn.Module) -> dict[str, Any]:
        return {"num_bytes": num_bytes, **row_of(judge(logits_of(network, judged), reference_NK, labels_N))}

    found: dict[str, dict[str, Any]] = {"published Deep Compression": row(PUBLISHED_BYTES, trained.model)}
    contents = {"int8 ONNX, export": (first / PAIRS["int8 ONNX"]).read_bytes()}
    for name, content in (contents | quantised_by_others(trained, calibration)).items():
        found[name] = row(len(content), OnnxNetwork(session_of(content)))
        found[f"{name}, zstd -{LEVEL}"] = {**found[name], "num_bytes": zstd(content)}
    package = (first / PAIRS["package"]).read_bytes()
    found["package, export"] = row(len(package), with_weights(trained.model, decode(package).tensors()))
    for name, (num_bytes, network) in through_nncodec(options.nncodec, trained.model).items():
        found[name] = row(num_bytes, network)
    for name, one in found.items():
        common.show(name, one)
    return found


def deltas(first: Path, second: Path) -> dict[str, dict[str, int | None]]:
    """From the older version's file to the newer one's, by kind of file."""
    found: dict[str, dict[str, int | None]] = {}
    for name, file in PAIRS.items():
        older, newer = (first / file).read_bytes(), (second / file).read_bytes()
        own = (second / "model.sqd").stat().st_size if name == "package" else None
        found[name] = {"num_bytes": len(newer), "delta_of_export": own}
        found[name] |= {"bsdiff4": bsdiff(older, newer), "zstd_with_the_older": zstd(newer, older)}
        common.show(f"delta of {name}", found[name])
    return found


def main(arguments: list[str]) -> int:
    """Files, deltas, the tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="class folders of JPEGs")
    parser.add_argument("--classes", type=Path, required=True, help="1000 class names, one per line, in index order")
    parser.add_argument("--weights", type=Path, required=True, help="v1.0's published weights, as .npz")
    parser.add_argument("--nncodec", type=Path, required=True, help="the Python that has NNCodec")
    options = parser.parse_args(arguments)
    common.print_conditions()
    made = make_files(options, "safetensors,onnx_int8,package")
    trained = load_trained(options.weights, ModelConfig(name=MODEL, input=preset_input(MODEL)))
    versions = {"nncf": nncf.__version__, "bsdiff4": bsdiff4.__version__, "zstandard": zstandard.__version__}
    result = common.Result("export_peers", {**vars(options), **versions, "nncodec": "2.1.3"})
    result.figures["deltas"] = rows = deltas(made["first"], made["second"])
    result.figures["files"] = files(options, made["first"], trained)
    package = rows["package"]
    assert package["delta_of_export"] is not None and package["num_bytes"] is not None
    share = package["delta_of_export"] / package["num_bytes"]
    result.floors = [common.Floor("delta over package", share, at_most=LARGEST_DELTA)]
    return result.finish(options.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
