"""The figures of a comparison: what is drawn, of which rows, and what stands beside it."""

import xml.etree.ElementTree as ElementTree

from pipeline.core.schemas.comparison import ModelLayerJson, ModelRowJson
from pipeline.reporting import comparison_figures, figures
from pipeline.reporting.comparison_figures import Layered, Rated, best_models, draw_all, layers_label
from tests.making.runs import handmade_comparison, handmade_row


def layer(name: str, kind: str, num_bytes: int) -> ModelLayerJson:
    return {"name": name, "kind": kind, "bytes": num_bytes}


LAYERS = [layer("features", "convolution", 600), layer("classifier", "convolution", 400)]
ALEXNET_LAYERS = [layer("features", "convolution", 2_000), layer("fc", "fully connected", 48_000)]
ROW = handmade_row(
    gradient_bytes=1000,
    payload_bytes_per_step=1000,
    times_baseline=1.0,
    step_seconds=0.2,
    exposed_seconds=0.05,
    images_per_second=80.0,
    published_top1=0.58,
    server_egress_bytes_per_training=40_000,
    layers=LAYERS,
)
HALF: ModelRowJson = {
    **ROW,
    "hook": "bf16",
    "label": "squeezenet1_0 + bf16",
    "payload_bytes_per_step": 500,
    "times_baseline": 0.5,
}
ALEXNET = handmade_row(
    "alexnet",
    gradient_bytes=50_000,
    payload_bytes_per_step=50_000,
    times_baseline=50.0,
    step_seconds=0.4,
    images_per_second=40.0,
    published_top1=0.56,
    server_egress_bytes_per_training=2_000_000,
    layers=ALEXNET_LAYERS,
)
RESNET: ModelRowJson = {
    **ALEXNET,
    "model": "resnet18",
    "label": "resnet18",
    "published_top1": 0.70,
    "server_egress_bytes_per_training": 300_000,
}
FAILED = handmade_row("vgg16", reason="It failed.")
COMPARISON = handmade_comparison(ROW, HALF, ALEXNET, RESNET, FAILED)


def texts(name: str) -> list[str]:
    drawing = draw_all(COMPARISON)[name]
    assert drawing is not None
    svg = figures.to_svg(drawing.figure, "x")
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter("text")]


def test_bytes_are_those_carried() -> None:
    assert "500 B · 0.50×" in texts("comparison") and "1.00 kB · baseline" in texts("comparison")


def test_a_step_is_told_with_what_it_waits_for() -> None:
    shown = texts("comparison-time")
    assert "200 ms · 80.0 pictures/s · 25.0 % exposed" in shown
    assert "400 ms · 40.0 pictures/s" in shown  # not timed, so not split
    assert {"computing", "exposed communication", "squeezenet1_0 + bf16"} <= set(shown)
    assert "vgg16" not in shown


def test_layers_name_the_largest_and_the_fully_connected() -> None:
    assert layers_label(LAYERS) == "features 60.0 %"
    assert layers_label(ALEXNET_LAYERS) == "fc 96.0 % · fully connected 96.0 %"
    shown = texts("comparison-layers")
    assert shown.count("squeezenet1_0") == 1 and "squeezenet1_0 + bf16" not in shown


def test_fully_connected_layers_are_hatched() -> None:
    drawing = draw_all(COMPARISON)["comparison-layers"]
    assert drawing is not None
    svg = figures.to_svg(drawing.figure, "x")
    assert "<pattern" in svg and "url(#x-" in svg
    plain = comparison_figures.layer_shares_figure([Layered("squeezenet1_0", LAYERS)])
    assert "<pattern" not in figures.to_svg(plain, "x")


def test_accuracy_stands_against_bytes_without_compression() -> None:
    shown = texts("comparison-accuracy")
    assert "squeezenet1_0 · 40.00 kB" in shown and "resnet18 · 300.00 kB" in shown
    assert not any("bf16" in text for text in shown)


def test_the_best_have_nobody_as_accurate_for_fewer_bytes() -> None:
    small, large, best = Rated(40_000, 0.58, "small"), Rated(2_000_000, 0.56, "large"), Rated(300_000, 0.70, "best")
    assert best_models([small, large, best]) == {"small", "best"}
    assert best_models([small, Rated(40_000, 0.58, "equal")]) == {"small"}


def test_what_nobody_measured_is_not_drawn() -> None:
    bare = handmade_row("vgg16", gradient_bytes=1000, times_baseline=1.0)
    drawn = draw_all(handmade_comparison(bare, baseline="vgg16"))
    assert [name for name, drawing in drawn.items() if drawing] == ["comparison"]
    assert not any(draw_all(handmade_comparison(FAILED, baseline="vgg16")).values())
