"""Figures are written twice, closed, and show what they were given."""

from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt

from vectors.analysis import figures
from vectors.analysis.figures import behaviour_bars, heatmaps, learning_curves, radius_curve
from vectors.radius.rule import RadiusChoice


def choice(**changed):
    settings: dict[str, Any] = dict(
        radii=(0.2, 0.4), tried=[0.1, 0.2, 0.4], values=[0.0, 0.5, 0.9], quantity="q (nats)", rule="r", threshold=0.5
    )
    return RadiusChoice(**(settings | changed))


DRAWN = {
    "radius": lambda stem: radius_curve(choice(), stem),
    "one radius": lambda stem: radius_curve(choice(tried=[0.3], values=[1.0], threshold=None), stem),
    "words": lambda stem: behaviour_bars(["costs $5 or $6", "\n中 🙂 " + 50 * "x"], [0.1, 0.2], stem, quantity="score"),
    "many": lambda stem: heatmaps({"theta": torch.eye(200).bfloat16()}, stem),
    "three": lambda stem: heatmaps({"theta": torch.eye(3), "delta": -torch.eye(3), "last": torch.ones(3, 3)}, stem),
    "learning": lambda stem: learning_curves(torch.rand(5, 3, requires_grad=True), stem, quantity="KL (nats)"),
    "bars": lambda stem: behaviour_bars(["a", "$x^$", ""], [0.1, -0.2, 0.0], stem, quantity="score"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_two_files_and_nothing_left_open(tmp_path, name):
    stem = tmp_path / "new" / "R-0.5"  # the dot is no suffix
    paths = DRAWN[name](stem)
    assert [path.name for path in paths] == ["R-0.5.png", "R-0.5.pdf"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG" and paths[1].read_bytes()[:4] == b"%PDF"
    assert plt.get_fignums() == []


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The axes of a figure, looked at before it is saved."""
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, _stem: kept.append(figure) or [])

    def draw(function, *args, **named):
        function(*args, tmp_path / "x", **named)
        return kept[-1].axes

    yield draw
    plt.close("all")


def test_radius_curve_shows_values_choice_and_threshold(drawn):
    (axes,) = drawn(radius_curve, choice())
    measured, *chosen, threshold = axes.lines
    assert measured.get_xydata().tolist() == [[0.1, 0.0], [0.2, 0.5], [0.4, 0.9]]
    assert [line.get_xdata()[0] for line in chosen] == [0.2, 0.4] and threshold.get_ydata()[0] == 0.5
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "q (nats)" and "fraction" in axes.get_xlabel()


def test_heatmaps_share_one_scale_and_label_few_vectors_only(drawn):
    *panels, bar = drawn(heatmaps, {"theta": torch.eye(32), "delta": 0.1 * torch.eye(32)})
    assert all(axes.images[0].get_clim() == (-1, 1) for axes in panels) and bar.get_ylabel() == "cosine"
    assert [axes.get_title() for axes in panels] == ["theta", "delta"] and len(panels[0].get_xticks()) == 32
    axes, _ = drawn(heatmaps, {"theta": torch.eye(33)})
    assert len(axes.get_xticks()) < 10


def test_learning_curves_have_one_line_per_vector_and_the_median(drawn):
    values = torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 4.0]])
    (axes,) = drawn(learning_curves, values, quantity="KL (nats)")
    curves = [line for line in axes.lines if len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in curves] == [[0, 2], [1, 3], [5, 4], [1, 3]]
    assert curves[-1].get_linewidth() > 2 * curves[0].get_linewidth()


def test_bars_are_sorted_best_on_top_and_short(drawn):
    (axes,) = drawn(behaviour_bars, ["low", "high " * 40, "mid"], [0.1, 0.9, 0.5], quantity="score (fraction)")
    assert [bar.get_width() for bar in axes.patches] == [0.9, 0.5, 0.1]
    texts = [text.get_text() for text in axes.get_yticklabels()]
    assert texts[1:] == ["mid", "low"] and len(texts[0]) <= 60 and texts[0].endswith("…")
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # first bar above


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="tried no radius"):
        radius_curve(choice(tried=[], values=[]), tmp_path / "x")
    with pytest.raises(ValueError, match="'delta' has no vectors"):
        heatmaps({"delta": torch.zeros(0, 0)}, tmp_path / "x")
    with pytest.raises(ValueError, match="no matrices"):
        heatmaps({}, tmp_path / "x")
    with pytest.raises(ValueError, match="2 labels and 1 scores"):
        behaviour_bars(["a", "b"], [1.0], tmp_path / "x", quantity="q")
    assert plt.get_fignums() == [] and list(tmp_path.iterdir()) == []
