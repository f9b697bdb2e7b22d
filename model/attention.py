"""Causal attention behind one function: fused kernels that store no weights and compute no masked score.

B batch, T tokens, N heads, H head size.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# In order of preference. FLASH is FlashAttention on CUDA and the fused blockwise kernel on CPU. The unfused MATH backend
# is left out on purpose: it would materialise T x T weights without a word. Where no fused kernel fits, torch raises.
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def causal_attention(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H)) v over the tokens up to each one's own: [B, T, N, H]."""
    with sdpa_kernel(FUSED, set_priority=True):
        out_BNTH = scaled_dot_product_attention(
            q_BTNH.transpose(1, 2), k_BTNH.transpose(1, 2), v_BTNH.transpose(1, 2), is_causal=True
        )
    return out_BNTH.transpose(1, 2)


def reference_attention(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """The same by the book, in fp32, weights and all: what the fused kernels are tested against."""
    q, k, v = (x.transpose(1, 2).float() for x in (q_BTNH, k_BTNH, v_BTNH))
    scores_BNTT = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    tokens = q.shape[-2]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    weights = scores_BNTT.masked_fill(future, -math.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).to(q_BTNH.dtype)
