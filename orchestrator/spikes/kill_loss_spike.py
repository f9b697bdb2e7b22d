"""llm-foundry's KillLossSpike callback: stops a run when more than `patience` steps in a row lie above `multiplier` times the
mean of the last `window` losses, or when half of that window lies above `loss_cap`. Written from its documentation
(github.com/mosaicml/llm-foundry, Apache-2.0)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.spikes.finding import Finding, Kind, nonfinite, ok
from orchestrator.spikes.window import Window


@dataclass(frozen=True, kw_only=True)
class Params:
    window: float = 100
    patience: float = 4
    multiplier: float = 2.0
    loss_cap: float = 10.0


class KillLossSpike:
    """Its published defaults."""

    def __init__(self, params: Params | None = None, declared_steps: Iterable[int] = ()) -> None:
        self.params = params or Params()
        self.losses = Window(int(self.params.window))
        self.outliers = 0
        self.since = 0

    def judge(self, step: int, loss: float, grad_norm: float | None = None) -> Finding:
        if not math.isfinite(loss):
            return nonfinite(step, loss, grad_norm)
        p = self.params
        finding = ok(step, judged=self.losses.full)
        if self.losses.full:
            if loss >= p.multiplier * self.losses.mean:
                self.since = step if not self.outliers else self.since
                self.outliers += 1
                if self.outliers > p.patience:
                    reason = (
                        f"{self.outliers} losses in a row above {p.multiplier:g} times the mean {self.losses.mean:.4g}"
                    )
                    finding = Finding(Kind.SPIKE, step, self.since, self.outliers / (p.patience + 1), reason)
                else:
                    finding = Finding(Kind.OUTLIER, step, step, self.outliers / (p.patience + 1), "a high loss")
            else:
                self.outliers = 0
                high = sum(v > p.loss_cap for v in self.losses.values)
                if 2 * high >= len(self.losses):
                    reason = f"{high} of the last {len(self.losses)} losses above {p.loss_cap:g}"
                    finding = Finding(Kind.SLOW_DIVERGENCE, step, step, 2 * high / len(self.losses), reason)
        self.losses.add(loss)
        return finding

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses.state(), "outliers": self.outliers, "since": self.since}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses.restore(state["losses"])
        self.outliers, self.since = state["outliers"], state["since"]
