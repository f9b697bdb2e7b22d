"""ZClip (Kumar, Owen, Chowdhury, Gura, arXiv:2504.02507): a gradient norm more than `sigmas` standard deviations above its
exponential mean is clipped. It clips and never stops a run; here a clip is counted as its alarm. Without gradient norms
it sees nothing but losses that are not finite. Written from the paper's equations."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.spikes.finding import Finding, Kind, nonfinite, ok


@dataclass(frozen=True, kw_only=True)
class Params:
    alpha: float = 0.97  # of the exponential mean and variance
    sigmas: float = 2.5
    warmup: float = 25  # observations from which mean and variance start


class ZClip:
    """Its published defaults; what is learnt from a clipped gradient is its clipped norm."""

    def __init__(self, params: Params | None = None, declared_steps: Iterable[int] = ()) -> None:
        self.params = params or Params()
        self.seen = 0
        self.mean = self.variance = 0.0
        self._sum = self._squares = 0.0

    def judge(self, step: int, loss: float, grad_norm: float | None = None) -> Finding:
        if not math.isfinite(loss) or (grad_norm is not None and not math.isfinite(grad_norm)):
            return nonfinite(step, loss, grad_norm)
        if grad_norm is None:
            return ok(step, judged=False)
        p = self.params
        self.seen += 1
        if self.seen <= p.warmup:
            self._sum += grad_norm
            self._squares += grad_norm * grad_norm
            self.mean = self._sum / self.seen
            self.variance = max(0.0, self._squares / self.seen - self.mean**2)
            return ok(step, judged=False)
        std = max(math.sqrt(self.variance), 1e-12)
        z = (grad_norm - self.mean) / std
        learnt = grad_norm
        finding = ok(step)
        if z > p.sigmas:
            learnt = self.mean + p.sigmas**2 / z * std  # eq. 5: the further out, the harder the clip
            finding = Finding(Kind.SPIKE, step, step, z / p.sigmas, f"gradient norm {z:.1f} standard deviations up")
        self.variance = p.alpha * self.variance + (1 - p.alpha) * (learnt - self.mean) ** 2
        self.mean = p.alpha * self.mean + (1 - p.alpha) * learnt
        return finding

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "params"}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
