"""The gate before the update: what to do with a loss and a gradient that have been computed but not yet applied.

Pure: the trainer withholds, recomputes and applies; these functions decide. Twice the same bad value means that the batch
is to blame, two different values mean that the hardware is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from orchestrator.spikes.config import SpikesConfig


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One computation of one step. `by_rank` is each rank's own share: numbers of what it has computed, in the order in which
    the step computes them (model.train.Share), to name the rank that goes wrong first."""

    loss: float
    grad_norm: float | None
    by_rank: tuple[tuple[float, ...], ...] = ()

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and (self.grad_norm is None or math.isfinite(self.grad_norm))


class Scores(Protocol):
    """The part of a rule that the gate asks; rules without it withhold only what is not finite."""

    def scores(self, loss: float, grad_norm: float | None = None) -> tuple[float, float | None]: ...


@dataclass(frozen=True)
class Gate:
    """`accept`: apply the update. `withhold`: leave it out and compute the step once more."""

    act: Literal["accept", "withhold"]
    reason: str = ""


@dataclass(frozen=True)
class Recomputed:
    """What two computations of the same step say. `accept` applies the second; `skip` leaves this data batch out (the
    step is done with the next one); `clip` applies the gradient, clipped to the run's usual norm; `stop` calls a person."""

    cause: Literal["hardware", "data"]
    act: Literal["accept", "skip", "clip", "stop"]
    ranks: tuple[int, ...]  # among which the fault is: tensor and context parallel ranks spread it over their group
    reason: str


ACCEPT = Gate("accept")


def gate(measured: Measured, rule: object, config: SpikesConfig) -> Gate:
    """Whether an update may be applied. O(1), changes nothing."""
    if not measured.finite:
        return Gate("withhold", f"loss {measured.loss}, gradient norm {measured.grad_norm}: not finite")
    if not hasattr(rule, "scores"):
        return ACCEPT
    asked: Scores = rule
    loss_tails, grad_tails = asked.scores(measured.loss, measured.grad_norm)
    if loss_tails > config.gate_tails or (grad_tails is not None and grad_tails > 2 * config.gate_tails):
        grad = "" if grad_tails is None else f", gradient norm {measured.grad_norm:.4g} ({grad_tails:.1f} tails)"
        return Gate("withhold", f"loss {measured.loss:.4g} ({loss_tails:.1f} learnt tails above its trend){grad}")
    return ACCEPT


def judge_recomputed(
    first: Measured, second: Measured, rule: object, config: SpikesConfig, nodes: Sequence[str] = ()
) -> Recomputed:
    """After the recomputation. `nodes[rank]` names the node of a rank; a withheld step is recomputed once, not more."""
    grad_rtol = max(config.recompute_rtol, 1e-2)  # kernels of the backward pass may add in another order
    ranks = _differ_first(first.by_rank, second.by_rank, config.recompute_rtol, grad_rtol)
    differs = (
        bool(ranks)
        or not _same(first.loss, second.loss, config.recompute_rtol)
        or not _same(first.grad_norm, second.grad_norm, grad_rtol)
    )
    if differs:
        who = ", ".join(f"rank {r}" + (f" on {nodes[r]}" if r < len(nodes) else "") for r in ranks)
        who = f"one of {who}" if len(ranks) > 1 else who or "a rank not known"
        reason = (
            f"recomputed, loss and gradient norm were {_both(second)} after {_both(first)}: hardware fault at {who}"
        )
        if gate(second, rule, config).act == "accept":
            return Recomputed("hardware", "accept", ranks, reason)
        return Recomputed("hardware", "stop", ranks, reason + "; and the second value is no better")
    if not second.finite:
        return Recomputed("data", "skip", (), f"recomputed, the loss was {second.loss} again: the batch is skipped")
    reason = f"recomputed, the loss was {second.loss:.6g} again: the batch stands out, its gradient is applied clipped"
    return Recomputed("data", "clip", (), reason)


def _differ_first(
    first: Sequence[tuple[float, ...]], second: Sequence[tuple[float, ...]], rtol: float, grad_rtol: float
) -> tuple[int, ...]:
    """The ranks whose shares differ at the first place at which any do: what differs after it only follows from that."""
    both = list(zip(first, second, strict=False))
    places = min((len(share) for pair in both for share in pair), default=0)
    for place in range(places):
        allowed = rtol if place < places / 2 else grad_rtol
        ranks = tuple(r for r, (one, other) in enumerate(both) if not _same(one[place], other[place], allowed))
        if ranks:
            return ranks
    return ()


def _both(measured: Measured) -> str:
    return f"{measured.loss:.6g}" + ("" if measured.grad_norm is None else f", {measured.grad_norm:.4g}")


def _same(a: float | None, b: float | None, rtol: float) -> bool:
    if a is None or b is None:
        return a is b
    if not (math.isfinite(a) and math.isfinite(b)):
        return (math.isnan(a) and math.isnan(b)) or a == b
    return math.isclose(a, b, rel_tol=rtol, abs_tol=1e-12)
