"""Asked to stop by a signal, a training saves, says so with its exit code, and goes on as if nothing had happened."""

import json
import time
from pathlib import Path

import pytest

from tests.commands import Ended, fired, rows, train_recorded
from tests.comparing import assert_same, differences, fed, load
from tests.making.pairs import PAIR_OPTIONS, Pair, take_unbroken

LONGEST_SECONDS = 25.0  # Slurm kills 30 s after SIGTERM
WORKERS = ("data.num_workers=2",)


def preempted(root: Path, shards: Path, name: str, devices: int, events: str, *options: str) -> Ended:
    """Train until the signals of SIGNAL_AT end it; they all fired, and it ended in time with 75."""
    already = len(fired(root / f"{name}.fed"))
    ended = train_recorded(root, shards, name, devices, *options, expect=75, environment={"SIGNAL_AT": events})
    sent = fired(root / f"{name}.fed")[already:]
    assert sorted(what for _, what in sent) == sorted(events.split("; ")), "a signal was not sent, or sent twice"
    took = time.time() - sent[0][0]
    assert took <= LONGEST_SECONDS, f"{took:.1f} s\n{ended.output}"
    assert "Traceback" not in ended.output
    return ended


def saved_step(run: Path) -> int:
    return json.loads((run / "checkpoints" / "last.json").read_text())["step"]


def test_one_rank_of_two_is_asked_in_the_middle_of_a_step(two_ranks: Pair, shards: Path, tmp_path: Path) -> None:
    """Only rank 1, while it accumulates step 7 (8 is validated: the next test's)."""
    take_unbroken(tmp_path, two_ranks.root)
    ended = preempted(tmp_path, shards, "resumed", 2, "1 step6.0 SIGTERM rank", *PAIR_OPTIONS)
    assert ended.output.count("step 7 of 11 is saved. The same command goes on.") == 1  # all ranks would say the same
    assert saved_step(tmp_path / "resumed") == 7
    assert "7 steps" in (tmp_path / "resumed" / "report.html").read_text()
    ended = train_recorded(tmp_path, shards, "resumed", 2, *PAIR_OPTIONS)
    assert "resumed from step=000000007.ckpt" in ended.output
    assert_same(Pair(tmp_path, 2))


def test_every_process_of_three_ranks_is_told_again_and_again(three_ranks: Path, shards: Path, tmp_path: Path) -> None:
    """As Slurm does it: data loader workers too. Then once more while it saves, by other signals."""
    take_unbroken(tmp_path, three_ranks)
    events = "0 step4.0 SIGUSR1 everything; 0 save5 SIGUSR1 everything; 0 save5 SIGTERM supervisor"
    ended = preempted(tmp_path, shards, "resumed", 3, events, *WORKERS)
    assert "DataLoader worker" not in ended.output
    assert saved_step(tmp_path / "resumed") == 5
    train_recorded(tmp_path, shards, "resumed", 3, *WORKERS)
    assert_same(Pair(tmp_path, 3))


def test_suspended_and_resumed_it_goes_on_or_stops_to_go_on(two_ranks: Pair, shards: Path, tmp_path: Path) -> None:
    """The launcher alone, its ranks alone, both: at the start, in a step, in a save, with a signal that waits.

    Then the ranks for longer than they wait for one another.
    """
    take_unbroken(tmp_path, two_ranks.root)
    goes_on = (
        "0 start SIGSTOP supervisor; 1 step1.0 SIGSTOP ranks; 0 step2.0 SIGSTOP supervisor; 0 step2.0 SIGSTOP ranks; "
        "0 save3 SIGSTOP supervisor; 0 save3 SIGSTOP ranks"
    )
    stops = "0 step6.0 SIGSTOP supervisor; 0 step6.0 SIGTERM supervisor; 0 step6.0 SIGSTOP ranks"
    environment = {"SUSPEND_SECONDS": "2.5", "SIGNAL_AT": f"{goes_on}; {stops}"}
    ended = train_recorded(tmp_path, shards, "resumed", 2, *PAIR_OPTIONS, expect=75, environment=environment)
    assert sorted(what for _, what in fired(tmp_path / "resumed.fed")) == sorted(f"{goes_on}; {stops}".split("; "))
    assert "Traceback" not in ended.output and saved_step(tmp_path / "resumed") in (6, 7), ended.output
    environment = {"SUSPEND_SECONDS": "8", "SIGNAL_AT": "1 step9.0 SIGSTOP supervisor; 1 step9.0 SIGSTOP ranks"}
    options = (*PAIR_OPTIONS, "cluster.step_timeout_seconds=4")
    ended = train_recorded(tmp_path, shards, "resumed", 2, *options, expect=(0, 75), environment=environment)
    assert len(fired(tmp_path / "resumed.fed")) == len(f"{goes_on}; {stops}".split("; ")) + 2
    # Continued, either rank may find what it waited for before it finds that it waited too long.
    if ended.code == 75:
        assert "was suspended for longer than the ranks wait for one another" in ended.output, ended.output
        train_recorded(tmp_path, shards, "resumed", 2, *PAIR_OPTIONS)
    assert_same(Pair(tmp_path, 2))


