"""The loader alone, on one core, beside other people's: original ImageNet JPEGs, random crops of 224, uint8 batches.

    python -m benchmarks.loader --folder imagenet-sample

`--folder` holds a directory per class; its pictures are linked several times, so that an epoch has a few thousand. Each
contender is one process on the same core with one thread, and no worker processes; a round is an epoch of each in turn
while the others wait, and ratios are taken within a round, so that a machine that changes its speed changes all. The
contenders, and what exactly each decodes, are in `peers/loaders.py`; litData, MosaicML Streaming and DALI are left out,
and said to be, where their environment (`make peers`) is missing. Ours reads the shards that `prepare` wrote through
the loader that trains, without worker processes; once more from shards prepared with short_side=256, and from shards of
check=ends, whose pictures nobody has decoded, so that rows below the crop are decoded too, as with shards of others.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.peers import loaders

OURS, OURS_SMALL, OURS_UNCHECKED = "squeezewire", "squeezewire, short side 256", "squeezewire, check=ends"
PROJECT_PEERS, OTHER_PEERS = ("image_folder", "webdataset"), ("litdata", "mosaic", "dali")
FLOOR_PEERS, FLOOR_DALI, FLOOR_DECODER = 1.2, 1.0, 0.85
GOAL_PEERS, GOAL_DALI = 1.5, 1.2
SHORT_SIDE, SEED = 256, 0
PROGRAM = Path(loaders.__file__)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="class folders of JPEGs")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers/bin/python"), help="(%(default)s)")
    parser.add_argument("--copies", type=int, default=3, help="times each picture is in an epoch (%(default)s)")
    parser.add_argument("--batch", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="and one more that is not counted (%(default)s)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="(%(default)s)")
    return parser.parse_args(arguments)


class Contender:
    """A loader in its process, seen from outside."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.versions = self._answer()
        self.rates: list[float] = []
        """Pictures per second, by round."""

    def epoch(self) -> dict[str, Any]:
        """Let it go through one; nothing else of the benchmark computes meanwhile."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"A contender ended with {self._process.wait()}; its own words are above.")
        return json.loads(answer)


@contextmanager
def started(command: Sequence[str], core: int) -> Iterator[Contender]:
    """The contender's process, on that core alone. It ends with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        ["taskset", "--cpu-list", str(core), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            yield Contender(process)
        finally:
            process.kill()


def link_pictures(folder: Path, out: Path, copies: int) -> None:
    """`out/<class>/` with every picture of `folder` so many times."""
    for path in sorted(folder.glob("*/*")):
        (out / path.parent.name).mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            link = out / path.parent.name / f"{copy}_{path.name}"
            if not link.exists():
                link.symlink_to(path.resolve())


def make_sources(options: argparse.Namespace, peers: Sequence[str]) -> dict[str, Path]:
    """What each contender reads, unless it is there."""
    root = common.SHARDS / f"loader-{options.copies}"
    folder = root / "folder"
    link_pictures(options.folder, folder, options.copies)
    common.run("prepare", f"source={folder}", f"out={root / 'shards'}")
    common.run("prepare", f"source={folder}", f"out={root / 'shards-256'}", f"short_side={SHORT_SIDE}")
    common.run("prepare", f"source={folder}", f"out={root / 'shards-ends'}", "check=ends")
    sources = dict.fromkeys(("image_folder", "dali", "decoder"), folder)
    sources |= {OURS: root / "shards", OURS_SMALL: root / "shards-256", "webdataset": root / "shards"}
    sources[OURS_UNCHECKED] = root / "shards-ends"
    for name in {"litdata", "mosaic"} & set(peers):
        sources[name] = root / name
        if not sources[name].exists():
            command = [str(options.peers), str(PROGRAM), "write", name, str(folder.resolve()), str(sources[name])]
            subprocess.run(command, check=True)
    return sources


def command_of(name: str, source: Path, options: argparse.Namespace) -> list[str]:
    """Of the contender's process."""
    if name in (OURS, OURS_SMALL, OURS_UNCHECKED):
        return [sys.executable, "-m", "benchmarks.loader_ours", str(source), str(options.batch)]
    python = str(options.peers) if name in OTHER_PEERS else sys.executable
    return [python, str(PROGRAM), "serve", name, str(source.resolve()), str(options.batch)]


