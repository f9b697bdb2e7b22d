"""What a law recommends, against its own definition and against published figures."""

import numpy as np
import pytest

from orchestrator.errors import UserError
from orchestrator.scaling.law import PUBLISHED, best_for_training, cheapest_at_loss

LAW = PUBLISHED["besiroglu"]


def test_the_best_size_for_a_budget_has_the_lowest_loss_of_all_sizes() -> None:
    best = best_for_training(LAW, 1e21)
    assert best.training_flops == pytest.approx(1e21)
    for factor in (0.5, 0.9, 1.1, 2.0):
        n = best.parameters * factor
        assert LAW.loss(n, 1e21 / 6 / n) > best.loss


def test_chinchillas_budget_gives_about_20_tokens_a_parameter_by_the_replication() -> None:
    """Besiroglu et al.: their fit agrees with Chinchilla's 70B on 1.4T tokens (5.76e23 FLOPs)."""
    best = best_for_training(LAW, 5.76e23)
    assert 15 < best.tokens / best.parameters < 30
    assert 50e9 < best.parameters < 90e9


def test_the_cheapest_model_at_a_loss_without_inference_is_the_training_optimum() -> None:
    best = best_for_training(LAW, 1e22)
    cheapest = cheapest_at_loss(LAW, best.loss)
    assert cheapest.flops == pytest.approx(1e22, rel=1e-6)
    assert cheapest.parameters == pytest.approx(best.parameters, rel=1e-2)


@pytest.mark.parametrize("served", [1e11, 1e12, 1e14])
def test_counting_inference_makes_the_model_smaller_and_no_other_size_is_cheaper(served: float) -> None:
    loss = best_for_training(LAW, 1e22).loss
    plain, chosen = cheapest_at_loss(LAW, loss), cheapest_at_loss(LAW, loss, served)
    assert chosen.parameters < plain.parameters
    assert chosen.tokens > plain.tokens
    assert LAW.loss(chosen.parameters, chosen.tokens) == pytest.approx(loss, abs=1e-9)
    for n in chosen.parameters * np.array([0.8, 0.95, 1.05, 1.5]):
        rest = loss - LAW.E - LAW.A / n**LAW.alpha
        if rest > 0:
            d = (LAW.B / rest) ** (1 / LAW.beta)
            assert 6 * n * d + 2 * n * served >= chosen.flops


def test_a_loss_that_no_model_reaches_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"1\.8 is not above E = 1\.817"):
        cheapest_at_loss(LAW, 1.8)
