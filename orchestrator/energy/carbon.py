"""From joules to carbon: the grid's intensity, ranges, LLaMA's formula, forecasts, the greenest start, and budgets.

Pure but for reading the time series that the user names and the tables that codecarbon ships; nothing asks a network.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np

from dashboards.carbon import Range
from orchestrator.energy.config import CarbonConfig
from orchestrator.errors import UserError

J_PER_KWH = 3.6e6
FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]

# Half-widths of what a joule of each source is known to (docs/numbers.md): systematic, so they never average out.
UNCERTAINTY = {"counter": 0.10, "sampled": 0.10, "modelled": 0.30, "estimated": 0.50}
TABLE_UNCERTAINTY = 0.10  # a yearly mean of a whole grid stands for the hours of this run
UNCERTAINTY_METHOD = (
    "low and high: each source's joules moved together by its half-width "
    + ", ".join(f"{source} {100 * width:.0f}%" for source, width in UNCERTAINTY.items())
    + f"; a yearly table's intensity by {100 * TABLE_UNCERTAINTY:.0f}%; PUE taken as exact"
)


def energy_range(joules_by_source: Mapping[str, float]) -> Range:
    """kWh of the devices, by how their joules were got (UNCERTAINTY)."""
    kwh = sum(joules_by_source.values()) / J_PER_KWH
    half = sum(joules * UNCERTAINTY[source] for source, joules in joules_by_source.items()) / J_PER_KWH
    return Range(kwh - half, kwh, kwh + half)


# --------------------------------------------------------------------------------------------------------- intensity


@dataclass(frozen=True)
class Series:
    """A grid's intensity over time; each value holds from its time to the next, the last as long as the one before."""

    start_s: tuple[float, ...]  # Unix, growing
    g_per_kwh: tuple[float, ...]
    path: str

    @property
    def end_s(self) -> float:
        return self.start_s[-1] + (self.start_s[-1] - self.start_s[-2])

    def covers(self, start_s: float, end_s: float) -> bool:
        return self.start_s[0] <= start_s and end_s <= self.end_s

    def mean_g_per_kwh(self, start_s: Sequence[float], end_s: Sequence[float]) -> FloatArray:
        """The mean over each of many stretches of time, at even power."""
        edges = np.array([*self.start_s, self.end_s]) - self.start_s[0]
        until = np.concatenate(([0.0], np.cumsum(np.diff(edges) * np.array(self.g_per_kwh))))
        a, b = np.array(start_s) - self.start_s[0], np.array(end_s) - self.start_s[0]
        mean: FloatArray = (np.interp(b, edges, until) - np.interp(a, edges, until)) / (b - a)
        return mean


def read_series(path: str) -> Series:
    """A CSV with the header time_utc,g_per_kwh. Raises UserError with the line that is wrong."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"carbon.series={path} does not exist: give a CSV file with the header time_utc,g_per_kwh")
    try:
        return _series(path, file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(
            f"carbon.series={path} is no text: give a CSV file with the header time_utc,g_per_kwh"
        ) from None


@lru_cache(maxsize=4)  # every point of a sweep asks
def _series(path: str, text: str) -> Series:
    rows: list[tuple[float, float]] = []
    reader = csv.DictReader(io.StringIO(text))
    if not {"time_utc", "g_per_kwh"} <= set(reader.fieldnames or ()):
        raise UserError(f"{path}: its header is {reader.fieldnames}, and must hold time_utc,g_per_kwh")
    for row in reader:
        try:
            time = datetime.fromisoformat(row["time_utc"])
            value = float(row["g_per_kwh"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}:{reader.line_num}: {error}") from None
        if not 0 <= value < 10_000:
            raise UserError(f"{path}:{reader.line_num}: {value} is no intensity in g CO2e per kWh")
        rows.append(((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp(), value))
    rows.sort()
    if len({time_s for time_s, _ in rows}) < max(2, len(rows)):
        raise UserError(f"{path} must hold two rows or more, each with a time of its own; it holds {len(rows)}")
    return Series(tuple(t for t, _ in rows), tuple(v for _, v in rows), path)


@dataclass(frozen=True)
class Intensity:
    """g CO2e per kWh of the grid (location-based), and where it comes from."""

    g_per_kwh: Range
    source: str
    year: str


def intensity(config: CarbonConfig) -> Intensity | None:
    """The grid's intensity as a constant; None where none is configured, or where it varies (`config.series`).

    Raises UserError for a zone, region or cloud region that the tables do not hold: nothing falls back silently.
    """
    if config.intensity_g_per_kwh is not None:
        g = config.intensity_g_per_kwh
        return Intensity(Range(g, g, g), "carbon.intensity_g_per_kwh", "as given")
    if config.series is not None:
        return None
    if config.cloud is not None:
        g, source, year = _cloud_g_per_kwh(config.cloud)
    elif config.zone is not None:
        g, source, year = _zone_g_per_kwh(config.zone, config.region)
    else:
        return None
    return Intensity(Range(g * (1 - TABLE_UNCERTAINTY), g, g * (1 + TABLE_UNCERTAINTY)), source, year)


def place_problems(config: CarbonConfig) -> list[str]:
    """Why the grid's intensity cannot be told from where the run says it is: known before it trains."""
    try:
        intensity(config)
        if config.series is not None:
            read_series(config.series)
    except UserError as error:
        return [str(error)]
    return []


