"""Sizes and optimization of a LLaMA (arXiv 2302.13971, section 2), as Hydra reads them. Pure: no torch.

Config dataclasses are not frozen: OmegaConf writes them. `problems()` lists what cannot be, each with the way out.
"""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm before each sublayer, SwiGLU, rotary embeddings, no biases, untied output."""

    name: str
    dim: int  # width of the residual stream
    n_layers: int
    n_heads: int  # head size is dim / n_heads
    ffn_dim: int  # SwiGLU hidden width; the paper's 2/3 * 4 * dim rounded up to a multiple of 256
    vocab_size: int
    sequence_length: int  # tokens in a row
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    n_kv_heads: int | None = None  # of keys and values, each for a group of queries (2305.13245); null: n_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_dim(self) -> int:
        """Width of the keys, and of the values."""
        return self.head_dim * (self.n_kv_heads or self.n_heads)

    def problems(self) -> list[str]:
        """What cannot be, one message each, naming the field, both numbers and the way out."""
        found = []
        for name in ("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", "sequence_length"):
            if getattr(self, name) < 1:
                found.append(f"model.{name}={getattr(self, name)} must be at least 1")
        if found:
            return found
        if self.dim % self.n_heads:
            divisors = [n for n in range(1, self.dim + 1) if self.dim % n == 0 and (self.dim // n) % 2 == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.n_heads), default=1)
            found.append(
                f"model.dim={self.dim} does not divide into model.n_heads={self.n_heads}: set model.n_heads={nearest}"
            )
        elif self.head_dim % 2:
            found.append(
                f"model.dim={self.dim} over model.n_heads={self.n_heads} gives heads of {self.head_dim}, and rotary "
                f"embeddings turn pairs: choose an even head size"
            )
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
            found.append(
                f"model.n_heads={self.n_heads} does not divide into model.n_kv_heads={self.n_kv_heads} groups: "
                f"choose a divisor of {self.n_heads}"
            )
        if self.norm_eps <= 0:
            found.append(f"model.norm_eps={self.norm_eps} must be above 0 (the paper's models use 1e-6 or 1e-5)")
        return found


def swiglu_ffn_dim(dim: int, multiple_of: int = 256) -> int:
    """The paper's feed-forward width: 2/3 of 4 `dim`, rounded up to `multiple_of` (arXiv 2302.13971, section 2.2)."""
    two_thirds = int(2 * (4 * dim) / 3)
    return multiple_of * ((two_thirds + multiple_of - 1) // multiple_of)


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with warm-up and cosine decay (arXiv 2302.13971, section 2.3)."""

    name: str
    lr: float  # peak learning rate
    min_lr_ratio: float = 0.1  # the cosine ends at this share of the peak
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float = 1.0  # global norm
    batch_sequences: int = 2048  # rows in one optimizer step, over all ranks

    def problems(self) -> list[str]:
        found = []
        if self.lr <= 0:
            found.append(f"optim.lr={self.lr} must be above 0 (the paper: 3e-4 for 7B and 13B, 1.5e-4 for 33B and 65B)")
        if not 0 <= self.min_lr_ratio <= 1:
            found.append(f"optim.min_lr_ratio={self.min_lr_ratio} must be from 0 to 1 (the paper: 0.1)")
        if self.warmup_steps < 0:
            found.append(f"optim.warmup_steps={self.warmup_steps} must be 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optim.{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.weight_decay < 0:
            found.append(f"optim.weight_decay={self.weight_decay} must be 0 or more")
        if self.grad_clip <= 0:
            found.append(f"optim.grad_clip={self.grad_clip} must be above 0 (the paper: 1.0)")
        if self.batch_sequences < 1:
            found.append(f"optim.batch_sequences={self.batch_sequences} must be at least 1")
        return found


@dataclass(kw_only=True)
class ProfileConfig:
    """Which steps torch.profiler traces (model/profile.py)."""

    name: str
    first_step: int | None = None  # null: none
    steps: int = 3
    ranks: list[int] = field(default_factory=lambda: [0])  # each writes a file

    def problems(self, steps: int, ranks: int) -> list[str]:
        """In a run of `steps` steps on `ranks` ranks."""
        found = []
        if self.first_step is not None and not 1 <= self.first_step <= steps:
            found.append(
                f"profile.first_step={self.first_step} is no step of steps={steps}: choose 1 to {steps}, or null"
            )
        if self.steps < 1:
            found.append(f"profile.steps={self.steps} must be at least 1")
        for rank in self.ranks:
            if not 0 <= rank < ranks:
                found.append(
                    f"profile.ranks has {rank}, and this run has {ranks} rank(s): choose from 0 to {ranks - 1}"
                )
        return found
