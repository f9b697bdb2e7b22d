"""Our rule on curves made here: what it must tell apart, and that it forgets nothing."""

import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.spikes.cusum import SETTLE, Cusum
from orchestrator.spikes.finding import Finding, Kind

NOISE = 0.03
Bump = Callable[[int], float]


def no_bump(step: int) -> float:
    return 0.0


def run_over(
    steps: int = 1500,
    bump: Bump = no_bump,
    grad: Bump | None = None,
    seed: int = 0,
    rule: Cusum | None = None,
    outliers_every: int = 0,
    decimals: int = 9,
) -> list[Finding]:
    """A clean power-law fall with normal noise, plus `bump` on the loss and `grad` on the log of the gradient norm."""
    rng = random.Random(seed)
    rule = rule or Cusum()
    findings = []
    for step in range(1, steps + 1):
        loss = 2 + 8 * (1 + step / 30) ** -0.4 + rng.gauss(0, NOISE) + bump(step)
        if outliers_every and step % outliers_every == 0:
            loss += 20 * NOISE
        grad_norm = None if grad is None else math.exp(rng.gauss(0, 0.1) + grad(step))
        findings.append(rule.judge(step, round(loss, decimals), grad_norm))
    return findings


def stops(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.stopping]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("grad", [None, no_bump])
def test_a_clean_run_raises_no_alarm(seed: int, grad: Bump | None) -> None:
    assert not stops(run_over(3000, grad=grad, seed=seed))


@pytest.mark.parametrize("size", [10, 100, 3000])
def test_one_batch_that_stands_out_is_an_outlier_however_large(size: float) -> None:
    findings = run_over(bump=lambda s: size * NOISE if s == 900 else 0.0)
    assert findings[899].kind is Kind.OUTLIER
    assert not stops(findings)


@pytest.mark.parametrize("grad", [None, lambda s: 2.0 if s >= 900 else 0.0])
def test_a_spike_is_seen_at_its_second_observation_and_dated_to_its_first(grad: Bump | None) -> None:
    spike = stops(run_over(bump=lambda s: 0.9 * math.exp(-(s - 900) / 20) if s >= 900 else 0.0, grad=grad))[0]
    assert (spike.kind, spike.step) == (Kind.SPIKE, 901 if grad is None else spike.step)
    assert spike.step <= 903
    assert 895 <= spike.onset_step <= 900
    assert "expected" in spike.reason


@pytest.mark.parametrize("grad", [None, lambda s: 0.002 * max(0, s - 1500)])
@pytest.mark.parametrize(("nats_per_step", "within"), [(0.004, 150), (0.001, 500), (0.0007, 1500)])
def test_a_slow_divergence_is_seen(nats_per_step: float, within: int, grad: Bump | None) -> None:
    """From a seventh to a fortieth of the noise a step: nothing that any single loss would show."""
    findings = run_over(1500 + within, bump=lambda s: nats_per_step * max(0, s - 1500), grad=grad)
    first = stops(findings)[0]
    assert first.kind in (Kind.SLOW_DIVERGENCE, Kind.SPIKE)
    assert first.step >= 1500
    assert 1350 <= first.onset_step <= first.step


def test_a_slow_divergence_is_seen_in_the_end_though_the_gradient_is_calm() -> None:
    assert stops(run_over(3500, bump=lambda s: 0.001 * max(0, s - 1500), grad=no_bump))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_and_leaves_the_rule_as_it_was(bad: float) -> None:
    rule = Cusum()
    run_over(200, rule=rule)
    before = rule.state()
    assert rule.judge(201, bad, 1.0).kind is Kind.NONFINITE
    assert rule.judge(201, 2.0, bad).kind is Kind.NONFINITE
    assert rule.state() == before


def level_from_900(step: int) -> float:
    return 0.5 if step >= 900 else 0.0


def test_a_declared_change_is_no_alarm_and_an_undeclared_one_is() -> None:
    assert not stops(run_over(bump=level_from_900, rule=Cusum(declared_steps=[900])))
    assert stops(run_over(bump=level_from_900))


def test_a_spike_after_a_declared_change_has_settled_is_seen() -> None:
    findings = run_over(
        bump=lambda s: level_from_900(s) + (0.9 if s >= 1200 else 0.0), rule=Cusum(declared_steps=[900])
    )
    assert stops(findings)[0].step in (1201, 1202)


def test_a_new_level_with_a_calm_gradient_is_other_data() -> None:
    findings = run_over(bump=level_from_900, grad=no_bump)
    assert not stops(findings)
    assert any(f.kind is Kind.SHIFT and f.step <= 905 for f in findings)


