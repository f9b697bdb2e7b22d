"""The loss curve: well-formed, within its frame, short for long runs, and it survives a NaN."""

import math
import xml.etree.ElementTree as ET

from dashboards.curve import HEIGHT, WIDTH, loss_curve_svg

SVG = "{http://www.w3.org/2000/svg}"


def test_the_curve_shows_every_series_inside_its_frame() -> None:
    steps = list(range(1, 301))
    tree = ET.fromstring(loss_curve_svg("a < b", steps, [8 - s / 100 for s in steps], [(100, 6.9), (300, 5.2)], 6.6))
    (line,) = tree.iter(f"{SVG}polyline")
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert len(points) == 300
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert points[0][1] < points[-1][1]  # a falling loss falls
    assert len(list(tree.iter(f"{SVG}circle"))) == 2
    text = " ".join(t.text or "" for t in tree.iter(f"{SVG}text"))
    assert "unigram level, 6.60" in text
    assert "a < b" in text


def test_a_long_run_with_a_nan_stays_small() -> None:
    steps = list(range(1, 1_000_001))
    losses = [2.0 + 1 / s for s in steps]
    losses[0] = losses[500_000] = math.nan
    svg = loss_curve_svg("long", steps, losses, [], None)
    assert len(svg) < 100_000
    assert "nan" not in svg
