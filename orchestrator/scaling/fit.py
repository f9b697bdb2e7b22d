"""Fits of scaling laws to runs: the parametric law of Hoffmann et al. (arXiv 2203.15556, approach 3) and IsoFLOP minima
(approach 2), each with confidence intervals by bootstrap.

Losses are compared in logarithms by a Huber loss (delta 1e-3), minimized by L-BFGS from a grid of starts. Besiroglu et al.
(arXiv 2404.10102) found that the original fit had stopped too early: here residuals are counted in deltas and summed, so
that the optimizer's tolerance is far below what a point weighs.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np

from orchestrator.errors import UserError
from orchestrator.scaling.law import Law

HUBER_DELTA = 1e-3  # in log loss; arXiv 2203.15556, appendix D.3
LEVEL = 0.95  # of the confidence intervals
STARTS = 40  # of the grid, the best by their objective
SAME_BUDGET = (
    0.03  # in ln FLOPs: neighbours that are nearer share one IsoFLOP budget, up to five times that from its first
)

POORLY_FIXED = "poorly fixed: add sizes near it"

Array = np.ndarray


@dataclass(frozen=True)
class Points:
    """Finished runs: parameters N, training tokens D, loss (nats per token), each [n]."""

    parameters: Array
    tokens: Array
    loss: Array

    @property
    def flops(self) -> Array:
        return np.asarray(6 * self.parameters * self.tokens)

    def __len__(self) -> int:
        return len(self.loss)

    def at(self, index: Array) -> "Points":
        return Points(self.parameters[index], self.tokens[index], self.loss[index])


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval (LEVEL, percentiles of the bootstrap)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Isoflop:
    """The points of one budget and their parabola's minimum."""

    flops: float
    points: Points
    parabola: tuple[float, float, float]  # loss = c0 + c1 u + c2 u^2, u = ln N - `center`
    center: float
    parameters: Interval | None  # of the minimum; None where there is none among the sizes that were tried
    loss: float | None
    note: str = ""

    @property
    def tokens(self) -> float | None:
        return self.flops / 6 / self.parameters.value if self.parameters else None


@dataclass(frozen=True, kw_only=True)
class Fit:
    points: Points
    law: Law
    replicates: list[Law]
    rms_log_error: float  # of the law at the points
    isoflops: list[Isoflop]
    isoflop_exponent: Interval | None  # a of N* ~ C^a through the minima
    notes: list[str] = field(default_factory=list)

    def interval(self, name: str) -> Interval:
        """Of E, A, B, alpha, beta or size_exponent."""
        return interval(getattr(self.law, name), [getattr(r, name) for r in self.replicates])


