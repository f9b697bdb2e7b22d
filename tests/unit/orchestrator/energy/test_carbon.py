"""Intensities, forecasts, the greenest start and budgets."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dashboards.carbon import llama_table
from orchestrator.energy.carbon import (
    Range,
    Series,
    budget_verdict,
    carbon_forecast,
    energy_forecast,
    energy_range,
    greenest_start,
    intensity,
    place_problems,
    read_series,
)
from orchestrator.energy.config import CarbonConfig
from orchestrator.errors import UserError

GOLDEN = Path(__file__).parents[3] / "golden"
H = 3600.0


def config(**fields: object) -> CarbonConfig:
    return CarbonConfig(name="test", **fields)  # type: ignore[arg-type]


def test_llamas_table_15_is_reproduced_to_the_printed_digit():
    assert llama_table() == (GOLDEN / "llama_table_15.md").read_text()


def test_llamas_table_differs_from_the_printed_one_in_blooms_mwh_alone():
    printed = {
        "OPT-175B": ("356", "137"),
        "BLOOM-175B": ("475", "183"),
        "LLaMA-7B": ("36", "14"),
        "LLaMA-13B": ("59", "23"),
        "LLaMA-33B": ("233", "90"),
        "LLaMA-65B": ("449", "173"),
    }
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in llama_table().splitlines()[2:8]]
    computed = {model: (mwh, tonnes) for model, _, _, mwh, tonnes in cells}
    assert computed == printed | {"BLOOM-175B": ("476", "183")}


def test_llamas_whole_project_is_reproduced():
    """2,638 MWh and 1,015 tCO2e: section 6 of the paper, both cut."""
    gpu_hours = 2_638_000 / (400 * 1.1 / 1000)
    assert gpu_hours / 2048 / 24 == pytest.approx(122, abs=0.1)  # "approximately 5 months"
    assert int(2638 * 0.385) == 1015


@pytest.mark.parametrize(
    ("fields", "g_per_kwh", "year"),
    [
        ({"zone": "FRA"}, 56.0, "2023"),
        ({"zone": "USA"}, 369.5, "2023"),
        ({"zone": "DEU"}, 380.9, "2023"),
        ({"zone": "USA", "region": "Texas"}, 349.8, "2023"),
        ({"zone": "SWE", "region": "SE3"}, 27, "2025"),
        ({"cloud": "gcp/asia-east1"}, 451, "not stated by the table"),
        ({"intensity_g_per_kwh": 12.5, "zone": "USA"}, 12.5, "as given"),
    ],
)
def test_an_intensity_has_its_source_and_year(fields: dict[str, object], g_per_kwh: float, year: str):
    found = intensity(config(**fields))
    assert found is not None
    assert (found.g_per_kwh.central, found.year) == (pytest.approx(g_per_kwh, abs=0.1), year)
    assert found.source


def test_without_a_zone_there_is_no_intensity():
    assert intensity(config()) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"zone": "XKX"}, "213 countries"),
        ({"zone": "USA", "region": "Atlantis"}, "texas"),
        ({"zone": "FRA", "region": "Bretagne"}, "there are: none"),
        ({"cloud": "aws/us-east-1"}, "only gcp"),
        ({"cloud": "gcp/moon-1"}, "europe-west1"),
    ],
)
def test_an_unknown_place_is_refused_and_never_the_worlds_mean(fields: dict[str, object], said: str):
    with pytest.raises(UserError, match=said):
        intensity(config(**fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"zone": "FR"}, "FRA"),
        ({"pue": 0.9}, "at least 1"),
        ({"region": "Texas"}, "carbon.zone"),
        ({"start": "greenest"}, "carbon.series"),
        ({"start": "later"}, "greenest"),
        ({"deadline": "2026-12-01T08:00:00"}, "time zone"),
        ({"budget_t_co2e": 3.0}, "carbon.zone"),
        ({"cloud": "gcp"}, "provider/region"),
    ],
)
def test_a_configuration_that_cannot_be_says_why(fields: dict[str, object], said: str):
    assert any(said in problem for problem in config(**fields).problems())


def write_series(path: Path, values: list[float], day: str = "2026-12-01") -> str:
    rows = [f"{day}T{hour:02d}:00:00Z,{g}" for hour, g in enumerate(values)]
    path.write_text("\n".join(["time_utc,g_per_kwh", *rows]) + "\n")
    return str(path)


def test_a_series_is_averaged_over_the_time_of_use(tmp_path: Path):
    series = read_series(write_series(tmp_path / "s.csv", [100, 300]))
    t = series.start_s[0]
    assert list(series.mean_g_per_kwh([t, t + H / 2, t + H], [t + H, t + 1.5 * H, t + 2 * H])) == [100, 200, 300]
    assert series.covers(t, t + 2 * H)
    assert not series.covers(t, t + 2 * H + 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "header"),
        ("time_utc,g_per_kwh\nyesterday,2\n", ":2:"),
        ("time_utc,g_per_kwh\n2026-12-01T00:00Z,-4\n", "-4"),
        ("time_utc,g_per_kwh\n2026-12-01T00:00Z,4\n", "two rows"),
    ],
)
def test_a_broken_series_is_refused(tmp_path: Path, text: str, said: str):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_series(str(tmp_path / "s.csv"))


def test_a_place_is_known_or_told_before_a_run_trains(tmp_path: Path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for fields, said in (
        ({"zone": "XXX"}, "carbon.zone=XXX"),
        ({"series": str(tmp_path / "binary.csv")}, "is no text"),
        ({"series": str(tmp_path / "nope.csv"), "intensity_g_per_kwh": 5.0}, "does not exist"),
    ):
        (problem,) = place_problems(config(**fields))
        assert said in problem
    path = write_series(tmp_path / "s.csv", [100, 300])
    assert place_problems(config(series=path)) == place_problems(config(zone="FRA")) == place_problems(config()) == []


def test_a_series_that_was_written_anew_is_read_anew(tmp_path: Path):
    for value in (100.0, 200.0):
        assert read_series(write_series(tmp_path / "s.csv", [value, value])).g_per_kwh == (value, value)


def test_the_range_of_an_energy_is_as_wide_as_its_worst_part():
    assert energy_range({"counter": 3.6e6}) == Range(0.9, 1.0, 1.1)
    assert energy_range({"counter": 3.6e6, "estimated": 3.6e6}) == Range(pytest.approx(1.4), 2.0, pytest.approx(2.6))


def test_the_forecasts_centre_is_llamas_formula():
    forecast = energy_forecast(1_022_362, 400, 1.1)
    assert forecast.central == pytest.approx(449_839, abs=1)
    assert forecast.low < forecast.central < forecast.high


def test_carbon_is_forecast_by_zone_or_by_the_hours_of_the_run(tmp_path: Path):
    kwh = Range(1000, 1000, 1000)
    by_zone = carbon_forecast(kwh, config(intensity_g_per_kwh=50), 0, 1)
    assert by_zone is not None
    assert by_zone[0].central == 50
    path = write_series(tmp_path / "s.csv", [100, 300])
    start_s = read_series(path).start_s[0]
    by_hour = carbon_forecast(kwh, config(series=path), start_s, 2)
    assert by_hour is not None
    assert by_hour[0].central == 200
    assert carbon_forecast(kwh, config(), 0, 1) is None
    with pytest.raises(UserError, match="longer series"):
        carbon_forecast(kwh, config(series=path), start_s, 3)


def test_the_greenest_start_waits_for_the_wind_and_says_what_it_saves():
    series = Series(tuple(H * i for i in range(6)), (400, 400, 100, 100, 400, 400), "s.csv")
    start = greenest_start(series, now_s=0, duration_s=2 * H, deadline_s=6 * H)
    assert (start.start_s, start.g_per_kwh, start.now_g_per_kwh) == (2 * H, 100, 400)
    assert start.saved_kg(1000) == 300
    assert "saves 75%: 300.0 kg CO2e" in start.describe(1000)


def test_the_greenest_start_keeps_the_deadline_and_needs_a_forecast_up_to_it():
    series = Series((0, H, 2 * H), (400, 300, 100), "s.csv")
    assert greenest_start(series, 0, H, 2 * H).start_s == H
    with pytest.raises(UserError, match="move the deadline"):
        greenest_start(series, 0, 3 * H, 2 * H)
    with pytest.raises(UserError, match="must cover"):
        greenest_start(series, 0, H, 9 * H)


@given(
    st.lists(st.integers(1, 500), min_size=3, max_size=12),
    st.integers(1, 300),
    st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_no_other_start_is_greener(values: list[int], duration_min: int, now_min: int):
    series = Series(tuple(H * i for i in range(len(values))), tuple(map(float, values)), "s.csv")
    now_s, duration_s, deadline_s = 60.0 * now_min, 60.0 * duration_min, series.end_s
    if now_s + duration_s > deadline_s:
        return
    best = greenest_start(series, now_s, duration_s, deadline_s)
    every = [now_s + 60 * m for m in range(int((deadline_s - duration_s - now_s) // 60) + 1)]
    means = series.mean_g_per_kwh(every, [t + duration_s for t in every])
    assert best.g_per_kwh <= means.min() + 1e-6
    assert now_s <= best.start_s <= deadline_s - duration_s


@pytest.mark.parametrize(
    ("used_kwh", "used_kg", "on_budget", "action"),
    [
        (79, None, "stop", "ok"),
        (81, None, "stop", "warn"),
        (100, None, "stop", "stop"),
        (100, None, "warn", "warn"),
        (10, 2000, "stop", "stop"),
    ],
)
def test_a_budget_warns_and_then_does_what_was_asked(used_kwh, used_kg, on_budget, action):
    verdict = budget_verdict(
        config(budget_kwh=100, budget_t_co2e=2, on_budget=on_budget, zone="FRA"), used_kwh, used_kg
    )
    assert verdict.action == action
