"""The plain rule that everybody writes first: a loss `sigmas` standard deviations above the mean of the last `window`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.spikes.finding import Finding, Kind, nonfinite, ok
from orchestrator.spikes.window import Window


@dataclass(frozen=True, kw_only=True)
class Params:
    window: float = 200
    sigmas: float = 6.0


class ZScore:
    """Losses that raise the alarm are not learnt from."""

    def __init__(self, params: Params | None = None, declared_steps: Iterable[int] = ()) -> None:
        self.params = params or Params()
        self.losses = Window(int(self.params.window))

    def judge(self, step: int, loss: float, grad_norm: float | None = None) -> Finding:
        if not math.isfinite(loss) or (grad_norm is not None and not math.isfinite(grad_norm)):
            return nonfinite(step, loss, grad_norm)
        judged = len(self.losses) >= 32
        if judged:
            z = (loss - self.losses.mean) / max(self.losses.std, 1e-12)
            if z > self.params.sigmas:
                return Finding(Kind.SPIKE, step, step, z / self.params.sigmas, f"loss {z:.1f} standard deviations up")
        self.losses.add(loss)
        return ok(step, judged)

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses.restore(state["losses"])