def measure(options: argparse.Namespace, sources: dict[str, Path]) -> dict[str, Contender]:
    """Rounds in turn, each of them printed; the order is turned by one from round to round."""
    names = list(sources)
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(started(command_of(name, source, options), options.core))
            for name, source in sources.items()
        }
        num_images = None
        for number in range(options.rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                answer = contenders[name].epoch()
                num_images = num_images or answer["images"]
                check_answer(name, answer, num_images)
                if number:  # the first fills caches
                    contenders[name].rates.append(answer["images"] / answer["seconds"])
            if number:
                rates = ", ".join(f"{name} {contender.rates[-1]:.0f}" for name, contender in contenders.items())
                print(f"  round {number}: {rates} pictures/s", flush=True)
    return contenders


def check_answer(name: str, answer: dict[str, Any], num_images: int) -> None:
    """Everybody does the same work."""
    is_batch = name == "decoder" or (answer["dtype"].endswith("uint8") and sorted(answer["shape"][1:]) == [3, 224, 224])
    if answer["images"] != num_images or not is_batch:
        sys.exit(f"{name} handed out {answer}, not {num_images} pictures in uint8 batches of 224 x 224.")


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median and middle half."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "quartile_low": low, "quartile_high": high}


def ratios(contenders: dict[str, Contender], of: str, to: Sequence[str]) -> dict[str, float]:
    """Of one contender's rate to the best of others, round by round."""
    best = [max(rates) for rates in zip(*(contenders[name].rates for name in to), strict=True)]
    return middle([mine / theirs for mine, theirs in zip(contenders[of].rates, best, strict=True)])


def report(options: argparse.Namespace, contenders: dict[str, Contender]) -> int:
    """Print, and write the result; returns the exit code."""
    result = common.Result("loader", vars(options))
    present = [name for name in (*PROJECT_PEERS, "litdata", "mosaic") if name in contenders]
    compared = {f"best of {', '.join(present)}": present, **{name: [name] for name in contenders if name != OURS}}
    result.figures |= {
        "images_per_second": {name: middle(contender.rates) for name, contender in contenders.items()},
        "ours_times_as_fast_as": {label: ratios(contenders, OURS, names) for label, names in compared.items()},
        "short_side_256_times_original": ratios(contenders, OURS_SMALL, [OURS]),
        "unchecked_times_as_fast_as_the_best": ratios(contenders, OURS_UNCHECKED, present),
        "versions": {name: contender.versions for name, contender in contenders.items()},
        "rounds": {name: contender.rates for name, contender in contenders.items()},
    }
    for name, rate in result.figures["images_per_second"].items():
        print(
            f"  {name:28s} {rate['median']:7.1f} pictures/s ({rate['quartile_low']:.1f}, {rate['quartile_high']:.1f})"
        )
    for name, ratio in result.figures["ours_times_as_fast_as"].items():
        told = f"{ratio['median']:.3f} ({ratio['quartile_low']:.3f}, {ratio['quartile_high']:.3f})"
        print(f"  {OURS} against {name}: {told}")
    by_name = result.figures["ours_times_as_fast_as"]
    best = next(iter(by_name.values()))["median"]
    result.floors = [
        common.Floor(f"times as fast as the best of {len(present)}", best, at_least=FLOOR_PEERS),
        common.Floor("share of the decoder alone", by_name["decoder"]["median"], at_least=FLOOR_DECODER),
    ]
    goals = {f"best of {len(present)}, {GOAL_PEERS}": best >= GOAL_PEERS}
    if "dali" in by_name:
        result.floors.append(common.Floor("times as fast as DALI", by_name["dali"]["median"], at_least=FLOOR_DALI))
        goals[f"DALI, {GOAL_DALI}"] = by_name["dali"]["median"] >= GOAL_DALI
    result.figures["goals_reached"] = goals
    print(f"  goals reached: {goals}")
    unchecked = result.figures["unchecked_times_as_fast_as_the_best"]["median"]
    print(f"  from shards of check=ends: {unchecked:.3f} times as fast as the best of {len(present)}")
    print(f"  short side {SHORT_SIDE}: {result.figures['short_side_256_times_original']['median']:.3f} times that")
    return result.finish(options.results)


def main(arguments: Sequence[str]) -> int:
    """Make the sources, measure, report."""
    options = parse(arguments)
    common.print_conditions()
    peers = list(itertools.chain(PROJECT_PEERS, OTHER_PEERS if options.peers.exists() else ()))
    if not options.peers.exists():
        print(f"  {', '.join(OTHER_PEERS)}: left out, there is no {options.peers} (make peers)")
    sources = make_sources(options, peers)
    order = [OURS, *peers, "decoder", OURS_SMALL, OURS_UNCHECKED]
    return report(options, measure(options, {name: sources[name] for name in order}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
