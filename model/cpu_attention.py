"""Causal attention on a CPU as matrix products over blocks of queries: [B * N, block, keys] of scores at a time, never all T x T.

torch's fused CPU kernel computes its small products at a sixth of the rate of a batched matrix product in bf16, and was a fifth
of a step. Here each block sees the keys up to its end, softmax is compiled into one pass, and the backward pass computes the
weights again from the log of their sum (FlashAttention-2, arXiv 2307.08691, algorithm 2). For torch.compile only.

B batch, N heads, T tokens, H head size; G = B * N.
"""

import math
from typing import Any

import torch
from torch import Tensor

from model.attention import repeat_heads

BLOCK = 128  # queries (backward: keys) at a time, at least: their scores stay in the cache
BLOCKS = 8  # and at most so many blocks: each is compiled by itself


def block_attention(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H)) v over the tokens up to each one's own: [B, T, N, H]. Softmax in fp32, products in q's type.

    Fewer heads of keys and values (model/attention.py) are repeated, and kept so for the backward pass.
    """
    batch, tokens, heads, size = q_BTNH.shape
    whole = (repeat_heads(x, heads // x.shape[2]) for x in (q_BTNH, k_BTNH, v_BTNH))
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, tokens, size) for x in whole)
    out: Tensor = _BlockAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out.view(batch, heads, tokens, size).transpose(1, 2)


def _starts(tokens: int) -> tuple[range, int]:
    block = max(BLOCK, math.ceil(tokens / BLOCKS))
    return range(0, tokens, block), block


def _up_to(end: int) -> Tensor:
    return torch.arange(end, dtype=torch.int32)  # int64 takes 10 to 20% longer over all but the products


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_GTH: Tensor, k_GTH: Tensor, v_GTH: Tensor) -> Tensor:
        outs, sums = [], []
        starts, block = _starts(q_GTH.shape[1])
        for start in starts:
            end = min(start + block, q_GTH.shape[1])
            # A turned part of a tensor would be copied by torch's product, for as long as the product itself takes: parts whole.
            k_GHT = k_GTH[:, :end].contiguous().transpose(1, 2)
            scores = torch.bmm(q_GTH[:, start:end], k_GHT).float() / math.sqrt(q_GTH.shape[-1])
            seen = _up_to(end)[None, :] <= _up_to(end)[start:, None]
            scores = torch.where(seen, scores, -math.inf)
            highest = scores.amax(dim=-1, keepdim=True)
            weights = (scores - highest).exp()
            total = weights.sum(dim=-1, keepdim=True)
            outs.append(torch.bmm((weights / total).to(q_GTH.dtype), v_GTH[:, :end]))
            sums.append(total.log() + highest)
        out, log_sum = torch.cat(outs, dim=1), torch.cat(sums, dim=1)
        ctx.save_for_backward(q_GTH, k_GTH, v_GTH, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad_GTH,) = grads
        q_GTH, k_GTH, v_GTH, out, log_sum = ctx.saved_tensors
        tokens, dtype, scale = q_GTH.shape[1], q_GTH.dtype, 1 / math.sqrt(q_GTH.shape[-1])
        delta = (grad_GTH.float() * out.float()).sum(dim=-1, keepdim=True).transpose(1, 2)
        log_sum = log_sum.transpose(1, 2)
        grad_q = grad_GTH[:, tokens:].float()  # of no queries yet, and of a block more in each turn
        grads_k, grads_v = [], []
        starts, block = _starts(tokens)
        for start in reversed(starts):  # of keys, which the queries from there on see
            part = slice(start, min(start + block, tokens))
            q, k, v, grad = (
                x.contiguous() for x in (q_GTH[:, start:], k_GTH[:, part], v_GTH[:, part], grad_GTH[:, start:])
            )
            # Keys by queries, as two of three products want them; and torch.compile would know the forward pass's scores
            # again and keep them for this one.
            scores_GKI = torch.bmm(k, q.transpose(1, 2)).float() * scale
            keys, queries = scores_GKI.shape[1:]
            seen = _up_to(keys)[:, None] <= _up_to(queries)[None, :]
            weights = torch.where(seen, (scores_GKI - log_sum[:, :, start:]).exp(), 0.0)
            grad_weights = torch.bmm(v, grad.transpose(1, 2)).float()
            grad_scores = (weights * (grad_weights - delta[:, :, start:]) * scale).to(dtype)
            grads_k.append(torch.bmm(grad_scores, q))
            grads_v.append(torch.bmm(weights.to(dtype), grad))
            more = torch.bmm(grad_scores.transpose(1, 2), k).float()
            grad_q = torch.cat([more[:, :keys], more[:, keys:] + grad_q], dim=1)
        return grad_q.to(dtype), torch.cat(grads_k[::-1], dim=1), torch.cat(grads_v[::-1], dim=1)
