"""Our rule: how long, in units of the run's own noise, has the loss stood above its own trend?

1. Trend: a critically damped level-and-slope filter (the g-h filter) with a window that grows with the run. Its slope never
   points up, for nobody expects a loss to rise, and what stands out moves it no more than CLIP scales.
2. Scale: the median distance from the trend, tracked by a stochastic quantile (no outlier moves it by more than one notch).
3. Tail: the upper quantile of the *isolated* exceedances, those that the next observation takes back. A run whose batches
   stand out now and then, and do no harm, thereby learns to expect it: scores shrink by what its tail exceeds the normal's.
   Noise with memory (data that are not well shuffled, a logger that averages) stays up for longer by itself. Where no gradient
   norm is known to speak against it, the share of successive distances on the same side gives the correlation (the arcsine
   law), and scores shrink by the square root of (1 + rho) / (1 - rho), by which a sum of such noise is wider than one of
   independent noise.
4. Spike: a one-sided CUSUM (Page, "Continuous inspection schemes", Biometrika 1954) of the capped scores. One observation alone
   cannot reach the threshold, a second one must stand out too; if it does not, the first was one batch's outlier and its
   share is taken back.
5. Slow divergence: an exponential mean of the scores over SLOW observations against its own learnt scale, so that a run
   that wanders is allowed to wander; and, for what rises too slowly even for that, the trend's height above its lowest point.
6. Where the gradient norm is known, its logarithm goes through 1 to 5 as well and must agree: a level that
   moves without the gradient is other data, not a spike.

A declared change (end of the warm-up, another learning rate, another mix) is treated like the start of a run: the trend is
found anew and nothing is judged meanwhile; what was learnt of the noise is kept. All thresholds are in units of the run's own
noise.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.spikes.finding import Finding, Kind, nonfinite, ok


@dataclass(frozen=True, kw_only=True)
class Params:
    """Set once for all runs; docs/spikes.md says on what curves and how far each may move."""

    threshold: float = 6.5  # of the CUSUM; also the cap of one observation's score
    drift: float = 1.15  # scores below it count as calm
    grad_threshold: float = 8.0  # of the gradient norm's CUSUM, where there is one
    slow_threshold: float = 6.5
    rise_threshold: float = 5.0  # scales by which the trend may rise above its lowest point
    window: float = 64.0  # observations of the trend
    scale_window: float = 256.0
    slow_window: float = 48.0
    tail_rate: float = 0.005  # share of isolated exceedances above the learnt tail


CLIP = 3.0  # scales by which one observation may move the trend
SETTLE = 32  # observations without judgement after the start and after each declared change
YOUNG = 64.0  # after the start scores are divided by 1 + YOUNG/n: the trend itself is not yet known
MEDIAN = 0.6745  # of |z| of the standard normal
TAIL = 2.33  # its 99th percentile: the least tail assumed
TAIL_GAIN = 0.02
STANDS_OUT = 3.5  # a score above which one observation alone is held back for the next
TAKEN_BACK = 1.0  # a next score below which it was one batch
NOT_TAIL = 1.5  # z below which the previous observation counts as isolated
MEMORY_WINDOW = 512.0  # observations
USUAL_MEMORY = 0.3  # correlation that a trend which lags, and the spikes themselves, leave in any run
USUAL_AGREEMENT = 2 / math.pi * math.asin(USUAL_MEMORY)  # of signs, at that correlation
GRAD_CAP, GRAD_DRIFT, GRAD_SLOW = 4.0, 0.5, 1.0
GRAD_LEAST = 0.1  # of the logarithm: a gradient norm that moves by less than a tenth says nothing
GRAD_RISE = 1.0  # scales by which the gradient norm's own trend must have risen with the loss's
UNAIDED = 3.0  # times the threshold, from which a rise is one whatever the gradient says
USUAL = 1.0  # of its own scale: below it a slow mean or a rise has not begun
FORGET = 1000.0  # observations in which the lowest point comes up by one scale


class Cusum:
    """`declared_steps`: steps from which the loss is expected to change for a known reason."""

    def __init__(self, params: Params | None = None, declared_steps: Iterable[int] = ()) -> None:
        self.params = params or Params()
        self.declared_steps = tuple(sorted(declared_steps))
        self.seen = 0  # observations
        self.age = 0  # observations since the start or the last declared change
        self.last_step = -1
        self.last_loss = 0.0
        self.quantum = 1e300  # the smallest change seen: logs are rounded, and a loss may repeat
        self.level = self.slope = 0.0
        self.scale = 1e-9
        self.tail = TAIL
        self.memory = 0.0  # how much oftener successive distances are on the same side of the trend than on either
        self.previous = 0.0  # the previous observation's distance, in scales
        self.previous_score = 0.0
        self.cusum = self.pending = 0.0
        self.slow = 0.0
        self.slow_scale = self._slow_floor
        self.lowest = self.grad_lowest = 0.0
        self.onset = self.slow_onset = self.rise_onset = 0
        self.grad_level = 0.0  # of the logarithm
        self.grad_scale = 0.3
        self.grad_tail = TAIL
        self.grad_previous = 0.0
        self.grad_cusum = 0.0
        self.grad_slow = 0.0
        self.grad_slow_scale = self._slow_floor

    @property
    def _slow_floor(self) -> float:
        """The scale of the slow mean over independent normal scores: the least assumed."""
        a = 1 / self.params.slow_window
        return math.sqrt(a / (2 - a))

    @property
    def expected_loss(self) -> float:
        return self.level + self.slope

    @property
    def elevated(self) -> bool:
        """Whether the loss still stands above its trend after an alarm."""
        return self.cusum > self.params.threshold / 2

    @property
    def usual_grad_norm(self) -> float | None:
        return math.exp(self.grad_level) if self.age >= SETTLE else None

    def scores(self, loss: float, grad_norm: float | None = None) -> tuple[float, float | None]:
        """How far a loss and a gradient norm stand above what is expected, in the run's own tails (1 = the tail of
        harmless outliers). Changes nothing; 0 while the rule still settles."""
        if self.age < SETTLE:
            return 0.0, None if grad_norm is None else 0.0
        above = (loss - self.expected_loss) / self.scale / self.tail
        if grad_norm is None:
            return above, None
        return above, (math.log(max(grad_norm, 1e-30)) - self.grad_level) / self.grad_scale / self.grad_tail

    def judge(self, step: int, loss: float, grad_norm: float | None = None) -> Finding:
        """O(1). Observations may be every step or every k-th: windows count observations."""
        if not math.isfinite(loss) or (grad_norm is not None and not math.isfinite(grad_norm)):
            return nonfinite(step, loss, grad_norm)
        p = self.params
        log_grad = None if grad_norm is None else math.log(grad_norm) if grad_norm > 1e-30 else -69.0
        self.seen = seen = self.seen + 1
        if seen == 1:
            self.level, self.scale, self.age = loss, 0.02 * abs(loss) + 1e-9, 1
            if log_grad is not None:
                self.grad_level = log_grad
            self.last_step, self.last_loss = step, loss
            self.onset = self.slow_onset = self.rise_onset = step
            return ok(step, judged=False)
        if self.declared_steps and any(self.last_step < s <= step for s in self.declared_steps):
            self._begin_anew(step)
        self.last_step = step
        self.age = age = self.age + 1
        change = abs(loss - self.last_loss)
        if 1e-6 * abs(loss) < change < self.quantum:
            self.quantum = change
        self.last_loss = loss

        # 1, 2: distance from the trend in scales
        window = min(max(age / 12, 3.0), p.window)
        keep = 1 - 1 / window
        notch = 2 / min(max(seen / 4, 8.0), p.scale_window)
        expected = self.level + self.slope
        z = (loss - expected) / self.scale
        settling = age < SETTLE
        pull = (z if settling or -CLIP < z < CLIP else math.copysign(CLIP, z)) * self.scale
        self.level = expected + (1 - keep * keep) * pull
        self.slope = min(0.0, self.slope + (1 - keep) ** 2 * pull)
        floor = min(self.quantum / 2, 0.02 * abs(self.level))
        self.scale = max(self.scale * (1 + notch if abs(z) > MEDIAN else 1 - notch), floor, 1e-12)
        grad_z = 0.0
        if log_grad is not None:
            grad_z = (log_grad - self.grad_level) / self.grad_scale
            grad_pull = grad_z if settling or -CLIP < grad_z < CLIP else math.copysign(CLIP, grad_z)
            self.grad_level += grad_pull * self.grad_scale / window
            self.grad_scale = max(self.grad_scale * (1 + notch if abs(grad_z) > MEDIAN else 1 - notch), 1e-3)
        if settling:
            return ok(step, judged=False)

        # 3: the tail of what the next observation takes back
        if z < NOT_TAIL:
            self.tail = _tracked(self.tail, self.previous, p.tail_rate)
        if self.cusum < p.threshold:
            self.memory += ((1.0 if (z > 0) == (self.previous > 0) else -1.0) - self.memory) / MEMORY_WINDOW
        self.previous = z
        score = z * TAIL / self.tail / (1 + YOUNG / age) if z > 0 else z
        if log_grad is None and score > 0 and self.memory > USUAL_AGREEMENT:
            rho = math.sin(math.pi / 2 * self.memory) - USUAL_MEMORY
            score /= math.sqrt((1 + rho) / (1 - rho))
        score = min(max(score, -CLIP), p.threshold)

        # 4: spike
        if self.pending and score < TAKEN_BACK:
            self.cusum = max(0.0, self.cusum - self.pending)
        self.pending = 0.0
        before = self.cusum
        cusum = before + score - p.drift
        if cusum <= 0:
            cusum = 0.0
        elif before == 0:
            self.onset = step
        if score >= STANDS_OUT and self.previous_score < 2.0:
            cusum = min(cusum, p.threshold - 1)
            self.pending = max(0.0, cusum - before)
        self.previous_score = score

        # 5: slow divergence
        a = 1 / p.slow_window
        self.slow += a * (min(score, CLIP) - self.slow)
        slow_z = self.slow / self.slow_scale
        if slow_z < USUAL:
            self.slow_onset = step
        self.slow_scale = max(self._slow_floor, self.slow_scale * (1 + (a if abs(slow_z) > MEDIAN else -a) / 6))

        self.lowest = self.level if age < 3 * p.window else min(self.level, self.lowest + self.scale / FORGET)
        rise = (self.level - self.lowest) / self.scale
        if rise < USUAL:
            self.rise_onset = step

        # 6: what the gradient says
        agrees = slow_agrees = rise_agrees = True
        if log_grad is not None:
            if grad_z < NOT_TAIL:
                self.grad_tail = _tracked(self.grad_tail, self.grad_previous, p.tail_rate)
            self.grad_previous = grad_z
            if self.grad_scale < GRAD_LEAST:
                grad_z *= self.grad_scale / GRAD_LEAST
            grad_score = min(max(grad_z * TAIL / self.grad_tail if grad_z > 0 else grad_z, -CLIP), GRAD_CAP)
            self.grad_cusum = max(0.0, min(self.grad_cusum + grad_score - GRAD_DRIFT, 3 * GRAD_CAP))
            self.grad_slow += a * (min(grad_score, CLIP) - self.grad_slow)
            grad_slow_z = self.grad_slow / self.grad_slow_scale
            notch = (a if abs(grad_slow_z) > MEDIAN else -a) / 6
            self.grad_slow_scale = max(self._slow_floor, self.grad_slow_scale * (1 + notch))
            agrees = self.grad_cusum > p.grad_threshold
            slow_agrees = agrees or grad_slow_z > GRAD_SLOW
            lifted = self.grad_lowest + self.grad_scale / FORGET
            self.grad_lowest = self.grad_level if age < 3 * p.window else min(self.grad_level, lifted)
            rise_agrees = self.grad_level - self.grad_lowest > GRAD_RISE * self.grad_scale

        over = cusum > p.threshold
        self.cusum = min(cusum, p.threshold)
        if over and agrees:
            return Finding(
                Kind.SPIKE,
                step,
                self.onset,
                cusum / p.threshold,
                f"loss {loss:.4g}, expected {expected:.4g}: above its trend since step {self.onset} "
                f"({z:.1f} scales now), and more than one batch can explain",
            )
        if slow_z > p.slow_threshold and slow_agrees and age > 3 * p.slow_window:
            return Finding(
                Kind.SLOW_DIVERGENCE,
                step,
                self.slow_onset,
                slow_z / p.slow_threshold,
                f"loss {loss:.4g} has risen above its trend since step {self.slow_onset}, {slow_z:.1f} times its usual wandering",
            )
        if rise > p.rise_threshold * (1 if rise_agrees else UNAIDED):
            since = self.rise_onset
            self.lowest, self.grad_lowest = self.level, self.grad_level
            return Finding(
                Kind.SLOW_DIVERGENCE,
                step,
                since,
                rise / p.rise_threshold,
                f"the trend of the loss has risen to {self.level:.4g}, {rise:.1f} scales above its lowest point, "
                f"mostly since step {since}",
            )
        if over:
            return Finding(
                Kind.SHIFT,
                step,
                self.onset,
                cusum / p.threshold,
                f"loss {loss:.4g}, expected {expected:.4g}: a new level since step {self.onset}, the gradient norm is calm",
            )
        if score >= STANDS_OUT:
            return Finding(
                Kind.OUTLIER,
                step,
                step,
                self.cusum / p.threshold,
                f"loss {loss:.4g}, expected {expected:.4g}: {z:.1f} scales above, in one observation",
            )
        return ok(step)

    def _begin_anew(self, step: int) -> None:
        self.age = 0
        self.cusum = self.pending = self.grad_cusum = self.slow = self.grad_slow = 0.0
        self.onset = self.slow_onset = self.rise_onset = step

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("params", "declared_steps")}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _tracked(tail: float, z: float, rate: float) -> float:
    """One step of a stochastic quantile: it rises by what it falls so that a share `rate` lies above."""
    return tail * (1 + TAIL_GAIN * (1 - rate)) if z > tail else max(TAIL, tail * (1 - TAIL_GAIN * rate))
