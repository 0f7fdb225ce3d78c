"""The columns of a comparison: hand-made runs in, values and reasons out."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comparison.measure import read_outcomes
from pipeline.comparison.outcome import Outcome
from pipeline.comparison.result import compare_outcomes
from pipeline.comparison.rows import egress
from pipeline.config.compare import CompareConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError, ExitCode
from pipeline.core.missing import Missing
from pipeline.core.schemas.comparison import ComparisonJson
from pipeline.models.facts import model_facts
from pipeline.reporting.comparison_tables import comparison_tables
from tests.making.runs import MakeRun, timed_run

SQUEEZENET_BYTES, ALEXNET_BYTES = 4_993_696, 244_403_360


def compared(tmp_path: Path, runs: list[Path], **keys: str) -> dict[str, Any]:
    """comparison.json of runs already made, without its files and report."""
    keys = {"runs": f"[{','.join(map(repr, map(str, runs)))}]", "name": "c", "run_root": f"'{tmp_path}'", **keys}
    config = compose("compare", CompareConfig, [f"{key}={value}" for key, value in keys.items()])
    result = compare_outcomes(read_outcomes(config), config.baseline, config.directory)
    return json.loads(json.dumps(result))


def change(run: Path, **changes: Any) -> None:
    path = run / "ledger.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def compress(run: Path, hook: str, carried: int) -> None:
    """Make it a run whose steps carried so many bytes of gradients."""
    ledger = json.loads((run / "ledger.json").read_text())
    ledger["collectives"][2]["payload_bytes"] = carried * ledger["num_steps"]
    change(run, hook=hook, collectives=ledger["collectives"])


def alone(make_run: MakeRun, name: str, seconds: float, **settings: Any) -> Path:
    """A run on one rank."""
    run = make_run(name, global_batch=8, seconds=seconds, **settings)
    change(run, world_size=1, num_servers=1, server_of_rank=[0], collectives=[])
    return run


def test_egress_grows_from_the_step_to_the_training(make_run: MakeRun, tmp_path: Path) -> None:
    (row,) = compared(tmp_path, [make_run("a", model="alexnet")])["models"]
    per_step = ALEXNET_BYTES + 1152 + 104  # of the busiest server, as the ledger says
    assert row["payload_bytes_per_step"] == ALEXNET_BYTES
    assert row["server_egress_bytes_per_step"] == per_step
    assert row["server_egress_bytes_per_image"] == per_step / 16
    assert row["server_egress_bytes_per_epoch"] == 80_072 * per_step  # 1,281,167 // 16 whole batches
    assert row["server_egress_bytes_per_training"] == 90 * 80_072 * per_step
    assert (row["published_epochs"], row["published_top1"]) == (90, 0.56522)


@given(st.integers(0, 10**10), st.integers(1, 1_281_167), st.floats(0.5, 600))
def test_steps_are_whole(per_step: int, global_batch: int, epochs: float) -> None:
    sent = egress(per_step, global_batch, epochs)
    steps_per_epoch = 1_281_167 // global_batch
    assert sent["server_egress_bytes_per_epoch"] == steps_per_epoch * per_step
    training = sent["server_egress_bytes_per_training"]
    assert isinstance(training, int) and training <= epochs * steps_per_epoch * per_step * (1 + 1e-12)
    assert training >= (epochs * steps_per_epoch - 1) * per_step * (1 - 1e-12)


def test_a_batch_larger_than_imagenet_has_no_epoch() -> None:
    sent = egress(100, 2_000_000, 90)
    too_large = Missing("The global batch is larger than ImageNet.")
    assert sent["server_egress_bytes_per_epoch"] == sent["server_egress_bytes_per_training"] == too_large
    assert set(egress(Missing("why"), 16, 90).values()) == {Missing("why")}


def test_a_variant_has_no_recipe_and_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    result = compared(tmp_path, [make_run("b", model="squeezenet1_0", sr=0.5)])
    assert result["models"][0]["server_egress_bytes_per_training"] is None
    assert "squeezenet1_0:sr=0.5" in result["null_reasons"]["models.0.server_egress_bytes_per_training"]


def test_layers_carry_their_kind(make_run: MakeRun, tmp_path: Path) -> None:
    (row,) = compared(tmp_path, [make_run("a", model="alexnet")])["models"]
    connected = sum(layer["bytes"] for layer in row["layers"] if layer["kind"] == "fully connected")
    assert sum(layer["bytes"] for layer in row["layers"]) == ALEXNET_BYTES
    assert round(connected / ALEXNET_BYTES, 2) == 0.96


# --- compressions ---


def test_compressions_are_rows_of_the_same_model(make_run: MakeRun, tmp_path: Path) -> None:
    plain, half, alexnet = make_run("plain"), make_run("half"), make_run("alexnet", model="alexnet")
    compress(half, "bf16", SQUEEZENET_BYTES // 2)
    result = compared(tmp_path, [half, plain, alexnet], hooks="[none,bf16]")
    rows = result["models"]
    assert [row["label"] for row in rows] == ["squeezenet1_0 + bf16", "squeezenet1_0", "alexnet"]
    assert [row["hook"] for row in rows] == ["bf16", "none", "none"]
    assert [row["times_baseline"] for row in rows[:2]] == [0.5, 1.0]
    assert [row["gradient_bytes"] for row in rows[:2]] == [SQUEEZENET_BYTES] * 2
    assert result["conditions"]["compression hook"] == ["bf16", "none"]
    assert result["runs"]["squeezenet1_0 + bf16"] == "../half"


def test_nothing_but_the_compression_may_differ(make_run: MakeRun, tmp_path: Path) -> None:
    plain, half = make_run("plain"), make_run("half", num_classes=1000, global_batch=32)
    compress(half, "bf16", SQUEEZENET_BYTES // 2)
    with pytest.raises(ConfigError, match="pictures per step is 16"):
        compared(tmp_path, [plain, half], hooks="[none,bf16]")


def test_a_compression_that_was_not_asked_for_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    half = make_run("half")
    compress(half, "fp16", SQUEEZENET_BYTES // 2)
    with pytest.raises(ConfigError, match="compressed by fp16"):
        compared(tmp_path, [make_run("plain"), half], hooks="[none,bf16]")


def test_powersgds_plain_steps_are_not_what_it_carries(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("low-rank")
    num_steps, num_plain, carried = 8, 2, 55_820
    total = num_plain * SQUEEZENET_BYTES + (num_steps - num_plain) * carried
    ledger = json.loads((run / "ledger.json").read_text())
    ledger["collectives"][2]["payload_bytes"] = total
    change(run, hook="powersgd", collectives=ledger["collectives"])
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("hook: none", f"hook: none\n  powersgd_start_step: {num_plain}"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [json.dumps({**row, "comm/gradient_bytes": SQUEEZENET_BYTES}) for row in rows]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    result = compared(tmp_path, [run])
    assert result["models"][0]["payload_bytes_per_step"] == carried
    assert "after 2 plain steps" in result["conditions"]["PowerSGD"]


# --- one rank alone ---


def test_scaling_is_set_against_one_rank_alone(make_run: MakeRun, tmp_path: Path) -> None:
    together, single = make_run("a", seconds=0.25), alone(make_run, "one", seconds=0.2)
    result = compared(tmp_path, [together], alone_runs=f"['{single}']")
    assert result["models"][0]["scaling_efficiency"] == pytest.approx((16 / 0.25 / 2) / (8 / 0.2))
    assert result["conditions"]["all ranks share one machine"] is True
    assert "pictures per step: 8" in result["conditions"]["one rank alone"]


def test_without_one_the_reason_is_given(make_run: MakeRun, tmp_path: Path) -> None:
    result = compared(tmp_path, [make_run("a")])
    assert result["models"][0]["scaling_efficiency"] is None
    assert "alone_runs" in result["null_reasons"]["models.0.scaling_efficiency"]


@pytest.mark.parametrize("batch", [4, 16])
def test_a_rank_alone_has_what_each_rank_has(make_run: MakeRun, tmp_path: Path, batch: int) -> None:
    single = alone(make_run, "one", seconds=0.2)
    change(single, global_batch=batch)
    with pytest.raises(ConfigError, match=f"pictures per step and rank is {batch}, not 8"):
        compared(tmp_path, [make_run("a")], alone_runs=f"['{single}']")


def test_two_ranks_are_not_one(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run of a single rank"):
        compared(tmp_path, [make_run("a")], alone_runs=f"['{make_run('b')}']")


# --- the ledger ---


@pytest.mark.parametrize("closed", [True, False])
def test_whether_the_ledger_closes_is_told(make_run: MakeRun, tmp_path: Path, closed: bool) -> None:
    run = make_run("a")
    change(run, closed=closed)
    assert compared(tmp_path, [run])["models"][0]["ledger_closed"] is closed


def test_a_run_that_ended_for_its_ledger_is_not_closed(tmp_path: Path) -> None:
    facts = model_facts("squeezenet1_0", num_classes=1000, image_size=64, batch_size=8)
    failed = Outcome("squeezenet1_0", facts, reason="It does not close.", exit_code=ExitCode.LEDGER)
    killed = Outcome("squeezenet1_1", facts, reason="It was killed.", exit_code=ExitCode.INTERNAL)
    rows = compare_outcomes([failed, killed], None, tmp_path)["models"]
    assert [row["ledger_closed"] for row in rows] == [False, None]
    assert rows[0]["export_bytes"] == SQUEEZENET_BYTES


def timed(tmp_path: Path, model: str, passes_seconds: float, step_seconds: float, exposed_seconds: float) -> Path:
    """A run of two servers at 1 Gbit/s."""
    run = timed_run(model, run=model)
    run.ledger["time"] |= {
        "forward_seconds": passes_seconds / 2,
        "backward_seconds": passes_seconds / 2,
        "exposed_seconds": exposed_seconds,
        "step_seconds": {"p50": step_seconds, "p90": step_seconds},
    }
    return run.write(tmp_path / model)


def test_the_break_even_link_lies_where_both_train_equally_fast(tmp_path: Path) -> None:
    runs = [timed(tmp_path, "squeezenet1_0", 0.16, 0.25, 0.045), timed(tmp_path, "resnet18", 0.03, 0.25, 0.2)]
    result = compared(tmp_path, runs)
    small, large = result["models"]
    key = "break_even_bandwidth_bits_per_second"
    assert small[key] is None and result["null_reasons"][f"models.0.{key}"] == "It is the baseline."
    assert 1e8 < large[key] < 1e12
    turned = compared(tmp_path, runs, baseline="resnet18")
    assert turned["models"][0][key] == large[key] and turned["models"][1][key] is None
    assert "bit/s" in str(comparison_tables(cast(ComparisonJson, result)))


def test_runs_that_timed_no_buckets_have_no_break_even_and_say_why(make_run: MakeRun, tmp_path: Path) -> None:
    result = compared(tmp_path, [make_run("a"), make_run("b", model="alexnet")])
    key = "break_even_bandwidth_bits_per_second"
    assert [row[key] for row in result["models"]] == [None, None]
    assert "did not time its buckets" in result["null_reasons"][f"models.1.{key}"]
