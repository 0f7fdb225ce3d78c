"""One rank: issue collectives one by one; after each, read from the kernel what this rank's sockets sent."""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.comm.collectives import Call, CollectiveMeter
from pipeline.comm.kernel.sockets import Connection, own_connections
from pipeline.comm.wire import gloo


def gloo_connections(store_port: int) -> list[Connection]:
    """This process's connections but the store's: gloo's pairs."""
    return [c for c in own_connections() if store_port not in (c.local[1], c.remote[1])]


def sent_bytes(connections: list[Connection]) -> int | None:
    """Bytes handed to TCP so far, retransmissions left out; None where this kernel does not count them."""
    counts = [connection.counts() for connection in connections]
    return None if None in counts else sum(count.sent_bytes for count in counts if count)


def cases(num_ranks: int) -> list[tuple[str, str, int, int]]:
    """(operation, dtype, elements, root)."""
    listed = [("barrier", "float32", 0, -1)]
    sizes = (1, 2, 7, 100, 1024, 262_144, 1_248_424, 2 * num_ranks * 262_144 + 3)
    listed += [("all_reduce", "float32", elements, -1) for elements in sizes]
    listed += [("all_reduce", dtype, 33_333, -1) for dtype in ("float16", "bfloat16", "int64", "uint8")]
    for elements in (1, 5, 9_600, 300_001):
        listed += [("broadcast", "float32", elements, root) for root in range(num_ranks)]
        listed += [(op, "float32", elements, num_ranks - 1) for op in ("reduce", "gather")]
        listed += [("all_gather", "float32", elements, -1), ("all_gather", "uint8", elements, -1)]
    for elements in (0, 1, 5, 100_003):
        listed += [(op, "float32", elements, -1) for op in WITHOUT_ROOT]
        listed += [("scatter", "float32", elements, root) for root in range(num_ranks)]
    for dtype in ("bfloat16", "int64", "complex64"):
        listed += [
            ("reduce_scatter_single", dtype, 3_333, -1),
            ("all_reduce", dtype, 333, -1),
            ("reduce", dtype, 333, 0),
        ]
    listed += [(op, "float32", 0, 0) for op in ("all_reduce", "broadcast", "reduce", "gather", "all_gather")]
    listed += [("reduce", "float32", num_ranks * 524_288 + 1, root) for root in (0, num_ranks - 1)]
    listed += [(op, "uint8", elements, num_ranks - 1) for op in OBJECTS for elements in (1, 3_000)]
    return listed


WITHOUT_ROOT = (
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter coalesced",
    "all_reduce coalesced",
    "all_gather coalesced",
    "all_gather_single",
    "all_to_all",
    "all_to_all_single",
    "send",
)
OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


def split_elements(elements: int, num_ranks: int) -> list[list[int]]:
    """Uneven: what each rank (row) sends to each other one."""
    return [[elements * (1 + source + 2 * other) for other in range(num_ranks)] for source in range(num_ranks)]


def links_of(case: tuple[str, str, int, int], calls: Counter[Call], num_ranks: int) -> list[gloo.Links]:
    """The formula of every recorded call; where a record is not enough, that of what the case is known to do."""
    op, _, elements, _ = case
    if op == "send":
        return [{(num_ranks - 1, 0): gloo.Link(1, 4 * elements)}]  # one message, also of an empty tensor
    if op == "all_to_all_single":
        rows = split_elements(elements, num_ranks)
        return [gloo.gloo_all_to_all(tuple(tuple(4 * size for size in row) for row in rows))]
    found = []
    for call, count in calls.items():
        links = gloo.links(call.op, call.payload_bytes, call.itemsize, call.root, num_ranks, "gloo")
        assert not isinstance(links, gloo.NotDerivable), links
        found += [links] * count
    return found