def test_benign_outliers_are_learnt() -> None:
    rule = Cusum()
    run_over(3000, rule=rule, outliers_every=40)
    before, after = Cusum().tail, rule.tail
    assert after > 2 * before
    assert rule.scores(rule.expected_loss + 20 * NOISE)[0] < 2.5


@pytest.mark.parametrize("seed", range(3))
def test_noise_with_memory_is_learnt_and_a_spike_in_it_is_seen(seed: int) -> None:
    """Correlation 0.7 from one loss to the next, no gradient norm."""
    rng, rule, wave, findings = random.Random(seed), Cusum(), 0.0, []
    for step in range(1, 4001):
        wave = 0.7 * wave + math.sqrt(1 - 0.7**2) * rng.gauss(0, NOISE)
        spike = 1.0 * math.exp(-(step - 3900) / 20) if step >= 3900 else 0.0
        findings.append(rule.judge(step, 2 + 8 * (1 + step / 30) ** -0.4 + wave + spike))
    assert [f for f in stops(findings) if 1000 < f.step < 3900] == []
    assert 3901 <= next(f for f in stops(findings) if f.step >= 3900).step <= 3903


def test_a_gradient_norm_that_moves_by_a_few_percent_does_not_make_new_data_a_spike() -> None:
    rng, rule, findings = random.Random(0), Cusum(), []
    for step in range(1, 1501):
        loss = 3 + rng.gauss(0, NOISE) + level_from_900(step)
        findings.append(rule.judge(step, loss, math.exp(rng.gauss(0, 0.02) + 0.04 * (step >= 900))))
    assert Kind.SPIKE not in {f.kind for f in findings}
    assert Kind.SHIFT in {f.kind for f in findings}


@pytest.mark.parametrize("decimals", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_rounded_losses_that_repeat_raise_no_alarm(decimals: int, seed: int) -> None:
    assert not stops(run_over(3000, decimals=decimals, seed=seed))


def test_a_loss_that_never_moves_raises_no_alarm_and_a_spike_from_it_does() -> None:
    rule = Cusum()
    assert not stops([rule.judge(s, 2.0) for s in range(500)])
    assert rule.judge(500, 3.0).kind is Kind.OUTLIER
    assert rule.judge(501, 3.0).kind is Kind.SPIKE


def test_nothing_is_judged_while_it_settles() -> None:
    rule = Cusum()
    assert all(rule.judge(s, 10.0 if s % 2 else 3.0).kind is Kind.OK for s in range(SETTLE - 1))
    assert rule.scores(100.0, 100.0) == (0.0, 0.0)


@given(scale=st.floats(1e-3, 1e3), every=st.integers(1, 1000))
@settings(max_examples=15, deadline=None)
def test_verdicts_depend_neither_on_the_unit_of_the_loss_nor_on_how_often_it_is_logged(
    scale: float, every: int
) -> None:
    rng = random.Random(5)
    losses = [2 + 8 * (1 + s / 30) ** -0.4 + rng.gauss(0, NOISE) + (0.5 if 300 <= s < 310 else 0) for s in range(400)]
    one, other = Cusum(), Cusum()
    kinds = [one.judge(s, x).kind for s, x in enumerate(losses)]
    assert [other.judge(s * every, x * scale).kind for s, x in enumerate(losses)] == kinds
    assert Kind.SPIKE in kinds


values = st.floats(0.01, 100) | st.sampled_from([2.0, 2.5, math.nan, math.inf])


@given(
    observations=st.lists(st.tuples(values, st.none() | values), min_size=2, max_size=150),
    cut=st.floats(0, 1),
    declared=st.lists(st.integers(0, 150), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_restored_from_json_it_gives_the_same_verdicts(
    observations: list[tuple[float, float | None]], cut: float, declared: list[int]
) -> None:
    at = int(cut * len(observations))
    one = Cusum(declared_steps=declared)
    for step in range(at):
        one.judge(step, *observations[step])
    other = Cusum(declared_steps=declared)
    other.restore(json.loads(json.dumps(one.state(), allow_nan=False)))
    for step in range(at, len(observations)):
        assert repr(one.judge(step, *observations[step])) == repr(other.judge(step, *observations[step]))
    assert one.state() == other.state()


def test_its_state_is_small_and_does_not_grow() -> None:
    rule = Cusum()
    run_over(100, rule=rule, grad=no_bump)
    early = rule.state()
    run_over(2000, rule=rule, grad=no_bump)
    assert len(rule.state()) == len(early) <= 64
    assert all(isinstance(v, (int, float)) for v in rule.state().values())
