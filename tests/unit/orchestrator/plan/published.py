"""Tables that others have published, to hold a forecast against. Layouts as published; where a table leaves one out
(microbatches and virtual stages of 2104.04473), ours: the largest microbatch of 4, 2, 1 rows that suits the depth."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from model.config import ModelConfig
from model.cost import GpuConfig
from model.layout import Layout
from orchestrator.plan.config import PlanConfig
from orchestrator.plan.step import forecast_step

GPUS = Path(__file__).resolve().parents[4] / "hydra_conf" / "gpu"


@dataclass(frozen=True)
class Row:
    source: str
    label: str
    figure: str  # of Step
    published: float
    model: ModelConfig
    layout: Layout
    batch_sequences: int
    plan: PlanConfig
    gpu: str = "a100_80gb"

    @property
    def forecast(self) -> float:
        gpu = GpuConfig(**yaml.safe_load((GPUS / f"{self.gpu}.yaml").read_text()))
        step = forecast_step(self.model, gpu, 8, self.layout, self.batch_sequences, self.plan)
        return float(getattr(step, self.figure))

    @property
    def error(self) -> float:
        return self.forecast / self.published - 1


def gpt(dim: int, layers: int, heads: int, vocab: int = 51200) -> ModelConfig:
    """GPT's two matrices of 4 dim have the parameters and FLOPs of SwiGLU's three of 8/3 dim."""
    return llama(dim, layers, heads, 8 * dim // 3, vocab)


def llama(
    dim: int, layers: int, heads: int, ffn: int, vocab: int, tokens: int = 2048, kv: int | None = None
) -> ModelConfig:
    return ModelConfig(
        name="x", dim=dim, n_layers=layers, n_heads=heads, ffn_dim=ffn, vocab_size=vocab, sequence_length=tokens,
        n_kv_heads=kv,
    )  # fmt: skip


def laid(virtual: int = 1, **degrees: int | str) -> Layout:
    schedule = "interleaved_1f1b" if virtual > 1 else "1f1b"
    return Layout(name="x", virtual_stages=virtual, pipeline_schedule=schedule, **degrees)  # type: ignore[arg-type]


MEGATRON_2021 = PlanConfig(name="2021", attention="unfused", sequence_parallel=False, gradient_bytes=2)
MEGATRON_2022 = PlanConfig(name="2022", attention="unfused", gradient_bytes=2)
NOW = PlanConfig(name="now")


def megatron() -> list[Row]:
    """arXiv 2104.04473, table 1: TFLOP/s a GPU, recomputation counted; interleaved pipelines."""
    rows = []
    for size, dim, layers, heads, tp, pp, gpus, batch, published in (
        ("1.7B", 2304, 24, 24, 1, 1, 32, 512, 137), ("3.6B", 3072, 30, 32, 2, 1, 64, 512, 138),
        ("7.5B", 4096, 36, 32, 4, 1, 128, 512, 142), ("18.4B", 6144, 40, 48, 8, 1, 256, 1024, 135),
        ("39.1B", 8192, 48, 64, 8, 2, 512, 1536, 138), ("76.1B", 10240, 60, 80, 8, 4, 1024, 1792, 140),
        ("145.6B", 12288, 80, 96, 8, 8, 1536, 2304, 148), ("310.1B", 16384, 96, 128, 8, 16, 1920, 2160, 155),
        ("529.6B", 20480, 105, 128, 8, 35, 2520, 2520, 163), ("1008B", 25600, 128, 160, 8, 64, 3072, 3072, 163),
    ):  # fmt: skip
        dp = gpus // (tp * pp)
        virtual = next((v for v in (2, 3) if pp > 1 and layers % (pp * v) == 0), 1)
        rows_at_once = next(m for m in ((4, 2, 1) if pp == 1 else (2, 1) if pp <= 4 else (1,)) if batch % (dp * m) == 0)
        layout = laid(virtual, tp=tp, pp=pp, dp_replicate=dp, microbatch_sequences=rows_at_once, recompute="full")
        rows.append(
            Row("2104.04473", size, "hardware_tflops_per_gpu", published, gpt(dim, layers, heads), layout, batch,
                MEGATRON_2021)
        )  # fmt: skip
    return rows


def selective() -> list[Row]:
    """arXiv 2205.05198, table 5: seconds a step, full recomputation, and selective with sequence parallelism."""
    rows = []
    for size, dim, layers, heads, pp, virtual, batch, at_once, full_s, selective_s in (
        ("22B", 6144, 48, 64, 1, 1, 4, 4, 1.42, 1.10), ("175B", 12288, 96, 96, 8, 3, 64, 1, 18.13, 13.75),
        ("530B", 20480, 105, 128, 35, 3, 280, 1, 49.05, 37.83), ("1T", 25600, 128, 160, 64, 1, 512, 1, 94.42, 71.49),
    ):  # fmt: skip
        for recompute, plan, published in (("full", MEGATRON_2021, full_s), ("selective", MEGATRON_2022, selective_s)):
            layout = laid(virtual, tp=8, pp=pp, microbatch_sequences=at_once, recompute=recompute)
            model = gpt(dim, layers, heads)
            rows.append(Row("2205.05198", f"{size} {recompute}", "step_s", published, model, layout, batch, plan))
    return rows


def llama3() -> list[Row]:
    """arXiv 2407.21783, table 4: model TFLOP/s a GPU of 405B on H100; groups of layers: one a stage, as it says."""
    return [
        Row(
            "2407.21783", f"405B, {gpus:,} GPUs, cp {cp}", "model_tflops_per_gpu", published,
            llama(16384, 126, 128, 53248, 128256, tokens, 8), laid(7, tp=8, pp=16, cp=cp, dp_shard=dp),
            batch, NOW, "h100",
        )
        for gpus, cp, dp, batch, tokens, published in (
            (8192, 1, 64, 2048, 8192, 430), (16384, 1, 128, 2048, 8192, 400), (16384, 16, 8, 128, 131072, 380),
        )
    ]  # fmt: skip


def mpt() -> list[Row]:
    """llm-foundry's benchmark table, H100 and bf16: tokens/s a GPU, FSDP alone."""
    return [
        Row(
            "llm-foundry", f"MPT {size}, {gpus} GPUs", "tokens_per_s_per_gpu", published,
            gpt(dim, layers, heads, 50432),
            laid(dp_shard=gpus, microbatch_sequences=at_once, recompute="full" if full else "none"), batch, NOW, "h100",
        )
        for size, dim, layers, heads, gpus, at_once, batch, full, published in (
            ("7B", 4096, 32, 32, 8, 6, 48, False, 10643), ("13B", 5120, 40, 40, 64, 2, 128, False, 4800),
            ("30B", 7168, 48, 56, 32, 14, 1344, True, 2308), ("70B", 8192, 80, 64, 64, 8, 2048, True, 1039),
        )
    ]  # fmt: skip
