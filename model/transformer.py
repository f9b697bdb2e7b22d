"""LLaMA (arXiv 2302.13971, section 2.2) in one reading: RMSNorm before each sublayer, SwiGLU, rotary embeddings, no biases.

B batch, T tokens, D width (dim), N heads, H head size, F feed-forward width, V vocabulary.
Parameters are fp32 masters; each matrix is cast to the activations' type where it is used, so that bf16 training needs no
autocast and FSDP2 (which hands in bf16 parameters already) computes the same.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.nn import functional as F

from model.attention import ContextParallel, causal_attention
from model.config import ModelConfig
from model.cpu_attention import block_attention
from model.loss import chunked_cross_entropy
from model.recompute import recomputing
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
        self.wk = Linear(config.dim, config.kv_dim)
        self.wv = Linear(config.dim, config.kv_dim)
        self.wo = Linear(config.dim, config.dim)
        self.context: ContextParallel | None = None  # where ranks share a row's tokens
        self.in_blocks = False  # compiled for a CPU (model/cpu_attention.py)

    def forward(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        if self.context:
            rope = rope[:, self.context.positions(x_BTD.shape[1] * self.context.size)]
        heads = (*x_BTD.shape[:2], -1, self.head_dim)  # -1: a tensor parallel rank holds a share of the heads
        q_BTNH = apply_rope(self.wq(x_BTD).view(heads), rope)
        k_BTNH = apply_rope(self.wk(x_BTD).view(heads), rope)
        v_BTNH = self.wv(x_BTD).view(heads)
        if self.in_blocks and torch.is_grad_enabled() and self.context is None:
            return self.wo(block_attention(q_BTNH, k_BTNH, v_BTNH).flatten(2))
        return self.wo(causal_attention(q_BTNH, k_BTNH, v_BTNH, self.context).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.w3 = Linear(config.dim, config.ffn_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, recompute: str = "none") -> None:
        """`recompute`: what the backward pass computes again: none | selective | full (model/recompute.py)."""
        super().__init__()
        self.recompute = recompute
        self.compiled: Callable[[Block, Tensor, Tensor], Tensor] | None = None  # train_pass, where it pays
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # rows of any length are evaluated and sampled: never compiled
            return self.compute(x_BTD, rope)
        return self.compiled(self, x_BTD, rope) if self.compiled else self.train_pass(x_BTD, rope)

    def train_pass(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        if self.recompute == "full":
            return recomputing(self.compute, x_BTD, rope)
        if self.recompute == "selective":
            x_BTD = x_BTD + recomputing(self.attend, x_BTD, rope, keep_products=3)
            return x_BTD + recomputing(self.feed, x_BTD, keep_products=2)
        return self.compute(x_BTD, rope)

    def compute(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attend(x_BTD, rope)
        return x_BTD + self.feed(x_BTD)

    def attend(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        return self.attention(self.attention_norm(x_BTD), rope)

    def feed(self, x_BTD: Tensor) -> Tensor:
        return self.ffn(self.ffn_norm(x_BTD))


class Transformer(nn.Module):
    """The model, or a stage of a pipeline: `layers` of it. The first embeds, the last has norm and output; parameters keep
    their names. Where ranks share rows (model/parallel.py), each has some tokens of the residual stream: [B, T / row_shares, D].
    """

    rope: Tensor

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        recompute: str = "none",
        layers: range | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        layers = range(config.n_layers) if layers is None else layers
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.n_layers
        self.context: ContextParallel | None = None
        self.row_shares = 1  # ranks that share a row's tokens
        self.row_multiple = 1  # the tokens of a row divide by it
        self.compiled = False
        if self.is_first:
            self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): Block(config, recompute) for i in layers})
        if self.is_last:
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.output = Linear(config.dim, config.vocab_size)
        self.register_buffer("rope", torch.empty(2, config.sequence_length, config.head_dim // 2), persistent=False)

    def compile_training(self) -> None:
        """Compiles what training computes in layers and loss: one layer's code serves them all."""
        compiled = torch.compile(Block.train_pass, dynamic=False)
        for layer in self.layers.values():
            assert isinstance(layer, Block)
            layer.compiled = compiled
            # What is recomputed selectively keeps attention's output, and knows it by torch's kernel.
            layer.attention.in_blocks = self.rope.device.type == "cpu" and layer.recompute == "none"
        self.compiled = True

    def share_rows(self, context: ContextParallel | None, tp: int) -> None:
        """Says which ranks have the other tokens of this one's rows: context parallel, and `tp` tensor parallel ones."""
        self.context = context
        for module in self.modules():
            if isinstance(module, Attention):
                module.context = context
        self.row_shares = tp * (context.size if context else 1)
        self.row_multiple = self.row_shares * (2 if context else 1)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; with `targets_BT`, the summed next-token loss in nats (scalar, fp32) without all logits at once.

        Targets below 0 are not counted. A later stage takes hidden states for tokens; all but the last return them.
        Context parallel ranks return the loss of their tokens; tensor parallel ranks all return the whole.
        """
        x_BTD = tokens_BT
        if self.is_first:
            tokens_BT = self.context.take(tokens_BT) if self.context else tokens_BT
            x_BTD = self.embedding(tokens_BT).to(self.compute_dtype)
        for layer in self.layers.values():
            x_BTD = layer(x_BTD, self.rope)
        if not self.is_last:
            return x_BTD
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            logits = self.output(x_BTD)
            return self.context.gather(logits) if self.context else logits
        targets_BT = self.context.take(targets_BT) if self.context else targets_BT
        weight_VD, group = self.output.weight, None
        if isinstance(weight_VD, DTensor):  # tensor parallel: each rank has some of the vocabulary, and all tokens here
            group = weight_VD.device_mesh.get_group()
            weight_VD = weight_VD.to_local()
            x_BTD = x_BTD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        compiled = self.compiled and torch.is_grad_enabled()
        return chunked_cross_entropy(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), group, compiled)

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
            name = name.replace("_orig_mod.", "")
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
