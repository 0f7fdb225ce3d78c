"""The wire formulas: published numbers, closed forms where they hold, and sums that must hold always."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.wire import gloo

OPERATIONS = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "reduce",
    "gather",
    "barrier",
    "reduce_scatter",
    "scatter",
    "all_to_all",
)

ranks = st.integers(2, 17)
itemsizes = st.sampled_from([1, 2, 4, 8])
element_counts = st.one_of(st.integers(1, 300), st.integers(300, 3_000_000))


def links_of(op: str, payload_bytes: int, itemsize: int = 4, root: int = -1, num_ranks: int = 2) -> gloo.Links:
    found = gloo.links(op, payload_bytes, itemsize, root, num_ranks, "gloo")
    assert not isinstance(found, gloo.NotDerivable)
    return found


def sent(op: str, payload_bytes: int, itemsize: int = 4, root: int = -1, num_ranks: int = 2) -> list[int]:
    return gloo.sent_bytes_per_rank(links_of(op, payload_bytes, itemsize, root, num_ranks), num_ranks)


@pytest.mark.parametrize(
    ("bucket_bytes", "step_bytes"),
    [
        ((2_048_000, 2_893_984), 4_943_136),  # SqueezeNet 1.1
        ((2_048_000, 2_945_696), 4_994_848),  # SqueezeNet 1.0
        ((2_052_000, 28_852_224, 15_853_824), 46_764_960),  # ResNet-18
        ((16_388_000, 67_125_248, 151_011_328, 9_878_784), 244_437_632),  # AlexNet
        ((1_024_000, 1_446_992), 2_472_144),  # SqueezeNet 1.1 halved by a hook
        ((248,), 824),  # ResNet-18's bitmap of used parameters
    ],
)
def test_steps_measured_on_two_ranks(bucket_bytes: tuple[int, ...], step_bytes: int) -> None:
    """Bytes the kernel counted for one optimiser step of these models, buckets as DDP cut them."""
    for rank in range(2):
        assert sum(sent("all_reduce", size)[rank] for size in bucket_bytes) == step_bytes


def test_broadcasts_measured() -> None:
    float_buffers, int_buffers = 38_400, 160  # ResNet-18
    both = [
        sum(pair)
        for pair in zip(sent("broadcast", float_buffers, root=0), sent("broadcast", int_buffers, root=0), strict=True)
    ]
    assert both == [38_752, 96]
    assert sent("broadcast", 8, itemsize=8, root=0) == [104, 48]  # Lightning's word before every micro-batch
    resnet50 = [sent("broadcast", size, root=0, num_ranks=4) for size in (212_480, 424)]
    assert [sum(pair) for pair in zip(*resnet50, strict=True)] == [426_192, 213_192, 96, 96]


@given(element_counts, itemsizes, ranks)
def test_all_reduce_moves_every_segment_but_one_twice_around(elements: int, itemsize: int, num_ranks: int) -> None:
    """Each element crosses n - 1 links on its way to the sum and n - 1 on its way back."""
    payload_bytes = elements * itemsize
    links = links_of("all_reduce", payload_bytes, itemsize, num_ranks=num_ranks)
    assert sum(link.data_bytes for link in links.values()) == 2 * (num_ranks - 1) * payload_bytes
    assert set(links) <= {(rank, (rank - 1) % num_ranks) for rank in range(num_ranks)}


@given(st.integers(1, gloo.MAX_SEGMENT_BYTES // 8), itemsizes, ranks)
def test_all_reduce_closed_form(segment_elements: int, itemsize: int, num_ranks: int) -> None:
    """Two full segments per rank: 2(n-1)/n of the payload, and 144 bytes for each of the 4(n-1) messages."""
    payload_bytes = 2 * num_ranks * segment_elements * itemsize
    expected = 2 * (num_ranks - 1) * payload_bytes // num_ranks + 144 * 4 * (num_ranks - 1)
    assert sent("all_reduce", payload_bytes, itemsize, num_ranks=num_ranks) == [expected] * num_ranks


@given(element_counts, itemsizes, ranks)
def test_all_reduce_is_nearly_even(elements: int, itemsize: int, num_ranks: int) -> None:
    """Ranks differ only by the uneven tail: less than what one rank's segments would hold if all were full."""
    payload_bytes = elements * itemsize
    per_rank = sent("all_reduce", payload_bytes, itemsize, num_ranks=num_ranks)
    share = math.ceil(payload_bytes / num_ranks)
    slack = 2 * (itemsize * 2 * num_ranks + share + 288 * (2 + payload_bytes // gloo.MAX_SEGMENT_BYTES))
    assert max(per_rank) - min(per_rank) <= slack


@given(element_counts, ranks, st.data())
def test_broadcast_gives_every_other_rank_one_copy(elements: int, num_ranks: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, num_ranks - 1))
    links = links_of("broadcast", 4 * elements, root=root, num_ranks=num_ranks)
    assert sorted(destination for _, destination in links) == sorted(set(range(num_ranks)) - {root})
    assert all(link == gloo.Link(1, 4 * elements) for link in links.values())
    copies_of_root = sum(source == root for source, _ in links)
    assert copies_of_root == math.ceil(math.log2(num_ranks))


@given(element_counts, ranks)
def test_all_gather_brings_every_contribution_everywhere(elements: int, num_ranks: int) -> None:
    links = links_of("all_gather", 4 * elements, num_ranks=num_ranks)
    assert sum(link.data_bytes for link in links.values()) == num_ranks * (num_ranks - 1) * 4 * elements


@given(st.integers(1, 2 * gloo.MAX_SEGMENT_BYTES // 8), itemsizes, ranks, st.data())
def test_reduce_is_no_more_than_all_reduce(
    elements_per_rank: int, itemsize: int, num_ranks: int, data: st.DataObject
) -> None:
    """While a rank's share is two segments."""
    elements = num_ranks * elements_per_rank - data.draw(st.integers(0, num_ranks - 1))
    root = data.draw(st.integers(0, num_ranks - 1))
    links = links_of("reduce", elements * itemsize, itemsize, root, num_ranks)
    whole = links_of("all_reduce", elements * itemsize, itemsize, num_ranks=num_ranks)
    assert sum(link.data_bytes for link in links.values()) <= sum(link.data_bytes for link in whole.values())


@given(st.sampled_from(OPERATIONS), element_counts, ranks)
def test_servers_of_one_rank_emit_what_their_rank_sends(op: str, elements: int, num_ranks: int) -> None:
    links = links_of(op, 4 * elements, root=0, num_ranks=num_ranks)
    egress = gloo.egress_bytes_per_server(links, range(num_ranks))
    assert egress == gloo.sent_bytes_per_rank(links, num_ranks)


@given(st.sampled_from(OPERATIONS), element_counts, ranks, st.data())
def test_traffic_inside_servers_and_between_them_is_all(
    op: str, elements: int, num_ranks: int, data: st.DataObject
) -> None:
    server_of_rank = data.draw(st.lists(st.integers(0, 3), min_size=num_ranks, max_size=num_ranks))
    links = links_of(op, 4 * elements, root=0, num_ranks=num_ranks)
    inside = {pair: link for pair, link in links.items() if server_of_rank[pair[0]] == server_of_rank[pair[1]]}
    between = sum(gloo.egress_bytes_per_server(links, server_of_rank))
    assert between + sum(gloo.sent_bytes_per_rank(inside, num_ranks)) == sum(gloo.sent_bytes_per_rank(links, num_ranks))


def test_interleaved_ranks_double_what_leaves_a_server() -> None:
    """SqueezeNet 1.1 on two servers of two ranks: one link of the ring leaves each server, or two."""
    egress = {}
    for name, server_of_rank in {"contiguous": (0, 0, 1, 1), "interleaved": (0, 1, 0, 1)}.items():
        parts = [
            gloo.egress_bytes_per_server(links_of("all_reduce", size, num_ranks=4), server_of_rank)
            for size in (2_048_000, 2_893_984)
        ]
        egress[name] = [sum(pair) for pair in zip(*parts, strict=True)]
    assert egress == {"contiguous": [7_416_432] * 2, "interleaved": [14_832_864] * 2}


@given(element_counts, itemsizes, ranks)
def test_gloos_reduce_scatter_costs_a_whole_all_reduce(elements: int, itemsize: int, num_ranks: int) -> None:
    payload_bytes = num_ranks * elements * itemsize
    scattered = links_of("reduce_scatter", payload_bytes, itemsize, num_ranks=num_ranks)
    assert scattered == links_of("all_reduce", payload_bytes, itemsize, num_ranks=num_ranks)


@given(element_counts, ranks, st.data())
def test_scatter_is_gather_backwards(elements: int, num_ranks: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, num_ranks - 1))
    scattered = links_of("scatter", num_ranks * 4 * elements, root=root, num_ranks=num_ranks)
    gathered = links_of("gather", 4 * elements, root=root, num_ranks=num_ranks)
    assert scattered == {(destination, source): link for (source, destination), link in gathered.items()}


@given(ranks.filter(lambda count: count < 7), st.data())
def test_all_to_all_sends_all_but_what_is_kept(num_ranks: int, data: st.DataObject) -> None:
    rows = st.tuples(*[st.integers(0, 1000)] * num_ranks)
    split_bytes = tuple(data.draw(rows) for _ in range(num_ranks))
    sent_bytes = gloo.sent_bytes_per_rank(gloo.gloo_all_to_all(split_bytes), num_ranks)
    for rank in range(num_ranks):
        assert sent_bytes[rank] == sum(split_bytes[rank]) - split_bytes[rank][rank] + 144 * (num_ranks - 1)


def test_a_large_reduce_sends_more_than_it_needs() -> None:
    """Bytes the kernel counted for 1,048,576 floats and for one more, on two ranks: a third segment, sent in vain."""
    assert sent("reduce", 4 * 1_048_576, root=1) == [4_194_688, 2_097_488]
    assert sent("reduce", 4 * 1_048_577, root=1) == [5_243_460, 4_194_880]


@given(st.sampled_from(OPERATIONS), st.integers(0, 3000), st.integers(0, 3000), ranks)
def test_more_payload_is_never_less_traffic(op: str, few: int, more: int, num_ranks: int) -> None:
    """Over all ranks and in data alone: single ranks may send a short tail less, and preambles come in whole ones."""
    sizes = [
        sum(link.data_bytes for link in links_of(op, 4 * num_ranks * count, root=0, num_ranks=num_ranks).values())
        for count in sorted((few, more))
    ]
    assert sizes[0] <= sizes[1]


@given(st.sampled_from(OPERATIONS), element_counts, ranks, st.data())
def test_servers_are_only_names(op: str, elements: int, num_ranks: int, data: st.DataObject) -> None:
    server_of_rank = data.draw(st.lists(st.integers(0, 3), min_size=num_ranks, max_size=num_ranks))
    names = data.draw(st.permutations(range(4)))
    links = links_of(op, num_ranks * 4 * elements, root=0, num_ranks=num_ranks)
    egress = dict(enumerate(gloo.egress_bytes_per_server(links, server_of_rank)))
    renamed = dict(enumerate(gloo.egress_bytes_per_server(links, [names[server] for server in server_of_rank])))
    for server in set(server_of_rank):
        assert renamed[names[server]] == egress[server]
    assert sum(renamed.values()) == sum(egress.values())


@given(st.sampled_from(OPERATIONS), element_counts, ranks)
def test_one_server_sends_nothing_out(op: str, elements: int, num_ranks: int) -> None:
    links = links_of(op, num_ranks * 4 * elements, root=0, num_ranks=num_ranks)
    assert gloo.egress_bytes_per_server(links, [0] * num_ranks) == [0]


@given(element_counts, st.integers(2, 4), st.integers(1, 4), st.data())
def test_contiguous_ranks_are_best_for_a_ring(
    elements: int, num_servers: int, ranks_per_server: int, data: st.DataObject
) -> None:
    """Their ring leaves each server once; no other order can leave one less often, up to the uneven tail."""
    contiguous = [server for server in range(num_servers) for _ in range(ranks_per_server)]
    other = data.draw(st.permutations(contiguous))
    links = links_of("all_reduce", 4 * elements, num_ranks=len(contiguous))
    best = gloo.egress_bytes_per_server(links, contiguous)
    tail_bytes = 2 * (math.ceil(4 * elements / len(contiguous)) + 16 * len(contiguous)) + 288 * len(links)
    for server, egress in enumerate(gloo.egress_bytes_per_server(links, other)):
        assert best[server] <= egress + tail_bytes


def test_one_rank_sends_nothing() -> None:
    for op in (*OPERATIONS, "all_to_all_single"):
        links = gloo.links(op, 1000, 4, 0, 1, "gloo")
        assert not isinstance(links, gloo.NotDerivable)
        assert gloo.sent_bytes_per_rank(links, 1) == [0]


@pytest.mark.parametrize(
    ("op", "backend"),
    [
        ("all_to_all_single", "gloo"),
        ("send", "gloo"),
        ("recv", "gloo"),
        ("sparse_all_reduce", "gloo"),
        ("split", "gloo"),
        ("all_reduce", "nccl"),
    ],
)
def test_what_is_unknown_says_why(op: str, backend: str) -> None:
    found = gloo.links(op, 1000, 4, -1, 2, backend)
    assert isinstance(found, gloo.NotDerivable)
    assert backend in found.reason


def test_results_cannot_be_altered() -> None:
    """They are shared through a cache."""
    links = links_of("all_reduce", 1000)
    with pytest.raises(TypeError):
        links[0, 1] = gloo.Link(0, 0)  # type: ignore[index]


@pytest.mark.not_quick
def test_the_formulas_need_the_standard_library_alone() -> None:
    """They are imported, with the kernel's counts, where neither torch nor another package is."""
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "pipeline"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
try:
    import torch
except ImportError:
    print("blocked")
import pipeline.comm.wire.algorithms, pipeline.comm.wire.nccl, pipeline.comm.wire.nccl_log
import pipeline.comm.kernel.sockets
print(sorted(name for name in sys.modules if name.startswith("pipeline.") and ".comm" not in name))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["blocked", "[]"]
