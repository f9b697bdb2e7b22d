"""AdamW with decay on matrices only, the schedule, and clipping by the global norm (arXiv 2302.13971, section 2.3)."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW on CPU and CUDA, with its state. Norms are vectors: they are not decayed.

    The moments are made here, not in the first step as AdamW would: a checkpoint finds them before any step, and in memory they
    do not lie among activations that come and go.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of 1-based `step`: linear warm-up to `lr`, then a cosine to `min_lr_ratio * lr` at the last of `steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def global_grad_norm(parameters: Iterable[nn.Parameter], stages: dist.ProcessGroup | None = None) -> Tensor:
    """The 2-norm of all gradients over all ranks, before clipping: a scalar tensor, the same on every rank. DTensors know the
    ranks that share them; `stages` are the ranks of a pipeline, whose parameters are others."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if stages is not None:
        square = norm.square()
        dist.all_reduce(square, group=stages)
        norm = square.sqrt()
    return norm


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scales all gradients by max_norm / norm where norm is above it."""
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def clipped_step(optimizer: torch.optim.Optimizer, max_norm: float, norm: Tensor) -> None:
    """Clips and makes one step. Fused AdamW scales gradients as it reads them, so clipping costs no pass over memory of its
    own; it takes no scale for DTensors, whose gradients are scaled first.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(isinstance(p, DTensor) for p in parameters):
        clip_gradients(parameters, max_norm, norm)
    else:
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.step()
