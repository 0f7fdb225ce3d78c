"""NCCL's loops, walked step by step: which sends each rank makes, one by one. An oracle for the formulas of the ledger.

Written from the source of NCCL 2.28.9 and 2.30.7 and not from `pipeline.comm.wire`, of which nothing is imported. It
counts in elements, as the device does, and knows no closed form: the host's plan deals elements to channels
(enqueue.cc), each rank's device code runs its loops over chunks and slices (src/device/*.h), and each send is a size.
The proxy's own count of steps, which the host computes apart from the device's loops, must equal what the device posts.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

STEPS = 8
BUFFER_BYTES = {"LL": 8 * 512 * STEPS * 16, "LL128": 120 * 640 * STEPS * 8, "Simple": 4 << 20}
GRAIN_BYTES = {"LL": 16, "LL128": 32 * 8 // 16 * 15 * 8, "Simple": 512}
THREAD_THRESHOLD = {"LL": 8, "LL128": 8, "Simple": 64}


@dataclass(frozen=True)
class Task:
    func: str
    count: int
    """As the caller passes it to NCCL: elements of the input, of the output for reduce_scatter."""
    size: int
    """Bytes of an element."""
    num_ranks: int
    algorithm: str
    protocol: str
    num_channels: int
    version: tuple[int, int]
    simple_ring_threads: int = 256
    root: int = 0


@dataclass(frozen=True)
class Part:
    """One channel's share of a task."""

    channel: int
    count: int
    chunk_bytes: int
    num_steps: int
    slice_steps: int
    slices_per_chunk: int


def single(value: float) -> float:
    """Round to a C float."""
    return struct.unpack("f", struct.pack("f", value))[0]


def as_taken(task: Task) -> tuple[int, int]:
    """collTaskAppend: what only moves is moved as bytes. Returns (count, element size)."""
    if task.func in ("all_gather", "broadcast"):
        return task.count * task.size, 1
    return task.count, task.size


def busy_channels(task: Task) -> int:
    """topoGetAlgoInfo"""
    count, size = as_taken(task)
    num_bytes = count * size * (task.num_ranks if task.func in ("all_gather", "reduce_scatter") else 1)
    threads = {"LL": 512, "LL128": 640, "Simple": 512}[task.protocol]
    threshold = THREAD_THRESHOLD[task.protocol]
    if task.algorithm == "ring":
        if task.protocol == "LL":
            threshold *= task.num_ranks
        if task.protocol == "Simple":
            threads = task.simple_ring_threads
    channels = task.num_channels
    while num_bytes < channels * threads * threshold:
        if channels >= 2:
            channels -= 1
        else:
            break
    return channels