def _cloud_g_per_kwh(cloud: str) -> tuple[float, str, str]:
    import codecarbon
    from codecarbon.input import DataSource

    provider, region = cloud.split("/")
    table = DataSource().get_cloud_emissions_data()
    rows = table[table["provider"] == provider]
    if rows.empty:
        raise UserError(
            f"carbon.cloud={cloud}: codecarbon's table has no provider {provider}, only "
            f"{', '.join(sorted(set(table['provider'])))}: set carbon.zone to the country instead"
        )
    row = rows[rows["region"] == region]
    if row.empty:
        raise UserError(f"carbon.cloud={cloud}: no such region; there are {', '.join(sorted(rows['region']))}")
    origin = f"{row['source'].item()} in codecarbon {codecarbon.__version__}, {cloud}"
    return float(row["impact"].item()), origin, "not stated by the table"


def _zone_g_per_kwh(zone: str, region: str | None) -> tuple[float, str, str]:
    import codecarbon
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    tables = DataSource()
    countries = tables.get_global_energy_mix_data()
    if zone not in countries:
        near = ", ".join(sorted(z for z in countries if z[0] == zone[0])) or "none"
        raise UserError(
            f"carbon.zone={zone} is not in codecarbon's table of {len(countries)} countries; with its first letter: {near}"
        )
    year = str(countries[zone]["year"])
    if region is not None:
        regions, year = _regions(tables, zone)
        if region.lower() not in regions:
            known = ", ".join(sorted(regions)) or "none"
            raise UserError(f"carbon.region={region} is not in codecarbon's table for {zone}; there are: {known}")
    kg = Emissions(tables).get_private_infra_emissions(Energy.from_energy(1.0), GeoMetadata(zone, region=region))
    place = zone if region is None else f"{zone}/{region}"
    return 1000 * kg, f"codecarbon {codecarbon.__version__}'s offline table, {place}", year


def _regions(tables: "DataSource", zone: str) -> tuple[set[str], str]:  # type: ignore[name-defined]  # noqa: F821
    """The regions of a zone, in lower case, and the year of their table."""
    if zone == "USA":
        table = tables.get_country_emissions_data("usa")
        return {name for name in table if not name.startswith("_")}, str(table["_source"]["year"])
    if zone == "CAN":
        return set(tables.get_country_energy_mix_data("can")), "2023"
    if zone == "CHN":
        provinces = tables.get_china_provincial_emissions_data()["data"].values()
        return {name for p in provinces for name in p["names"]}, "/".join(sorted({str(p["year"]) for p in provinces}))
    prefix = {"SWE": "SE", "NOR": "NO", "FIN": "FI"}.get(zone)
    if prefix is None:
        return set(), ""
    zones = {k: v for k, v in tables.get_nordic_country_energy_mix_data()["data"].items() if k.startswith(prefix)}
    return {k.lower() for k in zones}, "/".join(sorted({str(v["year"]) for v in zones.values()}))


# ---------------------------------------------------------------------------------------------------------- forecast


# The forecast's margins around the formula (docs/numbers.md).
FORECAST_LOW = 0.75  # training does not draw the board's full limit all the time
FORECAST_HIGH = (
    1.6  # processors, memory, network and idle nodes, which the formula leaves out (BLOOM, arXiv 2211.02001)
)


def energy_forecast(gpu_hours: float, gpu_watts: float, pue: float) -> Range:
    """kWh at the site's meter: the formula, and margins for what it leaves out."""
    central = gpu_hours * gpu_watts * pue / 1000  # LLaMA's account: arXiv 2302.13971, section 6
    return Range(FORECAST_LOW * central, central, FORECAST_HIGH * central)


