"""Schedule, decay groups and clipping."""

import pytest
import torch

from model.config import ModelConfig, OptimConfig
from model.optim import clip_gradients, clipped_step, global_grad_norm, learning_rate, make_optimizer
from model.transformer import Transformer

OPTIM = OptimConfig(name="test", lr=1.5e-4)


def test_schedule_warms_up_then_falls_along_a_cosine_to_a_tenth() -> None:
    steps = 10_000
    assert learning_rate(1, steps, OPTIM) == pytest.approx(1.5e-4 / 2000)
    assert learning_rate(2000, steps, OPTIM) == pytest.approx(1.5e-4)
    assert learning_rate(6000, steps, OPTIM) == pytest.approx((1.5e-4 + 1.5e-5) / 2)
    assert learning_rate(steps, steps, OPTIM) == pytest.approx(1.5e-5)
    after = [learning_rate(s, steps, OPTIM) for s in range(2000, steps + 1)]
    assert after == sorted(after, reverse=True)


def test_only_matrices_decay() -> None:
    model = Transformer(
        ModelConfig(name="t", dim=16, n_layers=1, n_heads=2, ffn_dim=32, vocab_size=32, sequence_length=8)
    )
    decayed, kept = make_optimizer(model, OPTIM).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decayed["params"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("norm" in names[id(p)] for p in kept["params"])
    assert len(kept["params"]) == 3


def test_the_state_made_at_once_is_what_adamw_would_make_at_its_first_step() -> None:
    config = ModelConfig(name="t", dim=16, n_layers=1, n_heads=2, ffn_dim=32, vocab_size=32, sequence_length=8)
    ends = []
    for lazy in (False, True):
        model = Transformer(config)
        model.initialize(seed=1)
        optimizer = make_optimizer(model, OPTIM)
        if lazy:
            optimizer.state.clear()
        for _ in range(3):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
            optimizer.step()
        ends.append((optimizer.state_dict()["state"], model.state_dict()))
    (made, weights), (expected, expected_weights) = ends
    assert [list(moments) for moments in made.values()] == [list(moments) for moments in expected.values()]
    torch.testing.assert_close(made, expected, rtol=0, atol=0)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)


def test_clipping_is_by_the_global_norm() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((4,), -1.0)
    norm = global_grad_norm(parameters)
    assert norm.item() == pytest.approx(4.0)
    clip_gradients(parameters, 1.0, norm)
    assert global_grad_norm(parameters).item() == pytest.approx(1.0, rel=1e-5)
    assert parameters[0].grad[0].item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_a_clipped_step_is_clipping_and_a_step(max_norm: float) -> None:
    stepped = []
    for fused in (True, False):
        weight = torch.nn.Parameter(torch.ones(3, 4))
        optimizer = torch.optim.AdamW(
            [weight], lr=0.1, eps=0.1, fused=True
        )  # a large eps: the scale of gradients shows
        for _ in range(2):
            weight.grad = torch.arange(12.0).view(3, 4)
            norm = global_grad_norm([weight])
            if fused:
                clipped_step(optimizer, max_norm, norm)
            else:
                clip_gradients([weight], max_norm, norm)
                optimizer.step()
        stepped.append(weight.detach())
    torch.testing.assert_close(stepped[0], stepped[1])
