"""The page in a real browser with the network off; what it is made from; how it is served."""

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from made_run import START_S, add_events, event, make_run

from dashboards.serve import server
from orchestrator.cli import main
from orchestrator.page_data import RunFollower, run_view

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOW = "no chromium is installed: `make test` installs it where it may; by hand: apt-get install chromium"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail(HOW)
        pytest.skip(HOW)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        off = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--no-proxy-server"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=off)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_run(tmp_path_factory.mktemp("runs") / "llama", 4000, 3)
    add_events(
        root,
        2,
        event(START_S + 100, "spike", 2000, 2, "loss 6.1 stands 9 tails above its trend"),
        event(START_S + 101, "rewound", 2000, 2, "back to step 1900"),
    )
    (root / "logs" / "1_0_log.out").write_text("fine\nRuntimeError: <script>window.broken = 1</script>\n")
    (root / "plan.json").write_text(json.dumps({"step_s": {"low": 0.4, "central": 0.6, "high": 0.7}, "mfu": 0.45}))
    return root


class Opened:
    """A page that is drawn, with all that it said and asked for."""

    def __init__(self, browser: Any, url: str, scheme: str = "light", width: int = 1280) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=url.startswith("file:")
        )
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#page[data-drawn]")

    def inked(self) -> dict[str, int]:
        """Of every chart, how many of its pixels are drawn on."""
        found: dict[str, int] = self.page.evaluate(
            """() => Object.fromEntries([...document.querySelectorAll('article canvas')].map(c => {
                const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
                let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0;
                return [c.closest('article').id, n]; }))"""
        )
        return found


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_the_page_draws_in_a_browser_without_a_network_an_error_or_a_request(
    browser: Any, run: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    assert main(["dashboard", "page", str(run), "--output", str(tmp_path / "page.html")]) == 0
    opened = Opened(browser, (tmp_path / "page.html").as_uri(), scheme, width)
    assert opened.said == []
    assert opened.asked == [(tmp_path / "page.html").as_uri()]
    inked = opened.inked()
    steps = {"loss", "held_out", "grad_norm", "lr", "tokens_per_s", "mfu", "step_time", "memory", "power", "tokens"}
    assert set(inked) == {f"panel-{key}" for key in steps}
    assert min(inked.values()) > 500
    text = opened.page.inner_text("#page")
    for words in (
        "1 spike",
        "1 rewind",
        "2 resumes",
        "Attempt 3, finished",
        "ETTR",
        "RuntimeError: <script>",
        "counter",
    ):
        assert words in text
    assert "20.0%" in text  # step_s: 0.6 was forecast, 0.5 measured
    assert opened.page.evaluate("window.broken") is None
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
    opened.context.close()


@pytest.mark.slow
def test_runs_are_compared_in_one_page(browser: Any, run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", 300, 1, 20, "optim.lr=1e-4")
    assert main(["dashboard", "page", str(run), str(other), "--output", str(tmp_path / "both.html")]) == 0
    opened = Opened(browser, (tmp_path / "both.html").as_uri())
    assert opened.said == []
    text = opened.page.inner_text("main")
    assert "optim.lr" in text.splitlines()[0] or "optim.lr" in text
    assert opened.page.locator("#panel-life .life svg").count() == 4
    opened.context.close()


@pytest.mark.slow
def test_the_legends_of_many_runs_stay_small_and_the_table_in_its_box(browser: Any, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"model-tiny.lr-0.00{i}-c166f08349", 60, 1, 20, f"optim.lr=1e-{i}", f"seed={i}")
        for i in range(1, 7)
    ]
    assert main(["dashboard", "page", *map(str, runs), "--output", str(tmp_path / "six.html")]) == 0
    opened = Opened(browser, (tmp_path / "six.html").as_uri(), width=900)
    cards = "[...document.querySelectorAll('article:has(canvas)')]"
    heights = opened.page.evaluate(f"{cards}.map(c => c.offsetHeight)")
    assert len(heights) > 6
    assert max(heights) < 600
    # a name, its colon and its value beside each other: two lines at most
    rows = opened.page.evaluate("[...document.querySelectorAll('.u-series:not([hidden])')].map(r => r.offsetHeight)")
    assert max(rows) <= 50
    box = opened.page.locator("main > .card .scroll").first
    assert box.evaluate("e => e.scrollWidth > e.clientWidth + 20")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 900
    box.evaluate("e => e.scrollLeft = 1000")
    inside = "e => e.getBoundingClientRect().left >= e.closest('.scroll').getBoundingClientRect().left"
    assert box.locator("td").first.evaluate(inside)  # the names stay in sight
    opened.context.close()


@pytest.mark.slow
def test_the_served_page_refreshes_itself_and_asks_nobody_else(browser: Any, tmp_path: Path) -> None:
    root = make_run(tmp_path / "going", 100, 1, finished=False)
    follower = RunFollower(root)
    serving = server(follower.fingerprint, lambda: [follower.view()], 0, live_s=0.1)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{serving.server_address[1]}/"
    try:
        opened = Opened(browser, url)
        opened.page.locator(".chip", has_text="no sign of life").wait_for()
        add_events(root, 1, event(START_S + 90, "finished", 100, 1, "finished"))
        opened.page.locator(".chip", has_text="finished").wait_for()
        assert opened.said == []
        assert {asked.removesuffix("data.json") for asked in opened.asked} == {url}
        opened.context.close()

        with urllib.request.urlopen(url) as answer:
            tag = answer.headers["ETag"]
        for headers, expected in (({"If-None-Match": tag}, 304), ({"Host": "elsewhere.example"}, 403)):
            with pytest.raises(HTTPError) as told:
                urllib.request.urlopen(urllib.request.Request(url, headers=headers))
            assert told.value.code == expected
    finally:
        serving.shutdown()
        serving.server_close()


@pytest.mark.slow
def test_a_million_steps_make_a_small_page(browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run(tmp_path / "long", 1_000_000, 3, 5000)
    assert main(["dashboard", "page", str(root), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["size_bytes"] < 1_000_000
    opened = Opened(browser, Path(made["page"]).as_uri())
    assert opened.said == []
    assert min(opened.inked().values()) > 500
    opened.context.close()


def test_the_time_of_a_run_is_accounted_for_from_its_first_start(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 300, 3, 20)
    seen = run_view(root)
    assert seen.state == "finished"
    assert seen.seconds["kept"] == pytest.approx(300 * 0.5, rel=0.01)
    assert seen.seconds["lost"] == pytest.approx(40 * 0.5, rel=0.05)
    assert seen.seconds["down"] == pytest.approx(2 * 30, rel=0.1)
    whole = seen.attempts[-1].end_s - seen.attempts[0].start_s
    assert sum(seen.seconds.values()) == pytest.approx(whole, rel=1e-6)
    assert seen.headline["ettr"] == pytest.approx(seen.seconds["kept"] / whole)
    assert [a.ended for a in seen.attempts] == ["without a word", "without a word", "finished"]
    assert len(seen.undone.step) == 40 + 2  # and a break after each stretch
    assert seen.statement is not None
    assert seen.statement.by_class_kwh["lost"] > 0


def test_power_adds_up_to_the_energy(tmp_path: Path) -> None:
    seen = run_view(make_run(tmp_path / "run", 300, 1))
    times, kinds = seen.power_w
    joules = sum(v or 0 for v in kinds["gpu"]) * (times[1] - times[0])
    assert seen.statement is not None
    assert joules == pytest.approx(seen.statement.by_kind_kwh["gpu"] * 3.6e6, rel=0.01)


def test_a_run_that_has_not_begun_has_a_page_too(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 10)
    for folder in ("records", "events", "energy"):
        shutil.rmtree(root / folder)
    seen = run_view(root)
    assert (seen.state, seen.steps_done, seen.attempts, seen.forecast) == ("not started", 0, [], None)
    assert main(["dashboard", "page", str(root)]) == 0


def test_a_folder_that_is_no_run_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "page", str(tmp_path)]) == 2
    assert "holds none: none has a spec.yaml" in capsys.readouterr().err


def test_the_page_is_made_without_torch(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 10)
    code = f"from orchestrator.cli import main; main(['dashboard', 'page', {str(root)!r}])"
    code += "; import sys; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
