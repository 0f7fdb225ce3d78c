"""NCCL's bytes on one GPU: what each collective makes the sockets of its ranks send, against the ledger's formulas.

Starts 2 and 3 ranks on one GPU, each a server of its own to NCCL (`NCCL_HOSTID`), with sockets on the loopback between
them, and reads the kernel's counts of these (TCP_INFO) before and after each operation. NCCL reads its environment
once, so every pinned (ranks, algorithm, protocol, channels) is a launch; then NCCL is left alone, and its log says what
it chose; then DDP trains. Each launch leaves a JSON file in the folder, and one that is there is not made again, so a
second run takes up what is missing. Needs torch 2.11 or newer and nothing else.

Exit codes: 0 every prediction met to the byte; 1 one was not, or a result was wrong; 2 bad input: options, no GPU, a
folder of another measurement, a port in use; 3 a launch failed or hung; 4 ended by a signal; 5 an NCCL whose source was
not read, so measured and not predicted. What was measured until then is in the folder, whatever the code.
"""

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.nccl_probe_plan import SIZES_BYTES, Launch, difference, launches, made_by
from benchmarks.nccl_probe_result import collect, last_words, line_of, num_records, summary
from pipeline.comm.wire.nccl_sends import FIRST_VERSION, LAST_VERSION
from pipeline.core.files import write_json_atomic

DONE, DIFFERENT, BAD_INPUT, FAILED, CUT, UNPREDICTED = range(6)
POLL_SECONDS = 0.02
FAILURES_RUNNING = 2  # launches that measured nothing, one after the other: the rest would fail alike


class ProbeError(Exception):
    """The rest cannot be measured; `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Cut(Exception):
    """A signal asked to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    before = {number: signal.signal(number, _cut) for number in (signal.SIGTERM, signal.SIGINT)}
    results: list[dict[str, Any]] = []
    code, said = FAILED, ""
    try:
        code = Probe(options).run(results)
    except ProbeError as error:
        code, said = error.code, str(error)
    except Cut as error:
        code, said = CUT, f"{error} ended the probe. The same command takes up what is missing."
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if results:
        found = summary(results)
        write_json_atomic(options.out / "summary.json", {**found, "ended": said or None})
        print("\n".join(found["lines"]))
        if code == DONE and found["num_different"] + found["num_wrong_results"]:
            code = DIFFERENT
    if said:
        print(f"error: {said}", file=sys.stderr)
    return code


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--dry-run", action="store_true", help="the same on CPUs, over gloo and with its formulas")
    parser.add_argument("--ranks", type=_numbers(2), default=(2, 3), help="numbers of ranks (2,3)")
    parser.add_argument("--sizes", type=_numbers(4), default=SIZES_BYTES, help="bytes of the collectives (4 to 25 MiB)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each training (%(default)s)")
    parser.add_argument("--deadline", type=float, default=60, help="seconds a launch may take (%(default)s)")
    parser.add_argument("--port", type=int, default=0, help="where the ranks meet (a free one)")
    return parser.parse_args(arguments)


def _numbers(least: int) -> Any:
    def numbers(text: str) -> tuple[int, ...]:
        found = tuple(dict.fromkeys(int(word) for word in text.split(",")))
        if min(found) < least:
            raise argparse.ArgumentTypeError(f"{text}: numbers from {least} on, such as {least},{least + 1}")
        return found

    return numbers


def _cut(number: int, frame: object) -> NoReturn:
    del frame
    raise Cut(signal.Signals(number).name)


