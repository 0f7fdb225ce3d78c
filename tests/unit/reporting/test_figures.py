"""Figures: what they say, and that they can live in a page."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pipeline.core.schemas.ledger import LayerJson
from pipeline.reporting import figures
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
