"""Figures: what is drawn is where the numbers say, outliers do not flatten it, and names are escaped."""

import re
from xml.etree import ElementTree

import numpy as np

from ches_jax.report import svg
from ches_jax.report.axes import axis


def elements(text, tag):
    return [e for e in ElementTree.fromstring(text).iter() if e.tag == tag]


def test_heights_of_a_histogram_count_the_pairs():
    values = np.array([0.0] * 30 + [10.0] * 15)
    bars = [e for e in elements(svg.histogram(values, x="x <b>"), "rect") if "fillbar" in e.get("class", "")]
    heights = [float(b.get("height", "nan")) for b in bars]
    assert len(bars) == 2 and abs(heights[0] / heights[1] - 2) < 0.01


def test_one_far_value_does_not_flatten_a_figure():
    values = np.concatenate([np.linspace(0, 1, 99), [1e6]])
    bars = [e for e in elements(svg.histogram(values, x="x"), "rect") if "fillbar" in e.get("class", "")]
    assert len(bars) > 8
    found = axis(values)
    assert found.high < 10 and found.outside(values) == (0, 1)


def test_a_curve_goes_through_its_points_and_leaves_gaps():
    x, y = np.array([0.0, 1.0, 2.0]), np.array([0.0, np.nan, -4.0])
    text = svg.lines([svg.Series(name="a<b", x=x, y=y)], x="update", y="nats", zero=True)
    (curve,) = [e for e in elements(text, "polyline") if "curve" in e.get("class", "")]
    (x0, y0), (x2, y2) = (map(float, p.split(",")) for p in curve.get("points", "").split())
    assert x0 == svg.LEFT and x2 == svg.WIDTH - svg.RIGHT and y2 > y0
    assert "a&lt;b" in text


def test_parts_of_a_bar_add_up_on_either_side_of_zero():
    text = svg.stacked(
        {"up": np.array([3.0]), "more": np.array([1.0]), "down": np.array([-2.0])}, np.array([5]), x="step", y="nats"
    )
    bars = [e for e in elements(text, "rect") if e.find("title") is not None]
    tops = [(float(b.get("y", "nan")), float(b.get("height", "nan"))) for b in bars]
    unit = tops[1][1]
    np.testing.assert_allclose([h for _, h in tops], [3 * unit, unit, 2 * unit], atol=0.2)
    assert abs(tops[1][0] + unit - tops[0][0]) < 0.2  # the second stands on the first
    assert abs(tops[0][0] + 3 * unit - tops[2][0]) < 0.2  # the negative one hangs from zero


def test_figures_of_nothing_and_of_one_value():
    for values in (np.array([]), np.array([np.nan]), np.array([7.0])):
        ElementTree.fromstring(svg.histogram(values, x="x"))
    one = svg.lines([svg.Series(name="a", x=np.array([1.0]), y=np.array([2.0]), marks=False)], x="x", y="y")
    assert len(elements(one, "circle")) == 1
    labels = re.findall(r">([^<]*)</text>", svg.histogram(np.array([12_000.0, 15_000.0]), x="x"))
    assert "12,000" in labels and not any("e+" in label for label in labels)