class Probe:
    """Starts the launches one after the other and writes what each left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.context = multiprocessing.get_context("fork")
        self.version = None if options.dry_run else _library_version()
        if not options.dry_run and not self._has_gpu():
            raise ProbeError("torch finds no GPU here: --dry-run does the same on CPUs, over gloo.", BAD_INPUT)
        self.launches = launches(options.ranks, options.dry_run, options.sizes, options.steps)

    def run(self, results: list[dict[str, Any]]) -> int:
        """Measure what is missing; results are appended as they come. Returns the exit code."""
        folder = self.options.out
        folder.mkdir(parents=True, exist_ok=True)
        failures = 0
        for launch, result in self.earlier():
            if result is None:
                result = self._measure(launch, results)
                print(line_of(result), flush=True)
            else:
                print(f"{launch.name}: measured before", flush=True)
            results.append(result)
            failures = 0 if result["cases"] else failures + 1
            if result["refusal"] is not None:
                raise ProbeError(f"NCCL lets no two ranks share the GPU: {result['refusal']}", FAILED)
            if failures == FAILURES_RUNNING:
                raise ProbeError(f"{failures} launches running measured nothing. {result['problem']}", FAILED)
        if not all(result["is_complete"] for result in results):
            return FAILED
        return UNPREDICTED if any(self._is_unknown(result["nccl"]) for result in results) else DONE

    def _is_unknown(self, version: Sequence[int] | None) -> bool:
        return version is not None and not FIRST_VERSION <= tuple(version[:2]) <= LAST_VERSION

    def earlier(self) -> list[tuple[Launch, dict[str, Any] | None]]:
        """Every launch, with the whole result of an earlier run if there is one.

        Raises:
            ProbeError: One was measured by something else.
        """
        return [(launch, self._earlier(launch)) for launch in self.launches]

    def _earlier(self, launch: Launch) -> dict[str, Any] | None:
        path = self.options.out / f"{launch.name}.json"
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            found = {}
        other = difference(found.get("made_by"), self._made_by(launch))
        if other is not None:
            raise ProbeError(
                f"{path} was measured otherwise: {other} differed. Results are not mixed: give --out another folder,"
                " or remove this one.",
                BAD_INPUT,
            )
        return found if found["is_complete"] else None

    def _made_by(self, launch: Launch) -> dict[str, Any]:
        return made_by(launch, importlib.metadata.version("torch"), self.version)

    # --- a launch ---

    def _measure(self, launch: Launch, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Start the ranks, wait for them, end them whatever happens, and write what they left.

        torch is imported once, here, and forked: NCCL, CUDA and gloo start in the ranks alone.
        """
        from benchmarks.nccl_probe_rank import run_rank

        if launch.kind == "training":  # which each rank's DistributedDataParallel would import, seconds long
            importlib.import_module("torch._dynamo")
        folder = self.options.out / launch.name
        if folder.exists():
            print(f"{launch.name}: an earlier run was cut here, after {num_records(folder)} cases: measured again")
            shutil.rmtree(folder)
        port = _free_port(self.options.port)
        folder.mkdir()
        started, problem, ranks = time.monotonic(), None, list[BaseProcess]()
        try:
            for rank in range(launch.num_ranks):
                arguments = (launch, rank, port, folder, os.getpid())
                process = self.context.Process(target=run_rank, args=arguments, daemon=True)
                process.start()
                ranks.append(process)
            problem = self._wait(ranks, launch, folder)
        except Cut as error:
            problem = f"{error} ended it."
            raise
        finally:
            for process in ranks:
                process.kill()
                process.join()
            result = collect(launch, folder, self._made_by(launch), self.version, problem)
            result["seconds"] = round(time.monotonic() - started, 2)
            write_json_atomic(self.options.out / f"{launch.name}.json", result)
            if isinstance(sys.exception(), Cut):
                results.append(result)
        return result

    def _wait(self, ranks: Sequence[BaseProcess], launch: Launch, folder: Path) -> str | None:
        """Wait for all, the first that fails, or the deadline; what went wrong is a sentence."""
        deadline = time.monotonic() + self.options.deadline
        while any(process.exitcode is None for process in ranks):
            failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
            if failed:
                time.sleep(POLL_SECONDS)  # the others see the same a moment later, and may say more
                break
            if time.monotonic() > deadline:
                late = [str(rank) for rank, process in enumerate(ranks) if process.exitcode is None]
                return (
                    f"It hung: of {launch.num_ranks} ranks {', '.join(late)} had not ended after "
                    f"{self.options.deadline:g} s, and were killed. Their last words are in {folder}."
                )
            time.sleep(POLL_SECONDS)
        for rank, process in enumerate(ranks):
            if process.exitcode:
                return f"Rank {rank} ended with exit code {process.exitcode}: {last_words(folder, rank)}"
        return None

    def _has_gpu(self) -> bool:
        from benchmarks.nccl_probe_rank import exit_with_gpus

        process = self.context.Process(target=exit_with_gpus)
        process.start()
        process.join()
        return process.exitcode == 0


def _free_port(asked: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", asked))
        except OSError as error:
            raise ProbeError(
                f"Port {asked} is in use ({error.strerror}): give --port another, or leave it out to have a free one.",
                BAD_INPUT,
            ) from error
        return probe.getsockname()[1]


def _library_version() -> tuple[int, ...] | None:
    """NCCL's version by the library that torch has loaded, which need not be the one that it was made for."""
    import torch.cuda.nccl
    import torch.distributed

    try:
        library, code = ctypes.CDLL("libnccl.so.2"), ctypes.c_int()
        library.ncclGetVersion(ctypes.byref(code))
    except (OSError, AttributeError):
        return tuple(map(int, torch.cuda.nccl.version()[:3])) if torch.distributed.is_nccl_available() else None
    return code.value // 10_000, code.value // 100 % 100, code.value % 100


if __name__ == "__main__":
    sys.exit(main())