def test_a_validation_is_broken_off_and_made_up_for(shards: Path, tmp_path: Path) -> None:
    """Signals before a validation and inside one. Its row is written by the attempt that ends it."""
    options = ("trainer.evaluation_batch_per_rank=1",)
    train_recorded(tmp_path, shards, "unbroken", 2, *options)
    preempted(tmp_path, shards, "resumed", 2, "1 step3.0 SIGUSR2 ranks", *options)
    assert [row["trainer/step"] for row in rows(tmp_path / "resumed")] == [1, 2, 3]
    assert saved_step(tmp_path / "resumed") == 4
    preempted(tmp_path, shards, "resumed", 2, "1 validation2 SIGTERM rank", *options)  # that of step 4, again
    assert [row["trainer/step"] for row in rows(tmp_path / "resumed")] == [1, 2, 3]
    train_recorded(tmp_path, shards, "resumed", 2, *options)
    one, other = load(tmp_path / "unbroken"), load(tmp_path / "resumed")
    for part in ("state_dict", "optimizer_states"):
        assert not differences(one[part], other[part], part)
    assert one["squeezewire"]["best_score"] == other["squeezewire"]["best_score"]
    assert rows(tmp_path / "unbroken") == rows(tmp_path / "resumed")
    assert fed(tmp_path, "unbroken", 2) == fed(tmp_path, "resumed", 2)
    ledger = json.loads((tmp_path / "resumed" / "ledger.json").read_text())
    assert ledger["closed"] is True and [attempt["attempt"] for attempt in ledger["attempts"]] == [1, 2, 3]


def test_before_the_first_step_there_is_nothing_to_save(shards: Path, tmp_path: Path) -> None:
    ended = preempted(tmp_path, shards, "run", 2, "1 start SIGTERM rank")
    assert "SIGTERM before the first step" in ended.output
    assert not (tmp_path / "run" / "checkpoints" / "last.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("event", ["0 join SIGTERM rank", "0 join SIGTERM ranks", "1 loader SIGUSR1 ranks"])
def test_while_ranks_join_and_make_ready(event: str, shards: Path, tmp_path: Path) -> None:
    """Rank 0 keeps the store where they meet: a peer may find nobody. The same command then trains to the end."""
    ended = preempted(tmp_path, shards, "run", 2, event)
    assert f"{event.split()[2]} before the first step" in ended.output
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not rows(tmp_path / "run")
    train_recorded(tmp_path, shards, "run", 2)
    assert [row["trainer/step"] for row in rows(tmp_path / "run")] == list(range(1, 12))


def test_after_the_last_step_it_is_too_late(shards: Path, tmp_path: Path) -> None:
    """It is validated, saved, reported on, and done."""
    events = "0 step10.0 SIGTERM ranks; 0 validation0 SIGUSR1 rank"
    environment = {"SIGNAL_AT": events}
    train_recorded(tmp_path, shards, "run", 1, "trainer.validate_every_steps=11", environment=environment)
    assert "; ".join(what for _, what in fired(tmp_path / "run.fed")) == events
    assert saved_step(tmp_path / "run") == 11 and (tmp_path / "run" / "report.html").exists()
    assert "val/top1" in rows(tmp_path / "run")[-1]


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["one rank", "two ranks", "three ranks"])
def unbroken(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A run that nothing happens to, and room for others beside it."""
    root = tmp_path_factory.mktemp("unbroken")
    train_recorded(root, shards, "unbroken", request.param)
    return Pair(root, request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "step"),
    [
        ("0 step4.0 SIGTERM ranks", 5),  # the last of the first epoch
        ("0 step5.0 SIGTERM ranks", 6),  # the first of the second, saved in any case
        ("0 step6.0 SIGINT supervisor", 7),
        ("0 save3 SIGTERM ranks", 4),
        ("0 step6.0 SIGUSR1 rank", 7),
        ("0 validation0 SIGTERM rank", 5),  # too short to be broken off
    ],
)
def test_anywhere(event: str, step: int, unbroken: Pair, shards: Path) -> None:
    pair = Pair(unbroken.root, unbroken.devices, event.replace(" ", "_"))
    preempted(pair.root, shards, pair.name, pair.devices, event)
    assert saved_step(pair.resumed) == step
    train_recorded(pair.root, shards, pair.name, pair.devices)
    assert_same(pair)


@pytest.mark.slow
def test_at_every_step(shards: Path, tmp_path: Path) -> None:
    """Ten attempts of one step each."""
    train_recorded(tmp_path, shards, "unbroken", 2)
    for step in range(10):
        preempted(tmp_path, shards, "resumed", 2, f"{step % 2} step{step}.0 SIGTERM rank")
        assert saved_step(tmp_path / "resumed") == step + 1
    train_recorded(tmp_path, shards, "resumed", 2)
    assert not differences(load(tmp_path / "unbroken")["state_dict"], load(tmp_path / "resumed")["state_dict"])
    assert rows(tmp_path / "unbroken") == rows(tmp_path / "resumed")
