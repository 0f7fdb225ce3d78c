"""The record and its mirror: the real wandb, offline, and online against servers that do not work."""

import contextlib
import csv
import gc
import http.server
import importlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config.training import TrackingConfig
from pipeline.run.directory import RunDirectory
from pipeline.run.record import wandb_mirror
from pipeline.run.record.metrics_log import read_rows
from pipeline.run.record.tracking import Tracker, wandb_id
from tests.wandb_file import records

pytestmark = pytest.mark.not_quick

TENSORBOARD: Any = importlib.import_module("tensorboardX.proto.event_pb2")
API_KEY = "0123456789abcdef" * 2 + "01234567"
ROW = {"train/loss": 0.5, "perf/images_per_second": 100.0, "comm/gradient_bytes": 4_941_952, "comm/seconds": None}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory(tmp_path, "sweep/lr=0.1")
    directory.open()
    yield directory
    directory.close()


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings and no server of whoever runs the tests; no process of wandb's left behind."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    yield
    deadline = time.monotonic() + 20
    while wandb_processes():
        assert time.monotonic() < deadline, "a process of wandb's is left behind"
        time.sleep(0.05)
    # 2026-11: wandb 0.31 does not wait for the service it has ended, and Popen complains when it is collected.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        subprocess._cleanup()  # type: ignore[attr-defined]
        gc.collect()


def wandb_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "wandb" in process.name() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def started_helper(before: list[psutil.Process]) -> psutil.Process:
    """The service of wandb's that this process has started since; what it forks itself has its name until it execs."""
    (helper,) = [process for process in wandb_processes() if process not in before and process.ppid() == os.getpid()]
    return helper


def track(run: RunDirectory, mode: str = "offline", **changes: Any) -> Tracker:
    return Tracker(run, TrackingConfig(mode=mode), **({"rank": 0, "model": "squeezenet1_1"} | changes))


