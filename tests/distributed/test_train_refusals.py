"""What cannot go well ends with one sentence and the documented code, whatever rank meets it first."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torchvision

from tests.commands import SMALL, assert_holds_no, run, sentences, train, train_recorded
from tests.making.pairs import PAIR_OPTIONS, Pair
from tests.making.shards import write_shards

SHORT = ("trainer.max_steps=4", "trainer.validate_every_steps=0", "trainer.checkpoint_every_steps=2")


# --- known before any rank starts ---


@pytest.mark.parametrize("devices", [1, 2])  # the rank itself, and the parent of two
@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("model.name=squeezenet1_2", 2, ["squeezenet1_2", "squeezenet1_1"]),
        ("model=squeezenet1_2", 2, ["squeezenet1_2", "squeezenet1_1"]),
        ("batch.globalsize=8", 2, ["batch.globalsize", "batch.global_size"]),
        ("model.metaparameters.srr=0.5", 2, ["srr", "sr"]),
        ("data.size=16", 2, ["squeezenet1_1", "16 x 16", "data.size to 17"]),
        ("name=../up", 2, ["'../up'"]),
        ("data.root=nowhere", 3, ["data.root=nowhere", "pipeline.prepare"]),
        ("data.train_split=training", 3, ["training", "train"]),
        ("data.val_split=test", 3, ["test", "val"]),
        ("init.freeze=[feature]", 2, ["'feature'", "Did you mean 'features'", "all_but_head"]),
        ("init.checkpoint=nowhere.pth", 4, ["nowhere.pth does not exist"]),
    ],
)
def test_what_the_command_line_tells(
    devices: int, override: str, code: int, words: list[str], shards: Path, tmp_path: Path
) -> None:
    ended = train(tmp_path / "runs", shards, "refused", devices, override, expect=code)
    (sentence,) = sentences(ended.output)
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "runs").exists()


def test_weights_of_another_model_are_refused_once(shards: Path, tmp_path: Path) -> None:
    torch.save(torchvision.models.squeezenet1_0(num_classes=4).state_dict(), tmp_path / "other.pth")
    ended = train(tmp_path / "runs", shards, "refused", 2, f"init.checkpoint={tmp_path}/other.pth", expect=4)
    (sentence,) = sentences(ended.output)
    assert "other.pth holds another model, which does not fit squeezenet1_1" in sentence
    assert "give model= and model.metaparameters= as they are of these weights, or other weights" in sentence
    assert not (tmp_path / "runs").exists()


def test_a_batch_the_ranks_cannot_share(shards: Path, tmp_path: Path) -> None:
    ended = train(tmp_path / "runs", shards, "refused", 2, "batch.global_size=13", expect=2)
    (sentence,) = sentences(ended.output)
    assert "batch.global_size=13 is not divisible by 2 ranks: set it to 12 or 14" in sentence


def test_a_root_without_shards(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = train(tmp_path / "runs", tmp_path / "empty", "refused", 2, expect=3)
    assert "holds no shards" in sentences(ended.output)[0]


# --- found by the ranks ---


def test_a_label_out_of_range_ends_every_rank_before_work_starts(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", labels={17: "9"})
    ended = train(tmp_path / "runs", shards, "refused", 2, *SHORT, expect=3)
    said = sentences(ended.output)
    assert said and all("000000017" in sentence and "9" in sentence for sentence in said), said
    assert not (tmp_path / "runs").exists()


def test_a_picture_too_many_that_does_not_decode(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", damaged=(17,))
    ended = train(tmp_path / "runs", shards, "stopped", 2, *SHORT, "trainer.max_steps=5", expect=3)
    (sentence,) = sentences(ended.output)  # of the one rank that was to show it
    assert "1 of 60 samples cannot be used" in sentence and "data.max_bad_fraction=0.0 allows 0" in sentence
    assert "'000000017' of shard train-000000.tar" in sentence


def test_a_run_that_another_process_took_over_is_left_to_it(shards: Path, tmp_path: Path) -> None:
    """The other one is a record, written amid step 6: the next save, or a beat before it, finds it there."""
    record = tmp_path / "successor"
    said = json.dumps({"host": "elsewhere", "pid": 7, "job": "78", "term": 2, "token": "its"})
    record.write_text(said.ljust(400))  # longer than the one before, and written over it at once
    run_directory = tmp_path / "taken"
    kept = tmp_path / "kept"
    replace = f"dd if='{record}' of='{run_directory}/lock' conv=notrunc status=none"
    take = {"DO": f"{replace} && cp -r '{run_directory}/checkpoints' '{kept}'"}
    ended = train_recorded(tmp_path, shards, "taken", 2, kill_at="0 5 0 shell", environment=take, expect=4)
    told = "Run 'taken' was taken over by another process (host elsewhere, pid 7, job 78)"
    assert told in sentences(ended.output)[0] and "Traceback" not in ended.output
    assert (run_directory / "lock").read_bytes() == record.read_bytes()
    found = {path.name: path.read_bytes() for path in (run_directory / "checkpoints").iterdir()}
    assert found == {path.name: path.read_bytes() for path in kept.iterdir()}
    assert f"step={3:09d}.ckpt" in found and not (run_directory / "report.html").exists()


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_trouble_that_may_not_stop_a_run(devices: int, tmp_path: Path) -> None:
    """Two bad pictures within the budget, and a W&B server that is not there."""
    shards = write_shards(tmp_path / "shards", damaged=(17, 41))
    keys = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "AWS_SECRET_ACCESS_KEY": "a/secret+of/somebody's"}
    unreachable = {**keys, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    options = (*SHORT, "trainer.max_steps=5", "data.max_bad_fraction=0.04", "tracking=online")
    ended = train(tmp_path / "runs", shards, "goes_on", devices, *options, environment=unreachable)
    run_directory = tmp_path / "runs" / "goes_on"
    for key, shard in (("000000017", "train-000000.tar"), ("000000041", "train-000001.tar")):
        assert ended.output.count(f"another picture takes the place of sample '{key}' of shard {shard}") == 1
    noted = [json.loads(line) for line in (run_directory / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((bad["sample_id"], bad["key"]) for bad in noted) == [(17, "000000017"), (41, "000000041")]
    assert f"2 of 60 pictures were replaced: {run_directory / 'quarantine.jsonl'}" in ended.output
    assert ended.output.count("W&B stays offline") == 1
    assert list((run_directory / "wandb").glob("offline-run-*/*.wandb"))
    assert_holds_no(tmp_path / "runs", ended.output, *keys.values())
    assert not [path for path in run_directory.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o002]
    steps = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["trainer/step"] for row in steps] == [1, 2, 3, 4, 5]  # every rank had a full batch for each


@pytest.mark.slow
def test_the_budget_is_of_all_ranks_and_attempts_together(tmp_path: Path) -> None:
    """Three bad pictures on three ranks, one of them met by an earlier attempt; two are allowed."""
    shards = write_shards(tmp_path / "shards", damaged=(10, 25, 50))
    options = (*SHORT, "trainer.max_steps=5", "data.max_bad_fraction=0.04", "trainer.checkpoint_every_steps=1")
    ended = train(tmp_path / "runs", shards, "stopped", 3, *options, expect=3)
    assert any("3 of 60 samples cannot be used" in sentence for sentence in sentences(ended.output))
    quarantine = tmp_path / "runs" / "stopped" / "quarantine.jsonl"
    assert sorted(json.loads(line)["sample_id"] for line in quarantine.read_text().splitlines()) == [10, 25, 50]
    again = train(tmp_path / "runs", shards, "stopped", 3, *options, "data.max_bad_fraction=0.05")
    assert "3 of 60 pictures were replaced" in again.output
    assert len(quarantine.read_text().splitlines()) == 3


@pytest.mark.slow
def test_who_stands_in_for_a_bad_picture_is_always_the_same(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", damaged=tuple(range(10, 20)))
    options = ("data.max_bad_fraction=0.5", *SHORT, "trainer.max_steps=10")
    seen = []
    for name, workers in (("one", 0), ("two", 2)):
        train_recorded(tmp_path, shards, name, 2, *options, f"data.num_workers={workers}")
        fed = [(tmp_path / f"{name}.fed" / f"rank{rank}.jsonl").read_text().splitlines() for rank in range(2)]
        keys = ("step", "micro", "ids", "pixels")
        seen.append([[[json.loads(line)[key] for key in keys] for line in lines] for lines in fed])
    assert seen[0] == seen[1]


def test_a_validation_picture_that_does_not_decode_is_never_left_out(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", damaged=(70,))
    options = ("trainer.max_steps=1", "trainer.validate_every_steps=1", "data.max_bad_fraction=0.5")
    ended = train(tmp_path / "runs", shards, "stopped", 2, *options, expect=3)
    (sentence,) = sentences(ended.output)
    assert "Validation cannot use sample '000000070'" in sentence


def test_a_loss_that_is_not_finite(shards: Path, tmp_path: Path) -> None:
    options = ("trainer.checkpoint_every_steps=1", "trainer.validate_every_steps=0", "recipe.lr=1e30")
    ended = train(tmp_path, shards, "diverged", 2, *options, "recipe.warmup_steps=0", expect=5)
    said = sentences(ended.output)
    assert any("is not finite (NaN or infinity)" in sentence and "Sample ids of rank" in sentence for sentence in said)
    text = (tmp_path / "diverged" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    saved = list((tmp_path / "diverged" / "checkpoints").glob("step=*.ckpt"))
    assert len(saved) == len(text.splitlines()) > 0  # everything before it is kept


# --- a run that goes on ---


@pytest.fixture
def root(two_ranks: Pair, tmp_path: Path) -> Path:
    """run_root with a copy, to be spoiled, of the run `unbroken`: saved after 9 and 11 steps, the best kept too."""
    shutil.copytree(two_ranks.unbroken, tmp_path / "unbroken")
    return tmp_path


def go_on(root: Path, shards: Path, *more: str, expect: int) -> str:
    """Make the run two steps longer."""
    return train(root, shards, "unbroken", 2, *PAIR_OPTIONS, "trainer.max_steps=13", *more, expect=expect).output


@pytest.mark.slow
def test_another_model_does_not_go_on_from_this_ones_checkpoint(root: Path, shards: Path) -> None:
    config = (root / "unbroken" / "config.yaml").read_bytes()
    said = sentences(go_on(root, shards, "model=squeezenet1_0", expect=4))
    assert said
    for sentence in said:
        assert "squeezenet1_1" in sentence and "squeezenet1_0" in sentence and "name=" in sentence
    assert (root / "unbroken" / "config.yaml").read_bytes() == config  # still tells what the run is made of


def test_nothing_is_trained_over_checkpoints_that_cannot_be_trusted(root: Path, shards: Path) -> None:
    directory = root / "unbroken" / "checkpoints"
    for path in directory.glob("*.ckpt"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    output = go_on(root, shards, expect=4)
    assert "none verifies" in sentences(output)[0]
    assert output.count("checkpoint passed over") == len(list(directory.glob("*.ckpt")))
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(root: Path, shards: Path) -> None:
    newest = root / "unbroken" / "checkpoints" / "step=000000011.ckpt"
    newest.with_name("best.ckpt").unlink()  # which may be of step 11 too, and sound
    newest.write_bytes(newest.read_bytes()[:-100])
    output = go_on(root, shards, expect=0)
    assert "checkpoint passed over" in output and "resumed from step=000000009.ckpt" in output


def test_a_full_disk_is_said_and_what_was_saved_stays(shards: Path, tmp_path: Path) -> None:
    """The limit on file size stands in for the disk: the record fits, a checkpoint does not."""
    program = (
        "import resource, sys; from pipeline.train import *;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, {resource.RLIM_INFINITY}));"
        "run_command('train', TrainConfig, train)"
    )
    where = [f"run_root={tmp_path}", f"data.root={shards}", "name=full", "cluster.devices=1", "tracking=disabled"]
    ended = run(["-c", program, *where, *SMALL, *SHORT, "model.num_classes=1000"], expect=4)
    (sentence,) = sentences(ended.output)
    assert "Cannot save" in sentence and "step=000000002.ckpt" in sentence and "make room" in sentence
    assert not list((tmp_path / "full" / "checkpoints").iterdir())
    steps = [json.loads(line) for line in (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()]
    assert [row["trainer/step"] for row in steps] == [1, 2]


def test_surroundings_that_may_not_stop_a_run(shards: Path, tmp_path: Path) -> None:
    """A full disk behind stdout, a TMPDIR too long for the workers' sockets, no home, what others left behind.

    Ranks that believe in torchrun's agent wait for it without end.
    """
    scratch = tmp_path / ("j" * 80)
    scratch.mkdir()
    around = {"TMPDIR": str(scratch), "HOME": "/dev/null", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    around["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    where = [f"run_root={tmp_path / 'runs'}", f"data.root={shards}", "name=goes_on", "cluster.devices=2"]
    options = ["tracking=offline", *SHORT, "trainer.max_steps=2", "data.num_workers=1"]
    full = ("bash", "-c", 'exec "$@" > /dev/full', "bash")
    ended = run(["-m", "pipeline.train", *where, *SMALL, *options], environment=around, prefix=full)
    assert ended.output.count("warning: stdout takes no more (No space left on device)") == 1  # rank 0 alone prints
    assert ended.output.count(f"TMPDIR={scratch} is longer than") == 1
    assert "Traceback" not in ended.output and " INFO " not in ended.output  # of W&B, which finds no place for its log
    run_directory = tmp_path / "runs" / "goes_on"
    assert len((run_directory / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run_directory / "checkpoints" / "step=000000002.ckpt").is_file()
    assert (run_directory / "report.html").is_file() and list((run_directory / "wandb").glob("offline-run-*/*.wandb"))
    assert not list(scratch.iterdir())


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """A batch is of a hundred shards, and 64 files may be open."""
    shards = write_shards(tmp_path / "shards", train=(2,) * 100, val=(4,))
    where = (f"run_root={tmp_path}", f"data.root={shards}", "name=few", "tracking=disabled")
    bounds = ("batch.global_size=200", "trainer.max_steps=1", "trainer.validate_every_steps=0")
    limited = ("bash", "-c", 'ulimit -n 64; exec "$@"', "-")
    ended = run(["-m", "pipeline.train", *where, *SMALL, *bounds], prefix=limited)
    assert "few: 1 steps done." in ended.output and "warning" not in ended.output, ended.output
