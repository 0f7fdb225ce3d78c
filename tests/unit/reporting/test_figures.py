"""Figures: what they say, and that they can live in a page."""

import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.schemas.ledger import LayerJson
from pipeline.reporting import figures
from pipeline.reporting.figures import NUM_SPANS, learning_figures, thinned
from pipeline.reporting.runs import read_run
from tests.making.runs import MakeRun, handmade_row

ROWS = [
    handmade_row(gradient_bytes=4_993_696, times_baseline=1.0),
    handmade_row("alexnet", gradient_bytes=244_403_360, times_baseline=244_403_360 / 4_993_696),
    handmade_row("failed"),
]


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter("text")]


def test_models_carry_their_bytes_and_their_multiple() -> None:
    svg = figures.to_svg(figures.model_bytes_figure(ROWS, "squeezenet1_0"), "models")
    shown = texts(svg)
    assert "244.40 MB · 48.94×" in shown
    assert "4.99 MB · baseline" in shown
    assert "failed" not in shown


def test_a_single_model_can_be_drawn() -> None:
    figures.to_svg(figures.model_bytes_figure(ROWS[:1], "squeezenet1_0"), "models")


def test_small_layers_are_summed_not_dropped() -> None:
    layers: list[LayerJson] = [
        {"name": f"layer{i}", "bytes": 1000 * (i + 1), "share": (i + 1) / 210} for i in range(20)
    ]
    shown = texts(figures.to_svg(figures.layer_bytes_figure(layers, num_shown=5), "layers"))
    assert "15 smaller layers" in shown
    assert "120.00 kB · 57.1 %" in shown


def test_an_inline_figure_loads_nothing_and_collides_with_nothing(make_run: MakeRun) -> None:
    run = read_run(make_run("first", num_steps=60, validated=True))
    drawings = {**figures.learning_figures(run), "traffic": figures.traffic_figure(run)}
    assert set(drawings) == {"loss", "top1", "traffic"}
    for name, figure in drawings.items():
        assert figure is not None
        svg = figures.to_svg(figure, name)
        root = ElementTree.fromstring(svg)
        assert "http" not in svg and "<style" not in svg
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert ids and all(identifier and identifier.startswith(f"{name}-") for identifier in ids)
        for element in root.iter():
            clip = element.get("clip-path")
            assert clip is None or clip.removeprefix("url(#").removesuffix(")") in ids


def test_a_run_without_rows_or_traffic_has_no_curves(make_run: MakeRun) -> None:
    directory = make_run("first")
    (directory / "metrics.jsonl").write_text("")
    run = read_run(directory)
    assert figures.learning_figures(run) == {}
    assert figures.traffic_figure(run) is None


def test_files_for_papers_are_written(tmp_path: Path) -> None:
    figures.save(figures.model_bytes_figure(ROWS, "squeezenet1_0"), tmp_path / "comparison")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(tmp_path / "comparison.svg")


@pytest.mark.parametrize("name", ["<b>&", '"quoted"'])
def test_names_are_escaped_in_figures(name: str) -> None:
    rows = [handmade_row(name, gradient_bytes=1)]
    assert name in texts(figures.to_svg(figures.model_bytes_figure(rows, "other"), "models"))


@given(num_values=st.integers(2 * NUM_SPANS + 1, 6 * NUM_SPANS), peak=st.integers(0, 2000), seed=st.integers())
@settings(max_examples=10, deadline=None)
def test_a_long_curve_is_thinned_and_keeps_its_extremes(num_values: int, peak: int, seed: int) -> None:
    source = random.Random(seed)
    values = [source.gauss() for _ in range(num_values)]
    values[peak] = 1e9
    steps = [7 * number for number in range(len(values))]
    x, y = thinned(steps, values)
    assert len(x) == len(y) <= 2 * NUM_SPANS + 2 and x == sorted(set(x))
    assert (x[0], x[-1]) == (steps[0], steps[-1]) and 7 * peak in x
    assert (min(y), max(y)) == (min(values), max(values))
    assert all(values[step // 7] == value for step, value in zip(x, y, strict=True))


def test_a_short_curve_is_drawn_whole() -> None:
    assert thinned([1, 2, 5], [3.0, 1.0, 2.0]) == ([1, 2, 5], [3.0, 1.0, 2.0])


@pytest.mark.not_quick
def test_what_is_drawn_does_not_grow_with_the_record(make_run: MakeRun) -> None:
    """And the drawing says by what rule."""
    drawn = {}
    for num_steps in (3000, 12_000):
        run = read_run(make_run(f"run{num_steps}", num_steps=num_steps))
        loss = learning_figures(run)["loss"]
        assert f"every {num_steps // 1000})" in loss.axes[0].get_xlabel()
        drawn[num_steps] = [np.size(line.get_xdata()) for line in loss.axes[0].get_lines()]
    assert all(number <= 2 * NUM_SPANS + 2 for numbers in drawn.values() for number in numbers)
