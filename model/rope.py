"""Rotary position embeddings (RoFormer, arXiv 2104.09864), in every layer of LLaMA.

Pairs are (i, i + H/2), as in the Hugging Face weights, so that weights go in and out without a permutation.
"""

import torch
from torch import Tensor


def rope_table(sequence_length: int, head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Cosines and sines of every position, fp32: [2, T, H/2] for T positions and head size H."""
    inverse_frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle_TF = torch.outer(torch.arange(sequence_length, device=device, dtype=torch.float32), inverse_frequency)
    return torch.stack([angle_TF.cos(), angle_TF.sin()])


def apply_rope(x_BTNH: Tensor, table: Tensor) -> Tensor:
    """Turns each pair of `x_BTNH` (batch, tokens, heads, head size) by its position's angle; computed in fp32."""
    cos_T1F, sin_T1F = table[:, : x_BTNH.shape[1], None, :]
    first, second = x_BTNH.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos_T1F - second * sin_T1F, second * cos_T1F + first * sin_T1F], dim=-1)
    return turned.to(x_BTNH.dtype)
