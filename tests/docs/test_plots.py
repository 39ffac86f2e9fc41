"""Plots: well-formed, with all points inside and all names shown, for light and dark themes."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.paths import ROOT

sys.path.append(str(ROOT))

from benchmarks import plots
from benchmarks.measure import Line, Plot

SVG = "{http://www.w3.org/2000/svg}"


def plot(*lines: Line, log_x: bool = False, log_y: bool = False) -> Plot:
    return Plot("streams", "Decode <all> & more", "streams", "tokens/s", lines, log_x, log_y)


def drawn(what: Plot) -> ElementTree.Element:
    return ElementTree.fromstring(plots.svg(what))


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def places(root: ElementTree.Element) -> list[tuple[float, float]]:
    """Return the points of the lines."""
    pairs = [pair for line in root.iter(f"{SVG}polyline") for pair in line.get("points", "").split()]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


numbers = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@st.composite
def anything_to_draw(draw: st.DrawFn) -> Plot:
    log_x, log_y = draw(st.booleans()), draw(st.booleans())
    point = st.tuples(positive if log_x else numbers, positive if log_y else numbers)
    line = st.builds(Line, st.text(max_size=120), st.lists(point, max_size=60).map(sorted))
    lines = draw(st.lists(line, min_size=1, max_size=8))
    return Plot("p", draw(st.text()), draw(st.text()), draw(st.text()), lines, log_x, log_y)


@given(anything_to_draw())
def test_every_point_lies_inside_the_drawing(what: Plot) -> None:
    root = drawn(what)
    assert len(places(root)) == sum(len(line.points) for line in what.lines)
    for x, y in places(root):
        assert plots.LEFT <= x <= plots.RIGHT
        assert plots.TOP <= y <= plots.BOTTOM
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not re.search(r"\b(nan|inf)", value, re.IGNORECASE), (name, value)


@given(anything_to_draw())
def test_a_plot_is_drawn_the_same_each_time(what: Plot) -> None:
    assert plots.svg(what) == plots.svg(what)


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cn", "Cc"]), min_size=1))
def test_names_and_labels_are_shown_unchanged(name: str) -> None:
    what = Plot("p", f"t{name}", f"x{name}", f"y{name}", [Line(name, [(1.0, 1.0)])])
    assert {name, f"t{name}", f"x{name}", f"y{name}"} <= set(texts(drawn(what)))


def test_text_that_looks_like_markup_is_escaped() -> None:
    what = Plot("p", "</title><script>", "a & b", "<b>", [Line("]]> \x00", [(1.0, 1.0)])])
    root = drawn(what)
    assert {"</title><script>", "a & b", "<b>", "]]> \ufffd"} <= set(texts(root))
    assert not list(root.iter(f"{SVG}script"))


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (plot(Line("a", [(0.0, 0.0), (10.0, 60_000.0)])), ["0", "2", "4", "6", "8", "10", "20k", "60k"]),
        (plot(Line("a", [(0.0, 0.0), (0.5, 3e6)])), ["0.1", "0.5", "1M", "3M"]),
        (plot(Line("a", [(1.0, 1.0), (1e6, 1.0)]), log_x=True), ["1", "10", "1k", "100k", "1M"]),
        (plot(Line("a", [(1.0, 1.0), (8.0, 1.0)]), log_x=True), ["1", "2", "4", "8"]),
        (plot(Line("a", [(1024.0, 1.0), (32768.0, 1.0)]), log_x=True), ["1024", "4Ki", "32Ki"]),
        (plot(Line("a", [(30.0, 1.0), (150.0, 1.0)]), log_x=True), ["20", "50", "100", "200"]),
        (plot(Line("a", [(1.0, 2e-9)])), ["2e-9"]),
    ],
)
def test_ticks_have_readable_labels(what: Plot, named: list[str]) -> None:
    assert set(named) <= set(texts(drawn(what)))


@given(st.decimals(min_value="1e-30", max_value="1e30", places=None, allow_nan=False))
def test_a_tick_is_labelled_with_its_value(value: Decimal) -> None:
    name = plots.shown(value)
    sizes = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    read = Decimal(name[:-1]) * sizes[name[-1]] if name[-1] in sizes else Decimal(name)
    assert abs(read - value) <= value * Decimal("1e-25")


@pytest.mark.parametrize("points", [[], [(3.0, 5.0)], [(3.0, 5.0), (3.0, 5.0)], [(0.0, 0.0)], [(-2.0, -2.0)]])
@pytest.mark.parametrize("log", [False, True])
def test_a_plot_of_few_points_has_axes_and_a_legend(points: list[tuple[float, float]], log: bool) -> None:
    if log and any(value <= 0 for point in points for value in point):
        pytest.skip("not on a logarithmic axis")
    root = drawn(plot(Line("lonely", points), log_x=log, log_y=log))
    assert "lonely" in texts(root)
    assert len(places(root)) == len(points)
    assert sum(element.get("class") == "grid" for element in root.iter(f"{SVG}line")) >= 4


def test_lines_differ_by_dash_and_by_marker_as_well_as_by_colour() -> None:
    root = drawn(plot(*(Line(f"line {i}", [(1.0, float(i))]) for i in range(6))))
    drawings = list(root.iter(f"{SVG}polyline"))
    assert len({each.get("stroke-dasharray") for each in drawings}) == 6
    assert len({each.get("class") for each in drawings}) == 6
    assert len({each.get("d") for each in root.iter(f"{SVG}path")}) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_undrawable_value_is_reported_with_its_line(value: float) -> None:
    with pytest.raises(ValueError, match="line 'ours'"):
        plots.svg(plot(Line("ours", [(1.0, value)])))


def test_a_logarithmic_axis_shows_positive_values_only() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        plots.svg(plot(Line("ours", [(0.0, 1.0)]), log_x=True))
