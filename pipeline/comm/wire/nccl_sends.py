"""How NCCL cuts a collective: over channels, each channel's part into chunks, these into sends. Pure functions.

A send of the socket transport is a header of 4 bytes, the size, and then so much data (transport/net_socket.cc,
`ncclNetSocketTest`); the receiver answers nothing. Empty sends are sent too, as a header alone: the device posts every
slice of a chunk (device/prims_simple.h, `genericOp`) and the proxy passes on whatever is posted (transport/net.cc,
`sendProxyProgress`). So the bytes of a link are

    4 x sends + data on the wire

    protocol  data on the wire                    of one step  source
    LL        16 bytes per line of 8               32,768 B    device/prims_ll.h, `LLGenericOp`
    LL128     2,048 bytes per slice of up to 1,920 576,000 B   device/prims_ll128.h, `GenericOp`, `DataEltPerSlice`
    Simple    the data                            524,288 B    device/prims_simple.h, `waitPeer`

A chunk is one step, but for Simple on the ring in all-reduce, all-gather and reduce-scatter: there it is four, in two
slices, which are a send each (include/collectives.h; enqueue.cc, `calcCollChunking`). Buffers have NCCL's default sizes
(init.cc, `computeBuffSizes`).

Files are those of NCCL 2.28.9 and 2.30.7, which agree but in how they deal a payload to channels (`split`). What the
sums leave out: LL sends a step full of flags once in 2^31 steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.comm.wire.gloo import ceil_div, round_up

HEADER_BYTES = 4
CHUNK_ALIGNMENT_BYTES = 16  # device/all_reduce.h, `runRing`: 16 / sizeof(T) elements
RING_STEPS_PER_CHUNK, RING_SENDS_PER_CHUNK = 4, 2  # Simple; ALLREDUCE_CHUNKSTEPS, and over ALLREDUCE_SLICESTEPS


@dataclass(frozen=True, slots=True)
class Protocol:
    """How data becomes bytes on the wire."""

    nccl_name: str
    unit_data_bytes: int
    """Data is sent in whole units, the last one part-filled ..."""
    unit_wire_bytes: int
    """... of so many bytes on the wire."""
    step_data_bytes: int
    """Data of one of the eight steps of a connection's buffer."""
    num_threads: int
    """Of a channel; Simple has fewer on a slow ring (`Condition.simple_ring_threads`)."""
    thread_bytes: int
    """A channel is used if there is so much payload for each of its threads; LL asks for n times it on a ring of n."""

    def wire_bytes(self, data_bytes: int) -> int:
        """Return the bytes on the wire of one send, or of a pipeline of them, as full chunks are made of full units."""
        return ceil_div(data_bytes, self.unit_data_bytes) * self.unit_wire_bytes


# graph/tuning.cc, `ncclTopoTuneModel`, and include/comm.h for the threads
PROTOCOLS = {
    "ll": Protocol("LL", 8, 16, 32 * 1024, 512, 8),
    "ll128": Protocol("LL128", 1920, 2048, 576_000, 640, 8),
    "simple": Protocol("Simple", 1, 1, 512 * 1024, 512, 64),
}


@dataclass(frozen=True, slots=True)
class Condition:
    """What the bytes depend on besides algorithm and protocol. With one channel, neither version nor threads matter."""

    num_channels: int = 1
    """Of the communicator, as `NCCL_MIN_CTAS` and `NCCL_MAX_CTAS` pin it."""
    version: tuple[int, int] = (2, 28)
    """NCCL's major and minor version."""
    simple_ring_threads: int = 256
    """Threads of a channel's ring under Simple: 256 where the ring is as slow as PCIe 3 or slower, 512 else."""


FIRST_VERSION, LAST_VERSION = (2, 28), (2, 30)
"""The versions whose source was read."""
_LARGE_CELLS_VERSION = (2, 29)


@dataclass(frozen=True, slots=True)
class Sends:
    """What one connection is handed."""

    num_sends: int = 0
    wire_bytes: int = 0

    def __add__(self, other: "Sends") -> "Sends":
        return Sends(self.num_sends + other.num_sends, self.wire_bytes + other.wire_bytes)

    @property
    def tcp_bytes(self) -> int:
        """With the headers."""
        return HEADER_BYTES * self.num_sends + self.wire_bytes


# --- chunks ------------------------------------------------------------------------------------------------------


def ring_all_reduce_sends(part_bytes: int, num_ranks: int, position: int, protocol: Protocol) -> Sends:
    """Return what the rank at `position` passes on (device/all_reduce.h, `runRing`).

    Each loop moves n chunks; the last loop's are shorter, aligned to 16 bytes, and its last ones may be empty. The rank
    at position p sends every chunk twice but chunk p and chunk p + 1, which it sends once.

    Args:
        part_bytes: One channel's part of the payload.
        num_ranks: Number of ranks.
        position: On the ring, counted from rank 0.
        protocol: The protocol.
    """
    chunk, sends_per_chunk = _ring_chunk(protocol)
    num_full, rest = divmod(part_bytes, num_ranks * chunk)
    last_chunk = round_up(ceil_div(rest, num_ranks), CHUNK_ALIGNMENT_BYTES)
    num_passed = 2 * (num_ranks - 1)
    wire = num_full * num_passed * protocol.wire_bytes(chunk)
    for index in range(num_ranks if rest else 0):
        times = 2 - (index == position) - (index == (position + 1) % num_ranks)
        wire += times * protocol.wire_bytes(max(0, min(last_chunk, rest - index * last_chunk)))
    return Sends((num_full + (rest > 0)) * num_passed * sends_per_chunk, wire)


