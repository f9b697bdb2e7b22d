"""The policy, by example and by property: over any sequence of findings, what may never happen."""

import functools
import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.mixture import Skip, data_batch_index
from orchestrator.spikes.audit import Recent, audit, restored_policy
from orchestrator.spikes.config import SpikesConfig
from orchestrator.spikes.cusum import Cusum
from orchestrator.spikes.finding import Finding, Kind, elevated, ok
from orchestrator.spikes.policy import (
    PolicyState,
    Verdict,
    decide,
    skip_batch,
)

AT_ONCE = SpikesConfig(name="test", patience=0.0)


def batch_of(state: PolicyState, step: int) -> int:
    return data_batch_index(step, [Skip(a, b) for a, b in state.skips])


def spike(step: int, onset: int, kind: Kind = Kind.SPIKE) -> Finding:
    return Finding(kind, step, onset, 1.1, "a spike")


def on(
    finding: Finding,
    state: PolicyState | None = None,
    config: SpikesConfig = AT_ONCE,
    saved: tuple[int, ...] = (0, 500, 1000),
    elevated: bool = True,
) -> tuple[Verdict, PolicyState]:
    state = state or PolicyState()
    return decide(finding, elevated, saved, lambda s: batch_of(state, s), state, config)


def test_rewinds_to_the_newest_checkpoint_trusted_before_the_onset_and_skips_around_the_spike() -> None:
    verdict, state = on(spike(step=1045, onset=1040))
    assert (verdict.act, verdict.to_step) == ("rewind", 500)  # 1000 has only 40 clean steps past it
    assert (verdict.skip_from, verdict.skip_to) == (1029, 1055)
    assert state.skips == ((1029, 1055),)
    verdict, _ = on(spike(step=1105, onset=1100))
    assert verdict.to_step == 1000


def test_watches_for_what_a_rewind_would_cost_and_then_rewinds() -> None:
    config = SpikesConfig(name="test", max_watch_steps=10_000)
    verdict, state = on(spike(1100, 1095), config=config)
    assert verdict.act == "watch"
    acts = []
    for step in range(1101, 1300):
        verdict, state = on(ok(step), state, config)
        acts.append(verdict.act)
        if verdict.act == "rewind":
            break
    # A rewind from step s costs s - 1000 + 10 steps and watching has cost s - 1100: patience 1 never catches up with a
    # checkpoint that recedes, so the cap decides.
    assert "rewind" not in acts
    config = SpikesConfig(name="test", max_watch_steps=30)
    verdict, state = on(spike(1100, 1095), config=config)
    for step in range(1101, 1131):
        assert verdict.act == "watch"
        verdict, state = on(ok(step), state, config)
    assert (verdict.act, verdict.to_step) == ("rewind", 1000)
    assert verdict.skip_from == 1084


def test_a_spike_that_passes_while_watched_costs_nothing() -> None:
    config = SpikesConfig(name="test")
    _, state = on(spike(1100, 1095), config=config)
    verdict, state = on(ok(1105), state, config, elevated=False)
    assert verdict.act == "accept"
    assert (state.rewinds, state.skips, state.watched_since) == (0, (), None)


@pytest.mark.parametrize("kind", [Kind.NONFINITE, Kind.SLOW_DIVERGENCE])
def test_what_does_not_come_back_is_not_watched(kind: Kind) -> None:
    assert on(spike(1100, 1095, kind), config=SpikesConfig(name="test"))[0].act == "rewind"


def test_escalates_further_back_and_wider_then_lower_lr_then_stop() -> None:
    saved = (0, 800, 900, 1000)
    verdicts, state = [], PolicyState()
    for _ in range(4):
        verdict, state = on(spike(1105, 1100), state, saved=saved)
        verdicts.append(verdict)
    assert [v.act for v in verdicts] == ["rewind", "rewind", "lower_lr", "stop"]
    assert [v.to_step for v in verdicts] == [1000, 900, 800, None]
    widths = [v.skip_to - v.skip_from for v in verdicts[:3] if v.skip_to and v.skip_from]
    assert widths == sorted(widths)
    assert verdicts[2].lr_scale == 0.5
    assert state.stopped
    assert "person" in verdicts[3].reason


def test_an_incident_ends_after_clean_steps_and_the_next_one_starts_mild_again() -> None:
    _, state = on(spike(1105, 1100))
    _, state = on(ok(1300), state, elevated=False)
    verdict, state = on(spike(1405, 1400), state)
    assert verdict.act == "rewind"
    assert state.incident_rewinds == 1


