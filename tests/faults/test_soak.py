"""One training under many faults, and one of many steps: they end as they should, and nothing grows on the way."""

import itertools
import json
import os
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import rows, train_recorded
from tests.comparing import assert_same
from tests.faults.test_disks import small_disk
from tests.making.pairs import Pair
from tests.making.shards import add_index
from tests.shard_server import Rule, ShardServer, serving

DEVICES = 2
DISK_BYTES = 64_000_000  # several checkpoints
# Every attempt is ended by one of these, and in every second one the server fails too.
ENDINGS = {"rank": 1, "supervisor": -9, "disk full": 4, "asked": 75}
SERVER_FAULTS = (
    Rule("status", path=r"train-\d+\.tar$", status=503, times=2),
    Rule("reset", path=r"train-000001\.tar$", times=1, after_bytes=20_000),
)
# Above the least of any process: a shard is opened when it is first read, and the first validation starts threads.
ALLOWED = {"fd": 2, "task": 4}
# Of the first attempt, which is short and validates nothing.
RSS_SHARE = 1.25
LONG_STEPS = int(os.environ.get("LONG_STEPS", "20000"))
# Of the median of a later tenth, over that of an early one: what is cached fills up first, and other programs disturb.
LONG_SHARES = {"rss": 1.05, "cpu_seconds": 1.25}


class Soak:
    """Attempts at one training, each with its faults.

    Args:
        root: where the runs lie.
        server: of the shards.
        num_faults: until the training is left alone.
        seed: of their kinds, places and victims.
    """

    def __init__(self, root: Path, server: ShardServer, num_faults: int, seed: int) -> None:
        self.root, self.server, self.num_faults = root, server, num_faults
        self.random = random.Random(seed)
        self.fired: Counter[str] = Counter()
        self.num_attempts = 0
        self.run = root / "soaked"
        self.endings = self._endings()
        # Each attempt goes on by up to three steps.
        self.options = [
            f"trainer.max_steps={6 + 3 * num_faults}",
            "trainer.validate_every_steps=7",
            "trainer.checkpoint_every_steps=1",
            "data.fetch_timeout_seconds=30",
        ]

    def _endings(self) -> Iterator[str]:
        """Each kind in a random order, again and again."""
        while True:
            yield from self.random.sample(list(ENDINGS), len(ENDINGS))

    def train(self, name: str, shards: Path | str, kill_at: str, expect: int) -> str:
        """One attempt, with a directory of its own for temporary files, in which nothing may stay."""
        temporary = self.root / "tmp"
        temporary.mkdir(exist_ok=True)
        environment = {"TMPDIR": str(temporary), "DO": f"head -c 1G /dev/zero > '{self.run}/filler' || true"}
        arguments = (*self.options, f"data.cache_dir={self.root / 'cache'}")
        ended = train_recorded(
            self.root, shards, name, DEVICES, *arguments, kill_at=kill_at, expect=expect, environment=environment
        )
        assert not list(temporary.iterdir()), "temporary files are left"
        return ended.output

    def committed(self) -> int:
        """Steps in the newest checkpoint."""
        pointer = self.run / "checkpoints" / "last.json"
        return json.loads(pointer.read_text())["step"] if pointer.exists() else 0

    def attempt(self) -> None:
        """Go on, and be ended by one fault; the server fails now and then too."""
        self.num_attempts += 1
        with_server = self.num_attempts % 2 == 0 and self.fired.total() < self.num_faults - 1
        if with_server:
            for path in (self.root / "cache" / "squeezewire").glob("*"):
                path.unlink()
        seen = len([request for request in self.server.requests() if request.fault])
        self.server.set_rules(*(SERVER_FAULTS if with_server else ()))
        ending = next(self.endings)
        step = self.committed() + self.random.randrange(1, 3)
        place = "0" if ending == "disk full" else self.random.choice(["0", "backward"])
        rank = 0 if ending == "disk full" else self.random.randrange(DEVICES)
        victim = "shell" if ending == "disk full" else ending
        output = self.train("soaked", self.server.url, f"{rank} {step} {place} {victim}", ENDINGS[ending])
        self.fired[ending] += 1
        if with_server:
            failed = len([request for request in self.server.requests() if request.fault]) - seen
            assert failed == sum(rule.times or 0 for rule in SERVER_FAULTS), output
            self.fired["server"] += 1
        (self.run / "filler").unlink(missing_ok=True)
        # Who is asked finishes the step first.
        assert self.committed() == step + (ending == "asked"), output

    def assert_nothing_grows(self) -> None:
        """Open files, threads and memory of each process from its second step on, and from process to process."""
        held: dict[str, dict[tuple[int, int], list[int]]] = {name: defaultdict(list) for name in ("fd", "task", "rss")}
        for rank in range(DEVICES):
            for line in (self.root / "soaked.fed" / f"rank{rank}.jsonl").read_text().splitlines():
                said = json.loads(line)
                for name, processes in held.items():
                    processes[rank, said["pid"]].append(said[name])
        for rank in range(DEVICES):
            for name in ALLOWED:
                later = [counts[1:] for (of, _), counts in held[name].items() if of == rank and len(counts) > 1]
                seen = {count for counts in later for count in counts}
                assert max(seen) - min(seen) <= ALLOWED[name], (name, rank, later)
            highest = [max(counts) for (of, _), counts in held["rss"].items() if of == rank]
            assert max(highest) < RSS_SHARE * highest[0], (rank, highest)
        kept = sorted(path.name for path in (self.run / "checkpoints").iterdir())
        assert len(kept) <= 7 and not [name for name in kept if ".tmp." in name], kept