def interval(value: float, replicates: list[float] | Array) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.asarray(replicates), [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def fit(points: Points, replicates: int = 500, seed: int = 0) -> Fit:
    """Raises UserError where the points cannot tell size from tokens."""
    _refuse_degenerate(points)
    if replicates < 20:
        raise UserError(f"--bootstrap {replicates}: an interval needs at least 20 replicates (500 by default)")
    theta = _from_grid(points)
    law = _law(theta, points)
    rng = np.random.default_rng(seed)
    drawn = [_law(_descend(start, sample)[0], sample) for sample, start in _resampled(points, theta, replicates, rng)]
    error = [np.log(law.loss(n, d)) - np.log(y) for n, d, y in zip(*_columns(points), strict=True)]
    isoflops, exponent = _isoflops(points, replicates, rng)
    return Fit(
        points=points,
        law=law,
        replicates=drawn,
        rms_log_error=float(np.sqrt(np.mean(np.square(error)))),
        isoflops=isoflops,
        isoflop_exponent=exponent,
        notes=_doubts(points, law, drawn),
    )


def _columns(points: Points) -> tuple[Array, Array, Array]:
    return points.parameters, points.tokens, points.loss


def _refuse_degenerate(points: Points) -> None:
    for name, values in zip(("parameters", "tokens", "loss"), _columns(points), strict=True):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise UserError(f"point {bad[0] + 1} has {name} {values[bad[0]]:g}: each must be a number above 0")
    if len(points) < 6:
        raise UserError(
            f"{len(points)} points cannot fix the law's 5 numbers with an interval: train at least 6, better 20"
        )
    for name, values in (("sizes", points.parameters), ("token counts", points.tokens)):
        if (distinct := _distinct(values)) < 3:
            raise UserError(
                f"the points have {distinct} distinct {name}, and a power law with a constant needs at least 3: "
                f"sweep over more of them"
            )
    x, y = np.log(points.parameters), np.log(points.tokens)
    spread = np.linalg.svd(np.stack([x - x.mean(), y - y.mean()], 1), compute_uv=False)
    if spread[1] < 1e-2 * spread[0]:
        raise UserError(
            "tokens follow from the size at every point (one line in log N, log D), so their effects cannot be told apart: "
            "train some sizes on more and on fewer tokens"
        )
    if np.ptp(points.loss) == 0:
        raise UserError(f"all {len(points)} losses are {points.loss[0]:g}: there is nothing to fit")


def _distinct(values: Array) -> int:
    """Values within 1% count once."""
    return len(np.unique(np.round(np.log(values) / 0.01)))


# theta = (a, alpha, b, beta, e): logarithms of A / N^alpha and B / D^beta at the points' geometric means, and of E.
# Centred like this the five hardly pull on each other, and L-BFGS gets to the bottom in tens of steps.


def _terms(theta: Array, points: Points) -> tuple[Array, Array, Array]:
    x, y = np.log(points.parameters), np.log(points.tokens)
    x, y = x - x.mean(), y - y.mean()
    a, alpha, b, beta, e = (theta[..., i, None] for i in range(5))
    return np.stack(np.broadcast_arrays(a - alpha * x, b - beta * y, e), -2), x, y


def _objective(theta: Array, points: Points) -> tuple[Array, Array]:
    """Sum of the Huber losses of log L, in units of delta^2, and its gradient. theta [..., 5]."""
    terms, x, y = _terms(theta, points)
    top = terms.max(-2, keepdims=True)
    weights = np.exp(terms - top)
    total = weights.sum(-2, keepdims=True)
    residual = ((top + np.log(total))[..., 0, :] - np.log(points.loss)) / HUBER_DELTA
    pull = np.clip(residual, -1, 1)
    value = (pull * (residual - pull / 2)).sum(-1)
    g = weights / total * pull[..., None, :] / HUBER_DELTA
    of_a, of_b, of_e = (g[..., i, :] for i in range(3))
    gradient = np.stack([of_a.sum(-1), -(of_a * x).sum(-1), of_b.sum(-1), -(of_b * y).sum(-1), of_e.sum(-1)], -1)
    return value, gradient


def _from_grid(points: Points) -> Array:
    """The lowest minimum found from the best starts of Hoffmann et al.'s grid (arXiv 2203.15556, appendix D.3)."""
    x_mean, y_mean = np.log(points.parameters).mean(), np.log(points.tokens).mean()
    exponents, logs = np.arange(0, 2.01, 0.5), np.arange(0, 25.1, 5)
    grid = np.array(list(itertools.product(logs, exponents, logs, exponents, np.arange(-1, 1.01, 0.5))))
    grid[:, 0] -= grid[:, 1] * x_mean
    grid[:, 2] -= grid[:, 3] * y_mean
    # A start of our own for losses in no unit that the grid was made for: each term a third of the lowest loss.
    third = float(np.log(points.loss.min() / 3))
    grid = np.concatenate([grid, [[third, 0.3, third, 0.3, third]]])
    values = np.concatenate([_objective(part, points)[0] for part in np.array_split(grid, 50)])
    starts = [*grid[np.argsort(values, kind="stable")[:STARTS]], grid[-1]]
    return min((_descend(start, points) for start in starts), key=lambda found: found[1])[0]


def _descend(start: Array, points: Points) -> tuple[Array, float]:
    from scipy.optimize import minimize

    found = minimize(
        _objective,
        start,
        args=(points,),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-40, 40), (0, 4), (-40, 40), (0, 4), (-20, 20)],
        options={"maxiter": 2000, "maxfun": 10_000, "ftol": 1e-12, "gtol": 1e-7},
    )
    return found.x, float(found.fun)


def _law(theta: Array, points: Points) -> Law:
    a, alpha, b, beta, e = (float(v) for v in theta)
    log_a = a + alpha * float(np.log(points.parameters).mean())
    log_b = b + beta * float(np.log(points.tokens).mean())
    return Law(E=float(np.exp(e)), A=float(np.exp(log_a)), B=float(np.exp(log_b)), alpha=alpha, beta=beta)


def _resampled(points: Points, theta: Array, replicates: int, rng: np.random.Generator) -> list[tuple[Points, Array]]:
    """Points drawn with replacement, and the estimate as a start, shifted to the draw's own centre."""
    found: list[tuple[Points, Array]] = []
    x, y = np.log(points.parameters), np.log(points.tokens)
    tries = 0
    while len(found) < replicates:
        tries += 1
        if tries > 50 * replicates:
            raise UserError("too few distinct points to resample: train more sizes and more token counts")
        index = rng.integers(0, len(points), len(points))
        if _distinct(points.parameters[index]) < 3 or _distinct(points.tokens[index]) < 3:
            continue
        start = theta.copy()
        start[0] -= theta[1] * (x[index].mean() - x.mean())
        start[2] -= theta[3] * (y[index].mean() - y.mean())
        found.append((points.at(index), start))
    return found