def mirrored(run: RunDirectory) -> tuple[set[str], list[dict[str, str]]]:
    """(run ids, rows) of all offline attempts."""
    ids, rows = set(), []
    for path in sorted(run.wandb.glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                rows.append({"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item})
    return ids, rows


def test_two_attempts_are_one_run_with_every_name(run: RunDirectory) -> None:
    with track(run) as tracker:
        assert tracker.mode == "offline"
        for step in (1, 2, 3):
            tracker.log(step, ROW)
        first_id = tracker.run_id
    with track(run, resume_step=2) as tracker:
        tracker.log(3, ROW)
        tracker.summarize({"val/top1": 0.9, "nothing": None})
        assert tracker.run_id == first_id
    assert [row["trainer/step"] for row in read_rows(run.metrics)] == [1, 2, 3]
    ids, rows = mirrored(run)
    assert ids == {first_id}
    assert [row["trainer/step"] for row in rows] == ["1", "2", "3", "3"]
    assert {"train/loss", "perf/images_per_second", "comm/gradient_bytes"} <= rows[0].keys()
    assert "comm/seconds" not in rows[0]


def test_neither_command_line_nor_key_is_in_any_file(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "password=hunter2secret"])
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    with track(run) as tracker:
        tracker.log(1, ROW)
    for path in filter(Path.is_file, run.path.rglob("*")):
        content = path.read_bytes()
        assert b"hunter2secret" not in content and API_KEY.encode() not in content, path


def test_other_ranks_and_disabled_write_no_mirror(run: RunDirectory) -> None:
    with track(run, rank=1) as tracker:
        tracker.log(1, ROW)
        tracker.sync()
        assert (tracker.mode, tracker.run_id) == ("disabled", None)
    assert not run.metrics.exists()
    with track(run, mode="disabled") as tracker:
        tracker.log(1, ROW)
    assert [row["trainer/step"] for row in read_rows(run.metrics)] == [1]
    assert not run.wandb.exists()


def test_the_id_is_made_once(run: RunDirectory, tmp_path: Path) -> None:
    assert wandb_id(run) == wandb_id(run)
    assert wandb_id(run).startswith("sweep-lr-0-1-")
    other = RunDirectory(tmp_path / "elsewhere", run.name)
    other.path.mkdir(parents=True)
    assert wandb_id(other) != wandb_id(run)


def test_what_is_not_finite_is_said_at_the_end(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with track(run) as tracker:
        tracker.log(1, {"train/loss": float("nan")})
    assert "1 values of train/loss were not finite" in capsys.readouterr().err
    assert next(read_rows(run.metrics)) == {"trainer/step": 1, "train/loss": None}


@pytest.mark.filterwarnings(
    "ignore:subprocess .* is still running:ResourceWarning"
)  # wandb's, of what we kill; 2026-11-24
def test_a_dead_wandb_does_not_hurt(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    ending = wandb_processes()  # of the test before, which need not be gone yet
    with track(run) as tracker:
        tracker.log(1, ROW)
        core = started_helper(ending)
        core.send_signal(signal.SIGKILL)
        core.wait(20)
        for step in range(2, 200):
            tracker.log(step, ROW)
    assert [row["trainer/step"] for row in read_rows(run.metrics)] == list(range(1, 200))
    assert capsys.readouterr().err.count("W&B is off") == 1
    gc.collect()


@pytest.mark.parametrize("logs", [False, True], ids=["at the end", "while rows come"])
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # as above
def test_a_stopped_wandb_neither_holds_a_training_nor_its_end(
    logs: bool, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGSTOP: it dies of nothing but SIGKILL, and its socket takes rows until it is full."""
    monkeypatch.setattr(wandb_mirror, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(wandb_mirror, "FINISH_SECONDS", {"offline": 1.0})
    ending = wandb_processes()
    num_rows = 5000 if logs else 2
    with track(run) as tracker:
        tracker.log(1, ROW)
        core = started_helper(ending)
        core.suspend()
        deadline = time.monotonic() + 20
        while core.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for step in range(2, num_rows):
            tracker.log(step, ROW)
        assert tracker.mode == ("disabled" if logs else "offline")
    assert len(list(read_rows(run.metrics))) == num_rows - 1
    assert not psutil.pid_exists(core.pid) or core.status() == psutil.STATUS_ZOMBIE
    warned = capsys.readouterr().err
    assert (
        warned.count("W&B is off") == 1 and "gave no answer for" in warned and "metrics.jsonl has everything" in warned
    )
    gc.collect()


# --- online ---


@pytest.fixture
def online(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setattr(wandb_mirror, "PROBE_SECONDS", 0.5)
    return run


def test_without_a_key_it_is_offline_and_nobody_is_asked(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with track(run, mode="online") as tracker:
        assert tracker.mode == "offline"
        tracker.log(1, ROW)
    assert capsys.readouterr().err.count("no API key is configured") == 1
    assert len(mirrored(run)[1]) == 1


@pytest.mark.parametrize("accepts", [False, True], ids=["refuses", "accepts and never answers"])
def test_a_server_that_does_not_answer_means_offline(
    accepts: bool, online: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        if not accepts:
            server.close()
            monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        else:
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with track(online, mode="online") as tracker:
            assert tracker.mode == "offline"
            tracker.log(1, ROW)
    assert capsys.readouterr().err.count("W&B stays offline") == 1
    assert len(mirrored(online)[1]) == 1


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers everything with 401."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Quietly."""
        del format, args


def test_a_server_that_refuses_the_key_does_not_hurt(
    online: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with track(online, mode="online") as tracker:
            tracker.log(1, ROW)
            assert tracker.mode == "disabled"
        server.shutdown()
    assert capsys.readouterr().err.count("W&B is off") == 1
    assert [row["trainer/step"] for row in read_rows(online.metrics)] == [1]


def test_lightnings_loggers_mirror_the_record(run: RunDirectory) -> None:
    """Of a run that was saved after two steps, made a third, and began again with it; None is nowhere."""
    tracking = TrackingConfig(mode="disabled", loggers=("csv", "tensorboard"))
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with Tracker(run, tracking, rank=0, model="x", resume_step=resume_step) as tracker:
            for step in steps:
                tracker.log(step, {**ROW, "train/loss": step / 8, **({"val/top1": 0.5} if step == 2 else {})})
    Tracker(run, tracking, rank=1, model="x").log(9, ROW)
    for attempt, steps in enumerate(((1, 2, 3), (3, 4))):
        with (run.path / f"csv/version_{attempt}/metrics.csv").open(newline="") as file:
            kept = list(csv.DictReader(file))
        assert [(int(row["step"]), float(row["train/loss"])) for row in kept] == [(step, step / 8) for step in steps]
        assert "comm/seconds" not in kept[0] and kept[0].get("val/top1", "") == ""
    events = [event for path in sorted(run.path.glob("tensorboard/events.*")) for event in events_of(path)]
    told = [(event.step, value.simple_value) for event in events for value in event.summary.value
            if value.tag == "train/loss"]  # fmt: skip
    assert told == [(step, step / 8) for step in (1, 2, 3, 3, 4)]
    begun_anew = [event.step for event in events if event.session_log.status == TENSORBOARD.SessionLog.START]
    assert begun_anew == [1, 3]  # TensorBoard forgets what it was told of these steps before


def events_of(path: Path) -> Iterator[Any]:
    """What TensorBoard reads in a file: each event after 8 bytes of length and 4 of checksum, 4 more behind it."""
    content, position = path.read_bytes(), 0
    while position < len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        yield TENSORBOARD.Event.FromString(content[position + 12 : position + 12 + length])
        position += 16 + length