@pytest.mark.slow  # each of these faults has a test of its own that is not
@pytest.mark.parametrize("num_faults", [5, pytest.param(50, marks=pytest.mark.timeout(3600))])
def test_soak(num_faults: int, shards: Path, tmp_path: Path) -> None:
    root, served = tmp_path / "runs", tmp_path / "served"
    root.mkdir()
    served.mkdir()
    for path in filter(Path.is_file, shards.iterdir()):
        (served / path.name).write_bytes(path.read_bytes())
    add_index(served, "train", "val")
    with (
        serving(served, tmp_path / "requests.jsonl") as server,
        small_disk(root / "soaked", DISK_BYTES),
    ):
        soak = Soak(root, server, num_faults, seed=num_faults)
        while soak.fired.total() < num_faults:
            soak.attempt()
        server.set_rules()
        soak.train("soaked", server.url, "", 0)
        soak.train("unbroken", served, "", 0)
        print(f"{num_faults} faults: {dict(soak.fired)}")
        assert set(soak.fired) == {*ENDINGS, "server"}
        assert_same(Pair(root, DEVICES, "soaked"))
        soak.assert_nothing_grows()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_last_of_many_steps_takes_no_more_than_an_early_one(shards: Path, tmp_path: Path) -> None:
    """Descriptors, threads, memory and computing time of each of two ranks, W&B's mirror included."""
    tenth = LONG_STEPS // 10
    small = (
        "model.metaparameters.final_relu=false",
        "model.metaparameters.base_e=8",
        "model.metaparameters.incr_e=8",
        "tracking=offline",
    )
    every = (f"trainer.checkpoint_every_steps={tenth}", f"trainer.validate_every_steps={tenth}")
    options = (*small, *every, f"trainer.max_steps={LONG_STEPS}", "batch.global_size=4", "recipe.lr=0.001")
    train_recorded(tmp_path, shards, "long", DEVICES, *options, expect=0, deadline_seconds=3500)
    assert [row["trainer/step"] for row in rows(tmp_path / "long")] == list(range(1, LONG_STEPS + 1))
    assert json.loads((tmp_path / "long" / "ledger.json").read_text())["closed"] is True
    for rank in range(DEVICES):
        said = [json.loads(line) for line in (tmp_path / "long.fed" / f"rank{rank}.jsonl").read_text().splitlines()]
        used = [after["cpu_seconds"] - before["cpu_seconds"] for before, after in itertools.pairwise(said)]
        held = {"rss": [line["rss"] for line in said], "cpu_seconds": used}
        assert len(said) == LONG_STEPS
        for name, most in LONG_SHARES.items():
            early, late = (statistics.median(held[name][start : start + tenth]) for start in (tenth, 9 * tenth))
            print(f"rank {rank}: {name} {early:.6g} early, {late:.6g} late")
            assert late < most * early, (rank, name, early, late)
        for name in ALLOWED:
            counts = {line[name] for line in said[tenth:]}  # the first validation starts threads
            print(f"rank {rank}: {name} {sorted(counts)}")
            assert max(counts) - min(counts) <= ALLOWED[name], (rank, name, counts)
