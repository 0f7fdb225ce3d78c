"""The way from a folder of pictures to a model in use, by the commands of docs/quickstart.md as they stand there."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision

from tests.commands import HERE, typed
from tests.making.pictures import coloured, write_files
from tests.pages import fenced, lines_of

SECTION = "From your own pictures to a model in use"
CLASSES = ("bird", "cat", "dog", "fish")
MOST_COMMANDS = 11
WEIGHTS = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
SMALL = ["data.size=64", "cluster.num_threads=1"]
"""Added to each training; the other commands must find what they need in the run."""
LEARNT = "validation loss"
"""In the first line after which Ctrl-C is pressed."""


def blocks() -> dict[str, list[str]]:
    """By language, the blocks of the section in order."""
    page = (HERE.parent / "docs/quickstart.md").read_text()
    section = re.split(r"^## ", page.partition(f"## {SECTION}\n")[2], flags=re.MULTILINE)[0]
    found: dict[str, list[str]] = {"bash": [], "text": [], "python": []}
    for _, language, body in fenced(section):
        found[language].append(body)
    return found


def shown_as(line: str) -> re.Pattern[str]:
    """What a line of the page stands for: numbers are others elsewhere, and classes come in another order."""
    words = re.escape(re.sub(r"\d(?:[\d,.]*\d)?", "0", line)).replace("0", r"\d(?:[\d,.]*\d)?")
    classes = "|".join(CLASSES)
    return re.compile(re.sub(rf"\b(?:{classes})\b(?!\\\.)", f"(?:{classes})", words))


def test_the_commands_of_the_page_lead_from_pictures_to_a_model_in_use(tmp_path: Path) -> None:
    files = {f"{name}/{number:03d}.jpg": coloured(1000 * label + number, label)
             for label, name in enumerate(CLASSES) for number in range(40)}  # fmt: skip
    write_files(tmp_path, {**{f"pictures/{name}": jpeg for name, jpeg in files.items()}, "cat.jpg": coloured(777, 1)})
    found = blocks()
    commands = [shlex.split(line) for body in found["bash"] for line in lines_of(body)]
    names = [words[2].removeprefix("pipeline.") if words[0] == "python" else words[0] for words in commands]
    assert names == ["prepare", "curl", "train", "train", "evaluate", "predict", "report", "predict"]
    (script,) = found["python"]
    assert len([line for line in script.splitlines() if line]) <= 5 and len(commands) + 1 <= MOST_COMMANDS
    assert commands[3] == [*commands[2], "recipe.lr=0.0002"]

    outputs: dict[str, str] = {}
    for number, (name, words) in enumerate(zip(names, commands, strict=True)):
        if name == "curl":
            assert words == ["curl", "-LO", WEIGHTS]
            torch.manual_seed(0)
            torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / WEIGHTS.rpartition("/")[2])
            continue
        is_interrupted = number == names.index("train")
        more = SMALL if name == "train" else []
        code, output = typed([*words, *more], tmp_path, interrupted_after=LEARNT if is_interrupted else "")
        assert code == (75 if is_interrupted else 0) and "Traceback" not in output, output
        outputs[f"{name}{number}"] = output
    assert list(outputs) == ["prepare0", "train2", "train3", "evaluate4", "predict5", "report6", "predict7"]

    everything = "\n".join(outputs.values())
    for line in "".join(found["text"]).splitlines():
        assert shown_as(line).search(everything), f"{line}\nis not what is printed:\n{everything}"
    run = tmp_path / "runs" / "own"
    stopped = int(re.findall(r"step (\d+) of 80 is saved", outputs["train2"])[0])
    assert 4 <= stopped < 80 and f"steps {stopped} to 80" in outputs["train3"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["trainer/step"] for row in rows] == list(range(1, 81))
    evaluation = json.loads((tmp_path / "runs" / "own-val" / "evaluation.json").read_text())
    assert evaluation["top1"] == pytest.approx(max(row.get("val/top1", 0) for row in rows))
    assert "recipe.lr was 0.0005 and is 0.0002" in (report := (run / "report.html").read_text()) and "cat" in report
    _, by_script = typed(["python", "-c", script], tmp_path)
    told = [(name, float(probability)) for name, probability in map(str.split, by_script.splitlines())]
    first = re.findall(r"(\w+) (\d\.\d{3})", outputs["predict5"])
    assert [(name, f"{probability:.3f}") for name, probability in told] == first[:3] and len(told) == 3
    assert outputs["predict7"].count("pictures/cat/") == 5 * 40


def test_what_is_shown_is_compared_word_by_word() -> None:
    line = "own: 80 steps done. 619 pictures/s, 3.8% waiting: cat 0.996"
    assert shown_as(line).search("own: 7 steps done. 1,250.5 pictures/s, 10% waiting: dog 1")
    assert not shown_as(line).search("own: 80 steps made. 619 pictures/s, 3.8% waiting: cat 0.996")
    assert not shown_as("cat.jpg  cat 0.996").search("dog.jpg  cat 0.996")