def issue(op: str, tensor: torch.Tensor, root: int, rank: int, num_ranks: int) -> None:
    outputs = [torch.empty_like(tensor) for _ in range(num_ranks)]
    match op:
        case "barrier":
            dist.barrier()
        case "all_reduce":
            dist.all_reduce(tensor)
        case "broadcast":
            dist.broadcast(tensor, root)
        case "send" if rank not in (0, num_ranks - 1):
            pass
        case "reduce":
            dist.reduce(tensor, root)
        case "gather":
            dist.gather(tensor, outputs if rank == root else None, root)
        case "all_gather":
            dist.all_gather(outputs, tensor)
        case "scatter":
            dist.scatter(tensor, outputs if rank == root else None, root)
        case "all_to_all":
            dist.all_to_all(outputs, [tensor] * num_ranks)
        case "all_to_all_single":
            rows = split_elements(tensor.numel(), num_ranks)
            sent, received = rows[rank], [row[rank] for row in rows]
            dist.all_to_all_single(torch.empty(sum(received)), torch.ones(sum(sent)), received, sent)
        case "send" if rank == num_ranks - 1:
            dist.send(tensor, 0)
        case "send" if rank == 0:
            dist.recv(tensor, num_ranks - 1)
        case _ if op in OBJECTS:
            issue_objects(op, "x" * tensor.numel() * (rank + 1), root, rank, num_ranks)
        case _:
            issue_single_and_coalesced(op, tensor, num_ranks)


def issue_objects(op: str, value: str, root: int, rank: int, num_ranks: int) -> None:
    """torch pickles them and sends sizes first; a gather pads all to the longest."""
    places: list[Any] = [None] * num_ranks
    match op:
        case "all_gather_object":
            dist.all_gather_object(places, value)
        case "broadcast_object_list":
            dist.broadcast_object_list([value, rank], root)
        case "gather_object":
            dist.gather_object(value, places if rank == root else None, root)
        case "scatter_object_list":
            dist.scatter_object_list(places[:1], [value] * num_ranks if rank == root else None, root)


def issue_single_and_coalesced(op: str, tensor: torch.Tensor, num_ranks: int) -> None:
    whole, longer = tensor.repeat(num_ranks), torch.cat([tensor, tensor[:1]])
    match op:
        case "reduce_scatter":
            dist.reduce_scatter(tensor, [tensor.clone() for _ in range(num_ranks)])
        case "reduce_scatter_single":
            dist.reduce_scatter_single(tensor, whole)
        case "all_gather_single":
            dist.all_gather_single(whole, tensor)
        case "all_reduce coalesced":
            with dist.distributed_c10d._coalescing_manager():
                dist.all_reduce(tensor)
                dist.all_reduce(longer)
        case "reduce_scatter coalesced":
            with dist.distributed_c10d._coalescing_manager():
                dist.reduce_scatter_single(tensor, whole)
                dist.reduce_scatter_single(longer, longer.repeat(num_ranks))
        case "all_gather coalesced":
            with dist.distributed_c10d._coalescing_manager():
                dist.all_gather_single(whole, tensor)
                dist.all_gather_single(longer.repeat(num_ranks), longer)
        case _:
            raise AssertionError(op)


def settled(connections: list[Connection]) -> int | None:
    """The count once gloo's own thread has stopped adding to it: readiness notices may trail the operation."""
    before, since = sent_bytes(connections), time.monotonic()
    while time.monotonic() - since < 0.02:
        now = sent_bytes(connections)
        if now != before:
            before, since = now, time.monotonic()
    return before


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    meter = CollectiveMeter()
    meter.attach()
    dist.all_reduce(torch.ones(1))  # every pair is connected
    store_barrier(rank, num_ranks)
    meter.take()
    connections = gloo_connections(int(os.environ["MASTER_PORT"]))
    rows = []
    before = settled(connections)
    store_barrier(rank, num_ranks)
    for case in cases(num_ranks):
        op, dtype, elements, root = case
        issue(op, torch.ones(elements, dtype=getattr(torch, dtype)), root, rank, num_ranks)
        store_barrier(rank, num_ranks)
        after = settled(connections)
        store_barrier(rank, num_ranks)  # nobody starts while another still reads
        calls = meter.take().calls
        rows.append(
            {
                "case": case,
                "recorded": [[call.op, call.payload_bytes, call.itemsize, call.root, n] for call, n in calls.items()],
                "predicted": sum(
                    gloo.sent_bytes_per_rank(links, num_ranks)[rank] for links in links_of(case, calls, num_ranks)
                ),
                "measured": None if before is None or after is None else after - before,
            }
        )
        before = after
    (out / f"rank{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


_num_store_barriers = 0


def store_barrier(rank: int, num_ranks: int) -> None:
    """Wait for all ranks through the store, whose sockets are not counted."""
    global _num_store_barriers
    _num_store_barriers += 1
    store = dist.distributed_c10d._get_default_store()
    store.set(f"meter-{_num_store_barriers}-{rank}", "here")
    store.wait([f"meter-{_num_store_barriers}-{other}" for other in range(num_ranks)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
