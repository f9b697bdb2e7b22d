"""`arriero simulate`: one run lived through many times, failure by failure; what remains of the time, and what helps.

From failure to failure: training and saving, a failure of one node or of a rack, the wait for nodes where no spare is
left, restarts that may not come up, and on from the newest checkpoint. All seeds at once (numpy).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dashboards.curve import lines_svg
from model.checkpoint.policy import CheckpointConfig, Interval, young_interval_s
from orchestrator.errors import UserError
from orchestrator.plan import forecast
from orchestrator.spec import RunSpec

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
PERCENTILES = (5, 50, 95)
AS_GOOD = 0.002  # of ETTR: two intervals that differ by less are equal
MAX_OUTAGES = 20_000  # after so many a run counts as one that never ends


@dataclass(frozen=True, kw_only=True)
class Life:
    """A run's circumstances. Times in seconds, of the whole cluster."""

    work_s: float  # of steps alone
    interval_s: float  # of work, between saves
    save_s: float  # training waits
    failures_per_s: float
    restart_s: float  # of one try, mean
    failed_restart_share: float
    rack_share: float
    rack_nodes: int
    spare_nodes: int
    repair_s: float
    queue_wait_s: float  # mean


def wall_s(life: Life, seeds: int, seed: int = 1) -> FloatArray:
    """How long each of `seeds` lives takes [seeds]. Infinite where it never ends.

    Failures come at a constant rate while the run trains. Half to one and a half of the mean is a restart's time. What spares
    do not replace, the queue does: each missing node comes after an exponential time or after the repair of the lost one, and
    the run waits for the last. A lost node whose place a spare took is a spare after its repair.
    """
    random = np.random.default_rng(seed)
    time, saved = np.zeros(seeds), np.zeros(seeds)
    # When each spare can be taken. A ring from `first` on, in order: who is taken first is back first.
    free_at, first = np.zeros((seeds, life.spare_nodes)), np.zeros(seeds, dtype=int)
    reach = np.arange(min(life.spare_nodes, max(life.rack_nodes, 1)))  # more are never lost at once
    alive = np.arange(seeds)
    for _ in range(MAX_OUTAGES):
        left_s = life.work_s - saved[alive]
        to_end_s = left_s + life.save_s * np.floor(left_s / life.interval_s)
        to_failure_s = (
            random.exponential(1 / life.failures_per_s, len(alive))
            if life.failures_per_s
            else np.full(len(alive), np.inf)
        )
        ends = to_end_s <= to_failure_s
        time[alive[ends]] += to_end_s[ends]
        alive, to_failure_s = alive[~ends], to_failure_s[~ends]
        if not len(alive):
            return time
        saved[alive] += life.interval_s * np.floor(to_failure_s / (life.interval_s + life.save_s))
        lost_nodes = np.where(random.random(len(alive)) < life.rack_share, life.rack_nodes, 1)
        now = time[alive] + to_failure_s
        if life.spare_nodes:
            at = (alive[:, None], (first[alive, None] + reach) % life.spare_nodes)
            taken = (free_at[at] <= now[:, None]) & (reach < lost_nodes[:, None])
            free_at[at] = np.where(taken, now[:, None] + life.repair_s, free_at[at])
            first[alive] += taken.sum(axis=1)
            lost_nodes = lost_nodes - taken.sum(axis=1)
        # The last of n exponential times, by the inverse of its distribution; 0 for none.
        last = -np.log1p(-(random.random(len(alive)) ** (1 / np.maximum(lost_nodes, 1))))
        wait_s = np.where(lost_nodes > 0, np.minimum(life.queue_wait_s * last, life.repair_s), 0.0)
        tries = random.geometric(1 - life.failed_restart_share, len(alive))
        restart_s = tries * life.restart_s * random.uniform(0.5, 1.5, len(alive))
        time[alive] = now + wait_s + restart_s
    time[alive] = np.inf
    return time


