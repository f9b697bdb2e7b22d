"""Next-token loss without the [rows, vocabulary] logits: a chunk of rows at a time, with its gradient at once.

M rows (batch x tokens), D width, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_LOGITS = 1 << 24  # logits alive at a time: 64 MiB of fp32
COMPILED_CHUNK_LOGITS = 1 << 26  # 128 MiB of bf16, 256 of fp32: compiled code turns them into their gradient in place


def chunked_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    group: dist.ProcessGroup | None = None,
    compiled: bool = False,
) -> Tensor:
    """Sum over rows of -log softmax(hidden weight^T)[target], in nats, fp32 scalar. Rows with target < 0 count nothing.

    Softmax is computed in fp32 from logits in the type of `hidden_MD`. The gradients are made in the forward pass, chunk by
    chunk, while the logits are at hand (as in Liger-Kernel, arXiv 2410.10989, section 3.2), so nothing is computed twice.
    `compiled`: with one compiled pass over each chunk's logits instead of one for each operation.

    With `group` (tensor parallel), `weight_VD` is this rank's equal share of the vocabulary, and rows and targets are the same
    on all ranks: so is the loss, and the gradient of `hidden_MD` is this rank's part of a sum over the ranks.
    """
    return _ChunkedCrossEntropy.apply(hidden_MD, weight_VD, targets_M, group, compiled)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        master_VD: Tensor,
        targets_M: Tensor,
        group: dist.ProcessGroup | None,
        compiled: bool,
    ) -> Tensor:
        weight_VD = master_VD.to(hidden_MD.dtype)
        rows, vocabulary = hidden_MD.shape[0], weight_VD.shape[0]
        compiled = compiled and group is None
        chunks = max(1, math.ceil(rows * vocabulary / (COMPILED_CHUNK_LOGITS if compiled else CHUNK_LOGITS)))
        chunk = math.ceil(rows / min(chunks, rows))  # of equal size, as far as can be
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_MD) if want_hidden else None
        grad_weight: Tensor | None = None
        total = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits = hidden_MD[part] @ weight_VD.T
            if compiled:
                loss, grad_logits = _to_gradient_in_place(logits, targets_M[part])
            else:
                loss, grad_logits = _to_gradient(logits, targets_M[part], group, want_hidden or want_weight)
            total += loss
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[part])
            if want_weight:
                product = grad_logits.T @ hidden_MD[part]
                if rows > chunk:  # summed in fp32 over the chunks: bf16 would lose the small ones
                    product = product.float() if grad_weight is None else grad_weight.add_(product)
                grad_weight = product
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = master_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight.to(ctx.weight_dtype, copy=True).mul_(grad),
            None,
            None,
            None,
        )


def _to_gradient(
    logits_MV: Tensor, targets_M: Tensor, group: dist.ProcessGroup | None, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The summed loss, and its gradient at the logits."""
    vocabulary = logits_MV.shape[1]
    first = group.rank() * vocabulary if group else 0  # of this rank's tokens of the vocabulary
    counted = targets_M >= 0
    targets = (targets_M - first).clamp(0, vocabulary - 1)[:, None]
    here = torch.ones_like(counted)  # whether the target's logit is on this rank
    logits = logits_MV.float()
    target_logit, log_sum = logits.gather(1, targets)[:, 0], logits.logsumexp(dim=-1)
    if group:
        here = (targets_M >= first) & (targets_M < first + vocabulary)
        log_sum, target_logit = _over_ranks(log_sum, torch.where(here, target_logit, 0.0), group)
    loss = torch.where(counted, log_sum - target_logit, 0.0).sum()
    if not want_gradient:
        return loss, logits_MV
    grad_logits = logits.sub_(log_sum[:, None]).exp_()
    grad_logits.scatter_add_(1, targets, -here[:, None].float())
    return loss, torch.where(counted[:, None], grad_logits, 0.0).to(logits_MV.dtype)


def _to_gradient_in_place(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """The same for compiled code: softmax in one kernel, in the logits' place, and the targets by themselves."""
    counted, at_target = targets_M >= 0, (torch.arange(len(targets_M), device=targets_M.device), targets_M.clamp(min=0))
    target_logit = logits_MV[at_target].float()
    log_sum = _compiled_softmax()(logits_MV, counted)
    gradient = (target_logit - log_sum).expm1()  # in fp32: of a probability near 1, bf16 has no digits for what is left
    logits_MV[at_target] = torch.where(counted, gradient, 0.0).to(logits_MV.dtype)
    return torch.where(counted, log_sum - target_logit, 0.0).sum(), logits_MV


def _softmax_in_place(logits_MV: Tensor, counted_M: Tensor) -> Tensor:
    """Turns logits into probabilities, into zeros in rows that are not counted. Returns the log of the sum of exponentials."""
    logits = logits_MV.float()
    highest = logits.amax(dim=-1, keepdim=True)
    log_sum = (logits - highest).exp().sum(dim=-1, keepdim=True).log() + highest
    logits_MV.copy_(torch.where(counted_M[:, None], (logits - log_sum).exp(), 0.0))
    return log_sum[:, 0]


@cache
def _compiled_softmax() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_softmax_in_place, dynamic=False)


def _over_ranks(log_sum_M: Tensor, target_logit_M: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Over the whole vocabulary: the log of the sum of exponentials, and the logit of the target, which one rank has."""
    highest = log_sum_M.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(log_sum_M - highest).exp_(), target_logit_M])
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]
