"""Fits recover the law that the points were made from, and refuse points that cannot tell."""

import numpy as np
import pytest

from orchestrator.errors import UserError
from orchestrator.scaling.fit import Points, _descend, _objective, fit
from orchestrator.scaling.law import PUBLISHED, Law, best_for_training

BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)  # Hoffmann et al.'s


def points(law: Law, noise: float, seed: int = 0) -> Points:
    """About as many as Besiroglu et al. had (240), around the optimum of each of the paper's budgets."""
    rng = np.random.default_rng(seed)
    n, d = [], []
    for budget in BUDGETS:
        sizes = best_for_training(law, budget).parameters * np.geomspace(0.1, 10, 27)
        n += sizes.tolist()
        d += (budget / 6 / sizes).tolist()
    loss = [law.loss(a, b) for a, b in zip(n, d, strict=True)] * np.exp(rng.normal(0, noise, len(n)))
    return Points(np.array(n), np.array(d), np.array(loss))


@pytest.mark.parametrize("name", ["besiroglu", "hoffmann"])
def test_points_without_noise_give_back_the_published_numbers(name: str) -> None:
    law = PUBLISHED[name]
    found = fit(points(law, 0.0), replicates=20).law
    for number in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found, number) == pytest.approx(getattr(law, number), rel=2e-2)


def test_noisy_points_hold_the_published_numbers_within_their_intervals() -> None:
    law = PUBLISHED["besiroglu"]
    found = fit(points(law, 0.005), replicates=150)
    for number in ("E", "A", "B", "alpha", "beta", "size_exponent"):
        interval = found.interval(number)
        assert interval.low < getattr(law, number) < interval.high, number
    assert found.interval("alpha").high - found.interval("alpha").low < 0.1
    assert not found.notes


def test_outliers_hardly_move_the_fit() -> None:
    law = PUBLISHED["besiroglu"]
    clean = points(law, 0.002)
    loss = clean.loss.copy()
    loss[::40] *= 1.5
    found = fit(Points(clean.parameters, clean.tokens, loss), replicates=20).law
    assert found.alpha == pytest.approx(law.alpha, abs=0.03)
    assert pytest.approx(law.E, abs=0.05) == found.E


def test_the_gradient_is_that_of_the_objective() -> None:
    some = points(PUBLISHED["besiroglu"], 0.01)
    theta = np.array([-0.5, 0.3, -0.7, 0.4, 0.6])
    _, gradient = _objective(theta, some)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-7
        slope = (_objective(theta + step, some)[0] - _objective(theta - step, some)[0]) / 2e-7
        assert gradient[i] == pytest.approx(slope, rel=1e-4)


def test_no_other_start_ends_lower() -> None:
    some = points(PUBLISHED["besiroglu"], 0.01)
    found = fit(some, replicates=20)
    x, y = np.log(some.parameters).mean(), np.log(some.tokens).mean()
    law = found.law
    at = np.array([np.log(law.A) - law.alpha * x, law.alpha, np.log(law.B) - law.beta * y, law.beta, np.log(law.E)])
    rng = np.random.default_rng(1)
    others = [_descend(at + rng.normal(0, [1, 0.3, 1, 0.3, 0.5]), some)[1] for _ in range(20)]
    assert float(_objective(at, some)[0]) <= min(others) + 1e-3


def test_isoflop_minima_lie_where_the_law_says() -> None:
    law = PUBLISHED["besiroglu"]
    sizes_near = points(law, 0.0)
    best = {b: best_for_training(law, b).parameters for b in BUDGETS}
    near = np.array([abs(np.log(n / best[min(BUDGETS, key=lambda b: abs(np.log(b / (6 * n * d))))])) < 1.2
                     for n, d in zip(sizes_near.parameters, sizes_near.tokens, strict=True)])  # fmt: skip
    rng = np.random.default_rng(0)
    some = sizes_near.at(np.flatnonzero(near))
    found = fit(
        Points(some.parameters, some.tokens, some.loss * np.exp(rng.normal(0, 0.001, len(some)))), replicates=100
    )
    assert len(found.isoflops) == len(BUDGETS)
    for isoflop, budget in zip(found.isoflops, BUDGETS, strict=True):
        assert isoflop.flops == pytest.approx(budget)
        assert isoflop.parameters is not None
        assert isoflop.parameters.value == pytest.approx(best[budget], rel=0.25)
    assert found.isoflop_exponent is not None
    assert found.isoflop_exponent.low < law.size_exponent < found.isoflop_exponent.high


def test_a_budget_whose_minimum_was_not_bracketed_says_which_sizes_to_add() -> None:
    law = PUBLISHED["besiroglu"]
    n, d = [], []
    for budget in BUDGETS[:3]:
        sizes = best_for_training(law, budget).parameters * np.geomspace(0.05, 0.5, 6)
        n += sizes.tolist()
        d += (budget / 6 / sizes).tolist()
    loss = [law.loss(a, b) for a, b in zip(n, d, strict=True)]
    found = fit(Points(np.array(n), np.array(d), np.array(loss)), replicates=20)
    assert all(i.parameters is None and "add larger ones" in i.note for i in found.isoflops)
    assert found.isoflop_exponent is None


def _grid(sizes: list[float], tokens: list[float]) -> Points:
    law = PUBLISHED["besiroglu"]
    pairs = [(n, d) for n in sizes for d in tokens]
    return Points(*(np.array(v) for v in zip(*[(n, d, law.loss(n, d)) for n, d in pairs], strict=True)))


@pytest.mark.parametrize(
    ("some", "message"),
    [
        (_grid([1e6, 2e6], [1e8, 2e8]), "4 points cannot fix"),
        (_grid([1e6, 2e6], [1e8, 2e8, 4e8, 8e8]), "2 distinct sizes"),
        (_grid([1e6, 2e6, 4e6, 8e6], [1e8, 2e8]), "2 distinct token counts"),
        (Points(np.geomspace(1e6, 1e8, 8), 20 * np.geomspace(1e6, 1e8, 8), np.linspace(4, 2, 8)), "cannot be told apart"),
        (Points(*_grid([1e6, 2e6, 4e6], [1e8, 2e8, 4e8]).__dict__.values()).at(np.arange(9)), None),
        (Points(np.full(8, 1e6), np.geomspace(1e6, 1e8, 8), np.full(8, np.nan)), "each must be a number above 0"),
    ],
)  # fmt: skip
def test_points_that_cannot_fix_the_law_are_refused(some: Points, message: str | None) -> None:
    if message is None:  # three of each are enough, and the note says how little it is
        assert any("only 9 points" in n for n in fit(some, replicates=20).notes)
        return
    with pytest.raises(UserError, match=message):
        fit(some, replicates=20)
