"""LLaMA (arXiv 2302.13971, section 2.2) in one reading: RMSNorm before each sublayer, SwiGLU, rotary embeddings, no biases.

B batch, T tokens, D width (dim), N heads, H head size, F feed-forward width, V vocabulary.
Parameters are fp32 masters; each matrix is cast to the activations' type where it is used, so that bf16 training needs no
autocast and FSDP2 (which hands in bf16 parameters already) computes the same.
"""

import hashlib
import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from model.attention import causal_attention
from model.config import ModelConfig
from model.rope import apply_rope, rope_table


class Linear(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = Linear(config.dim, config.dim)
        self.wk = Linear(config.dim, config.dim)
        self.wv = Linear(config.dim, config.dim)
        self.wo = Linear(config.dim, config.dim)

    def forward(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)  # -1: a tensor parallel rank holds a share of the heads
        q_BTNH = apply_rope(self.wq(x_BTD).view(heads), rope)
        k_BTNH = apply_rope(self.wk(x_BTD).view(heads), rope)
        v_BTNH = self.wv(x_BTD).view(heads)
        return self.wo(causal_attention(q_BTNH, k_BTNH, v_BTNH).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.w3 = Linear(config.dim, config.ffn_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


_aten = torch.ops.aten
_EXPENSIVE = frozenset(  # what the paper keeps (section 2.4): outputs of linear layers, and of attention
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def _keep_expensive(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    def __init__(self, config: ModelConfig, recompute: str = "none") -> None:
        """`recompute`: what the backward pass computes again: none; selective (all but `_EXPENSIVE`); full (the block)."""
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(x_BTD, rope)
        selective = partial(create_selective_checkpoint_contexts, _keep_expensive)
        context_fn = selective if self.recompute == "selective" else noop_context_fn
        return checkpoint(
            self.compute, x_BTD, rope, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn
        )

    def compute(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Transformer(nn.Module):
    rope: Tensor

    """Tokens [B, T] to the last hidden states [B, T, D], normed; `output` makes them logits (model/loss.py does, in chunks)."""

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32, recompute: str = "none"
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, recompute) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self.register_buffer("rope", torch.empty(2, config.sequence_length, config.head_dim // 2), persistent=False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; with `targets_BT`, the summed next-token loss in nats (scalar, fp32) without all logits at once.

        Targets below 0 are not counted.
        """
        from model.loss import chunked_cross_entropy

        x_BTD = self.embedding(tokens_BT).to(self.compute_dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, self.rope)
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return self.output(x_BTD)
        return chunked_cross_entropy(x_BTD.flatten(0, 1), self.output.weight.to(x_BTD.dtype), targets_BT.flatten())

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fills parameters: normal with std 0.02, and 0.02 / sqrt(2 layers) where a sublayer writes to the residual stream
        (GPT-2's scheme; the paper states none). Each parameter has a generator of its own, keyed by seed and name, so that
        the values do not depend on the world size or on how parameters are sharded.
        """
        self.rope.copy_(
            rope_table(self.config.sequence_length, self.config.head_dim, self.config.rope_theta, self.rope.device)
        )
        for name, parameter in self.named_parameters():
            name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            std = 0.02
            if name.endswith(("wo.weight", "w2.weight")):
                std /= math.sqrt(2 * self.config.n_layers)
            key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest())
            generator = torch.Generator(parameter.device).manual_seed(key)
            full = torch.empty(parameter.shape, device=parameter.device).normal_(0.0, std, generator=generator)
            if isinstance(parameter, DTensor):
                # Every rank has made the same full tensor: each keeps its part, nothing is sent.
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(full)
