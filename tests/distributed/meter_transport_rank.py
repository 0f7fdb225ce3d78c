"""One rank: issue collectives one by one; after each, read from the kernel what this rank's sockets sent."""

import json
import os
import socket
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.comm import wire
from pipeline.comm.collectives import CollectiveMeter

TCP_INFO_BYTES = 232  # linux/tcp.h, struct tcp_info up to tcpi_bytes_retrans and beyond


def gloo_sockets(master_port: int) -> list[socket.socket]:
    """This process's established TCP sockets but the store's: gloo's pairs."""
    found, seen = [], set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = str(path.readlink())
            if not target.startswith("socket:") or target in seen:  # a copy made here may take a number still to come
                continue
            seen.add(target)
            handle = socket.socket(fileno=os.dup(int(path.name)))
            if handle.type == socket.SOCK_STREAM and handle.family in (socket.AF_INET, socket.AF_INET6):
                ports = {handle.getpeername()[1], handle.getsockname()[1]}
                if master_port not in ports:
                    found.append(handle)
                    continue
            handle.close()
        except OSError:
            continue
    return found


def sent_bytes(handles: list[socket.socket]) -> int | None:
    """Bytes handed to TCP so far, retransmissions left out; None where this kernel does not count them."""
    total = 0
    for handle in handles:
        info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        if len(info) < 216:
            return None
        (notsent,) = struct.unpack_from("I", info, 144)
        sent, retransmitted = struct.unpack_from("QQ", info, 200)
        total += sent - retransmitted + notsent
    return total


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
    return listed


def issue(op: str, tensor: torch.Tensor, root: int, rank: int, num_ranks: int) -> None:
    outputs = [torch.empty_like(tensor) for _ in range(num_ranks)]
    match op:
        case "barrier":
            dist.barrier()
        case "all_reduce":
            dist.all_reduce(tensor)
        case "broadcast":
            dist.broadcast(tensor, root)
        case "reduce":
            dist.reduce(tensor, root)
        case "gather":
            dist.gather(tensor, outputs if rank == root else None, root)
        case "all_gather":
            dist.all_gather(outputs, tensor)


def settled(handles: list[socket.socket]) -> int | None:
    """The count once gloo's own thread has stopped adding to it: readiness notices may trail the operation."""
    before, since = sent_bytes(handles), time.monotonic()
    while time.monotonic() - since < 0.02:
        now = sent_bytes(handles)
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
    handles = gloo_sockets(int(os.environ["MASTER_PORT"]))
    rows = []
    for op, dtype, elements, root in cases(num_ranks):
        before = settled(handles)
        store_barrier(rank, num_ranks)  # nobody starts while another still reads
        issue(op, torch.ones(elements, dtype=getattr(torch, dtype)), root, rank, num_ranks)
        store_barrier(rank, num_ranks)
        after = settled(handles)
        store_barrier(rank, num_ranks)
        ((call, count),) = meter.take().calls.items()
        links = wire.links(call.op, call.payload_bytes, call.itemsize, call.root, num_ranks, meter.backend)
        assert not isinstance(links, wire.NotDerivable)
        rows.append(
            {
                "case": [op, dtype, elements, root],
                "recorded": [call.op, call.payload_bytes, call.itemsize, call.root, count],
                "predicted": wire.sent_bytes_per_rank(links, num_ranks)[rank],
                "measured": None if before is None or after is None else after - before,
            }
        )
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
