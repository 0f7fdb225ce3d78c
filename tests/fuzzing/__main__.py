"""Damage what commands read, and see that they refuse it in a sentence or read it right.

python -m tests.fuzzing                                 ten minutes, fresh seeds, which are printed
python -m tests.fuzzing --seed 0 --cases 400            the same 400 of each target every time
python -m tests.fuzzing --targets package delta --cases 10000    two kinds of file alone
python -m tests.fuzzing --only manifest:17              one case, in this process, with its traceback
"""

import argparse
import itertools
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.fuzzing.pool import Case, Limits, Result, run_case, run_cases
from tests.fuzzing.targets import all_targets

MOST_FAILURES_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if any case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="when no further case begins")
    parser.add_argument("--cases", type=int, help="most cases of each target")
    parser.add_argument("--seed", type=int, help="the first case's; a fresh one if none is given")
    parser.add_argument("--targets", nargs="*", help="those alone")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--deadline", type=float, default=Limits.seconds, help="seconds of one case")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB that a case may ask for")
    parser.add_argument("--only", help="TARGET:SEED, a case to look at")
    asked = parser.parse_args(arguments)

    torch.set_num_threads(1)  # before the first fork
    limits = Limits(seconds=asked.deadline, data_bytes=int(asked.memory * 2**30))
    first = secrets.randbelow(10**12) if asked.seed is None else asked.seed
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        under = Path(directory)
        (under / "cases").mkdir()
        targets = {target.name: target for target in all_targets(under)}
        if asked.only:
            name, _, seed = asked.only.rpartition(":")
            result = run_case(targets[name], Case(name, int(seed)), limits, under / "cases")
            print(result)
            return int(result.is_failure)
        chosen = {name: targets[name] for name in asked.targets or targets}
        until = time.monotonic() + asked.seconds
        print(f"seeds from {first}, {', '.join(chosen)}", flush=True)
        cases = _cases(list(chosen), first, asked.cases, until)
        results = run_cases(chosen, cases, limits, num_workers=asked.workers, under=under / "cases")
        return _report(results)


def _cases(targets: Sequence[str], first: int, most: int | None, until: float) -> Iterator[Case]:
    for seed in itertools.count(first) if most is None else range(first, first + most):
        for target in targets:
            if time.monotonic() > until:
                return
            yield Case(target, seed)


def _report(results: Iterator[Result]) -> int:
    refused: Counter[str] = Counter()
    done: Counter[str] = Counter()
    peak, longest, failures = Counter[str](), Counter[str](), list[Result]()
    for result in results:
        name = result.case.target
        done[name] += 1
        refused[name] += result.is_refused
        peak[name] = max(peak[name], result.peak_bytes)
        longest[name] = max(longest[name], result.seconds)  # type: ignore[assignment]
        if result.is_failure:
            failures.append(result)
            if len(failures) <= MOST_FAILURES_SHOWN:
                print(f"--- {result.case}: {result.said}", file=sys.stderr, flush=True)
    for name in done:
        print(
            f"{name:12} {done[name]:6} cases, {refused[name]:6} refused, at most {longest[name]:.2f} s,"
            f" {peak[name] / 2**20:.0f} MiB"
        )
    print(f"{done.total()} cases, {len(failures)} failed: {' '.join(str(f.case) for f in failures[:100])}")
    if failures:
        print("Look at one with: python -m tests.fuzzing --only TARGET:SEED", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
