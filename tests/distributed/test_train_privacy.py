"""With privacy=strict, what is handed on of a run does not say where it was made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import SMALL, clean_environment

ROOT = Path(__file__).resolve().parents[2]
HOST, USER = "host-of-quillon", "quillon"
PUBLISHED = ("report.html", "ledger.json", "environment.json", "attempts.jsonl", "config.yaml", "validation.json",
             "metrics.jsonl", "wandb/*/*.wandb", "checkpoints/*.ckpt", "checkpoints/*.json")  # fmt: skip


def found_in(run: Path, *words: str) -> dict[str, set[str]]:
    """Which of the words each published file holds."""
    files = [path for pattern in PUBLISHED for path in run.glob(pattern)]
    assert {path.suffix for path in files} >= {".html", ".json", ".wandb", ".ckpt"}
    found = {path.name: {word for word in words if word.encode() in path.read_bytes()} for path in files}
    return {name: held for name, held in found.items() if held}


@pytest.mark.skipif(os.geteuid() != 0, reason="a name for the machine wants root")
def test_nothing_that_is_published_names_places(shards: Path, tmp_path: Path) -> None:
    home = tmp_path / f"home-of-{USER}"
    shutil.copytree(shards, home / "sets" / "shards")
    (home / "work").mkdir()
    environment = clean_environment() | {"HOME": str(home), "LOGNAME": USER, "USER": USER, "PYTHONPATH": str(ROOT)}
    words = (HOST, USER, str(home), str(tmp_path), str(ROOT))

    def train(name: str, *more: str) -> Path:
        options = [*SMALL, f"name={name}", f"data.root={home}/sets/shards", "trainer.max_steps=2", *more]
        program = [sys.executable, "-m", "pipeline.train", *options]
        line = ["unshare", "--uts", "sh", "-c", f'hostname {HOST} && exec "$@"', "sh", *program]
        ended = subprocess.run(
            line, cwd=home / "work", env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return home / "work" / "runs" / name

    told = found_in(train("open"), *words)
    assert HOST in told["report.html"] and str(home) in told["report.html"], told  # so that the search would find it
    assert any(name.endswith(".wandb") for name in told) and any(name.endswith(".ckpt") for name in told), told
    run = train("strict", "privacy=strict")
    assert found_in(run, *words) == {}
    page = (run / "report.html").read_text()
    assert "data.root=.../shards" in page and "server 0" in page
    # What it leaves out is not missed: the same command goes on.
    train("strict", "privacy=strict", "trainer.max_steps=3")
    changed = [json.loads(line)["changed"] for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert len(changed) == 2 and not any("data.root" in clause for clause in changed[1])