def _doubts(points: Points, law: Law, replicates: list[Law]) -> list[str]:
    """What a reader must know before trusting the numbers."""
    notes = []
    if len(points) < 15:
        notes.append(f"only {len(points)} points: bootstrap intervals of so few are too narrow")
    for name, exponent, values in (("size", law.alpha, points.parameters), ("tokens", law.beta, points.tokens)):
        if values.max() / values.min() < 8:
            notes.append(
                f"{name} spans a factor of {values.max() / values.min():.1f} only: its exponent is poorly fixed"
            )
        if exponent <= 1e-6 or exponent >= 3.99:
            notes.append(f"the exponent of {name} ran to its bound ({exponent:.3g}): these points do not fix it")
    if 0.02 * points.loss.min() > law.E:
        notes.append(f"E = {law.E:.2g} nats: these points do not show where the loss ends")
    else:
        e = interval(law.E, [r.E for r in replicates])
        if e.low < 0.2 * e.value:
            notes.append("E's interval nearly reaches 0: extrapolate with care")
    return notes


def _isoflops(points: Points, replicates: int, rng: np.random.Generator) -> tuple[list[Isoflop], Interval | None]:
    """A parabola in ln N through the losses of each budget that has 4 sizes or more."""
    order = np.argsort(points.flops, kind="stable")
    log_flops = np.log(points.flops[order])
    cuts, first = [], 0
    for i in range(1, len(order)):
        if log_flops[i] - log_flops[i - 1] > SAME_BUDGET or log_flops[i] - log_flops[first] > 5 * SAME_BUDGET:
            cuts.append(first := i)
    found: list[Isoflop] = []
    drawn: list[Array] = []
    for index in np.split(order, cuts):
        group = points.at(index)
        if _distinct(group.parameters) < 4:
            continue
        isoflop, minima = _isoflop(group, replicates, rng)
        found.append(isoflop)
        if isoflop.parameters and not isoflop.note:
            drawn.append(minima)
    with_minimum = [i for i in found if i.parameters and not i.note]
    if len(with_minimum) < 2:
        return found, None
    log_c = np.log([i.flops for i in with_minimum])
    slope = float(np.polyfit(log_c, np.log([i.parameters.value for i in with_minimum if i.parameters]), 1)[0])
    slopes = np.polyfit(log_c, np.log(np.stack(drawn)), 1)[0]
    return found, interval(slope, slopes)


def _isoflop(group: Points, replicates: int, rng: np.random.Generator) -> tuple[Isoflop, Array]:
    """And the minimum's size in each replicate, kept within ten times the sizes that were tried."""
    x = np.log(group.parameters)
    center = float(x.mean())
    flops = float(np.exp(np.log(group.flops).mean()))
    c2, c1, c0 = (float(c) for c in np.polyfit(x - center, group.loss, 2))
    whole = Isoflop(
        flops=flops, points=group, parabola=(c0, c1, c2), center=center, parameters=None, loss=None, note="no minimum"
    )
    if c2 <= 0:
        return whole, x
    at = center - c1 / (2 * c2)
    if not x.min() <= at <= x.max():
        larger = "larger" if at > x.max() else "smaller"
        return Isoflop(**{**vars(whole), "note": f"the minimum lies beyond the sizes tried: add {larger} ones"}), x
    minima: list[float] = []
    tries = 0
    while len(minima) < replicates:
        tries += 1
        index = rng.integers(0, len(x), len(x))
        if _distinct(group.parameters[index]) < 3 and tries < 50 * replicates:
            continue
        d2, d1, _ = np.polyfit(x[index] - center, group.loss[index], 2)
        edge = x.min() - np.log(10) if d1 > 0 else x.max() + np.log(10)
        there = center - d1 / (2 * d2) if d2 > 0 else edge
        minima.append(float(np.clip(there, x.min() - np.log(10), x.max() + np.log(10))))
    size = interval(float(np.exp(at)), np.exp(minima))
    best = c0 - c1**2 / (4 * c2)
    inside = np.mean((np.array(minima) >= x.min()) & (np.array(minima) <= x.max()))
    note = "" if inside > 0.9 else POORLY_FIXED
    return Isoflop(**{**vars(whole), "parameters": size, "loss": best, "note": note}), np.exp(minima)