def test_without_a_checkpoint_to_trust_it_calls_a_person() -> None:
    verdict, state = on(spike(45, 40, Kind.NONFINITE), saved=())
    assert verdict.act == "stop"
    assert state.stopped


def test_the_run_budgets_bind() -> None:
    spent = PolicyState(rewound_to=(0,) * AT_ONCE.max_rewinds_per_run)
    assert on(spike(1105, 1100), spent)[0].act == "stop"
    full = PolicyState(skips=((0, AT_ONCE.max_skipped_batches),))
    assert on(spike(1105, 1100), full)[0].act == "stop"
    assert skip_batch(99_999, "bad batch", full, AT_ONCE)[0].act == "stop"


def test_watching_only_changes_nothing() -> None:
    verdict, state = on(spike(1105, 1100), config=SpikesConfig(name="test", act=False))
    assert verdict.act == "accept"
    assert state == PolicyState()


def test_a_skip_of_one_batch_moves_the_step_to_the_next() -> None:
    verdict, state = skip_batch(7, "not finite twice", PolicyState(), AT_ONCE)
    assert (verdict.act, state.skips) == ("skip", ((7, 8),))
    assert batch_of(state, 7) == 8
    assert [batch_of(state, s) for s in range(7)] == list(range(7))


@dataclass
class SimulatedRun:
    """A run led by the policy: findings come from `script`, one a step trained, whatever step that is."""

    config: SpikesConfig
    save_every: int
    state: PolicyState = field(default_factory=PolicyState)
    step: int = 0
    checkpoints: list[int] = field(default_factory=list)
    verdicts: list[tuple[Finding, Verdict]] = field(default_factory=list)

    def train(self, script: list[tuple[Kind, int, bool]]) -> None:
        for kind, back, still_up in script:
            if self.state.stopped:
                return
            if self.step % self.save_every == 0:
                self.checkpoints.append(self.step)
            self.step += 1
            finding = Finding(kind, self.step, max(1, self.step - back), 1.0, "scripted")
            before = self.state
            again = self.decide(finding, still_up)
            verdict, self.state = self.decide(finding, still_up)
            assert again == (verdict, self.state), "not deterministic"
            self.check(finding, verdict, before)
            self.verdicts.append((finding, verdict))
            if verdict.to_step is not None:
                self.step = verdict.to_step
                self.checkpoints = [c for c in self.checkpoints if c < self.step]  # it is saved anew

    def decide(self, finding: Finding, still_up: bool) -> tuple[Verdict, PolicyState]:
        state = self.state
        return decide(finding, still_up, self.checkpoints, lambda s: batch_of(state, s), state, self.config)

    def check(self, finding: Finding, verdict: Verdict, before: PolicyState) -> None:
        after, config = self.state, self.config
        assert after.skips[: len(before.skips)] == before.skips, "the skip list only grows"
        assert after.rewound_to[: len(before.rewound_to)] == before.rewound_to
        assert after.skipped_batches <= config.max_skipped_batches
        assert after.rewinds <= config.max_rewinds_per_run
        assert after.incident_rewinds <= config.max_rewinds_per_incident
        assert after.lr_scale <= before.lr_scale
        assert after == PolicyState.from_json(json.loads(json.dumps(after.to_json())))
        if verdict.to_step is None:
            assert after.rewinds == before.rewinds
            return
        assert verdict.to_step < finding.step, "never forward"
        assert verdict.to_step < finding.onset_step, "never past the onset"
        assert verdict.to_step in self.checkpoints
        assert verdict.skip_from is not None
        assert verdict.skip_to is not None
        assert verdict.skip_from < verdict.skip_to
        # What was trained before the checkpoint stays what it was: the skip begins at its next batch or later.
        assert verdict.skip_from >= batch_of(before, verdict.to_step)
        for step in (0, verdict.to_step // 2, verdict.to_step - 1):
            if step >= 0 and step < verdict.to_step:
                assert batch_of(after, step) == batch_of(before, step)
        # The batch on which the alarm was raised is never trained on again.
        alarm_batch = batch_of(before, finding.step - 1)
        assert verdict.skip_from <= alarm_batch < verdict.skip_to


moments = st.tuples(
    st.sampled_from([Kind.OK] * 12 + [Kind.OUTLIER, Kind.SHIFT, Kind.SPIKE, Kind.SLOW_DIVERGENCE, Kind.NONFINITE]),
    st.integers(0, 40),
    st.booleans(),
)


@given(
    script=st.lists(moments, max_size=250),
    save_every=st.integers(1, 60),
    margin=st.integers(0, 12),
    vet=st.integers(0, 30),
    patience=st.floats(0, 2),
    per_incident=st.integers(0, 4),
    per_run=st.integers(0, 8),
    skipped=st.integers(0, 400),
)
@settings(max_examples=120, deadline=None)
def test_over_any_findings_no_rule_of_the_policy_is_broken(
    script: list[tuple[Kind, int, bool]],
    save_every: int,
    margin: int,
    vet: int,
    patience: float,
    per_incident: int,
    per_run: int,
    skipped: int,
) -> None:
    config = SpikesConfig(
        name="test",
        patience=patience,
        max_watch_steps=20,
        margin_steps=margin,
        vet_steps=vet,
        max_rewinds_per_incident=per_incident,
        max_rewinds_per_run=per_run,
        max_skipped_batches=skipped,
    )
    SimulatedRun(config, save_every).train(script)


@given(save_every=st.integers(1, 50), back=st.integers(0, 30), patience=st.floats(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_run_that_only_ever_spikes_is_stopped(save_every: int, back: int, patience: float) -> None:
    run = SimulatedRun(SpikesConfig(name="test", patience=patience), save_every)
    run.train([(Kind.OK, 0, False)] * 200 + [(Kind.SPIKE, back, True)] * 4000)
    assert run.state.stopped


def test_killed_between_verdict_and_act_it_comes_out_the_same() -> None:
    run = SimulatedRun(AT_ONCE, 50)
    run.train([(Kind.OK, 0, False)] * 220 + [(Kind.NONFINITE, 2, True)])
    finding, verdict = run.verdicts[-1]
    recent = Recent()
    recent.add(220, 2.5, 1.0, (0.2, -0.1))
    recent.add(221, math.nan, None)
    written = json.dumps(audit("cusum", finding, verdict, run.state, recent).to_json(), allow_nan=False)
    state = restored_policy([json.loads(written)])
    assert state == run.state
    assert json.loads(written)["window"] == [[220, 2.5, 1.0, 0.2, -0.1], [221, "nan", None, None, None]]


def test_a_run_without_audits_starts_with_a_fresh_policy() -> None:
    assert restored_policy([]) == PolicyState()


def lead(
    config: SpikesConfig, tail_steps: float, poisoned: range, steps: int = 1500
) -> tuple[list[Verdict], int, float]:
    """A model whose loss each poisoned batch raises by 0.3, healing over `tail_steps`; our rule and the policy lead it.

    Returns the verdicts that changed the run, the steps computed in all, and the damage that is left.
    """
    rule, state, damage, step, computed = Cusum(), PolicyState(), 0.0, 0, 0
    saved: dict[int, tuple[dict[str, Any], float]] = {}
    changed = []
    while step < steps and not state.stopped:
        if step % 100 == 0:
            saved = {s: what for s, what in saved.items() if s < step} | {step: (rule.state(), damage)}
        batch = batch_of(state, step)
        step, computed = step + 1, computed + 1
        noise = random.Random(batch)
        damage = damage * (1 - 1 / tail_steps) + 0.3 * (batch in poisoned)
        loss = 2 + 8 * (1 + step / 30) ** -0.4 + noise.gauss(0, 0.03) + damage
        finding = rule.judge(step, loss, math.exp(noise.gauss(0, 0.1) + min(damage, 2)))
        before = state
        verdict, state = decide(
            finding,
            elevated(rule),
            list(saved),
            functools.partial(batch_of, before),
            before,
            config,
        )
        if verdict.act not in ("accept", "watch"):
            changed.append(verdict)
        if verdict.to_step is not None:
            learnt, damage = saved[verdict.to_step]
            rule.restore(learnt)
            step = verdict.to_step
    return changed, computed, damage


@pytest.mark.parametrize("tail_steps", [30, 400])
@pytest.mark.parametrize("patience", [0.0, 1.0])
def test_a_run_with_poisoned_batches_rewinds_skips_them_and_ends_unhurt(patience: float, tail_steps: float) -> None:
    poisoned = range(700, 712)
    changed, computed, damage = lead(SpikesConfig(name="test", patience=patience), tail_steps, poisoned)
    (only,) = changed
    assert (only.act, only.to_step) == ("rewind", 600)
    assert only.skip_from is not None
    assert only.skip_to is not None
    assert only.skip_from <= poisoned.start
    assert poisoned.stop <= only.skip_to
    assert damage == 0
    assert computed <= 1500 + 210


def test_a_spike_that_heals_at_once_is_left_to_heal() -> None:
    changed, computed, _ = lead(SpikesConfig(name="test"), tail_steps=5, poisoned=range(700, 703))
    assert (changed, computed) == ([], 1500)
