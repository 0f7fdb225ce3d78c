"""`export`: every file is read by `evaluate` and `predict`, and says itself what it needs."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline import load_model
from pipeline.models.sqz.decoder import decode
from pipeline.models.sqz.delta import apply_delta
from tests.commands import run, train, typed
from tests.making.shards import CLASSES, NUM_VALIDATION
from tests.sharing import made_once
from tests.wandb_file import records, tables

NUM_CALIBRATION = 10
JUDGED = NUM_VALIDATION - NUM_CALIBRATION
MAX_BYTES = 26_000
LATENCY = ("latency.num_windows=2", "latency.window_seconds=0.05")
# A twenty-fifth of squeezenet1_1: what is tested is files, and weights cost the time of their rounding.
WIDTHS = ("+model.metaparameters.base_e=32", "+model.metaparameters.incr_e=32")
MODEL = ("model=squeezenet_small", *WIDTHS, "+model.metaparameters.norm=batch")


def export(root: Path, *arguments: str, expect: int = 0) -> tuple[dict[str, Any], str]:
    """(artefacts.json, what was said)."""
    ended = run(["-m", "pipeline.export", f"run_root={root}", *LATENCY, *arguments], expect=expect)
    path = root / "export" / "artefacts.json"
    return json.loads(path.read_text()) if path.exists() else {}, ended.output


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is exported."""
    return made_once(tmp_path_factory, "to_export", lambda root: train(root, shards, "small", 1, *MODEL)) / "small"


