"""OLMo-core's SkipStepOptimizer: a step is left out when its loss or gradient norm exceeds the mean of the last
`window` steps by `sigmas` standard deviations. Written from its documentation (github.com/allenai/OLMo-core, Apache-2.0)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.spikes.finding import Finding, Kind, nonfinite, ok
from orchestrator.spikes.window import Window


@dataclass(frozen=True, kw_only=True)
class Params:
    window: float = 128
    sigmas: float = 6.0


class OlmoSkipStep:
    """Its published defaults. It knows no declared changes and learns from every step, the left-out ones too."""

    def __init__(self, params: Params | None = None, declared_steps: Iterable[int] = ()) -> None:
        self.params = params or Params()
        size = int(self.params.window)
        self.losses, self.grad_norms = Window(size), Window(size)

    def judge(self, step: int, loss: float, grad_norm: float | None = None) -> Finding:
        if not math.isfinite(loss) or (grad_norm is not None and not math.isfinite(grad_norm)):
            return nonfinite(step, loss, grad_norm)
        score, what, judged = _sigmas(self.losses, loss) / self.params.sigmas, "loss", _settled(self.losses)
        self.losses.add(loss)
        if grad_norm is not None:
            grad_score = _sigmas(self.grad_norms, grad_norm) / self.params.sigmas
            self.grad_norms.add(grad_norm)
            if grad_score > score:
                score, what = grad_score, "gradient norm"
        if score <= 1:
            return ok(step, judged)
        return Finding(Kind.SPIKE, step, step, score, f"{what} {score * self.params.sigmas:.1f} standard deviations up")

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses.state(), "grad_norms": self.grad_norms.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses.restore(state["losses"])
        self.grad_norms.restore(state["grad_norms"])


def _sigmas(window: Window, value: float) -> float:
    """How many standard deviations above the window's mean; 0 until half the window is full."""
    return (value - window.mean) / max(window.std, 1e-12) if _settled(window) else 0.0


def _settled(window: Window) -> bool:
    return len(window) >= max(2, (window.values.maxlen or 0) // 2)