def counts_of_channels(task: Task) -> list[int]:
    """scheduleCollTasksToPlan, for a plan of this task alone: elements of each channel from 0 on."""
    count, size = as_taken(task)
    minimum = 16 << 10 if task.version < (2, 29) else 32 << 10
    per_byte = {"all_reduce": 2, "all_gather": task.num_ranks, "reduce_scatter": task.num_ranks}.get(task.func, 1)
    traffic = count * size * per_byte
    if task.protocol == "LL":
        traffic *= 4
        per_byte *= 4
    traffic = max(minimum, traffic)
    if task.version < (2, 29):
        per_channel = max(minimum, traffic // busy_channels(task))
    else:
        per_channel = (traffic // busy_channels(task) + 15) // 16 * 16
    cell_size = ((minimum + per_byte - 1) // per_byte + 15) // 16 * 16
    elements_per_cell = cell_size // size
    cells = (count * size + cell_size - 1) // cell_size
    traffic_per_cell = cell_size * per_byte
    channel_id, most = 0, task.num_channels
    per = min(cells, (per_channel + traffic_per_cell - 1) // traffic_per_cell)
    low = cells if channel_id + 1 == most else min(cells, (per_channel + traffic_per_cell - 1) // traffic_per_cell)
    mid = (cells - low) // per
    high = (cells - low) % per
    needed = (low != 0) + mid + (high != 0)
    if most < channel_id + needed:
        mid = most - channel_id - 2
        per = (cells - low) // (mid + 1)
        high = per + (cells - low) % (mid + 1)
    if high == 0 and mid != 0:
        high = per
        mid -= 1
    count_low, count_mid, count_high = (
        low * elements_per_cell,
        per * elements_per_cell if mid else 0,
        high * elements_per_cell,
    )
    surplus = cells * elements_per_cell - count
    if count_high:
        count_high -= surplus
    else:
        count_low -= surplus
    return [count_low] + [count_mid] * mid + ([count_high] if count_high else [])


def parts_of(task: Task, num_nodes: int) -> Iterator[Part]:
    """calcCollChunking of each channel."""
    _, size = as_taken(task)
    n = task.num_ranks
    for channel, count in enumerate(counts_of_channels(task)):
        num_bytes = count * size * (n if task.func in ("all_gather", "reduce_scatter") else 1)
        chunk_steps = slice_steps = 1
        if task.protocol == "Simple" and task.algorithm == "ring" and task.func not in ("broadcast", "reduce"):
            chunk_steps, slice_steps = STEPS // 2, STEPS // 4
        chunk = BUFFER_BYTES[task.protocol] // STEPS * chunk_steps
        if task.protocol == "LL":
            chunk //= 2
        if task.protocol == "LL128":
            chunk = chunk // 16 * 15
        if task.algorithm == "tree" and task.protocol == "LL128":
            per_node = single(n / num_nodes)
            log2 = 0
            while num_nodes >> (log2 + 1):
                log2 += 1
            steps = single(1 + log2 + 0.1 * per_node)
            while num_bytes // chunk < single(steps * 64 / per_node) and chunk > 131072:
                chunk //= 2
            while num_bytes // chunk < single(steps * 16 / per_node) and chunk > 32768:
                chunk //= 2
        chunk = chunk // GRAIN_BYTES[task.protocol] * GRAIN_BYTES[task.protocol]
        steps_per_loop, chunks_per_loop = {
            ("all_reduce", "ring"): (2 * (n - 1), n),
            ("all_gather", "ring"): (n - 1, n),
            ("reduce_scatter", "ring"): (n - 1, n),
        }.get((task.func, task.algorithm), (1, 1))
        loops = 0
        while loops * chunks_per_loop * chunk < num_bytes:
            loops += 1
        yield Part(channel, count, chunk, steps_per_loop * loops * chunk_steps, slice_steps, chunk_steps // slice_steps)


def posted(task: Task, part: Part, elements: int) -> Iterator[int]:
    """The sizes that one send primitive posts: prims_simple.h `genericOp`, prims_ll.h, prims_ll128.h."""
    _, size = as_taken(task)
    elements = max(0, elements)
    if task.protocol == "LL":
        per_line = 8 // size
        yield (elements + per_line - 1) // per_line * 16
    elif task.protocol == "LL128":
        per_slice = (256 - 256 // 16) * (8 // size)
        yield (elements + per_slice - 1) // per_slice * 256 * 8
    else:
        slices = part.slices_per_chunk
        step_elements = BUFFER_BYTES["Simple"] // STEPS // size
        slice_elements = step_elements * part.slice_steps
        slice_elements = max((elements + 16 * slices - 1) // (16 * slices) * 16, slice_elements // 32)
        offset = 0
        for _ in range(slices):
            slice_elements = min(slice_elements, elements - offset)
            yield slice_elements * size
            offset += slice_elements


def ring_sends(task: Task, part: Part, rank: int) -> Iterator[int]:
    """What `rank` posts to the next rank on the ring, in the order in which it does; the ring is 0, 1, 2, ..."""
    _, size = as_taken(task)
    n, chunk = task.num_ranks, part.chunk_bytes // size
    if task.func == "all_reduce":
        loop = n * chunk
        for offset in range(0, part.count, loop):
            remaining = part.count - offset
            if remaining < loop:
                align = 16 // size
                chunk = ((remaining + n - 1) // n + align - 1) // align * align
            order = [(rank + n - 1) % n]
            order += [(rank + n - j) % n for j in range(2, n)]
            order += [rank]
            order += [(rank + n - j) % n for j in range(1, n - 1)]
            for index in order:
                yield from posted(task, part, min(chunk, remaining - index * chunk))
        return
    for offset in range(0, part.count, chunk):
        elements = min(chunk, part.count - offset)
        if task.func in ("all_gather", "reduce_scatter"):
            for _ in range(n - 1):
                yield from posted(task, part, elements)
        elif task.func == "broadcast":
            if (rank + 1) % n != task.root:
                yield from posted(task, part, elements)
        elif rank != task.root:
            yield from posted(task, part, elements)


# Parents of ranks 0, 1, ... in the two trees over n servers of one rank each, after graph/trees.cc; the root has -1.
TREES = {
    2: ((-1, 0), (1, -1)),
    3: ((-1, 2, 0), (1, -1, 0)),
    4: ((-1, 2, 0, 2), (1, 3, 1, -1)),
    5: ((-1, 2, 4, 2, 0), (1, -1, 3, 0, 3)),
}


def tree_sends(task: Task, part: Part, rank: int) -> Iterator[tuple[int, int]]:
    """(peer, size) of what `rank` posts to its parent and its children."""
    _, size = as_taken(task)
    parents = TREES[task.num_ranks][part.channel % 2]
    peers = [child for child, parent in enumerate(parents) if parent == rank]
    if parents[rank] >= 0:
        peers.append(parents[rank])
    for offset in range(0, part.count, part.chunk_bytes // size):
        elements = min(part.chunk_bytes // size, part.count - offset)
        for peer in peers:
            for sent in posted(task, part, elements):
                yield peer, sent


def walk(task: Task) -> list[dict[int, int]]:
    """Bytes handed to TCP, of each rank to each peer: 4 for every send, and its size. Every rank is its own server."""
    ranks: list[dict[int, int]] = []
    for rank in range(task.num_ranks):
        to: dict[int, int] = {}
        for part in parts_of(task, task.num_ranks):
            if task.algorithm == "tree":
                sends = list(tree_sends(task, part, rank))
            else:
                sends = [((rank + 1) % task.num_ranks, sent) for sent in ring_sends(task, part, rank)]
            for peer in {peer for peer, _ in sends}:
                sizes = [sent for receiver, sent in sends if receiver == peer]
                assert len(sizes) == part.num_steps // part.slice_steps, (task, part, len(sizes))
                to[peer] = to.get(peer, 0) + sum(4 + sent for sent in sizes)
        ranks.append(to)
    return ranks
