"""`study.json` and its tables from runs written by hand: one closed, one that does not close, one that is not there."""

import csv
import json
from pathlib import Path

import pytest

from pipeline.config.study import StudyConfig
from pipeline.core.cli import compose
from pipeline.core.schemas.study import EnvelopePointJson, StudyJson
from pipeline.reporting.runs import read_run
from pipeline.reporting.study import envelope_tables, study_sentence, terminal_table, write_study
from pipeline.studying.plan import make_plan
from pipeline.studying.result import study_result
from pipeline.studying.runs import Made
from tests.json_shape import mismatches
from tests.making.runs import handmade_run

VARIANTS = "study.variants=[{name:sound,published:{source:a paper,top1:0.5}},{name:leaking},{name:dead}]"


@pytest.fixture(scope="module")
def study(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyJson:
    root = tmp_path_factory.mktemp("study")
    where = ["name=s", f"run_root='{root}'", f"data.root='{shards}'", "study.budget.steps=50", "study.seeds=[0,1]"]
    overrides = "study.overrides=[model=squeezenet1_0,batch.global_size=16,model.metaparameters.bypass=simple]"
    plan = make_plan(compose("study", StudyConfig, [*where, VARIANTS, overrides, "study.targets=[0.3,0.99]"]))

    def run(variant: str, seed: int, closed: bool) -> Made:
        made = handmade_run(num_steps=50, num_classes=4, validated=True)
        made.ledger["closed"] = closed
        for row in made.rows:
            if variant == "leaking" and "val/top1" in row:
                row["val/top1"] += 0.1 * (seed + 1)
        return Made(seed, f"{variant}/seed{seed}", read_run(made.write(root / variant / f"seed{seed}")))

    died = [Made(seed, f"dead/seed{seed}", reason="It died.", exit_code=5) for seed in (0, 1)]
    found = {"sound": [run("sound", 0, True), run("sound", 1, True)], "dead": died}
    return study_result(plan, {**found, "leaking": [run("leaking", 0, True), run("leaking", 1, False)]})


def test_it_is_what_the_schema_says(study: StudyJson) -> None:
    assert mismatches(json.loads(json.dumps(study)), StudyJson) == []


def test_a_ledger_that_does_not_close_is_said_and_gives_no_curve(study: StudyJson) -> None:
    sound, leaking, dead = study["rows"]
    assert (sound["ledger_closed"], leaking["ledger_closed"], dead["ledger_closed"]) == (True, False, None)
    assert [run["ledger_closed"] for run in leaking["runs"]] == [True, False]
    assert [one["num_runs"] for one in leaking["reach"]] == [1, 1]
    assert [point["step"] for point in sound["curve"]] == [25, 50] and dead["curve"] == []
    names = [row.cells[0].text for row in terminal_table(study).rows]
    assert names == ["sound", "leaking * (1 of 2 seeds)", "dead"]
    assert terminal_table(study).caption == "* the ledger does not close"


def test_a_target_is_priced_or_never_reached(study: StudyJson) -> None:
    (reached, never) = study["rows"][0]["reach"]
    assert (reached["num_reached"], reached["steps"], reached["images"]) == (2, 25.0, 400.0)
    assert reached["seconds"] == pytest.approx(25 * 0.25)
    assert never["num_reached"] == 0 and never["gigabytes"] is None
    assert study["null_reasons"]["rows.0.reach.1.gigabytes"] == "No validation reached 99%."
    assert "did not time its buckets" in study["null_reasons"]["rows.0.reach.0.forecasts.0.seconds"]


def test_every_null_of_a_row_has_its_reason(study: StudyJson) -> None:
    for index, row in enumerate(study["rows"]):
        for key, value in row.items():
            assert (value is None) == (f"rows.{index}.{key}" in study["null_reasons"]), (key, value)
    assert study["null_reasons"]["rows.2.top1"] == "It died."


def test_the_files_say_what_failed(study: StudyJson, tmp_path: Path) -> None:
    page = write_study(study, tmp_path).read_text()
    assert "It died." in page and "does not close" in page and "No variant reaches 99%." in page
    assert "It died." in (tmp_path / "study.csv").read_text()
    assert page.count("leaking * (1 of 2 seeds)") >= 6 and "dead (" not in page.partition("<table")[2]
    sentence = study_sentence(study)
    assert sentence.startswith("sound is the most accurate of 1 of 3 variants") and ", 2 seeds, for" in sentence
    assert sentence.endswith("a closed ledger: leaking * (1 of 2 seeds), dead (failed).")
    (sound, leaking, dead) = csv.DictReader((tmp_path / "study.csv").read_text().splitlines())
    assert [line["num_seeds"] for line in (sound, leaking, dead)] == ["2", "1", "0"]
    assert (sound["to_0.3_reached"], leaking["to_0.3_runs"], sound["to_0.99_reached"]) == ("2", "1", "0")
    assert (sound["published_source"], sound["published_top1"], leaking["published_top1"]) == ("a paper", "0.5", "")


def test_means_are_of_runs_whose_ledger_closes(study: StudyJson) -> None:
    leaking = study["rows"][1]
    alone = leaking["runs"][0]["top1"]
    assert leaking["num_seeds"] == 1 and alone is not None
    assert leaking["top1"] == {"mean": alone, "lowest": alone, "highest": alone}
    assert alone > (study["rows"][0]["top1"] or {"mean": 1.0})["mean"]  # and yet it is not the most accurate


def test_the_best_for_a_budget_is_so_until_another_is_better(study: StudyJson) -> None:
    assert {point["name"] for point in study["envelope"]["images"]} == {"sound"}  # the other lacks a seed
    points = [(1.0, 0.1, "a"), (2.0, 0.2, "a"), (5.0, 0.3, "b"), (7.0, 0.4, "a")]
    best: list[EnvelopePointJson] = [{"spent": spent, "top1": top1, "name": name} for spent, top1, name in points]
    (table,) = envelope_tables({**study, "envelope": {"gigabytes": [], "seconds": [], "images": best}})
    assert [[cell.value for cell in row.cells] for row in table.rows] == [
        ["a", 1.0, 5.0, 0.2],
        ["b", 5.0, 7.0, 0.3],
        ["a", 7.0, None, 0.4],
    ]
