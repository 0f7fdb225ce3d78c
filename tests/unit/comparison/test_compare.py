"""`compare`: what it refuses before it starts, and what it makes of runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compare import compare
from pipeline.comparison.candidates import check_candidates
from pipeline.comparison.conditions import refuse_to_mix
from pipeline.comparison.outcome import Outcome
from pipeline.comparison.result import choose_baseline, compare_outcomes
from pipeline.comparison.rows import KEYS, published
from pipeline.config.compare import CompareConfig
from pipeline.core.cli import compose
from pipeline.core.errors import ConfigError, DataError, LedgerError
from pipeline.core.overrides import as_typed
from pipeline.core.schemas.comparison import ComparisonJson
from pipeline.models import zoo
from pipeline.models.facts import ModelFacts, model_facts
from pipeline.reporting.runs import read_run
from tests.json_shape import mismatches
from tests.making.runs import MakeRun

# design.md's, which may grow but not change.
CONTRACT_KEYS = {
    "model",
    "num_parameters",
    "gradient_bytes",
    "server_egress_bytes_per_step",
    "times_baseline",
    "step_seconds",
    "exposed_seconds",
    "images_per_second",
    "scaling_efficiency",
    "published_top1",
}


def configured(*overrides: str) -> CompareConfig:
    return compose("compare", CompareConfig, ("tracking=disabled", *overrides))


def from_runs(tmp_path: Path, *runs: Path, **keys: str) -> CompareConfig:
    listed = ",".join(f"'{run}'" for run in runs)
    more = [f"{key}={value}" for key, value in keys.items()]
    return configured("name=c", f"run_root='{tmp_path}'", f"runs=[{listed}]", *more)


def result_of(config: CompareConfig) -> dict:
    return json.loads((config.directory / "comparison.json").read_text())


def change(run: Path, **changes: Any) -> None:
    ledger = json.loads((run / "ledger.json").read_text())
    (run / "ledger.json").write_text(json.dumps(ledger | changes))


def facts(model: str) -> ModelFacts:
    return model_facts(model, num_classes=1000, image_size=64, batch_size=8)


# --- runs already made ---


def test_comparison_of_runs_already_made(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(name, model=name) for name in ("squeezenet1_0", "squeezenet1_1", "alexnet")]
    config = from_runs(tmp_path, *runs)
    assert compare(config) == 0
    result = result_of(config)
    assert not mismatches(result, ComparisonJson)
    assert result["baseline"] == "squeezenet1_0"
    assert [tuple(row) for row in result["models"]] == [KEYS] * 3
    assert set(KEYS) >= CONTRACT_KEYS
    alexnet = result["models"][2]
    assert alexnet["num_parameters"] == 61_100_840
    assert alexnet["gradient_bytes"] == 244_403_360
    assert round(alexnet["times_baseline"], 2) == 48.94
    assert alexnet["step_seconds"] == 0.25
    assert alexnet["images_per_second"] == 64.0
    assert alexnet["published_top1"] == 0.56522
    assert "48.94×" in capsys.readouterr().out
    figures = ("comparison", "comparison-time", "comparison-layers", "comparison-accuracy")
    drawn = [f"{figure}{suffix}" for figure in figures for suffix in (".png", ".svg")]
    for name in ("report.html", "comparison.csv", *drawn):
        assert (config.directory / name).stat().st_size


def test_an_accuracy_that_was_measured_stands_apart_from_the_published_one(make_run: MakeRun, tmp_path: Path) -> None:
    runs = make_run("a", validated=True), make_run("b", model="alexnet")
    config = from_runs(tmp_path, *runs)
    compare(config)
    measured, other = result_of(config)["models"]
    assert measured["measured_top1"] == pytest.approx(1 - 0.92 * 0.97**8) != measured["published_top1"]
    assert other["measured_top1"] is None and other["published_top1"] is not None
    assert "measured top-1" in (config.directory / "report.html").read_text()


def test_every_null_of_a_measured_row_has_its_reason(make_run: MakeRun, tmp_path: Path) -> None:
    config = from_runs(tmp_path, make_run("a"), make_run("b", model="squeezenet1_0", sr=0.5))
    compare(config)
    result = result_of(config)
    for index, row in enumerate(result["models"]):
        for key, value in row.items():
            assert (value is None) == (f"models.{index}.{key}" in result["null_reasons"]), (key, value)


def test_a_variant_is_a_model_of_its_own(make_run: MakeRun, tmp_path: Path) -> None:
    config = from_runs(tmp_path, make_run("a"), make_run("b", model="squeezenet1_0", sr=0.5))
    compare(config)
    rows = result_of(config)["models"]
    assert [row["model"] for row in rows] == ["squeezenet1_0", "squeezenet1_0:sr=0.5"]
    assert rows[1]["times_baseline"] > 1


def test_a_compressed_run_owes_the_same_gradients(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("half")
    ledger = json.loads((run / "ledger.json").read_text())
    for row in ledger["collectives"]:
        row["payload_bytes"] //= 2
    change(run, hook="bf16", collectives=ledger["collectives"])
    config = from_runs(tmp_path, run)
    compare(config)
    assert result_of(config)["models"][0]["gradient_bytes"] == 4_993_696


def test_runs_on_different_links_are_not_mixed(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", model="squeezenet1_1")]
    for run, rate in zip(runs, (10**9, None), strict=True):
        lab = {"servers": 2, "bandwidth_bits_per_second": rate, "offloads": False}
        environment = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps(environment | {"lab": lab}))
    with pytest.raises(ConfigError, match=r"link of a server is 1 Gbit/s, emulated for .* and unshaped"):
        compare(from_runs(tmp_path, *runs))


def test_a_run_of_local_steps_is_refused(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("local")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("hook: none", "hook: none\n  period: 4"))
    assert compare(from_runs(tmp_path, run)) == 2
    assert "comm.period=4, so that most of its steps exchanged nothing" in " ".join(capsys.readouterr().err.split())


def compressed_by_powersgd(run: Path, *, handed_over: int, carried: int) -> None:
    """Make it a run that handed over so many bytes of gradients per step, of which so many travelled."""
    ledger = json.loads((run / "ledger.json").read_text())
    ledger["collectives"][2]["payload_bytes"] = carried * ledger["num_steps"]
    change(run, hook="powersgd", collectives=ledger["collectives"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({**line, "comm/gradient_bytes": handed_over}) for line in lines]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_powersgd_owes_what_was_handed_over_to_it(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("low-rank")
    compressed_by_powersgd(run, handed_over=4_993_696, carried=60_000)
    config = from_runs(tmp_path, run)
    assert compare(config) == 0
    assert result_of(config)["models"][0]["gradient_bytes"] == 4_993_696


@pytest.mark.parametrize(("handed_over", "carried"), [(4_993_692, 60_000), (4_993_696, 4_993_700)])
def test_powersgd_that_hands_over_or_carries_something_else_fails(
    make_run: MakeRun, tmp_path: Path, handed_over: int, carried: int
) -> None:
    run = make_run("low-rank")
    compressed_by_powersgd(run, handed_over=handed_over, carried=carried)
    with pytest.raises(LedgerError, match="but the parameters of squeezenet1_0 are 4,993,696 bytes"):
        compare(from_runs(tmp_path, run))


def test_powersgd_without_a_record_of_what_was_handed_over_fails(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("low-rank")
    change(run, hook="powersgd")
    with pytest.raises(LedgerError, match="an unknown number of bytes"):
        compare(from_runs(tmp_path, run))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"global_batch": 32}, "pictures per step is 16"),
        ({"world_size": 4}, "ranks is 2"),
        ({"hook": "bf16"}, "hook is none"),
    ],
)
def test_different_conditions_are_not_mixed_and_the_difference_is_named(
    make_run: MakeRun, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    first, second = make_run("a"), make_run("b", model="squeezenet1_1")
    change(second, **changes)
    config = from_runs(tmp_path, first, second)
    with pytest.raises(ConfigError, match=f"different conditions: .*{named}"):
        compare(config)
    assert not config.directory.exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["bee", "ant"], "a was trained on 2 classes: 'ant', 'bee', b on 2 classes: 'bee', 'ant', in another order."),
        (["ant", "cat"], "a was trained on 2 classes: 'ant', 'bee', b on 2 classes: 'ant', 'cat'."),
    ],
)
def test_runs_over_other_classes_are_not_compared(make_run: MakeRun, other: list[str], said: str) -> None:
    """Also of the same number and place: the shards were made anew in between."""
    first, second = make_run("a"), make_run("b", model="squeezenet1_1")

    def refusal(digest: str, of_first: list[str] | None, of_second: list[str] | None) -> str:
        trained_over(first, "x", of_first)
        trained_over(second, digest, of_second)
        with pytest.raises(ConfigError) as raised:
            refuse_to_mix({"a": read_run(first), "b": read_run(second)})
        return str(raised.value)

    trained_over(first, "x", ["ant", "bee"])
    refuse_to_mix({"a": read_run(first), "b": read_run(second)})  # an older run did not record its shards
    trained_over(second, "x", ["ant", "bee"])
    refuse_to_mix({"a": read_run(first), "b": read_run(second)})
    assert said in refusal("y", ["ant", "bee"], other)
    assert "The shards at shards had another content for b than for a" in refusal("y", ["ant", "bee"], ["ant", "bee"])
    assert "had another content" in refusal("y", None, None)


def trained_over(run: Path, digest: str, classes: list[str] | None) -> None:
    environment = json.loads((run / "environment.json").read_text())
    environment["shards"] = {"sha256": digest, "classes": classes}
    (run / "environment.json").write_text(json.dumps(environment))


def test_a_ledger_that_does_not_carry_the_model_fails(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a")
    ledger = json.loads((run / "ledger.json").read_text())
    ledger["collectives"][2]["payload_bytes"] -= 4
    change(run, collectives=ledger["collectives"])
    with pytest.raises(LedgerError, match="but the parameters of squeezenet1_0 are 4,993,696 bytes"):
        compare(from_runs(tmp_path, run))


def test_a_ledger_without_gradient_collectives_fails(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a")
    change(run, collectives=[])
    with pytest.raises(LedgerError, match="recorded no gradient collective"):
        compare(from_runs(tmp_path, run))


def test_a_run_given_twice_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ConfigError, match="more than once: name each run once"):
        compare(from_runs(tmp_path, run, tmp_path / "link"))


def test_runs_of_one_model_stand_side_by_side_with_their_spread(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {"a": 0.2, "b": 0.24, "c": 0.3, "d": 0.23, "e": 0.26, "f": 0.5, "g": 0.6}
    models = (
        dict.fromkeys("abc", "squeezenet1_0") | dict.fromkeys("de", "squeezenet1_1") | dict.fromkeys("fg", "alexnet")
    )
    runs = [make_run(name, model=models[name], seconds=seconds[name], validated=True) for name in models]
    config = from_runs(tmp_path, *runs, make_run("resnet18", model="resnet18"))
    assert compare(config) == 0
    result = result_of(config)
    assert not mismatches(result, ComparisonJson)
    labels = [row["label"] for row in result["models"]]
    assert labels[:3] == ["squeezenet1_0 (a)", "squeezenet1_0 (b)", "squeezenet1_0 (c)"] and labels[-1] == "resnet18"
    assert set(result["runs"]) == set(labels)
    first, second, _ = result["repetitions"]
    assert (first["label"], first["num_runs"]) == ("squeezenet1_0", 3)
    assert first["step_seconds"] == {"lowest": 0.2, "median": 0.24, "highest": 0.3}
    assert first["exposed_seconds"] is None and second["val_top1"]["lowest"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert "squeezenet1_0 and squeezenet1_1 overlap, and neither is the faster: squeezenet1_0 240 ms (200 ms to" in said
    assert "Every run of squeezenet1_1 has shorter steps than any of alexnet" in said
    page = (config.directory / "report.html").read_text()
    assert "240 ms (200 ms to 300 ms)" in page and "squeezenet1_0 (b)" in page


def test_runs_of_one_name_are_told_apart_by_their_directories(make_run: MakeRun, tmp_path: Path) -> None:
    one = make_run("a")
    other = shutil.copytree(one, tmp_path / "elsewhere" / "a")
    config = from_runs(tmp_path, one, other)
    compare(config)
    assert [row["label"] for row in result_of(config)["models"]] == [f"squeezenet1_0 ({run})" for run in (one, other)]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no ledger\.json"):
        compare(from_runs(tmp_path, tmp_path))


def test_a_failed_model_is_a_row_and_the_others_are_reported(make_run: MakeRun, tmp_path: Path) -> None:
    run = read_run(make_run("squeezenet1_0"))
    outcomes = [
        Outcome("vgg16", facts("vgg16"), reason="It was killed.", exit_code=1),
        Outcome("squeezenet1_0", facts("squeezenet1_0"), run=run),
    ]
    result = compare_outcomes(outcomes, None, tmp_path / "c")
    assert not mismatches(result, ComparisonJson)
    failed, measured = result["models"]
    assert failed.get("reason") == "It was killed."
    assert failed["gradient_bytes"] is None and failed["times_baseline"] is None
    assert measured["times_baseline"] == 1.0 and "reason" not in measured
    assert result["runs"] == {"squeezenet1_0": "../squeezenet1_0"}


def test_without_its_baseline_a_multiple_is_null_with_the_reason(make_run: MakeRun, tmp_path: Path) -> None:
    run = read_run(make_run("squeezenet1_0"))
    outcomes = [
        Outcome("vgg16", facts("vgg16"), reason="It was killed.", exit_code=1),
        Outcome("squeezenet1_0", facts("squeezenet1_0"), run=run),
    ]
    result = compare_outcomes(outcomes, "vgg16", tmp_path)
    assert result["models"][1]["times_baseline"] is None
    assert result["null_reasons"]["models.1.times_baseline"] == "The baseline vgg16 was not measured."


# --- refused before any run ---


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["models=[squezenet1_0]"], "Did you mean 'squeezenet1_0'"),
        (["models=[squeezenet1_0:srr=0.5]"], "Did you mean 'sr'"),
        (["models=[squeezenet1_0:sr=5]"], "sr=5"),
        (["models=[squeezenet1_0]", "baseline=alexnet"], "baseline=alexnet is not among the models"),
        (["models=[squeezenet1_0,squeezenet1_0]"], "names a model twice"),
        (["models=[]"], "Nothing to compare"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["batch.global_size=15"], "not divisible by 2 ranks"),
        (["name=a/../b"], "cannot name a run"),
        (["cluster.devices=1"], "at least 2"),
        (["comm.meter=false"], "comm.meter=false"),
        (["precision=fp8"], "precision='fp8' is not one of"),
    ],
)
def test_impossible_comparisons_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_candidates(configured("name=c", f"run_root='{tmp_path}'", *overrides))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_somebody_else_is_left_alone(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("c/squeezenet1_0")
    with pytest.raises(ConfigError, match="was not made by a comparison"):
        check_candidates(configured("name=c", f"run_root='{tmp_path}'", "models=[squeezenet1_0]"))


def test_every_candidate_gets_the_same_conditions(tmp_path: Path) -> None:
    config = configured("name=c", f"run_root='{tmp_path}'", "models=[squeezenet1_0,squeezenet1_0:sr=0.5,vgg16]")
    candidates = check_candidates(config)
    mine = ("model", "name", "model.metaparameters.sr")
    shared = [[o for o in c.overrides if o.partition("=")[0] not in mine] for c in candidates]
    assert shared[0] == shared[1] == shared[2]
    assert [candidate.facts.num_parameters for candidate in candidates][::2] == [1_248_424, 138_357_544]
    assert [candidate.slug for candidate in candidates] == ["squeezenet1_0", "squeezenet1_0@sr=0.5", "vgg16"]


@pytest.mark.not_quick
def test_the_command_ends_2_and_names_the_nearest_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.compare", "models=[squezenet1_0]", f"run_root={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "squeezenet1_0" in ended.stderr and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.not_quick
def test_missing_shards_end_3_before_any_run(tmp_path: Path) -> None:
    where = [f"run_root={tmp_path}/runs", f"data.root={tmp_path}/nowhere"]
    command = [sys.executable, "-m", "pipeline.compare", "models=[squeezenet1_0]", *where]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 3
    assert "nowhere is not a directory" in ended.stderr
    assert list(tmp_path.iterdir()) == []


# --- names ---


def test_baseline_defaults_to_squeezenet_then_to_the_first() -> None:
    assert choose_baseline(None, ["alexnet", "squeezenet1_0"]) == "squeezenet1_0"
    assert choose_baseline(None, ["alexnet", "vgg16"]) == "alexnet"


def test_published_accuracy_is_not_lent_to_variants() -> None:
    accuracy = published("squeezenet1_0", zoo.published_accuracy)
    assert accuracy is not None and accuracy.top1 == 0.58092
    assert published("squeezenet1_0:sr=0.5", zoo.published_accuracy) is None
    assert published("squeezenet1_0:sr=0.5", zoo.published_recipe) is None


VALUES = st.one_of(
    st.integers(1, 99), st.floats(0.01, 1).map(lambda value: round(value, 3)), st.sampled_from(["simple", "none"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
)  # fmt: skip
SPECS = st.builds(
    zoo.format_spec,
    st.sampled_from(["squeezenet1_0", "squeezenet1_1"]),
    st.dictionaries(st.sampled_from(["sr", "bypass", "pool_after", "base_e"]), VALUES, max_size=3),
)


@given(st.lists(SPECS, min_size=1, max_size=4, unique=True))
def test_specs_need_no_quotes_on_the_command_line(specs: list[str]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (argument,) = as_typed([f"models=[{','.join(specs)}]"], CompareConfig)
    assert OverridesParser.create().parse_override(argument).value() == specs


def test_what_is_already_quoted_stays() -> None:
    argument = "models=['squeezenet1_0:sr=0.5','alexnet']"
    assert as_typed([argument], CompareConfig) == [argument]
