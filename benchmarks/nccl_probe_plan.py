"""What benchmarks.nccl_probe measures: its launches, their environment, and the bytes that the formulas predict.

Pure, and the standard library alone besides the formulas.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.comm.wire import gloo, nccl, nccl_log
from pipeline.comm.wire.gloo import NotDerivable
from pipeline.comm.wire.nccl_sends import Condition

REPOSITORY = Path(__file__).parents[1]
CODE = ("benchmarks/nccl_probe*.py", "pipeline/comm/wire/*.py", "pipeline/comm/kernel/sockets.py")
OPERATIONS = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter")
SIZES_BYTES = (4, 36, 1_000, 16_384, 33_332, 65_536, 262_148, 1_048_576, 2_048_000, 2_893_984, 10_000_004, 26_214_400)
"""Of the larger of input and output; 2,048,000 and 2,893,984 are the two buckets that DDP makes of SqueezeNet 1.1."""
ELEMENT_BYTES = 4
ROOT = 1
PROTOCOLS = ("simple", "ll", "ll128")


@dataclass(frozen=True)
class Launch:
    """Ranks that are started once, because NCCL reads its environment once."""

    kind: str
    """`collectives` or `training`."""
    num_ranks: int
    algorithm: str | None = None
    """Null: NCCL is left alone, and so are protocol and channels; or it is gloo."""
    protocol: str | None = None
    num_channels: int | None = None
    backend: str = "nccl"
    sizes_bytes: tuple[int, ...] = SIZES_BYTES
    num_steps: int = 30

    @property
    def name(self) -> str:
        """Of its file."""
        way = (self.algorithm, self.protocol, f"{self.num_channels}ch") if self.algorithm else ("unpinned",)
        return "-".join([self.kind, f"{self.num_ranks}ranks", *map(str, way if self.backend == "nccl" else ("gloo",))])


def launches(ranks: Sequence[int], dry_run: bool, sizes_bytes: Sequence[int], num_steps: int) -> list[Launch]:
    """All launches, the most telling first."""
    said = {"sizes_bytes": tuple(sizes_bytes), "num_steps": num_steps}
    two, more = min(ranks), max(ranks)
    if dry_run:
        return [Launch(kind, n, backend="gloo", **said) for kind in ("collectives", "training") for n in ranks]
    pinned = [(n, "ring", protocol, 1) for n in ranks for protocol in PROTOCOLS]
    pinned += [(more, "ring", protocol, channels) for channels in (2, 4) for protocol in PROTOCOLS]
    pinned += [(two, "tree", "simple", 1), *((more, "tree", protocol, 2) for protocol in PROTOCOLS)]
    pinned = list(dict.fromkeys(pinned))
    return [
        *(Launch("collectives", *way, **said) for way in pinned),
        *(Launch("collectives", n, **said) for n in ranks),
        *(Launch("training", two, "ring", protocol, 1, **said) for protocol in PROTOCOLS),
        Launch("training", two, **said),
    ]


Call = tuple[str, int, int]
"""(operation, payload bytes, root)."""


def cases(launch: Launch) -> Iterator[Call]:
    """The collectives of a launch; a pinned tree is for all-reduce alone, so others are left out there."""
    operations = OPERATIONS if launch.algorithm != "tree" else ("all_reduce",)
    yield "barrier", 0, -1
    for op in operations:
        for size in launch.sizes_bytes:
            elements = max(1, size // ELEMENT_BYTES)
            if op in ("all_gather", "reduce_scatter"):  # the larger side is a whole number of shares
                elements = max(1, elements // launch.num_ranks)
            if op == "reduce_scatter":
                elements *= launch.num_ranks
            yield op, elements * ELEMENT_BYTES, ROOT if op in ("broadcast", "reduce") else -1


def environment(launch: Launch, rank: int, log: Path) -> dict[str, str]:
    """The variables of a rank: an own host for NCCL, sockets of the loopback, nothing between ranks but these."""
    fixed = {
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_RANK": "0",
        "NCCL_HOSTID": f"server{rank}",
        "NCCL_NET": "Socket",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_FAMILY": "AF_INET",
        "NCCL_SOCKET_IFNAME": "=lo",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_MNNVL_ENABLE": "0",
        "NCCL_NET_GDR_LEVEL": "LOC",
        "NCCL_RAS_ENABLE": "0",  # else a keep-alive of 60 bytes a second
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NET,TUNING,ENV",
        "NCCL_DEBUG_FILE": str(log),
    }
    if launch.algorithm is None or launch.protocol is None or launch.num_channels is None:
        return fixed
    return {**fixed, **nccl.environment(launch.algorithm, launch.protocol, launch.num_channels)}


# --- prediction --------------------------------------------------------------------------------------------------


def predict(
    launch: Launch, calls: Sequence[Call], choices: Sequence[nccl_log.Choice], condition: Condition | str
) -> list[int] | NotDerivable:
    """Bytes that each rank hands to TCP for `calls`, or why they cannot be told.

    Args:
        launch: How the ranks were started.
        calls: What they issued.
        choices: What NCCL says in its log that it chose for each of them; where it says nothing, it is as pinned.
        condition: Channels, version and threads, or why they are not known.
    """
    total = [0] * launch.num_ranks
    unused = list(choices)
    for op, payload_bytes, root in calls:
        if launch.backend == "gloo":
            found = gloo.links(op, payload_bytes, ELEMENT_BYTES, root, launch.num_ranks, "gloo")
        elif isinstance(condition, str):
            found = NotDerivable(condition)
        else:
            way = _taken(unused, op, payload_bytes, launch)
            if isinstance(way, NotDerivable):
                return way
            servers = range(launch.num_ranks)
            found = nccl.links(op, payload_bytes, ELEMENT_BYTES, root, servers, *way, condition=condition)
        if isinstance(found, NotDerivable):
            return found
        total = [sum(pair) for pair in zip(total, gloo.sent_bytes_per_rank(found, launch.num_ranks), strict=True)]
    return total


def _taken(
    unused: list[nccl_log.Choice], op: str, payload_bytes: int, launch: Launch
) -> tuple[str, str] | NotDerivable:
    """Algorithm and protocol of one collective: the log's first line of its kind that no other has, else the pinned."""
    count_bytes = payload_bytes // launch.num_ranks if op == "reduce_scatter" else payload_bytes
    named = ("all_reduce", nccl.BARRIER_BYTES) if op == "barrier" else (op, count_bytes)
    for choice in unused:
        if (choice.op, choice.count_bytes) == named:
            unused.remove(choice)
            return choice.algorithm, choice.protocol
    if launch.algorithm is None or launch.protocol is None:
        return NotDerivable(f"NCCL's log does not say what it chose for {op} of {payload_bytes:,} bytes.")
    return launch.algorithm, launch.protocol


