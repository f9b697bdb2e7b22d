"""Causal attention behind one function: fused kernels that store no weights and compute no masked score.

B batch, T tokens, N heads, H head size. Keys and values may have fewer heads, of which each serves N / fewer queries next to each
other (arXiv 2305.13245).
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_single
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

# In order of preference. FLASH is FlashAttention on CUDA and the fused blockwise kernel on CPU. The unfused MATH backend
# is left out on purpose: it would materialise T x T weights without a word. Where no fused kernel fits, torch raises.
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


class ContextParallel:
    """Ranks that share each row's tokens. A row is cut into 2 `size` chunks; rank r holds chunks r and 2 size - 1 - r, so that
    all have as many keys to look at. Keys and values are gathered, queries stay (Llama 3, arXiv 2407.21783, section 3.3.2).
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    @property
    def chunks(self) -> tuple[int, int]:
        return self.rank, 2 * self.size - 1 - self.rank

    def positions(self, tokens: int) -> Tensor:
        """Where this rank's tokens stand in a row of `tokens`: [tokens / size]."""
        assert tokens % (2 * self.size) == 0
        return torch.arange(tokens).view(2 * self.size, -1)[list(self.chunks)].flatten()

    def take(self, x_BT: Tensor) -> Tensor:
        """This rank's tokens of whole rows."""
        return x_BT[:, self.positions(x_BT.shape[1])]

    def gather(self, x_BT: Tensor) -> Tensor:
        """Whole rows, in order, from every rank's tokens (dimension 1). The gradient is summed over the ranks."""
        parts = all_gather_single(x_BT.contiguous(), 0, self.group).chunk(self.size)
        firsts, seconds = zip(*(p.chunk(2, dim=1) for p in parts), strict=True)
        return torch.cat([*firsts, *reversed(seconds)], dim=1)


def causal_attention(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, context: ContextParallel | None = None) -> Tensor:
    """softmax(q k^T / sqrt(H)) v over the tokens up to each one's own: [B, T, N, H]; with `context`, of this rank's tokens."""
    if context is None:
        return _attend(q_BTNH, k_BTNH, v_BTNH)
    keys, values = context.gather(torch.cat([k_BTNH, v_BTNH], dim=-1)).chunk(2, dim=-1)
    length = q_BTNH.shape[1] // 2
    outs = []
    for chunk, q in zip(context.chunks, q_BTNH.chunk(2, dim=1), strict=True):
        end = (chunk + 1) * length
        outs.append(_attend(q, keys[:, :end], values[:, :end]))
    return torch.cat(outs, dim=1)


def repeat_heads(x_BTNH: Tensor, groups: int) -> Tensor:
    """Each head `groups` times, next to each other; where that is once, the tensor itself."""
    return x_BTNH if groups == 1 else x_BTNH.repeat_interleave(groups, 2)


def _attend(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """Causal, where the last query stands at the last key."""
    queries, keys, groups = q_BTNH.shape[1], k_BTNH.shape[1], q_BTNH.shape[2] // k_BTNH.shape[2]
    if groups > 1 and q_BTNH.is_cuda and q_BTNH.dtype == torch.float32:
        # The one kernel that takes fp32 knows no groups.
        k_BTNH, v_BTNH, groups = repeat_heads(k_BTNH, groups), repeat_heads(v_BTNH, groups), 1
    with sdpa_kernel(FUSED, set_priority=True):
        out_BNTH = scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            k_BTNH.transpose(1, 2),
            v_BTNH.transpose(1, 2),
            attn_mask=None if queries == keys else causal_lower_right(queries, keys),
            is_causal=queries == keys,
            enable_gqa=groups > 1,
        )
    return out_BNTH.transpose(1, 2)


def reference_attention(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """The same by the book, in fp32, weights and all: what the fused kernels are tested against."""
    groups = q_BTNH.shape[2] // k_BTNH.shape[2]
    whole = (q_BTNH, repeat_heads(k_BTNH, groups), repeat_heads(v_BTNH, groups))
    q, k, v = (x.transpose(1, 2).float() for x in whole)
    scores_BNTT = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    tokens = q.shape[-2]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    weights = scores_BNTT.masked_fill(future, -math.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).to(q_BTNH.dtype)
