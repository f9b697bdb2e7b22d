"""The gate before the update, and what a recomputation says about whom to blame."""

import math
import random

import pytest

from orchestrator.spikes.config import SpikesConfig
from orchestrator.spikes.cusum import Cusum
from orchestrator.spikes.gate import Measured, gate, judge_recomputed
from orchestrator.spikes.rules import make_rule

CONFIG = SpikesConfig(name="test")


def settled() -> Cusum:
    rng, rule = random.Random(0), Cusum()
    for step in range(400):
        rule.judge(step, 3 + rng.gauss(0, 0.05), math.exp(rng.gauss(0, 0.1)))
    return rule


def measured(loss: float, grad_norm: float | None = 1.0, ranks: tuple[float, ...] = ()) -> Measured:
    return Measured(loss=loss, grad_norm=grad_norm, by_rank=tuple((r,) for r in ranks))


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (3.0, math.inf), (90.0, 1.0), (3.0, 1e6)])
def test_withholds_what_is_not_finite_or_wildly_off(loss: float, grad_norm: float) -> None:
    rule = settled()
    before = rule.state()
    assert gate(measured(loss, grad_norm), rule, CONFIG).act == "withhold"
    assert rule.state() == before


@pytest.mark.parametrize(("loss", "grad_norm"), [(3.0, 1.0), (3.2, 1.5), (1.0, 0.1), (3.1, None)])
def test_accepts_the_usual(loss: float, grad_norm: float | None) -> None:
    assert gate(measured(loss, grad_norm), settled(), CONFIG).act == "accept"


def test_a_rule_without_scores_withholds_only_what_is_not_finite() -> None:
    rule = make_rule("zscore")
    assert gate(measured(1e9), rule, CONFIG).act == "accept"
    assert gate(measured(math.nan), rule, CONFIG).act == "withhold"


def test_a_value_that_differs_the_second_time_is_hardware_and_names_rank_and_node() -> None:
    first = measured(math.nan, 1.0, (3.0, 3.0, math.nan, 3.0))
    second = measured(3.0, 1.0, (3.0, 3.0, 3.0, 3.0))
    said = judge_recomputed(first, second, settled(), CONFIG, ["a", "a", "b", "b"])
    assert (said.cause, said.act, said.ranks) == ("hardware", "accept", (2,))
    assert "rank 2 on b" in said.reason


def test_the_rank_that_goes_wrong_first_is_named_and_not_those_whom_it_has_misled() -> None:
    """Two stages of a pipeline on two ranks each: rank 1 sends NaN to stage 1, and gets it back with the gradient."""
    clean = ((1.0, 0.0, 0.0, 5.0), (1.0, 0.0, 0.0, 5.0), (0.0, 3.0, 4.0, 0.0), (0.0, 3.0, 4.0, 0.0))
    nan = math.nan
    struck = ((1.0, 0.0, 0.0, nan), (nan, 0.0, 0.0, nan), (0.0, nan, nan, 0.0), (0.0, nan, nan, 0.0))
    first = Measured(loss=nan, grad_norm=nan, by_rank=struck)
    said = judge_recomputed(first, Measured(loss=3.0, grad_norm=1.0, by_rank=clean), settled(), CONFIG)
    assert (said.cause, said.ranks) == ("hardware", (1,))


def test_ranks_that_compute_together_are_named_together() -> None:
    first, second = measured(math.nan, 1.0, (3.0, math.nan, math.nan)), measured(3.0, 1.0, (3.0, 3.0, 3.0))
    said = judge_recomputed(first, second, settled(), CONFIG, ["a", "b", "b"])
    assert said.ranks == (1, 2)
    assert "one of rank 1 on b, rank 2 on b" in said.reason


def test_a_finite_value_that_is_not_there_the_second_time_is_hardware_too() -> None:
    first, second = measured(90.0, 1.0, (3.0, 177.0)), measured(3.0, 1.0, (3.0, 3.0))
    said = judge_recomputed(first, second, settled(), CONFIG)
    assert (said.cause, said.act, said.ranks) == ("hardware", "accept", (1,))


def test_hardware_that_is_wrong_twice_in_two_ways_calls_a_person() -> None:
    said = judge_recomputed(measured(math.nan), measured(math.inf), settled(), CONFIG)
    assert (said.cause, said.act) == ("hardware", "stop")


def test_the_same_nonfinite_value_twice_is_the_batch_and_it_is_skipped() -> None:
    said = judge_recomputed(measured(math.nan), measured(math.nan), settled(), CONFIG)
    assert (said.cause, said.act) == ("data", "skip")


def test_the_same_high_value_twice_is_the_batch_and_it_is_clipped() -> None:
    said = judge_recomputed(measured(90.0, 30.0), measured(90.0 * (1 + 1e-5), 30.0), settled(), CONFIG)
    assert (said.cause, said.act) == ("data", "clip")
