"""Downsampling loses no extreme; the page holds what it needs and nothing that could run."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dashboards.page import page, page_data
from dashboards.run_view import Attempt, Curve, Happening, LogError, RunView, curve
from tests.unit.dashboards.test_carbon_report import CPU

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def view(**changes: object) -> RunView:
    plain = RunView(
        name="run",
        state="finished",
        updated_s=1.8e9,
        steps_planned=10,
        steps_done=3,
        headline={"loss": 2.0, "mfu": None, "ettr": 0.5},
        curve=Curve([1, 2, 3], {"loss": [3.0, None, 2.0]}, {}, {}),
        undone=Curve([], {"loss": []}, {}, {}),
        events=[],
        attempts=[],
        seconds={"kept": 1.0},
        power_w=([], {}),
        power_note="",
        statement=None,
        mix=[],
        forecast=None,
        log_errors=[],
        config={"name": "run", "optim": {"lr": 1e-3}},
        code="abc",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1501, 10_000, 99_999])
def test_downsampling_keeps_every_extreme_and_the_mean(steps: int) -> None:
    rng = np.random.default_rng(steps)
    values = rng.normal(size=steps)
    values[steps // 3], values[steps // 2] = 1e6, -1e6
    values[7] = np.nan
    drawn = curve(np.arange(1.0, steps + 1), {"loss": values}, buckets=1000)
    assert len(drawn.step) == 1000
    assert drawn.step[-1] == steps
    assert max(v for v in drawn.high["loss"] if v is not None) == 1e6
    assert min(v for v in drawn.low["loss"] if v is not None) == -1e6
    assert np.mean([v for v in drawn.mean["loss"] if v]) == pytest.approx(np.nanmean(values), abs=0.05)


def test_few_steps_are_drawn_as_they_are() -> None:
    drawn = curve(np.array([1.0, 2.0]), {"loss": np.array([3.0, np.inf])})
    assert drawn == Curve([1, 2], {"loss": [3.0, None]}, {}, {})


def test_no_text_of_a_run_ends_the_data_or_becomes_html() -> None:
    text = page(
        [
            view(
                name=EVIL,
                events=[Happening(time_s=1.0, attempt=1, kind="spike", step=1, detail=EVIL)],
                log_errors=[LogError(file=EVIL, line=1, text=EVIL)],
                config={"name": EVIL},
            )
        ]
    )
    assert "<script>alert" not in text
    assert "<img" not in text
    assert text.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data
    assert json.loads(data[1])["runs"][0]["log_errors"][0]["text"] == EVIL


def test_the_policy_lets_only_the_pages_own_script_and_style_run() -> None:
    text = page([view()])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    for tag in ("script", "style"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inside
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert policy[1].startswith("default-src 'none'")
    assert "connect-src" not in policy[1]
    assert "connect-src 'self'" in page([view()], live_s=5)


def test_several_runs_are_told_apart_by_what_differs() -> None:
    data = page_data([view(name="a"), view(name="b", config={"name": "b", "run_root": "x", "optim": {"lr": 2e-3}})])
    assert data["differing"] == ["optim.lr"]
    assert [r["name"] for r in data["runs"]] == ["a", "b"]


def test_what_is_not_finite_makes_no_broken_json() -> None:
    seen = Happening(time_s=1.0, attempt=1, kind="evaluated", step=1, detail="", data={"loss": float("nan")})
    text = page([view(events=[seen], headline={"loss": float("inf")})])
    assert "NaN" not in text.partition('id="data">')[2].partition("</script>")[0]


def test_hundreds_of_attempts_and_thousands_of_events_stay_small() -> None:
    losses = {f"source_{i}": 2.0 + i / 7 for i in range(7)}
    detail = "held-out loss 2.345 nats per token"
    events = [
        Happening(
            time_s=1e9 + i, attempt=1, kind=kind, step=i, detail=detail, data={"loss": 2.1, "loss_by_source": losses}
        )
        for kind in ("evaluated", "saved", "removed", "resumed")
        for i in range(20_000)
    ]
    spans = [(1e9 + i, 1e9 + i + 1, "kept") for i in range(12)]
    attempts = [
        Attempt(
            number=n,
            start_s=1e9,
            end_s=1e9 + 12,
            first_step=1,
            last_step=9,
            where="node, 8 ranks",
            ended="",
            spans=spans,
        )
        for n in range(500)
    ]
    data = page_data([view(events=events, attempts=attempts)])
    assert len(page([view(events=events, attempts=attempts)])) < 1_500_000
    shown = [e["step"] for e in data["runs"][0]["events"] if e["kind"] == "evaluated"]
    assert (shown[0], shown[-1]) == (0, 19_999)
    assert not [e for e in data["runs"][0]["events"] if e["kind"] == "removed"]


def drawn(folder: Path, *runs: RunView) -> str:
    """The page's text as a browser draws it, an element a line."""
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("no chromium is installed")
    (folder / "page.html").write_text(page(runs))
    words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--dump-dom"]
    done = subprocess.run([*words, f"file://{folder}/page.html"], capture_output=True, text=True, check=True)
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", done.stdout, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", "\n", body)


def happened(kind: str, step: int, act: str = "", detail: str = "") -> Happening:
    return Happening(
        time_s=1e9 + step, attempt=1, kind=kind, step=step, detail=detail, data={"act": act} if act else {}
    )


def test_an_update_counts_as_left_out_where_it_was_left_out_and_the_list_says_what_came_of_it(tmp_path: Path) -> None:
    events = [happened("withheld", s) for s in (1, 2, 3, 4)]
    clipped = "recomputed, the loss was 9 again: the batch stands out, its gradient is applied clipped"
    events += [happened("recomputed", 1, "clip", clipped), happened("recomputed", 2, "accept")]
    events += [happened("recomputed", 3, "leave_out"), happened("spike", 4, "skip"), happened("recovered", 5)]
    text = drawn(tmp_path, view(events=events))
    loss = text[text.index("Loss\n") : text.index("Held-out loss by source\n")]
    assert [line for line in loss.splitlines() if "update" in line] == [
        "2 updates left out",
        "1 update applied clipped",
    ]
    for shown in ("recomputed", clipped, "recovered"):
        assert f"\n{shown}\n" in text


def test_a_panel_whose_figures_carry_their_units_names_no_other_and_no_two_columns_are_alike(tmp_path: Path) -> None:
    time = drawn(tmp_path, view(seconds={"kept": 8.0, "startup": 0.02}))
    time = time[time.index("Where the time went") : time.index("Events\n")]
    assert "8.0 s" in time
    assert "20 ms" in time
    assert "\nh\n" not in time
    two = drawn(tmp_path, view(name="a", config={"steps": 10}), view(name="b", config={"steps": 20}))
    heads = two[: two.index("\nLoss\n")].splitlines()
    assert heads.count("steps done") == heads.count("steps") == 1


def test_the_energy_of_a_part_of_the_time_says_so_above_its_figure(tmp_path: Path) -> None:
    assert "\nenergy at the site\n" in drawn(tmp_path, view(statement=CPU))
    part = drawn(tmp_path, view(statement=replace(CPU, covered_share=0.62)))
    assert "\nenergy at the site, of 62.0% of the device-hours\n" in part