def condition_of(launch: Launch, log: str, version: Sequence[int] | None) -> Condition | str:
    """Channels, version and threads as rank 0's log has them, else as pinned; a sentence if they cannot be known."""
    said = nccl_log.read_condition(log)
    if said is not None:
        return said
    version = nccl_log.read_version(log) or version
    if version is None:
        return "NCCL's version is not known: neither its log nor the library says it."
    if launch.num_channels is None:
        return "NCCL's log does not say how many channels it has."
    return Condition(launch.num_channels, (version[0], version[1]))


# --- what a file was made by -------------------------------------------------------------------------------------


def made_by(launch: Launch, torch_version: str, nccl_version: Sequence[int] | None) -> dict[str, Any]:
    """What two measurements must share to stand in one folder, as JSON has it."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in REPOSITORY.glob(pattern)):
        digest.update(path.read_bytes())
    found = {"code_sha256": digest.hexdigest(), "torch": torch_version, "nccl": nccl_version, "launch": asdict(launch)}
    return json.loads(json.dumps(found))


def difference(earlier: Any, now: dict[str, Any]) -> str | None:
    """What the measurement of a file was made by otherwise than now, as a sentence's subject; None if nothing is."""
    if not isinstance(earlier, dict):
        return "its measurement"
    names = {"code_sha256": "the code", "torch": "torch", "nccl": "NCCL", "launch": "the options"}
    found = [name for key, name in names.items() if earlier.get(key) != now[key]]
    return " and ".join(found) or None
