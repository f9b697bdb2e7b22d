"""What a spike rule sees at one step, and what every rule offers."""

from enum import StrEnum
from typing import Any, NamedTuple, Protocol


class Kind(StrEnum):
    """What one step shows. `STOPPING` kinds call for the policy; the others are only noted."""

    OK = "ok"
    OUTLIER = "outlier"  # one batch stands out; nothing yet says that the model is hurt
    SHIFT = "shift"  # the loss has moved to a new level, the gradient has not: new data, not a spike
    SPIKE = "spike"
    SLOW_DIVERGENCE = "slow_divergence"
    NONFINITE = "nonfinite"


STOPPING = frozenset({Kind.SPIKE, Kind.SLOW_DIVERGENCE, Kind.NONFINITE})


class Finding(NamedTuple):
    """`score` is the rule's own statistic over its own threshold: 1 is the alarm. `onset_step` is where it began. Not `judged`:
    the rule has seen too little so far to raise an alarm whatever comes."""

    kind: Kind
    step: int
    onset_step: int
    score: float
    reason: str
    judged: bool = True

    @property
    def stopping(self) -> bool:
        return self.kind in STOPPING


class Rule(Protocol):
    """An online rule: O(1) time and memory a step. A rule sees a loss only once, in the order of training."""

    def judge(self, step: int, loss: float, grad_norm: float | None = None) -> Finding:
        """What this observation shows. `grad_norm` (global, before clipping) is None where it is not known."""
        ...

    def state(self) -> dict[str, Any]:
        """All that the rule has learnt, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Stands exactly where `state()` was taken: the same verdicts follow."""
        ...


def ok(step: int, judged: bool = True) -> Finding:
    return Finding(Kind.OK, step, step, 0.0, "", judged)


def nonfinite(step: int, loss: float, grad_norm: float | None) -> Finding:
    shown = f"loss {loss}" + ("" if grad_norm is None else f", gradient norm {grad_norm}")
    return Finding(Kind.NONFINITE, step, step, float("inf"), f"{shown}: not finite")


def elevated(rule: Rule) -> bool:
    """Whether a rule still sees the loss above its trend after an alarm; rules that keep no trend alarm anew instead."""
    return bool(getattr(rule, "elevated", False))
