"""A run's spike guard: rule, gate and policy held together, step by step. Torch-free; every rank holds one.

All ranks call it with the same numbers and so decide the same. What it decides goes to the disk (rank 0's events) before it
is acted upon, and the trainer does what it says: apply, recompute, skip, rewind, stop.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from orchestrator.record import Event
from orchestrator.spikes.audit import Audit, Recent, audit, restored_policy
from orchestrator.spikes.config import SpikesConfig
from orchestrator.spikes.finding import Finding, Rule, elevated, nonfinite
from orchestrator.spikes.gate import Measured, gate, judge_recomputed
from orchestrator.spikes.policy import PolicyState, Verdict, decide, skip_batch
from orchestrator.spikes.rules import make_rule

SKIPS_IN_A_ROW = 3  # batches left out for one step before the weights, not the batches, are suspected

Recording = Callable[..., None]  # (kind, step, detail, **data): durable before it returns
Share = tuple[float, ...]  # of one rank (gate.Measured.by_rank)
Act = Literal["apply", "clip", "leave_out", "skip", "rewind", "stop"]


class SpikeWatch:
    """`checkpoints()` lists the steps of the run's checkpoints, asked only when something is wrong; `data_batch(step)` is the
    data batch of 0-based `step` under `skips`. Neither they nor `event` may differ between ranks in what they return.
    `changes`: steps from which the schedule changes how the loss goes, as the first after the warm-up."""

    def __init__(
        self,
        config: SpikesConfig,
        events: Iterable[Event],
        checkpoints: Callable[[], Sequence[int]],
        data_batch: Callable[[int], int],
        event: Recording,
        changes: Sequence[int] = (),
    ) -> None:
        self.config, self._changes = config, tuple(changes)
        self._checkpoints, self._data_batch, self._event = checkpoints, data_batch, event
        self._recent = Recent()
        self._withheld: Measured | None = None
        self._skips_in_a_row = 0
        self._alarmed = False
        self.said = ""  # why the last verdict
        audits = [e for e in events if e.kind == "spike"]
        self._policy = restored_policy(e.data for e in audits)
        self._rule = self._new_rule()
        self.rewind_to: int | None = _unfinished_rewind(events)
        """The step that the run must go back to before it goes on: a verdict, also one whose act was cut short by a kill."""
        if self._policy.stopped and audits[-1].data.get("config") != asdict(config):
            # A person has looked and changed spikes.*: that is how a stopped run goes on.
            self._policy = replace(self._policy, stopped=False, incident_onset=None, incident_rewinds=0)
        if self.rewind_to is not None and audits[-1].data.get("config") != asdict(config):
            # The same where a rewind could not be done, its checkpoint being gone.
            detail = f"spikes.* has changed: the run does not go back to step {self.rewind_to} but on from its newest checkpoint"
            self._event("rewind_dropped", self.rewind_to, detail)
            self.rewind_to = None

    @property
    def skips(self) -> tuple[tuple[int, int], ...]:
        """Data batches [first, end) that are not trained on."""
        return self._policy.skips

    @property
    def lr_scale(self) -> float:
        """Of the whole schedule."""
        return self._policy.lr_scale

    @property
    def usual_grad_norm(self) -> float | None:
        """What the rule takes for this run's usual gradient norm; None where it keeps none, or not yet."""
        usual = getattr(self._rule, "usual_grad_norm", None)
        return usual if isinstance(usual, float) else None

    def vetted_step(self, step: int) -> int | None:
        """The step that has now proved healthy: `vet_steps` clean steps ago. None while an incident is open."""
        if self._policy.incident_onset is not None or self._policy.watched_since is not None:
            return None
        return step - self.config.vet_steps

    def withhold(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether this step's update must wait for a second computation. Call it once a computed step, before `judged`."""
        measured = Measured(loss=loss, grad_norm=grad_norm)
        said = gate(measured, self._rule, self.config)
        if said.act == "accept" or (measured.finite and not self.config.act):
            self._skips_in_a_row = 0
            return False
        self._withheld = measured
        self._event("withheld", step, f"step {step}: {said.reason}: the update is withheld and the step computed again")
        return True

    def recomputed(
        self, step: int, loss: float, grad_norm: float, by_rank: Sequence[tuple[Share, Share, str]] = ()
    ) -> Act:
        """What the second computation of a withheld step says.

        `by_rank`: every rank's own share in the first and in the second computation, and its node. "apply" takes
        the second one, "clip" clips it to `usual_grad_norm` too; "leave_out" drops the update, and no more.
        """
        assert self._withheld is not None, "nothing was withheld"
        first = replace(self._withheld, by_rank=tuple(a for a, _, _ in by_rank))
        second = Measured(loss=loss, grad_norm=grad_norm, by_rank=tuple(b for _, b, _ in by_rank))
        self._withheld = None
        nodes = [node for _, _, node in by_rank]
        said = judge_recomputed(first, second, self._rule, self.config, nodes)
        found = {
            "cause": said.cause,
            "ranks": list(said.ranks),
            "nodes": sorted({nodes[r] for r in said.ranks if r < len(nodes)}),
        }
        if said.act == "accept" or said.act == "clip":
            self._skips_in_a_row = 0
            self._event("recomputed", step, f"step {step}: {said.reason}", act=said.act, **found)
            return "clip" if said.act == "clip" else "apply"
        finding = nonfinite(step, loss, grad_norm)._replace(reason=said.reason)
        if not self.config.act:
            self._event("recomputed", step, f"step {step}: {said.reason}; spikes.act=false", act="leave_out", **found)
            return "leave_out"
        if said.act == "stop":
            verdict = Verdict(act="stop", reason=f"{said.reason}: a person must look", lr_scale=self.lr_scale)
            return self._do(finding, verdict, replace(self._policy, stopped=True), **found)
        self._skips_in_a_row += 1
        if self._skips_in_a_row > SKIPS_IN_A_ROW:
            many = f"{SKIPS_IN_A_ROW} batches were left out for step {step} already: the weights are at fault"
            return self._decide(finding._replace(reason=f"the loss was {loss} twice; {many}"))
        verdict, after = skip_batch(self._data_batch(step - 1), said.reason, self._policy, self.config)
        return self._do(finding, verdict, after, **found)

    def judged(self, step: int, loss: float, grad_norm: float) -> Act:
        """The verdict on a step that was applied. "rewind": load `rewind_to`, then call `restore` and `rewound`."""
        scores = getattr(self._rule, "scores", None)
        self._recent.add(step, loss, grad_norm, scores(loss, grad_norm) if scores else (None, None))
        return self._decide(self._rule.judge(step, loss, grad_norm))

    def rewound(self, step: int) -> None:
        """The run stands at `step` again. It is written down before training goes on."""
        asked, self.rewind_to = self.rewind_to, None
        further = "" if asked == step else f" (step {asked} could not be loaded)"
        left_out = f"{self._policy.skipped_batches} data batches are left out in all"
        self._event("rewound", step, f"back at step {step}{further}; {left_out}", to_step=step)

    def state(self) -> dict[str, Any]:
        """For the checkpoint: JSON."""
        return {"rule": self._rule_id(), "learnt": self._rule.state(), "policy": self._policy.to_json()}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Stands where the checkpoint was saved. Skips, rewinds and a stop that came later stay: they are not undone."""
        self._rule = self._new_rule()
        self._recent = Recent()
        self._skips_in_a_row, self._alarmed = 0, False
        if not saved:
            return
        if saved["rule"] == self._rule_id():
            self._rule.restore(saved["learnt"])
        policy = PolicyState.from_json(saved["policy"])
        if (policy.rewinds, len(policy.skips)) >= (self._policy.rewinds, len(self._policy.skips)):
            self._policy = replace(policy, stopped=self._policy.stopped)

    def _new_rule(self) -> Rule:
        """Knows of the changes that the user has declared, of the schedule's, and of those that the policy has made."""
        declared = [*self.config.declared_steps, *self._changes, *self._policy.lowered_at]
        return make_rule(self.config.rule, self.config.params, declared)

    def _rule_id(self) -> list[Any]:
        return [self.config.rule, dict(self.config.params)]

    def _decide(self, finding: Finding) -> Act:
        before = self._policy
        wrong = finding.stopping or before.watched_since is not None
        checkpoints = self._checkpoints() if wrong else []
        verdict, after = decide(finding, elevated(self._rule), checkpoints, self._data_batch, before, self.config)
        newly, self._alarmed = finding.stopping and not self._alarmed, finding.stopping
        if verdict.act in ("rewind", "lower_lr", "stop"):
            return self._do(finding, verdict, after)
        if (verdict.act == "watch" and before.watched_since is None) or (verdict.act == "accept" and newly):
            return self._do(finding, verdict, after)
        closed = before.incident_onset is not None and after.incident_onset is None
        if closed or (before.watched_since is not None and after.watched_since is None):
            since = before.incident_onset or before.watched_since
            how = f"after {before.incident_rewinds} rewind(s)" if closed and before.incident_rewinds else "by itself"
            self._event(
                "recovered",
                finding.step,
                f"step {finding.step}: the spike of step {since} is over, {how}",
                onset_step=since,
                rewinds=before.incident_rewinds,
            )
        self._policy = after
        return "apply"

    def _do(self, finding: Finding, verdict: Verdict, after: PolicyState, **found: Any) -> Act:
        """Writes the verdict down, and only then makes it so."""
        written: Audit = audit(self.config.rule, finding, verdict, after, self._recent)
        self._event(
            "spike",
            finding.step,
            f"step {finding.step}: {verdict.act}: {verdict.reason}",
            **written.to_json(),
            config=asdict(self.config),
            **found,
        )
        self._policy, self.said = after, verdict.reason
        if verdict.act in ("rewind", "lower_lr"):
            self.rewind_to = verdict.to_step
            return "rewind"
        if verdict.act == "stop":
            return "stop"
        return "skip" if verdict.act == "skip" else "apply"


def _unfinished_rewind(events: Iterable[Event]) -> int | None:
    """Where the last verdict sent the run, if no start has got there yet."""
    to_step: int | None = None
    for event in events:
        if event.kind == "spike" and event.data.get("act") in ("rewind", "lower_lr"):
            to_step = int(event.data["to_step"])
        elif event.kind in ("rewound", "rewind_dropped"):
            to_step = None
    return to_step


def stopped_for_a_person(events: Iterable[Event], config: SpikesConfig) -> str | None:
    """Why the policy stopped this run, while nobody has changed spikes.* since; else None."""
    last = next((e for e in reversed(list(events)) if e.kind == "spike"), None)
    if last is None or last.data.get("act") != "stop" or last.data.get("config") != asdict(config):
        return None
    return last.detail
