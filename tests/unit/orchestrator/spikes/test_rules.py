"""The published rules: each raises its alarm where its description says, and is restored exactly."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.spec import compose
from orchestrator.spikes.finding import Kind
from orchestrator.spikes.rules import RULES, make_rule, param_names


def calm(seed: int = 0, n: int = 300) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    return [(3 + rng.gauss(0, 0.05), 1 + abs(rng.gauss(0, 0.05))) for _ in range(n)]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_names_what_is_not_finite(name: str) -> None:
    rule = make_rule(name)
    for step, (loss, grad_norm) in enumerate(calm()):
        rule.judge(step, loss, grad_norm)
    assert rule.judge(300, math.nan, 1.0).kind is Kind.NONFINITE


values = st.floats(0.01, 100) | st.just(2.0)


@pytest.mark.parametrize("name", [n for n in RULES if n != "cusum"])  # which has a harder test of its own
@given(observations=st.lists(st.tuples(values, st.none() | values), min_size=1, max_size=60), cut=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_restored_from_json_a_rule_gives_the_same_verdicts(
    name: str, observations: list[tuple[float, float | None]], cut: float
) -> None:
    at = int(cut * len(observations))
    one, other = make_rule(name), make_rule(name)
    for step, (loss, grad_norm) in enumerate([*calm(n=140), *observations[:at]]):
        one.judge(step, loss, grad_norm)
    other.restore(json.loads(json.dumps(one.state())))
    for step, (loss, grad_norm) in enumerate(observations[at:]):
        assert repr(one.judge(step, loss, grad_norm)) == repr(other.judge(step, loss, grad_norm))
    assert one.state() == other.state()


@pytest.mark.parametrize(("name", "loss"), [("olmo_skip_step", 3.6), ("zscore", 3.6)])
def test_six_standard_deviations_are_an_alarm(name: str, loss: float) -> None:
    rule = make_rule(name)
    assert all(rule.judge(s, x, g).kind is Kind.OK for s, (x, g) in enumerate(calm()))
    assert rule.judge(300, loss, 1.0).kind is Kind.SPIKE


def test_olmo_skip_step_also_watches_the_gradient_norm() -> None:
    rule = make_rule("olmo_skip_step")
    for step, (loss, grad_norm) in enumerate(calm()):
        rule.judge(step, loss, grad_norm)
    assert rule.judge(300, 3.0, 5.0).kind is Kind.SPIKE


def test_kill_loss_spike_waits_for_more_than_its_patience() -> None:
    rule = make_rule("kill_loss_spike")
    for step, (loss, _) in enumerate(calm()):
        rule.judge(step, loss)
    kinds = [rule.judge(300 + i, 9.0).kind for i in range(5)]
    assert kinds == [Kind.OUTLIER] * 4 + [Kind.SPIKE]


def test_kill_loss_spike_stops_a_loss_that_stays_above_its_cap() -> None:
    rule = make_rule("kill_loss_spike")
    kinds = [rule.judge(step, 11.0).kind for step in range(101)]
    assert set(kinds[:100]) == {Kind.OK}
    assert kinds[100] is Kind.SLOW_DIVERGENCE


def test_zclip_sees_the_gradient_norm_only() -> None:
    rule = make_rule("zclip")
    for step, (loss, grad_norm) in enumerate(calm()):
        rule.judge(step, loss, grad_norm)
    assert rule.judge(300, 90.0, 1.0).kind is Kind.OK
    assert rule.judge(301, 3.0, 4.0).kind is Kind.SPIKE
    assert rule.judge(302, 3.0, None).kind is Kind.OK


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_chosen_by_one_override(name: str) -> None:
    group = "default" if name == "cusum" else name
    spikes = compose(["experiment=first_run", f"spikes={group}"]).spikes
    assert spikes.rule == name
    assert not spikes.problems()


def test_wrong_parameters_are_told_with_the_right_ones() -> None:
    spikes = compose(["experiment=first_run"]).spikes
    spikes.params = {"sigma": 3.0}
    spikes.gate_tails = 0.5
    told = "\n".join(spikes.problems())
    assert "spikes.params.sigma=3.0" in told
    assert all(name in told for name in param_names("cusum"))
    assert "spikes.gate_tails=0.5" in told
    spikes.rule = "magic"
    assert any("olmo_skip_step" in p for p in spikes.problems())


def test_watching_only_is_one_override() -> None:
    assert not compose(["experiment=first_run", "spikes=watch"]).spikes.act