def ettr(life: Life, seeds: int, seed: int = 1) -> FloatArray:
    """Work over wall time of each life."""
    return life.work_s / wall_s(life, seeds, seed)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    seeds: int
    life: Life
    nodes: int
    days: list[float]  # of PERCENTILES
    ettr: list[float]
    formula_ettr: float
    intervals_s: list[float]
    interval_ettr: list[list[float]]  # PERCENTILES of each
    best_interval_s: float
    best_every_steps: int
    young_interval_s: float
    spares: dict[int, float]  # spare nodes: median ETTR

    def to_json(self) -> dict[str, Any]:
        named = {f"p{p}": e for p, e in zip(PERCENTILES, self.ettr, strict=True)}
        return {
            "seeds": self.seeds,
            "nodes": self.nodes,
            "ettr": named,
            "days": {f"p{p}": d for p, d in zip(PERCENTILES, self.days, strict=True)},
            "formula_ettr": self.formula_ettr,
            "interval_s": self.life.interval_s,
            "save_s": self.life.save_s,
            "mean_time_between_failures_h": 1 / self.life.failures_per_s / 3600 if self.life.failures_per_s else None,
            "best_interval_s": self.best_interval_s,
            "best_every_steps": self.best_every_steps,
            "young_interval_s": self.young_interval_s,
            "intervals": [
                {"interval_s": i, **{f"ettr_p{p}": e for p, e in zip(PERCENTILES, band, strict=True)}}
                for i, band in zip(self.intervals_s, self.interval_ettr, strict=True)
            ],
            "spares": [
                {"spare_nodes": n, "ettr_p50": e, "ettr_of_all_nodes_p50": self._of_all_nodes(n)}
                for n, e in self.spares.items()
            ],
        }

    def _of_all_nodes(self, spares: int) -> float:
        """What is useful of the time of all nodes that are held, spares too."""
        return self.spares[spares] * self.nodes / (self.nodes + spares)

    def table(self) -> str:
        rate = self.life.failures_per_s
        rows = [
            f"{self.seeds:,} lives of {self.nodes:,} node{'s' if self.nodes > 1 else ''}, "
            + (f"a failure every {1 / rate / 3600:.1f} h of training" if rate else "without failures"),
            f"ETTR     5% of lives below {self.ettr[0]:.3f}, half below {self.ettr[1]:.3f}, 95% below {self.ettr[2]:.3f}; "
            f"the closed formula, which knows no queue, rack or failed restart, says {self.formula_ettr:.3f}",
            f"days     5% of lives take less than {self.days[0]:.1f}, half {self.days[1]:.1f}, 95% {self.days[2]:.1f}",
            f"saving   every {self.life.interval_s:,.0f} s now; best every {self.best_interval_s:,.0f} s "
            f"(checkpoint.every_steps={self.best_every_steps}); Young's formula {self.young_interval_s:,.0f} s",
            "spares   "
            + ", ".join(f"{n}: {e:.3f}" for n, e in self.spares.items())
            + "   (median ETTR by spare nodes)",
            "         "
            + ", ".join(f"{n}: {self._of_all_nodes(n):.3f}" for n in self.spares)
            + "   (of the time of all "
            "nodes, the spares too)",
        ]
        return "\n".join(rows)

    def picture(self) -> str:
        lines = [
            (
                f"{100 - p}% of lives above" if p != 50 else "median",
                self.intervals_s,
                [band[i] for band in self.interval_ettr],
            )
            for i, p in enumerate(PERCENTILES)
        ]
        return lines_svg(
            f"ETTR by checkpoint interval, {self.seeds:,} lives", "seconds of work between saves", "ETTR", lines
        )