def ring_pass_sends(part_bytes: int, num_ranks: int, protocol: Protocol) -> Sends:
    """Each rank passes n - 1 shares on (device/all_gather.h and reduce_scatter.h, `runRing`)."""
    chunk, sends_per_chunk = _ring_chunk(protocol)
    num_sends = (num_ranks - 1) * ceil_div(part_bytes, chunk) * sends_per_chunk
    return Sends(num_sends, (num_ranks - 1) * protocol.wire_bytes(part_bytes))


def step_sends(part_bytes: int, protocol: Protocol, chunk_bytes: int | None = None) -> Sends:
    """Everything once over one connection, a chunk a send (device/broadcast.h and reduce.h, and the trees)."""
    return Sends(ceil_div(part_bytes, chunk_bytes or protocol.step_data_bytes), protocol.wire_bytes(part_bytes))


def tree_chunk_bytes(part_bytes: int, num_ranks: int, num_servers: int, protocol: Protocol) -> int:
    """Return a tree's chunk, which under LL128 is halved while the part is short (enqueue.cc, `calcCollChunking`)."""
    chunk = protocol.step_data_bytes
    if protocol.nccl_name != "LL128":
        return chunk
    ranks_per_server = num_ranks / num_servers
    depth = num_servers.bit_length() + 0.1 * ranks_per_server
    for num_chunks, smallest in ((64, 131_072), (16, 32_768)):
        while part_bytes // chunk < depth * num_chunks / ranks_per_server and chunk > smallest:
            chunk //= 2
    return chunk // protocol.unit_data_bytes * protocol.unit_data_bytes


def _ring_chunk(protocol: Protocol) -> tuple[int, int]:
    """Return data bytes and sends of a ring's chunk."""
    if protocol.nccl_name != "Simple":
        return protocol.step_data_bytes, 1
    return RING_STEPS_PER_CHUNK * protocol.step_data_bytes, RING_SENDS_PER_CHUNK


# --- channels ----------------------------------------------------------------------------------------------------


def channel_parts(
    op: str, share_bytes: int, num_ranks: int, algorithm: str, protocol: Protocol, condition: Condition
) -> Iterator[tuple[int, int]]:
    """Yield (channel, bytes of its part) of a collective that is issued alone.

    Args:
        op: Operation, as the meter names it.
        share_bytes: As NCCL counts: one rank's input, for a reduce-scatter one rank's output.
        num_ranks: Number of ranks.
        algorithm: `ring` or `tree`.
        protocol: The protocol.
        condition: Channels, version, threads.
    """
    shares = num_ranks if op in ("all_gather", "reduce_scatter") else 1
    # enqueue.cc, `topoGetAlgoInfo`: a channel less while there is too little for each thread.
    threads, thread_bytes = protocol.num_threads, protocol.thread_bytes
    if algorithm == "ring":
        thread_bytes *= num_ranks if protocol.nccl_name == "LL" else 1
        threads = condition.simple_ring_threads if protocol.nccl_name == "Simple" else threads
    num_busy = min(condition.num_channels, max(1, shares * share_bytes // (threads * thread_bytes)))
    # enqueue.cc, `ncclFuncTrafficPerByte`, `ncclPrepareTasks`
    traffic_per_byte = (2 if op == "all_reduce" else shares) * (4 if protocol.nccl_name == "LL" else 1)
    return enumerate(split(share_bytes, traffic_per_byte, num_busy, condition))


def split(share_bytes: int, traffic_per_byte: int, num_busy: int, condition: Condition) -> list[int]:
    """Deal a payload to channels in cells of at least so much traffic (enqueue.cc, `scheduleCollTasksToPlan`).

    Full channels first, the last one takes what is left, and more than its share where cells would not come out even.
    """
    large = condition.version >= _LARGE_CELLS_VERSION
    least_traffic = 32 * 1024 if large else 16 * 1024
    channel_traffic = max(least_traffic, share_bytes * traffic_per_byte) // num_busy
    channel_traffic = round_up(channel_traffic, 16) if large else max(least_traffic, channel_traffic)
    cell_bytes = round_up(ceil_div(least_traffic, traffic_per_byte), 16)
    num_cells = ceil_div(share_bytes, cell_bytes)
    each = min(num_cells, ceil_div(channel_traffic, cell_bytes * traffic_per_byte))
    if condition.num_channels == 1 or each == num_cells:
        return [share_bytes]
    num_more, over = divmod(num_cells - each, each)
    cells = [each] * (1 + num_more) + [over] * (over > 0)
    if len(cells) > condition.num_channels:
        each_more, over = divmod(num_cells - each, condition.num_channels - 1)
        cells = [each] + [each_more] * (condition.num_channels - 2) + [each_more + over]
    cut_short = num_cells * cell_bytes - share_bytes
    return [count * cell_bytes for count in cells[:-1]] + [cells[-1] * cell_bytes - cut_short]
