"""What the dashboards take: one run as plain data. Whoever knows the run directory fills it; nothing here reads a file."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dashboards.carbon import CarbonStatement

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

BUCKETS = 1500  # about the pixels of a wide screen


@dataclass(frozen=True)
class Curve:
    """Figures over the step: per bucket of steps the last step, and each figure's mean, lowest and highest."""

    step: list[int]
    mean: dict[str, list[float | None]]
    low: dict[str, list[float | None]]  # empty where every bucket is one step
    high: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Happening:
    """An event."""

    time_s: float
    attempt: int | None
    kind: str
    step: int
    detail: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the run."""

    number: int
    start_s: float  # Unix
    end_s: float
    first_step: int | None
    last_step: int | None
    where: str  # hosts, ranks
    ended: str  # finished, stopped, going on, or "without a word"
    spans: list[tuple[float, float, str]]  # start, end (Unix s), what the time was for


@dataclass(frozen=True, kw_only=True)
class MixLine:
    source: str
    stands_in_for: str | None
    proportion: float  # of rows
    tokens: int | None
    epochs: float | None  # None: the prepared tokens are not there to ask


@dataclass(frozen=True, kw_only=True)
class ForecastLine:
    figure: str  # with its unit
    forecast: float
    low: float | None
    high: float | None
    measured: float | None


@dataclass(frozen=True, kw_only=True)
class LogError:
    file: str
    line: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RunView:
    name: str
    state: str  # finished, failed, stopped, stopping, queued, cancelled, dropped, training, not started, or no sign of life
    updated_s: float  # the newest sign of life, Unix
    steps_planned: int
    steps_done: int
    headline: dict[str, float | None]  # newest figures by StepRecord's field, held_out_loss, ettr, left_s
    curve: Curve
    undone: Curve  # of steps that were undone: the loss alone
    events: list[Happening]
    attempts: list[Attempt]
    seconds: dict[str, float]  # by what the time was for: attribution's classes, and `down` between attempts
    power_w: tuple[list[float], dict[str, list[float | None]]]  # Unix s; by kind of device
    power_note: str
    statement: CarbonStatement | None
    mix: list[MixLine]
    forecast: list[ForecastLine] | None  # None: the run has no forecast
    log_errors: list[LogError]
    config: dict[str, Any]
    code: str


def curve(step: Floats, figures: dict[str, Floats], buckets: int = BUCKETS) -> Curve:
    """Min-max downsampling: no extreme is lost, whatever the number of steps.

    `figures` are of the length of `step`; NaN is left out. Costs one pass over each.
    """
    n = len(step)
    if n <= buckets:
        return Curve(step.astype(int).tolist(), {k: _plain(v) for k, v in figures.items()}, {}, {})
    edges = np.linspace(0, n, buckets + 1).astype(np.int64)
    starts, counts = edges[:-1], np.diff(edges)
    mean, low, high = {}, {}, {}
    for name, values in figures.items():
        there = np.isfinite(values)
        seen = np.add.reduceat(there.astype(np.int64), starts)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean[name] = _plain(np.add.reduceat(np.where(there, values, 0.0), starts) / seen)
        least = np.minimum.reduceat(np.where(there, values, np.inf), starts)
        most = np.maximum.reduceat(np.where(there, values, -np.inf), starts)
        if np.array_equal(least, most):
            continue
        low[name], high[name] = _plain(least), _plain(most)
    return Curve(step[starts + counts - 1].astype(int).tolist(), mean, low, high)


def _plain(values: Floats) -> list[float | None]:
    """Five significant digits; what is not finite is left out."""
    return [float(f"{v:.5g}") if v - v == 0 else None for v in values.tolist()]
