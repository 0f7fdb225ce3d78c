"""Names and paths are taken as they are typed, through the commands themselves and the shell's arguments."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from tests.commands import SMALL, run
from tests.making.pictures import pictures, write_files

NAMES = {"first": "1_1", "second": "1e5", "third": "2024_11_29", "evaluation": "12e4567", "comparison": "007"}
PATHS = {
    "source": "pictures (of a, b) #1",
    "classes": "~/n[1], 'x'.txt",
    "shards": "[shards], {2} #3",
    "runs": "my  runs",
    "other runs": "~/b=c;d",
    "evaluations": "50%20 off & @home",
    "comparisons": "läufe $x",
    "picture": 'cat [1] "x"*?.jpg',
    "pattern": "pictures (of a, b) #1/d*/000[12].jpg",
    "state": "null.pth",
    "list": "1_000",
    "link": "-3",
    "again": "1.10/~b",
    "told": "a:b\\c.json",
    "empty root": "true",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Where each of PATHS is, seen from the folder of `here`, with `home` as HOME."""
    here, home = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("home")
    where = {key: home / path[2:] if path.startswith("~/") else here / path for key, path in PATHS.items()}
    return {**where, "here": here, "home": home}


def typed(places: Mapping[str, Path], command: str, *words: str) -> str:
    """What the command prints."""
    environment = {"HOME": str(places["home"]), "XDG_CACHE_HOME": str(places["home"] / "cache")}
    return run(["-m", f"pipeline.{command}", *words], cwd=places["here"], environment=environment).output


def test_twenty_names_and_paths_are_taken_as_typed(places: Mapping[str, Path]) -> None:
    files = pictures({"cat": 8, "dog": 8}, height=40, width=48)
    write_files(places["source"], files)
    places["classes"].write_text("dog\ncat\n")
    places["picture"].write_bytes(files["cat/0000.jpg"])
    small = [word for word in SMALL if not word.startswith(("trainer.", "batch."))]
    small += ["trainer.max_steps=1", "batch.global_size=4", "tracking=disabled", "cluster.devices=2"]

    prepared = [f"{key}={PATHS[place]}" for key, place in (("source", "source"), ("out", "shards"))]
    typed(places, "prepare", *prepared, f"classes={PATHS['classes']}", "val_fraction=0.25", "num_workers=1")
    assert json.loads((places["shards"] / "manifest.json").read_text())["classes"] == ["dog", "cat"]

    for name, root, more in (
        ("first", "runs", []),
        ("second", "other runs", [f"init.checkpoint={PATHS['runs']}/{NAMES['first']}"]),
        ("third", "again", [f"tracking.tags=[{PATHS['list']}]"]),
    ):
        words = [f"name={NAMES[name]}", f"run_root={PATHS[root]}", f"data.root={PATHS['shards']}", *small, *more]
        output = typed(places, "train", *words)
        kept = yaml.safe_load((places[root] / NAMES[name] / "config.yaml").read_text())
        assert (kept["name"], kept["data"]["root"]) == (NAMES[name], PATHS["shards"]), output
        assert (places[root] / NAMES[name] / "report.html").is_file()
    assert kept["tracking"]["tags"] == [PATHS["list"]]

    checkpoint = f"checkpoint={PATHS['other runs']}/{NAMES['second']}"
    words = [f"name={NAMES['evaluation']}", f"run_root={PATHS['evaluations']}", f"data.root={PATHS['shards']}"]
    typed(places, "evaluate", *words, checkpoint, "cluster.num_threads=1", "data.num_workers=0")
    evaluation = json.loads((places["evaluations"] / NAMES["evaluation"] / "evaluation.json").read_text())
    assert evaluation["num_samples"] == 4 and f"{places['other runs']}/{NAMES['second']}" in evaluation["checkpoint"]

    told = typed(places, "predict", checkpoint, f"source={PATHS['picture']}", "format=jsonl")
    assert [json.loads(line)["path"] for line in told.splitlines()] == [PATHS["picture"]]
    assert typed(places, "predict", checkpoint, f"source={PATHS['pattern']}", "format=csv", "top=1").count("dog/") == 2

    assert NAMES["third"] in typed(places, "report", f"run={PATHS['again']}/{NAMES['third']}")
    runs = ",".join(f'"{PATHS[root]}/{NAMES[name]}"' for name, root in (("first", "runs"), ("third", "again")))
    words = [f"name={NAMES['comparison']}", f"run_root={PATHS['comparisons']}", f"runs=[{runs}]", "tracking=disabled"]
    typed(places, "compare", *words)
    comparison = json.loads((places["comparisons"] / NAMES["comparison"] / "comparison.json").read_text())
    assert [NAMES[name] in row["model"] for name, row in zip(("first", "third"), comparison["models"], strict=True)]
