"""Activations that the backward pass computes again, to hold fewer of them: none, selective (the paper's), full."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def recomputing(compute: Callable[..., Tensor], *args: Tensor, keep_products: int | None = None) -> Tensor:
    """`compute(*args)`, of which the backward pass computes again what was not kept: all of it, or with `keep_products` all but
    attention and the outputs of its first matrix products (arXiv 2302.13971, section 2.4: "outputs of linear layers").

    The last product is not to be kept: the backward pass needs its inputs only, and stops computing again when it has them.
    """
    # Without a context_fn where nothing is kept: torch.compile does not take torch's own default for it.
    kept: dict[str, Any] = {} if keep_products is None else {"context_fn": partial(_keeping, keep_products)}
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kept)


def _keeping(keep_products: int) -> Any:
    seen = {False: 0, True: 0}  # matrix products so far, in the forward pass and when computed again

    def policy(context: Any, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        keep = op in _ATTENTION
        if op is _aten.mm.default:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] <= keep_products
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
