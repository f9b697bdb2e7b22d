"""Recomputation changes what is kept for the backward pass and computed in it, and no bit of the result."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.transformer import Transformer

CONFIG = ModelConfig(name="t", dim=64, n_layers=3, n_heads=4, ffn_dim=160, vocab_size=97, sequence_length=32)


def trained(recompute: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor], int, int]:
    """Loss, gradients, FLOPs of both passes, and bytes that the graph outside of recomputed blocks holds."""
    model = Transformer(CONFIG, dtype, recompute)
    model.initialize(seed=1)
    tokens = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(2))
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, flops.get_total_flops(), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_gradients_are_the_same_bit_by_bit(recompute: str, dtype: torch.dtype) -> None:
    loss, gradients, flops, kept = trained("none", dtype)
    again, same, more_flops, less_kept = trained(recompute, dtype)
    assert torch.equal(loss, again)
    assert gradients.keys() == same.keys()
    assert all(torch.equal(gradients[n], same[n]) for n in gradients)
    assert less_kept < kept / 2
    # Selective recomputation repeats no matrix product and no attention; full repeats those of the forward pass but each layer's
    # last, as the forecast has it (attention is not among what is counted).
    products = 4 * CONFIG.dim**2 + 2 * CONFIG.dim * CONFIG.ffn_dim
    assert more_flops - flops == (2 * 64 * CONFIG.n_layers * products if recompute == "full" else 0)


def test_the_names_of_parameters_do_not_depend_on_it(tmp_path: Path) -> None:
    names = [
        list(dict(Transformer(CONFIG, torch.float32, r).named_parameters())) for r in ("none", "selective", "full")
    ]
    assert names[0] == names[1] == names[2]
