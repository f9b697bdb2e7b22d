"""The transformer against the Hugging Face implementation and against itself."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.hf import to_hugging_face
from model.transformer import Transformer

CONFIG = ModelConfig(
    name="test", dim=64, n_layers=3, n_heads=4, ffn_dim=192, vocab_size=211, sequence_length=48, norm_eps=1e-5
)

GROUPED = replace(CONFIG, n_kv_heads=2, rope_theta=500_000.0)


def models(config: ModelConfig = CONFIG) -> tuple[Transformer, LlamaForCausalLM]:
    ours = Transformer(config)
    ours.initialize(seed=3)
    with torch.no_grad():  # norms of one would hide a norm that is not applied
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape))
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=CONFIG.dim,
            num_hidden_layers=CONFIG.n_layers,
            num_attention_heads=CONFIG.n_heads,
            num_key_value_heads=config.n_kv_heads or config.n_heads,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            intermediate_size=CONFIG.ffn_dim,
            vocab_size=CONFIG.vocab_size,
            max_position_embeddings=CONFIG.sequence_length,
            rms_norm_eps=CONFIG.norm_eps,
            tie_word_embeddings=False,
        )
    )
    theirs.load_state_dict(to_hugging_face(ours.state_dict()), strict=True)
    return ours, theirs


@pytest.mark.parametrize("config", [CONFIG, GROUPED])
def test_logits_equal_hugging_face_llama(config: ModelConfig) -> None:
    ours, theirs = models(config)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (ours(tokens) - theirs(tokens).logits).abs().max()
    assert difference <= 1e-4


@pytest.mark.parametrize("config", [CONFIG, GROUPED])
def test_loss_and_every_gradient_equal_hugging_face_llama(config: ModelConfig) -> None:
    ours, theirs = models(config)
    row = torch.randint(0, CONFIG.vocab_size, (2, 49), generator=torch.Generator().manual_seed(2))
    loss = ours(row[:, :-1], row[:, 1:]) / row[:, 1:].numel()
    loss.backward()
    logits = theirs(row[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = to_hugging_face({n: p.grad for n, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_no_token_sees_its_future() -> None:
    ours, _ = models()
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 48), generator=torch.Generator().manual_seed(4))
    changed = tokens.clone()
    changed[0, 30] = (changed[0, 30] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = ours(tokens), ours(changed)
    torch.testing.assert_close(before[:, :30], after[:, :30], atol=0, rtol=0)
    assert (before[:, 30:] != after[:, 30:]).any()


def test_initialization_is_a_function_of_seed_and_name() -> None:
    first, second, other = Transformer(CONFIG), Transformer(CONFIG), Transformer(CONFIG)
    first.initialize(7), second.initialize(7), other.initialize(8)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)


def test_bf16_computation_stays_near_fp32() -> None:
    ours, _ = models()
    coarse = Transformer(CONFIG, compute_dtype=torch.bfloat16)
    coarse.load_state_dict(ours.state_dict())
    coarse.rope.copy_(ours.rope)
    row = torch.randint(0, CONFIG.vocab_size, (2, 49), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact, near = ours(row[:, :-1], row[:, 1:]), coarse(row[:, :-1], row[:, 1:])
    assert near.item() == pytest.approx(exact.item(), rel=5e-3)
