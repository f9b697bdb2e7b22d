"""Fused attention against the reference, forward and backward, and what it is allowed to store."""

import pytest
import torch

from model.attention import causal_attention, reference_attention
from model.cpu_attention import BLOCK, BLOCKS, block_attention


def random_inputs(tokens: int, heads: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values of `heads`: of queries, and of keys and values."""
    torch.manual_seed(0)
    return [torch.randn(2, tokens, n, 16, dtype=dtype, requires_grad=True) for n in (heads[0], heads[1], heads[1])]


def test_each_head_of_keys_serves_the_queries_next_to_each_other() -> None:
    q, k, v = random_inputs(9, (4, 2), torch.float32)
    whole = causal_attention(q, k, v)
    for head in range(4):
        alone = (q[:, :, [head]], k[:, :, [head // 2]], v[:, :, [head // 2]])
        torch.testing.assert_close(whole[:, :, [head]], causal_attention(*alone))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [1, 5, 64, 129])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
def test_fused_equals_reference(dtype: torch.dtype, tolerance: float, tokens: int, heads: tuple[int, int]) -> None:
    inputs = random_inputs(tokens, heads, dtype)
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    fused, expected = causal_attention(*inputs), reference_attention(*twins)
    torch.testing.assert_close(fused, expected, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(fused)
    fused.backward(upstream)
    expected.backward(upstream)
    for ours, theirs in zip(inputs, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=4 * tolerance, rtol=4 * tolerance)


def test_no_attention_weights_are_stored_for_the_backward_pass() -> None:
    tokens, heads = 256, 2
    inputs = [torch.randn(1, tokens, heads, 16, requires_grad=True) for _ in range(3)]
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        causal_attention(*inputs)
    assert saved
    assert max(saved) < tokens * tokens


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [1, BLOCK, 2 * BLOCK + 5, BLOCKS * BLOCK + 5])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
def test_in_blocks_equals_reference(dtype: torch.dtype, tolerance: float, tokens: int, heads: tuple[int, int]) -> None:
    inputs = random_inputs(tokens, heads, dtype)
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    ours, expected = block_attention(*inputs), reference_attention(*twins)
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, inputs, upstream)
    for ours_grad, theirs in zip(found, torch.autograd.grad(expected, twins, upstream), strict=True):
        torch.testing.assert_close(ours_grad, theirs, atol=2 * tolerance, rtol=tolerance)
