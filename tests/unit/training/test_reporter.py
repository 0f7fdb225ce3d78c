"""The report of a training that goes on: made beside it, by a process of its own, and never a reason to fail."""

from pathlib import Path

import pytest

from pipeline.run.directory import RunDirectory
from pipeline.training.reporter import Reporter
from tests.commands import run
from tests.making.runs import MakeRun, make_run

__all__ = ["make_run"]


def reporter_of(directory: Path, every_seconds: float | None, *, is_writer: bool = True) -> Reporter:
    run_directory = RunDirectory(directory.parent, directory.name)
    return Reporter(run_directory, None, num_classes=2, every_seconds=every_seconds, is_writer=is_writer)


@pytest.mark.not_quick
def test_a_checkpoint_has_the_report_made(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")  # as in a training, whose rank the process must not take itself for
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("pipeline.training.reporter.PATIENCE_SECONDS", 120.0)  # a loaded machine is no failure
    directory = make_run("first", num_steps=30, validated=True)
    reporter = reporter_of(directory, 0.0)
    reporter.saved()
    reporter.saved()  # one is being made: none more
    reporter.close()
    assert "Learning: squeezenet1_0, 30 steps" in (directory / "report.html").read_text()
    assert capfd.readouterr() == ("", "")


@pytest.mark.not_quick
def test_a_report_that_cannot_be_made_is_a_warning(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.training.reporter.PATIENCE_SECONDS", 120.0)
    directory = make_run("first")
    (directory / "ledger.json").write_text("{")
    reporter = reporter_of(directory, 0.0)
    reporter.saved()
    reporter.close()
    said = capfd.readouterr().err
    assert said.startswith(f"warning: {directory}/report.html is not written (") and "not readable JSON" in said
    assert f"python -m pipeline.report run={directory}" in said and said.count("\n") == 1
    assert reporter.finish().startswith("not written")
    assert "warning: " in capfd.readouterr().err


def test_not_before_its_time_not_where_it_is_not_wanted_and_by_one_rank_only(make_run: MakeRun) -> None:
    directory = make_run("first")
    for reporter in (
        reporter_of(directory, 3600.0),
        reporter_of(directory, None),
        reporter_of(directory, 0.0, is_writer=False),
    ):
        reporter.saved()
        assert reporter._child is None
        reporter.close()
    assert not (directory / "report.html").exists()


@pytest.mark.not_quick
def test_the_command(make_run: MakeRun, tmp_path: Path) -> None:
    directory = make_run("a run [1]", num_steps=3)
    ended = run(["-m", "pipeline.report", f"run={directory}"])
    assert ended.output == f"The report: {directory}/report.html\n"
    assert "holds no ledger.json" in run(["-m", "pipeline.report", f"run={tmp_path}"], expect=3).output
