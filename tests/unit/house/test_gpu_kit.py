"""The GPU kit without a GPU: its arithmetic, its summary, its workers, and that no way of reading changes a weight."""

import json
import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_decode, gpu_jobs, gpu_kit_summary, gpu_step
from benchmarks.gpu_decode import crossing_point
from benchmarks.gpu_loops import OurLoop, host_waits, make_loop
from benchmarks.gpu_step import Configuration, peak_share, spread, training_flops, weights_sha256
from pipeline.models import zoo
from pipeline.models.cost import cost

CPU = torch.device("cpu")
SIDE = 32


@pytest.mark.parametrize("model", ["squeezenet1_0", "squeezenet1_1", "resnet50"])
def test_a_steps_operations_are_those_that_torch_counts(model: str) -> None:
    with torch.device("meta"):
        network, images_BCHW = zoo.build(model), torch.empty(2, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        network(images_BCHW).sum().backward()
    assert training_flops(cost(network, 224), 2) == counter.get_total_flops()


def test_the_share_of_the_peak_is_of_the_card_that_is_there() -> None:
    assert peak_share(989.5e12, 2.0, "NVIDIA H200") == 0.5
    assert peak_share(1e12, 1.0, "another card") is None


def test_the_crossing_point_is_the_fewest_processes_that_keep_up() -> None:
    ours = {16: 900.0, 1: 100.0, 8: 640.0, 4: 390.0}
    assert [crossing_point(ours, nvjpeg) for nvjpeg in (50.0, 390.0, 391.0, 901.0)] == [1, 4, 8, None]


def test_configurations_have_a_name_each_and_the_most_telling_come_first() -> None:
    every = gpu_step.configurations(dry_run=False)
    assert len({each.name for each in every}) == len(every)
    assert {(each.loop, each.reads) for each in every[:4]} == {
        ("plain", "twice"),
        ("ours", "twice"),
        ("ours", "once"),
        ("ours", "late"),
    }
    assert [each.mode for each in every][-6:] == ["compiled"] * 6  # which take longest


@pytest.mark.not_quick
def test_where_torch_is_all_there_is_the_step_runs() -> None:
    absent = ("hydra", "lightning", "omegaconf", "pytorch_lightning", "torchmetrics", "torchvision", "webdataset")
    code = f"""
        import sys
        sys.modules.update(dict.fromkeys({absent}))
        import torch
        from benchmarks.gpu_loops import make_loop
        from benchmarks.gpu_step import Configuration, measure
        make_loop(Configuration("squeezenet1_1", batch=2), torch.device("cpu"), 32).step()
        import pipeline.data.pixels
        print(measure(Configuration("resnet50"), "CPU", dry_run=True)["left_out"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "torchvision's, which is not installed here: bring its wheel" in done.stdout, done.stderr


# --- the loops ---


def loop_of(**choices: Any) -> OurLoop:
    loop = make_loop(Configuration("squeezenet1_1", precision="fp32", batch=2, **choices), CPU, SIDE)
    assert isinstance(loop, OurLoop)
    return loop


def test_the_weights_are_the_same_bit_for_bit_however_the_host_reads() -> None:
    loops = {reads: loop_of(reads=reads) for reads in ("twice", "once", "late", "lightning")}
    for loop in loops.values():
        for _ in range(3):
            loop.step()
        loop.finish()
    assert len({weights_sha256(loop.model) for loop in loops.values()}) == 1
    assert all(loop.results == loops["twice"].results and len(loop.results) == 3 for loop in loops.values())


@pytest.mark.parametrize(("reads", "waits"), [("twice", 2), ("once", 1), ("late", 0), ("lightning", 3)])
def test_how_often_the_host_waits(reads: str, waits: int) -> None:
    loop = loop_of(reads=reads)
    loop.step()
    assert host_waits(loop) == waits


@pytest.mark.parametrize("reads", ["twice", "once", "late"])
def test_a_step_that_is_not_finite_never_reaches_the_weights(reads: str) -> None:
    loop = loop_of(reads=reads)
    loop.step()
    before = weights_sha256(loop.model)
    handle = next(loop.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="norm nan"):
        for _ in range(2):  # read late, it is the second that knows of the first
            loop.step()
            handle.remove()
    assert weights_sha256(loop.model) == before


def test_where_memory_runs_out_half_as_many_pictures_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(configuration: Configuration, *_: Any) -> dict[str, Any]:
        if configuration.batch > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"batch": configuration.batch}

    monkeypatch.setattr(gpu_step, "_measure", measure)
    found = gpu_step.measure(Configuration("squeezenet1_1", batch=256), "CPU", dry_run=True)
    assert found == {"batch": 64, "batch_halved_from": 256}


# --- the workers ---

WORKER = """
    import os, sys, time
    from pathlib import Path
    from benchmarks import gpu_jobs

    def measure(name):
        if name == "hangs":
            time.sleep(600)
        if name == "dies":
            os._exit(9)
        if name == "raises":
            raise ValueError("no such kernel")
        return {"left_out" if name == "left" else "worker": os.getpid()}

    gpu_jobs.measure_each(Path(sys.argv[1]), sys.argv[3].split(","), measure)
"""


def supervise(folder: Path, names: list[str], *, seconds: float = 60.0) -> int:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(folder)]
    ends = time.monotonic() + seconds
    return gpu_jobs.supervise(
        command, names, folder, deadline_seconds=lambda name: 0.3 if name == "hangs" else 30.0, ends=ends
    )


@pytest.mark.not_quick
def test_what_hangs_dies_or_raises_is_written_down_and_the_next_is_measured(tmp_path: Path) -> None:
    names = ["first", "hangs", "second", "dies", "raises", "third"]
    assert supervise(tmp_path, names) == 3
    errors = {name: (gpu_jobs.read(tmp_path, name) or {}).get("error") for name in names}
    assert errors == {
        "first": None,
        "hangs": "it passed its deadline of 0.3 s",
        "second": None,
        "dies": "it took its process down (exit code 9)",
        "raises": "ValueError: no such kernel",
        "third": None,
    }
    first = gpu_jobs.read(tmp_path, "first")
    assert gpu_jobs.missing(tmp_path, [*names, "fourth"]) == ["fourth", "hangs", "dies", "raises"]
    (tmp_path / "second.json").write_text('{"torn')
    assert supervise(tmp_path, ["left", "first", "second", "fourth"]) == 0
    assert gpu_jobs.read(tmp_path, "first") == first  # not measured again
    left = gpu_jobs.read(tmp_path, "left")
    assert supervise(tmp_path, ["first", "left"]) == 0
    assert (
        gpu_jobs.read(tmp_path, "first") == first and gpu_jobs.read(tmp_path, "left") != left
    )  # what it lacked may come


def test_results_of_a_dry_run_and_of_a_gpu_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_jobs.write(tmp_path, "decode-nvjpeg", {"device": "CPU", "left_out": "nvJPEG needs a GPU."})
    monkeypatch.setattr(gpu_jobs, "has_gpu", lambda: True)
    assert gpu_decode.main(["--out", str(tmp_path)]) == 2
    assert "decode-nvjpeg.json is of a dry run: results are not mixed, give another folder" in capsys.readouterr().err


@pytest.mark.not_quick
def test_what_is_under_way_when_time_is_over_stays_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path)]
    ends = time.monotonic() + 3.0
    names = ["first", "hangs", "second"]
    assert gpu_jobs.supervise(command, names, tmp_path, deadline_seconds=lambda _: 60.0, ends=ends) == 2
    assert gpu_jobs.missing(tmp_path, names) == ["hangs", "second"]


# --- the summary ---


def step_result(reads: str, seconds: list[float], weights: tuple[str, str] = ("a", "a")) -> dict[str, Any]:
    configuration = {"model": "m", "loop": "ours", "mode": "eager", "reads": reads, "batch": 8}
    return {
        "name": f"step-{reads}",
        "configuration": configuration,
        "step_seconds": spread(seconds),
        "images_per_second": 8 / spread(seconds)["median"],
        "share_of_bf16_peak": 0.25,
        "peak_memory_bytes": 2_000_000_000,
        "host_waits_per_step": 2,
        "weights_sha256": list(weights),
    }


def results_in(folder: Path) -> Path:
    made: dict[str, dict[str, Any]] = {
        "step/twice.json": step_result("twice", [0.02, 0.03, 0.02]),
        "step/once.json": step_result("once", [0.01, 0.01, 0.04], weights=("b", "b")),
        "step/late.json": step_result("late", [0.01, 0.01, 0.01], weights=("a", "b")),
        "step/graph.json": {"name": "step-graph", "error": "OutOfMemoryError: of one picture"},
        "decode/w4.json": {"name": "decode-ours-w4", "pictures_per_second": 400.0},
        "decode/w8.json": {"name": "decode-ours-w8", "pictures_per_second": 800.0},
        "decode/nvjpeg.json": {"name": "decode-nvjpeg", "pictures_per_second": 700.0},
        "nccl/summary.json": {"lines": ["432 cases with residual 0"]},
    }
    for name, content in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "step/torn.json").write_text("{")
    return folder


def test_the_summary_says_what_the_waits_cost_and_where_the_decoders_cross(tmp_path: Path) -> None:
    summary = gpu_kit_summary.summarize(results_in(tmp_path), missing={"step": "was cut"}, ended=None)
    same = {"model": "m", "mode": "eager", "times_as_fast": 2.0}
    assert summary["reads"] == [
        {**same, "reads": "late", "same_weights": None},
        {**same, "reads": "once", "same_weights": False},
    ]
    assert summary["decoding"]["crossing_point_processes"] == {"decode-nvjpeg": 8}
    told = "\n".join(gpu_kit_summary.table(summary))
    for words in (
        "step: was cut",
        "432 cases with residual 0",
        "400 images/s, 20.00 ms (20.00 to 25.00), 2 waits, 25.0% of the bf16 peak, 2.0 GB",
        "error: OutOfMemoryError: of one picture",
        "reading once is 2.000 times as fast as twice, OTHER WEIGHTS",
        "reading late is 2.000 times as fast as twice, weights not comparable",
        "decode-nvjpeg: 8 of our processes are as fast",
    ):
        assert words in told


def test_a_summary_brought_back_is_gone_on_from(tmp_path: Path) -> None:
    brought = tmp_path / "summary.json"
    summary = gpu_kit_summary.summarize(results_in(tmp_path / "there"), missing={}, ended=None)
    brought.write_text(json.dumps(summary))
    here = tmp_path / "here"
    (here / "step").mkdir(parents=True)
    (here / "step/twice.json").write_text('{"name": "newer"}')
    gpu_kit_summary.unpack(brought, here)
    assert json.loads((here / "step/twice.json").read_text()) == {"name": "newer"}
    assert json.loads((here / "decode/w8.json").read_text()) == summary["results"]["decode/w8.json"]
    for content in ({"results": {"../outside.json": {}}}, {"results": {"/outside.json": {}}}, []):
        brought.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"summary\.json"):
            gpu_kit_summary.unpack(brought, here)