@pytest.fixture(scope="module")
def exported(trained: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of every file of that run, and what was said."""

    def make(root: Path) -> None:
        bound = (
            f"max_bytes={MAX_BYTES}",
            f"calibration.num_images={NUM_CALIBRATION}",
            f"data.root={shards}",
            "tracking=offline",
        )
        _, said = export(root, f"checkpoint={trained}", *bound)
        (root / "said.txt").write_text(said)

    return made_once(tmp_path_factory, "exported", make)


def test_every_file_is_written_judged_and_small(exported: Path) -> None:
    table = json.loads((exported / "export" / "artefacts.json").read_text())
    rows = {row["artefact"]: row for row in table["artefacts"]}
    assert list(rows) == ["safetensors", "safetensors_fp16", "onnx", "onnx_int8", "package"]
    for row in rows.values():
        content = (exported / "export" / row["file"]).read_bytes()
        assert row["num_bytes"] == len(content) == sum(row["bytes_by_part"].values())
        assert row["judged"]["num_images"] == JUDGED and row["calibrated"]["num_images"] == NUM_CALIBRATION
        assert row["seconds_at_1_mbit"] == pytest.approx(len(content) * 8e-6)
    for exact in ("safetensors", "onnx"):
        assert rows[exact]["judged"]["agreement"] == 1 and abs(rows[exact]["judged"]["loss_change"]) < 1e-5
    assert rows["onnx_int8"]["num_bytes"] < rows["onnx"]["num_bytes"] / 2  # a half of it is the graph
    assert MAX_BYTES * 0.975 < rows["package"]["num_bytes"] <= MAX_BYTES
    assert table["bits_per_weight"] == rows["package"]["num_bytes"] * 8 / table["num_parameters"]
    said = (exported / "said.txt").read_text()
    assert "model.sqz" in said and "x under AlexNet's fp32" in said and "WARNING" not in said


def test_wandb_gets_the_table_and_keeps_the_files(exported: Path) -> None:
    rows = json.loads((exported / "export" / "artefacts.json").read_text())["artefacts"]
    (table,) = tables(exported / "export", "export/artefacts")
    assert [row["file"] for row in table] == [row["file"] for row in rows]
    for told, row in zip(table, rows, strict=True):
        assert told["num_bytes"] == row["num_bytes"] and told["judged_loss_change"] == row["judged"]["loss_change"]
    (path,) = (exported / "export").glob("wandb/offline-run-*/*.wandb")
    kept = {record.artifact.type: record.artifact for record in records(path) if record.HasField("artifact")}
    assert {row["artefact"] for row in rows} <= kept.keys()
    for row in rows:
        artifact = kept[row["artefact"]]
        assert set(artifact.aliases) == {"latest", row["sha256"][:12]}
        (entry,) = artifact.manifest.contents
        assert (entry.path, entry.size) == (row["file"], row["num_bytes"])


def test_memory_is_planned_and_measured(exported: Path) -> None:
    table = json.loads((exported / "export" / "artefacts.json").read_text())
    planned = table["memory"]["activations"]
    runs = {row["artefact"]: row["onnx_run"] for row in table["artefacts"]}
    assert [kind for kind, of in runs.items() if of is not None] == ["onnx", "onnx_int8"]
    # ONNX Runtime copies Concats, and does not count the picture: its account is the plan's, but for some bytes.
    copied_bytes = planned["copied"]["num_elements"] * 4
    assert copied_bytes <= runs["onnx"]["activation_peak_bytes"] < copied_bytes * 1.01
    assert runs["onnx_int8"]["activation_peak_bytes"] < runs["onnx"]["activation_peak_bytes"]
    for of in (runs["onnx"], runs["onnx_int8"]):
        assert 0 < of["p50_seconds"] <= of["p90_seconds"] and of["process_peak_bytes"] > of["activation_peak_bytes"]
    fits = {(row["hardware"], row["number_format"]): row["plan"] for row in table["memory"]["fits"]}
    assert fits == dict.fromkeys(fits, "copied") and len(fits) == 6
    page = (exported / "export" / "report.html").read_text()
    assert "Files to ship" in page and f"{table['artefacts'][-1]['num_bytes']:,}" in page
    assert "10 MB on the chip" in page and "latency.num_windows=0" not in page and page.count("<svg") == 2
    said = (exported / "said.txt").read_text()
    assert "x AlexNet's, though it has 0.001x its weights" in said and "ms a picture" in said


def test_weights_of_int8_are_stored_as_int8_and_nothing_tells_of_this_machine(exported: Path) -> None:
    model = onnx.load(exported / "export" / "model_int8.onnx")
    stored = {item.data_type: 0 for item in model.graph.initializer}
    for item in model.graph.initializer:
        stored[item.data_type] += int(np.prod(item.dims))
    assert stored[onnx.TensorProto.INT8] > 0.9 * sum(stored.values())
    concats = [node for node in model.graph.node if node.op_type == "Concat"]
    dequantised = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    scales = {item.name: float(onnx.numpy_helper.to_array(item)) for item in model.graph.initializer if not item.dims}
    assert concats
    for concat in concats:
        assert len({scales[dequantised[name]] for name in concat.input}) == 1
    for path in filter(Path.is_file, (exported / "export").rglob("*")):
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("file", ["model.safetensors", "model.onnx", "model_int8.onnx", "model.sqz"])
def test_each_is_used_like_a_checkpoint(file: str, exported: Path, shards: Path, trained: Path) -> None:
    shipped, origin = load_model(exported / "export" / file), load_model(trained)
    assert shipped.classes == origin.classes == CLASSES and shipped.input == origin.input
    assert (origin.metaparameters["norm"], shipped.metaparameters["norm"]) == ("batch", "none")  # folded
    pictures = some_pictures(shards)
    for ours, theirs in zip(shipped.predict(*pictures), origin.predict(*pictures), strict=True):
        assert {item.name: item.probability for item in ours} == pytest.approx(
            {item.name: item.probability for item in theirs}, abs=0.02
        )


def some_pictures(shards: Path) -> list[bytes]:
    with tarfile.open(next(shards.glob("*.tar"))) as tar:
        files = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".jpg")][:3]
        return [file.read() for file in files if file is not None]


def test_the_package_is_evaluated_without_saying_anything_again(exported: Path, shards: Path, tmp_path: Path) -> None:
    keys = [f"checkpoint={exported / 'export' / 'model.sqz'}", f"data.root={shards}", f"run_root={tmp_path}"]
    run(["-m", "pipeline.evaluate", *keys, "data.num_workers=0", "cluster.devices=2", "cluster.num_threads=1"])
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    table = json.loads((exported / "export" / "artefacts.json").read_text())
    row = next(row for row in table["artefacts"] if row["artefact"] == "package")
    both = row["judged"]["num_correct_top1"] + row["calibrated"]["num_correct_top1"]
    assert found["num_samples"] == NUM_VALIDATION and found["num_correct_top1"] == both


def test_the_next_version_travels_as_a_delta(exported: Path, trained: Path, shards: Path, tmp_path: Path) -> None:
    """The run some steps earlier stands for a version of other weights."""
    older = exported / "export" / "model.sqz"
    earlier = min((trained / "checkpoints").glob("step=*.ckpt"))
    common = (f"base={older}", f"data.root={shards}", f"calibration.num_images={NUM_CALIBRATION}", "formats=[package]")
    table, _ = export(tmp_path, f"checkpoint={earlier}", *common)
    package, delta = ((tmp_path / "export" / name).read_bytes() for name in ("model.sqz", "model.sqd"))
    assert [row["artefact"] for row in table["artefacts"]] == ["package", "delta"]
    assert len(delta) < len(package) / 2
    assert apply_delta(older.read_bytes(), delta) == package
    assert decode(package).meta["nats_per_bit"] == decode(older.read_bytes()).meta["nats_per_bit"]


def test_what_cannot_be_is_refused(exported: Path, trained: Path, shards: Path, tmp_path: Path) -> None:
    common = (f"checkpoint={trained}", f"data.root={shards}", "formats=[package]")
    _, said = export(tmp_path, *common, f"calibration.num_images={NUM_CALIBRATION}", "max_bytes=1000", expect=2)
    assert "max_bytes=1,000 cannot be reached: the smallest package of squeezenet_small has" in said
    damaged = tmp_path / "damaged.sqz"
    damaged.write_bytes((exported / "export" / "model.sqz").read_bytes()[:-9])
    _, said = export(tmp_path, *common, f"base={damaged}", expect=4)
    assert "is no sound .sqz package" in said
    run(["-m", "pipeline.evaluate", f"checkpoint={damaged}", f"data.root={shards}"], expect=4)


@pytest.mark.not_quick
def test_one_that_is_broken_off_leaves_what_was_there(trained: Path, shards: Path, tmp_path: Path) -> None:
    """No file without its row in artefacts.json, and none of another export beside an older latest.json."""
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("model.safetensors", "artefacts.json", "latest.json"):
        (folder / name).write_text("older")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "model.sqz").write_text("of one that was killed")
    keys = [f"run_root={tmp_path}", f"checkpoint={trained}", f"data.root={shards}", *LATENCY]
    command = ["python", "-m", "pipeline.export", *keys, "formats=[safetensors,onnx,onnx_int8,package]"]
    code, said = typed(command, tmp_path, interrupted_after="model.safetensors")
    assert code == 130 and f"{folder} is as it was" in " ".join(said.split()), said
    kept = {path.name: path.read_text() for path in folder.iterdir() if path.name != "lock"}
    assert kept == dict.fromkeys(("model.safetensors", "artefacts.json", "latest.json"), "older")