def simulate(spec: RunSpec, seeds: int) -> Simulation:
    """Raises UserError as the plan does, and where a run never ends."""
    if seeds < 1:
        raise UserError(f"--seeds {seeds} must be at least 1")
    rate, restart_s = forecast.failures_per_s(spec)[1], spec.plan.restart_s[1]
    step_s = forecast.planned_step(spec).step_s
    life = Life(
        work_s=spec.steps * step_s,
        interval_s=forecast.saves_every_steps(spec, step_s) * step_s,
        save_s=forecast.save_s(spec),
        failures_per_s=rate,
        restart_s=restart_s,
        failed_restart_share=spec.plan.failed_restart_share,
        rack_share=spec.plan.rack_share,
        rack_nodes=min(spec.plan.rack_nodes, spec.cluster.nodes),
        spare_nodes=spec.cluster.spare_nodes,
        repair_s=3600 * spec.plan.repair_h,
        queue_wait_s=spec.plan.queue_wait_s,
    )
    taken_s = wall_s(life, seeds)
    if not np.isfinite(taken_s).all():
        raise UserError(
            f"a run that saves every {life.interval_s:,.0f} s and fails every {1 / rate:,.0f} s never ends: "
            f"save more often (checkpoint.every_steps), or lower plan.restart_s or plan.failures_per_1000_node_days"
        )
    young = min(young_interval_s(life.save_s, forecast.mttf_s(spec)), life.work_s)
    planned = forecast.best_save_interval(spec, step_s)
    tried = sorted({*interval_grid(young, step_s, life.work_s), planned.steps * step_s})
    bands = [np.percentile(ettr(replace(life, interval_s=i), seeds), PERCENTILES) for i in tried]
    best = best_of(tried, [float(band[1]) for band in bands], planned, step_s, spec.checkpoint)
    ratios = life.work_s / taken_s
    return Simulation(
        seeds=seeds,
        life=life,
        nodes=spec.cluster.nodes,
        days=[float(d) for d in np.percentile(taken_s / 86400, PERCENTILES)],
        ettr=[float(e) for e in np.percentile(ratios, PERCENTILES)],
        formula_ettr=forecast.ettr(rate, restart_s, life.interval_s, life.save_s),
        intervals_s=list(tried),
        interval_ettr=[[float(e) for e in band] for band in bands],
        best_interval_s=best,
        best_every_steps=max(1, round(best / step_s)),
        young_interval_s=young,
        spares={
            n: _median(replace(life, spare_nodes=n), seeds)
            for n in sorted({*spares_to_try(spec.cluster.nodes), life.spare_nodes})
        },
    )


def best_of(
    tried: Sequence[float], ratios: Sequence[float], planned: Interval, step_s: float, config: CheckpointConfig
) -> float:
    """The interval, in seconds, with the highest of `ratios` among those that every_steps=auto may choose; the planned one where
    it is as good but for what other seeds would change, so that the plan, the trainer and this name the same."""
    low_s = max(planned.least_steps * step_s, config.auto_min_s) - step_s / 2
    high_s = max(config.auto_max_s, low_s) + step_s / 2
    of_plan = min(tried, key=lambda i: abs(i - planned.steps * step_s))
    allowed = {i: r for r, i in zip(ratios, tried, strict=True) if low_s <= i <= high_s or i == of_plan}
    most = max(allowed, key=lambda i: allowed[i])
    return of_plan if allowed[of_plan] >= allowed[most] - AS_GOOD else most


def interval_grid(young_s: float, step_s: float, work_s: float) -> Sequence[float]:
    """From a sixteenth of Young's to 64 times it, whole steps, each once."""
    steps = np.unique(np.maximum(1, np.round(young_s * 2.0 ** np.arange(-4, 6.5, 0.5) / step_s)))
    return [float(s * step_s) for s in steps if s * step_s <= work_s]


def spares_to_try(nodes: int) -> list[int]:
    """None, and powers of two up to 16 or a thirty-second of the nodes."""
    return [0, *(2**n for n in range(max(16, nodes // 32).bit_length()))]


def _median(life: Life, seeds: int) -> float:
    return float(np.median(ettr(life, seeds)))
