"""Peak activations: published and derived figures, and the plan against a simulation that holds and frees values."""

import pytest
import torch

from pipeline.models import zoo
from pipeline.models.activations import ELEMENTWISE, INPUT, Operation, Peaks, peaks, trace

KIB = 1024


def meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return zoo.build(name, 1000)


def elements(found: Peaks) -> tuple[int, int, int | None]:
    return found.in_place.num_elements, found.copied.num_elements, found.streamed and found.streamed.num_elements


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        # conv1 96x109x109 beside pool1 96x54x54; fire4's expands 2 x 128x54x54 beside their Concat; fire4 beside pool4
        ("squeezenet1_0", 224, (1_420_512, 1_492_992, 933_120)),
        ("squeezenet1_0", 227, (1_473_216, 1_548_800, 961_024)),
        ("squeezenet1_1", 224, (982_144, 982_144, 480_512)),
        ("alexnet", 224, (344_128, 344_128, 186_624)),
    ],
)
def test_peaks_worked_out_by_hand(name: str, side: int, expected: tuple[int, int, int]) -> None:
    assert elements(peaks(meta(name), side)) == expected


def test_the_rule_gives_the_published_figure_of_mobilenet_v2() -> None:
    found = peaks(meta("mobilenet_v2"), 224)
    assert found.in_place.num_elements == (16 + 96) * 112**2 == 1_372 * KIB  # arXiv 2110.15352: 1,372 kB in int8
    assert found.copied.num_elements == (96 + 96 // 4) * 112**2
    assert found.streamed is None  # its first convolution ends in no pooling


def simulate(operations: tuple[Operation, ...], *, concats: bool) -> int:
    """Hold what is needed, operator by operator. A value is needed while one that is to come reads it, or while the
    Concat is needed that it was the last to read: there the value lies."""
    makers = {operation.makes: at for at, operation in enumerate(operations) if operation.makes is not None}
    readers: dict[int, list[int]] = {number: [] for number in makers}
    for at, operation in enumerate(operations):
        for number in operation.reads:
            readers[number].append(at)

    def home(number: int) -> int | None:
        """The Concat's output in which a value lies."""
        if not concats or not readers[number] or operations[makers[number]].kind == INPUT:
            return None
        last = operations[readers[number][-1]]
        return last.makes if last.kind == "cat" else None

    def is_needed(number: int, at: int) -> bool:
        if any(reader >= at for reader in readers[number]) or makers[number] == at:
            return True
        inside = home(number)
        return inside is not None and is_needed(inside, at)

    peak = 0
    for at, operation in enumerate(operations):
        total = 0
        for number, made_at in makers.items():
            if made_at > at or not is_needed(number, at):
                continue
            size = operations[made_at].num_elements
            size -= sum(operations[makers[part]].num_elements for part in makers if home(part) == number)
            replaces = made_at == at and (operation.kind in ELEMENTWISE or (concats and operation.is_depthwise))
            victims = [part for part in operation.reads if readers[part][-1] == at]
            if replaces and any(operations[makers[part]].num_elements >= size for part in victims):
                size = 0
            total += size
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("name", zoo.names())
def test_each_plan_is_what_holding_and_freeing_needs(name: str) -> None:
    side = 32 if "small" in name else 224
    model = meta(name)
    operations, found = trace(model, side), peaks(model, side)
    assert operations[0].kind == INPUT and operations[-1].kind == "output"
    assert found.in_place.num_elements == simulate(operations, concats=True)
    assert found.copied.num_elements == simulate(operations, concats=False)
    assert found.in_place.num_elements <= found.copied.num_elements
    largest = max(operation.num_elements for operation in operations)
    if found.streamed is None:
        assert found.in_place.num_elements >= largest
    else:
        assert found.streamed.num_elements <= found.in_place.num_elements
