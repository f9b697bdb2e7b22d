"""Next-token loss without the [rows, vocabulary] logits: a chunk of rows at a time, with its gradient at once.

M rows (batch x tokens), D width, V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_LOGITS = 1 << 24  # logits alive at a time: 64 MiB of fp32


def chunked_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum over rows of -log softmax(hidden weight^T)[target], in nats, fp32 scalar. Rows with target < 0 count nothing.

    Softmax is computed in fp32 from logits in the type of `hidden_MD`. The gradients are made in the forward pass, chunk by
    chunk, while the logits are at hand (as in Liger-Kernel, arXiv 2410.10989, section 3.2), so nothing is computed twice.

    With `group` (tensor parallel), `weight_VD` is this rank's equal share of the vocabulary, and rows and targets are the same
    on all ranks: so is the loss, and the gradient of `hidden_MD` is this rank's part of a sum over the ranks.
    """
    return _ChunkedCrossEntropy.apply(hidden_MD, weight_VD, targets_M, group)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        rows, vocabulary = hidden_MD.shape[0], weight_VD.shape[0]
        first = group.rank() * vocabulary if group else 0  # of this rank's tokens of the vocabulary
        chunk = max(1, CHUNK_LOGITS // vocabulary)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_MD) if want_hidden else None
        # Summed in fp32 over the chunks: bf16 would lose the small ones.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if want_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits = (hidden_MD[part] @ weight_VD.T).float()
            counted = targets_M[part] >= 0
            targets = (targets_M[part] - first).clamp(0, vocabulary - 1)[:, None]
            here = torch.ones_like(counted)  # whether the target's logit is on this rank
            target_logit, log_sum = logits.gather(1, targets)[:, 0], logits.logsumexp(dim=-1)
            if group:
                here = (targets_M[part] >= first) & (targets_M[part] < first + vocabulary)
                log_sum, target_logit = _over_ranks(log_sum, torch.where(here, target_logit, 0.0), group)
            loss = log_sum - target_logit
            total += torch.where(counted, loss, 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = logits.sub_(log_sum[:, None]).exp_()
            grad_logits.scatter_add_(1, targets, -here[:, None].float())
            grad_logits = torch.where(counted[:, None], grad_logits, 0.0).to(hidden_MD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden_MD[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def _over_ranks(log_sum_M: Tensor, target_logit_M: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Over the whole vocabulary: the log of the sum of exponentials, and the logit of the target, which one rank has."""
    highest = log_sum_M.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(log_sum_M - highest).exp_(), target_logit_M])
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]
