"""What a model costs: parameters, FLOPs and the hardware's limits. Pure: no torch."""

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(kw_only=True)
class GpuConfig:
    """One accelerator (or a CPU that stands in for one). Sources of the numbers: docs/numbers.md."""

    name: str
    device: str  # cuda | cpu
    peak_bf16_tflops: float  # dense, as the vendor states it: what MFU is measured against
    memory_gb: float  # 1e9 bytes
    memory_gb_per_s: float  # HBM bandwidth
    intra_node_gb_per_s: float  # per GPU, one direction (NVLink, Infinity Fabric)
    inter_node_gb_per_s: float  # per GPU, one direction
    watts: float  # board power limit
    # Calibration of the forecast; null: nothing was measured, so nothing is forecast.
    matmul_fraction: float | None = None  # of the peak, that a matrix product without any edge reaches for hours
    attention_fraction: float | None = None  # of the peak, that causal flash attention reaches forward
    cores: int | None = None  # streaming multiprocessors or compute units: a matrix product runs in waves of them
    usd_per_hour: list[float] | None = None  # of one GPU, rented: low, central, high

    def problems(self) -> list[str]:
        found = []
        for name in (
            "peak_bf16_tflops",
            "memory_gb",
            "memory_gb_per_s",
            "intra_node_gb_per_s",
            "inter_node_gb_per_s",
            "watts",
        ):
            if getattr(self, name) <= 0:
                found.append(f"gpu.{name}={getattr(self, name)} must be above 0")
        for name in ("matmul_fraction", "attention_fraction"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                found.append(f"gpu.{name}={value} is a part of gpu.peak_bf16_tflops: above 0, at most 1, or null")
        if self.cores is not None and self.cores < 1:
            found.append(f"gpu.cores={self.cores} must be at least 1, or null")
        usd = self.usd_per_hour
        if usd is not None and (len(usd) != 3 or sorted(usd) != list(usd) or usd[0] < 0):
            found.append(f"gpu.usd_per_hour={list(usd)} must be three numbers from 0 up, [low,central,high], or null")
        return found


def parameter_count(model: ModelConfig) -> int:
    """All parameters: embedding and untied output, and per layer 2 dim^2 + 2 dim kv_dim + 3 dim ffn_dim + 2 dim; a final norm."""
    per_layer = 2 * model.dim * (model.dim + model.kv_dim) + 3 * model.dim * model.ffn_dim + 2 * model.dim
    return 2 * model.vocab_size * model.dim + model.n_layers * per_layer + model.dim


def flops_per_token(model: ModelConfig) -> float:
    """Model FLOPs of one training token, forward and backward.

    6 per parameter that multiplies (the embedding is a look-up) plus causal attention: QK^T and AV each cost
    2 T dim per token and layer, half of it masked, and three times that with the backward pass
    (PaLM, arXiv 2204.02311, appendix B, with the masked half not counted, since it is not computed).
    """
    multiplying = parameter_count(model) - model.vocab_size * model.dim
    attention = 6 * model.n_layers * model.sequence_length * model.dim
    return 6.0 * multiplying + attention
