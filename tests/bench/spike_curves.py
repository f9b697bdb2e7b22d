"""Loss curves with labelled spikes, made otherwise than those of ../shared/spikes: a second opinion on a rule.

A curve: power-law fall with warm-up, one of four schedules, noise of four kinds with and without memory and clustered volatility,
slow waves and blocks of data, changes of mix and of batch size that are declared or not, gradient norms or none, logged every
1 to 10 steps singly or as means. Events: spikes of six shapes, divergences of three, NaN; one-batch outliers are harmless.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass
class Curve:
    """`labels` as score.py takes them: [first, last, kind, shape], in observations."""

    name: str
    loss: Floats
    grad_norm: Floats | None
    labels: list[list[Any]]
    declared: list[int]


@dataclass
class _Made:
    """A curve while it is made, one value a step. `noise`: its scale; `used`: steps where nothing else may happen."""

    rng: np.random.Generator
    steps: int
    warmup: int
    every: int
    loss: Floats
    log_grad: Floats
    noise: Floats
    used: npt.NDArray[np.bool_]
    labels: list[list[Any]] = field(default_factory=list)
    changes: list[tuple[int, bool]] = field(default_factory=list)  # step, declared

    @property
    def t(self) -> npt.NDArray[np.int64]:
        return np.arange(self.steps)

    def since(self, step: int) -> npt.NDArray[np.int64]:
        return np.clip(self.t - step, 0, None)

    def place(self, duration: int, apart: int) -> int | None:
        for _ in range(50):
            s = int(self.rng.integers(350, self.steps - 60))
            around = slice(max(0, s - apart), s + duration + apart)
            if s + duration < self.steps and not self.used[around].any():
                self.used[around] = True
                return s
        return None


def make_curve(seed: int) -> Curve:
    rng = np.random.default_rng([seed, 2])
    steps = int(rng.integers(3000, 14000))
    warmup = int(rng.integers(50, 1500) if steps > 5000 else rng.integers(20, 400))
    t = np.arange(steps)
    trained = np.where(t < warmup, t * t / (2 * warmup), t - warmup / 2) + 0.05 * np.minimum(t, warmup)
    fall = rng.uniform(4, 14) * (1 + trained / rng.uniform(5, 80)) ** -rng.uniform(0.15, 0.55)
    loss = np.minimum(rng.uniform(1.4, 2.8) + fall, 11)
    made = _Made(
        rng,
        steps,
        warmup,
        every=int(rng.choice([1, 1, 1, 1, 2, 5, 10])),
        loss=loss,
        log_grad=np.log(10 ** rng.uniform(-1.3, 0.7))
        + 1.5 * np.exp(-t / (0.5 * warmup))
        + rng.normal(0, 0.4) * t / steps,
        noise=10 ** rng.uniform(-2.3, -0.9) * (loss / loss[-1]) ** rng.uniform(0, 1.5),
        used=t < 350,
    )
    _schedule(made)
    _noise(made)
    _mixes(made)
    for step, _ in made.changes:
        made.used[max(0, step - 50) : step + 200] = True
    _outliers(made)
    for _ in range(rng.choice([0, 1, 2, 4, 8], p=[0.4, 0.22, 0.18, 0.12, 0.08])):
        _spike(made)
    _end(made)
    return _logged(made, seed)


def _schedule(c: _Made) -> None:
    rng, n = c.rng, c.steps
    kind = rng.choice(["cosine", "decay", "cycles", "steps"], p=[0.4, 0.2, 0.25, 0.15])
    if kind == "decay":
        at = int(n * rng.uniform(0.7, 0.9))
        c.loss -= rng.uniform(0.03, 0.25) * (c.since(at) / (n - at)) ** 0.7
        c.changes.append((at, True))
    elif kind == "cycles":  # a restart of the learning rate costs some loss, which comes back
        for share in np.cumsum(rng.uniform(0.2, 0.45, 3)):
            at = int(n * share)
            if c.warmup + 300 < at < n - 400:
                k = c.since(at)
                back = np.exp(-k / rng.uniform(400, 3000))
                c.loss += rng.uniform(0.02, 0.2) * (1 - np.exp(-k / rng.uniform(5, 200))) * back
                c.changes.append((at, True))
    elif kind == "steps":
        for share in np.sort(rng.uniform(0.4, 0.95, 2)):
            c.loss -= rng.uniform(0.03, 0.2) * (1 - np.exp(-c.since(int(n * share)) / 50))
            c.changes.append((int(n * share), True))
    if rng.random() < 0.15:  # the batch is doubled
        at = int(n * rng.uniform(0.2, 0.6))
        c.noise = np.where(c.t >= at, c.noise / np.sqrt(2), c.noise)
        c.changes.append((at, bool(rng.random() < 0.5)))


def _noise(c: _Made) -> None:
    rng, n = c.rng, c.steps
    c.loss = c.loss + c.noise * _noise_of_one_kind(rng, n)
    if rng.random() < 0.2:  # data that are not shuffled: waves
        c.loss += c.noise * rng.uniform(0.3, 1.2) * np.sin(2 * np.pi * c.t / rng.uniform(200, 3000) + rng.uniform(0, 6))
    if rng.random() < 0.2:  # and blocks
        length = int(rng.integers(40, 600))
        c.loss += c.noise * rng.uniform(0.2, 0.8) * np.repeat(rng.standard_normal(n // length + 1), length)[:n]
    c.log_grad += rng.uniform(0.03, 0.25) * _noise_of_one_kind(rng, n)
    if rng.random() < 0.3:  # gradients that stand out and do no harm
        for step in np.flatnonzero(rng.random(n) < 10 ** rng.uniform(-4, -2.5)):
            c.log_grad[step] += rng.uniform(0.5, 4)


def _noise_of_one_kind(rng: np.random.Generator, n: int) -> Floats:
    """Of variance 1."""
    kind = rng.choice(["normal", "t", "laplace", "skew"], p=[0.35, 0.3, 0.15, 0.2])
    if kind == "normal":
        e = rng.standard_normal(n)
    elif kind == "t":
        freedom = rng.uniform(3.2, 9)
        e = rng.standard_t(freedom, n) / np.sqrt(freedom / (freedom - 2))
    elif kind == "laplace":
        e = rng.laplace(0, 1 / np.sqrt(2), n)
    else:
        s = rng.uniform(0.2, 0.6)
        e = (rng.lognormal(0, s, n) - np.exp(s * s / 2)) / np.sqrt((np.exp(s * s) - 1) * np.exp(s * s))
    e = _with_memory(e, rng.choice([0, rng.uniform(0, 0.3), rng.uniform(0.3, 0.7)], p=[0.4, 0.35, 0.25]))
    return e * np.exp(0.28 * _with_memory(rng.standard_normal(n), 0.99)) if rng.random() < 0.25 else e


def _with_memory(e: Floats, phi: float) -> Floats:
    """An AR(1) process driven by `e`, of the same variance."""
    out, x, share = np.empty_like(e), 0.0, np.sqrt(1 - phi * phi)
    for i, value in enumerate(e.tolist()):
        out[i] = x = phi * x + share * value
    return out


def _mixes(c: _Made) -> None:
    rng = c.rng
    for _ in range(rng.choice([0, 1, 2, 3], p=[0.45, 0.3, 0.15, 0.1])):
        at = int(rng.integers(500, c.steps - 200))
        height = rng.choice([-1, 1]) * 10 ** rng.uniform(-1.7, -0.2)
        after = c.t >= at
        c.loss += np.where(after, height * (0.4 + 0.6 * np.exp(-c.since(at) / rng.uniform(100, 3000))), 0)
        c.log_grad += np.where(after, rng.normal(0, 0.12), 0)
        c.changes.append((at, bool(rng.random() < 0.75)))


def _outliers(c: _Made) -> None:
    rng = c.rng
    for _ in range(rng.poisson(c.steps * rng.choice([0, 1e-4, 5e-4, 2e-3], p=[0.4, 0.3, 0.2, 0.1]))):
        if (s := c.place(1, 15 * c.every)) is not None:
            c.loss[s] += c.noise[s] * 10 ** rng.uniform(0.85, 1.8)
            c.log_grad[s] += rng.uniform(0, 1.5)
            c.labels.append([s, s, "outlier", "batch"])


def _spike(c: _Made) -> None:
    rng, usual = c.rng, c.noise[c.steps // 2]
    shape = str(
        rng.choice(["jump", "ramp", "power", "plateau", "aftershock", "slow"], p=[0.3, 0.2, 0.15, 0.1, 0.1, 0.15])
    )
    height = max(7 * usual, usual * 10 ** rng.uniform(0.85, 1.7) if rng.random() < 0.65 else rng.uniform(0.3, 4))
    rise = int({"ramp": rng.integers(4, 40), "slow": rng.integers(60, 500)}.get(shape, rng.integers(1, 4)))
    fall = rng.uniform(60, 500) if shape == "slow" else 10 ** rng.uniform(0.8, 2.4)
    grad_first = int(rng.integers(0, 30) if shape == "slow" else rng.integers(-1, 5))  # steps before the loss
    lasts = int(rise + 4 * fall) + 40
    if (s := c.place(lasts, 80 * c.every)) is None:
        return
    k = c.t - (s + max(grad_first, 0))
    down = np.clip(k - rise, 0, None)
    again = np.clip(down - fall, 0, None)
    recovery = np.exp(-down / fall)
    if shape == "power":
        recovery = (1 + down / fall) ** -1.3
    elif shape == "plateau":
        recovery = 0.85 * np.exp(-3 * down / fall) + 0.15 * np.exp(-2 * again / fall)
    elif shape == "aftershock":
        recovery = np.exp(-2 * down / fall) + 0.6 * np.where(down > fall, np.exp(-2 * again / fall), 0)
    profile = np.where((k < 0) | (k > lasts), 0, np.where(k < rise, np.clip((k + 1) / rise, 0, 1), recovery))
    c.loss = c.loss + height * profile
    k = c.t - (s + max(-grad_first, 0))
    grad_rise = max(1, grad_first + (rise if shape in ("ramp", "slow") else 0))
    times = 10 ** (rng.uniform(0.2, 0.8) if shape == "slow" else rng.uniform(0.25, 1.8))
    grad_fall = np.exp(-np.clip(k - grad_rise, 0, None) / (fall * rng.uniform(0.3, 1)))
    c.log_grad = c.log_grad + np.log(times) * np.where(
        k < 0, 0, np.where(k < grad_rise, (k + 1) / grad_rise, grad_fall)
    )
    up = np.flatnonzero(height * profile > c.noise)
    if len(up):
        c.labels.append([s, int(up[-1]), "recoverable", shape])


def _end(c: _Made) -> None:
    """One run in four does not come back."""
    rng, kind = c.rng, c.rng.random()
    if kind >= 0.25 or (s := c.place(10, 80 * c.every)) is None or s < c.steps // 3 or s > c.steps - 150:
        return
    shape, k = "nan", c.since(s)
    if kind < 0.15:
        shape = str(rng.choice(["linear", "exponential", "saturating"]))
        rise = {
            "linear": k * 10 ** rng.uniform(-3.3, -1.5) * max(1, c.noise[s] / 0.03),
            "exponential": c.noise[s] * (np.exp(np.minimum(k / rng.uniform(15, 150), 20)) - 1),
            "saturating": rng.uniform(0.4, 5) * (1 - np.exp(-k / rng.uniform(2, 300))),
        }[shape]
        rise = np.minimum(rise, 8)
        c.loss = c.loss + rise * (1 + 0.07 * rng.standard_normal(c.steps))
        c.log_grad = c.log_grad + np.log(10 ** rng.uniform(0.5, 2)) * (1 - np.exp(-rise / (3 * c.noise[s])))
    else:
        c.loss[s:], c.log_grad[s:] = rng.choice([np.nan, np.inf]), np.nan
    c.labels = [[first, min(last, s - 1), *kind] for first, last, *kind in c.labels if first < s]
    c.labels.append([s, c.steps - 1, "nan" if shape == "nan" else "divergence", shape])
    c.changes = [change for change in c.changes if change[0] < s]


def _logged(c: _Made, seed: int) -> Curve:
    """What the run's log holds. A spike that fills fewer than three rows can't be told from an outlier: "ambig"."""
    every, rng = c.every, c.rng
    rows = c.steps // every
    loss = c.loss[: rows * every].reshape(rows, every)
    grad_norm = np.exp(c.log_grad[: rows * every]).reshape(rows, every)[:, -1]
    labels = []
    for first, last, kind, shape in sorted(c.labels):
        short = kind == "recoverable" and last // every - first // every < 2
        labels.append([first // every, last // every, "ambig" if short else kind, shape])
    return Curve(
        name=f"seed {seed}",
        loss=loss.mean(axis=1) if rng.random() < 0.5 else loss[:, -1],
        grad_norm=grad_norm if rng.random() < 0.65 else None,
        labels=labels,
        declared=[-(-step // every) for step, known in c.changes if known],
    )
