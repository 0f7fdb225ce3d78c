"""The comparison in W&B, as it would be uploaded."""

from pathlib import Path

import pytest

from pipeline.comparison.tracking import mirror_comparison
from pipeline.config.training import CompareTrackingConfig
from tests.making.runs import handmade_comparison, handmade_row
from tests.wandb_file import records

pytestmark = pytest.mark.not_quick
EVIL, SHOWN = "a\x1b[2J\u202eb", r"a\x1b[2J\u202eb"


def test_names_in_tables_and_charts_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    rows = [handmade_row("squeezenet1_0"), handmade_row(f"run:{EVIL}", label=EVIL, reason=EVIL, gradient_bytes=4)]
    mirror_comparison(handmade_comparison(*rows), EVIL, tmp_path, CompareTrackingConfig(mode="offline"))
    written = [path for path in (tmp_path / "wandb").glob("offline-run-*/**/*") if path.is_file()]
    tables = [path.read_text() for path in written if path.suffix == ".json" and "table" in path.name]
    shown = SHOWN.replace("\\", "\\\\")  # as JSON has it
    assert any(f"run:{shown}" in table for table in tables) and len(tables) >= 2
    (path,) = [path for path in written if path.suffix == ".wandb"]
    told = "".join(str(record) for record in records(path))
    assert r"a\\x1b[2J\\u202eb" in told
    for text in (*tables, told):
        assert not any(mark in text for mark in ("\x1b", "\u202e", r"\u001b", r"\033"))
