"""A sweep's page: a best one only among points whose losses compare, and curves that are drawn whole."""

import re
from dataclasses import replace

from dashboards.sweep_page import APART, SweepPoint, equals, sweep_page


def point(name: str, loss: float | None, corpus: str) -> SweepPoint:
    return SweepPoint(
        name=name,
        state="finished" if loss else "waiting",
        values={"model": name},
        step=1,
        loss=loss,
        held_out_loss=loss,
        parameters=1000,
        tokens=4096,
        steps_s=1.0,
        energy_kwh=None,
        energy_site_kwh=None,
        co2e_kg=None,
        curve=[(2.0**i, 9.0 if i < 2 else 5.0) for i in range(12)],
        detail="",
        corpus=corpus,
    )


LARGE = [point("tiny", 5.9, "vocabulary of 4,096"), point("small", 6.1, "vocabulary of 4,096")]
SMALL = [point("nano", 4.8, "vocabulary of 512"), point("pico", 4.9, "vocabulary of 512")]


def best(text: str) -> list[str]:
    return re.findall(r'<tr class="best"><td>.*?</svg> (\w+)', text)


def test_a_point_is_the_best_only_of_those_with_its_tokens_and_texts() -> None:
    text = sweep_page("ladder", ["model"], [*SMALL, *LARGE], None, None)
    assert APART in text
    assert best(text) == ["nano", "tiny"]
    assert text.index("vocabulary of 512") < text.index(" pico") < text.index("vocabulary of 4,096")
    assert best(sweep_page("ladder", ["model"], [SMALL[0], LARGE[0]], None, None)) == []
    alike = sweep_page("ladder", ["model"], [*LARGE, point("later", None, "")], None, None)
    assert APART not in alike
    assert best(alike) == ["tiny"]


def test_what_has_not_begun_stands_apart_only_where_others_do() -> None:
    later = point("later", None, "")
    assert list(equals([*LARGE, later])) == [""]
    assert equals([*SMALL, later, *LARGE])["not begun"] == [later]
    assert equals([]) == {"": []}


def test_every_point_of_a_curve_lies_in_its_frame_and_no_line_crosses_a_label() -> None:
    text = sweep_page("ladder", ["model"], [replace(p, corpus="") for p in LARGE], None, None)
    frame = re.search(r'<clipPath id="clip0"><rect x="\d+" y="(\d+)" width="\d+" height="(\d+)"/>', text)
    assert frame
    top, height = map(int, frame.groups())
    curves = re.findall(r'<polyline points="([^"]+)"[^>]*stroke-width="1.4"', text)
    assert len(curves) == 2
    heights = [float(pair.split(",")[1]) for curve in curves for pair in curve.split()]
    assert len(heights) == 24
    assert all(top <= y <= top + height for y in heights)
    for label in ("tiny", "small"):
        assert re.search(rf'<text [^>]*stroke="#fff"[^>]*paint-order="stroke">{label}</text>', text)


def test_the_picture_says_how_many_points_it_leaves_out() -> None:
    dropped = [
        replace(point(name, None, "vocabulary of 4,096"), state="dropped", loss=6.0) for name in ("nano", "pico")
    ]
    assert "2 of 4 points are not in the picture" in sweep_page("ladder", ["model"], [*LARGE, *dropped], None, None)
    shown = [replace(p, held_out_loss=6.5) for p in dropped]
    assert "not in the picture" not in sweep_page("ladder", ["model"], [*LARGE, *shown], None, None)