def carbon_forecast(energy_kwh: Range, config: CarbonConfig, start_s: float, hours: float) -> tuple[Range, str] | None:
    """kg CO2e of a forecast run that starts at `start_s` (Unix) and takes `hours`, and the intensity's source.

    None where no intensity is configured; raises UserError where the series does not reach to the end of the run.
    """
    if config.intensity_g_per_kwh is None and config.series is not None:
        series = read_series(config.series)
        end_s = start_s + 3600 * hours
        if not series.covers(start_s, end_s):
            raise UserError(
                f"carbon.series={config.series} covers {_utc(series.start_s[0])} to {_utc(series.end_s)}, and the run "
                f"{_utc(start_s)} to {_utc(end_s)}: give a longer series, or carbon.zone"
            )
        g = float(series.mean_g_per_kwh([start_s], [end_s])[0])
        return energy_kwh * (g / 1000), f"carbon.series={config.series}, {g:.0f} g/kWh over the run"
    found = intensity(config)
    if found is None:
        return None
    g_range = found.g_per_kwh
    kg = Range(
        energy_kwh.low * g_range.low / 1000,
        energy_kwh.central * g_range.central / 1000,
        energy_kwh.high * g_range.high / 1000,
    )
    return kg, f"{found.source} ({found.year}), {g_range.central:.0f} g/kWh"


# ------------------------------------------------------------------------------------------------- the greenest start


@dataclass(frozen=True)
class Start:
    """When to begin, and what it saves against beginning at once."""

    start_s: float  # Unix
    g_per_kwh: float  # mean over the run
    now_g_per_kwh: float

    @property
    def saved_share(self) -> float:
        return 1 - self.g_per_kwh / self.now_g_per_kwh if self.now_g_per_kwh else 0.0

    def saved_kg(self, energy_kwh: float) -> float:
        return energy_kwh * (self.now_g_per_kwh - self.g_per_kwh) / 1000

    def describe(self, energy_kwh: float) -> str:
        return f"{self.describe_share()}: {self.saved_kg(energy_kwh):,.1f} kg CO2e"

    def describe_share(self) -> str:
        """Where the run's energy is not known."""
        return (
            f"greenest start {_utc(self.start_s)}: {self.g_per_kwh:.0f} g/kWh over the run instead of "
            f"{self.now_g_per_kwh:.0f}, saves {100 * self.saved_share:.0f}%"
        )


def start_of(config: CarbonConfig, hours: float, now_s: float) -> Start:
    """The start that carbon.start=greenest comes to, of a run of carbon.duration_h or else of `hours`. Raises UserError."""
    assert config.series
    assert config.deadline
    deadline_s = datetime.fromisoformat(config.deadline).timestamp()
    return greenest_start(read_series(config.series), now_s, 3600 * (config.duration_h or hours), deadline_s)


def greenest_start(series: Series, now_s: float, duration_s: float, deadline_s: float) -> Start:
    """The start with the least mean intensity that still ends by the deadline; the earliest of equals.

    The mean over a window that slides along a staircase is least where one of the window's ends meets a step, so only
    those starts are tried. Raises UserError where the deadline is too near, or the series too short.
    """
    latest_s = deadline_s - duration_s
    if latest_s < now_s:
        raise UserError(
            f"the run takes {duration_s / 3600:.1f} h, and only {(deadline_s - now_s) / 3600:.1f} h are left until "
            f"carbon.deadline={_utc(deadline_s)}: move the deadline, or set carbon.start=now"
        )
    if not series.covers(now_s, deadline_s):
        raise UserError(
            f"{series.path} covers {_utc(series.start_s[0])} to {_utc(series.end_s)}, and must cover now "
            f"({_utc(now_s)}) to carbon.deadline={_utc(deadline_s)}"
        )
    steps = [*series.start_s, series.end_s]
    tried = sorted({now_s, latest_s} | {t for s in steps for t in (s, s - duration_s) if now_s <= t <= latest_s})
    means = series.mean_g_per_kwh(tried, [t + duration_s for t in tried])
    best = int(np.argmin(np.round(means, 9)))
    return Start(tried[best], float(means[best]), float(means[0]))


# ------------------------------------------------------------------------------------------------------------ budgets


@dataclass(frozen=True)
class BudgetVerdict:
    action: str  # ok | warn | stop
    reason: str


BUDGET_WARNING = 0.8  # of a budget: from here on it warns


def budget_verdict(config: CarbonConfig, used_kwh: float, used_kg_co2e: float | None = None) -> BudgetVerdict:
    """Whether a run may go on; the worse budget decides. What was used is the site's: devices x PUE."""
    used_and_limits = [(used_kwh, config.budget_kwh, "kWh", "carbon.budget_kwh")]
    if used_kg_co2e is not None:
        used_and_limits.append((used_kg_co2e / 1000, config.budget_t_co2e, "t CO2e", "carbon.budget_t_co2e"))
    worst = BudgetVerdict("ok", "within its budgets")
    for used, limit, unit, name in used_and_limits:
        if limit is None or used < BUDGET_WARNING * limit:
            continue
        reason = f"{used:.4g} {unit} used of {name}={limit:g}"
        if used >= limit and config.on_budget == "stop":
            return BudgetVerdict("stop", f"{reason}: raise it to go on")
        if worst.action == "ok" or used >= limit:
            worst = BudgetVerdict("warn", reason)
    return worst


def _utc(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%MZ")
