"""The written record of every verdict that changes a run: saved to disk before the act, enough to act again after a kill."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.spikes.finding import Finding
from orchestrator.spikes.policy import PolicyState, Verdict

WINDOW = 64  # observations before the verdict


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Goes whole into `Event.data` (kind "spike"); every value is plain JSON. What came of it is the next `rewound`,
    `recovered` or `spike` event. `window` holds (step, loss, gradient norm, how many of the run's own tails the loss, and
    the gradient norm, stood above what was expected; None where the rule keeps no such score)."""

    rule: str
    finding: str  # the kind
    step: int
    onset_step: int
    score: float | None  # over the rule's threshold; None where it is not finite
    reason: str
    act: str
    to_step: int | None
    skip_from: int | None
    skip_to: int | None
    lr_scale: float
    window: list[list[float | str | None]] = field(default_factory=list)
    policy: dict[str, Any] = field(default_factory=dict)  # PolicyState after the verdict

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Recent:
    """The last observations, for the audit record."""

    def __init__(self) -> None:
        self._values: deque[tuple[int, float, float | None, float | None, float | None]] = deque(maxlen=WINDOW)

    def add(
        self, step: int, loss: float, grad_norm: float | None, tails: tuple[float | None, float | None] = (None, None)
    ) -> None:
        self._values.append((step, loss, grad_norm, *tails))

    def plain(self) -> list[list[float | str | None]]:
        return [[step, *map(_plain, values)] for step, *values in self._values]


def audit(rule: str, finding: Finding, verdict: Verdict, state: PolicyState, recent: Recent) -> Audit:
    score = _plain(finding.score)
    return Audit(
        rule=rule,
        finding=finding.kind.value,
        step=finding.step,
        onset_step=finding.onset_step,
        score=score if isinstance(score, float) else None,
        reason=verdict.reason,
        act=verdict.act,
        to_step=verdict.to_step,
        skip_from=verdict.skip_from,
        skip_to=verdict.skip_to,
        lr_scale=verdict.lr_scale,
        window=recent.plain(),
        policy=state.to_json(),
    )


def restored_policy(audits: Iterable[Mapping[str, Any]]) -> PolicyState:
    """The policy's state after the last of a run's audit records (`Event.data`, in order); fresh without one."""
    state = PolicyState()
    for values in audits:
        if values.get("policy"):
            state = PolicyState.from_json(dict(values["policy"]))
    return state


def _plain(value: float | None) -> float | str | None:
    """JSON has no NaN: what is not finite is written as a word."""
    if value is None or value - value == 0:
        return value
    return str(value)
