"""Tables that others have published, to hold a forecast against. Layouts as published; where a table leaves one out
(microbatches and virtual stages of 2104.04473), ours: the largest microbatch of 4, 2, 1 rows that suits the depth."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from model.config import ModelConfig
from model.cost import GpuConfig
from model.layout import Layout
from orchestrator.plan.config import PlanConfig
from orchestrator.plan.step import Step, forecast_step

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
    changes: dict[str, float] = field(default_factory=dict)  # of the GPU, where theirs was another

    @property
    def step(self) -> Step:
        gpu = replace(GpuConfig(**yaml.safe_load((GPUS / f"{self.gpu}.yaml").read_text())), **self.changes)  # type: ignore[arg-type]
        return forecast_step(self.model, gpu, 8, self.layout, self.batch_sequences, self.plan)

    @property
    def forecast(self) -> float:
        return float(getattr(self.step, self.figure))

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


MEGATRON_2021 = PlanConfig(
    name="2021", attention="unfused", sequence_parallel=False, gradient_bytes=2, recompute_whole=True
)
MEGATRON_2022 = PlanConfig(name="2022", attention="unfused", gradient_bytes=2)
NOW = PlanConfig(name="now")
TORCH_2_0 = PlanConfig(name="2023", recompute_whole=True)  # or 1.13: the README does not say
TORCHTITAN = PlanConfig(name="torchtitan", recompute_alternate=True)  # its selective "op"
NVIDIA = PlanConfig(name="nvidia", gradient_bytes=2, async_tp=True)  # NeMo's settings of 2024 and 2025


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
            replace(LLAMA_3["405B"], sequence_length=tokens), laid(7, tp=8, pp=16, cp=cp, dp_shard=dp),
            batch, NOW, "h100",
        )
        for gpus, cp, dp, batch, tokens, published in (
            (8192, 1, 64, 2048, 8192, 430), (16384, 1, 128, 2048, 8192, 400), (16384, 16, 8, 128, 131072, 380),
        )
    ]  # fmt: skip


MPT = {
    "1B": (2048, 24, 16), "3B": (2560, 32, 20), "7B": (4096, 32, 32), "13B": (5120, 40, 40), "30B": (7168, 48, 56),
    "70B": (8192, 80, 64),
}  # fmt: skip


def mpt(gpu: str) -> list[Row]:
    """llm-foundry's scripts/train/benchmarking/README.md at 061f2c7, bf16, FSDP (the first, uncompiled): tokens/s a GPU. Of
    97 rows: each size with 2,048 tokens, 7B with more, 13B with less, and the largest scale (1B and 3B there shard gradients
    only)."""
    h100 = (
        ("1B", 2048, 8, 14, 112, False, 45455), ("3B", 2048, 64, 6, 1152, False, 22525),
        ("7B", 2048, 8, 6, 48, False, 10643), ("7B", 4096, 8, 16, 256, True, 8611), ("7B", 8192, 8, 8, 128, True, 6935),
        ("13B", 2048, 8, 2, 16, False, 4792), ("13B", 2048, 64, 2, 128, False, 4800), ("13B", 1024, 8, 40, 960, True, 5502),
        ("30B", 2048, 32, 14, 1344, True, 2308), ("70B", 2048, 64, 8, 2048, True, 1039), ("70B", 2048, 32, 2, 1024, True, 882),
        # "Large Scale", of the README at 8c8dd48.
        ("1B", 2048, 512, 12, 6144, False, 39837), ("3B", 2048, 512, 8, 4096, False, 21664),
        ("7B", 2048, 512, 6, 3072, False, 9670), ("13B", 2048, 512, 16, 8192, True, 4952),
        ("30B", 2048, 512, 8, 4096, True, 2115), ("70B", 2048, 512, 8, 4096, True, 1007),
    )  # fmt: skip
    a100 = (
        ("1B", 2048, 8, 14, 448, False, 20513), ("3B", 2048, 8, 10, 160, False, 10811), ("7B", 2048, 8, 6, 96, False, 4641),
        ("7B", 4096, 8, 16, 256, True, 3684), ("7B", 8192, 8, 8, 128, True, 3206), ("13B", 2048, 8, 2, 48, False, 2262),
        ("13B", 1024, 8, 40, 960, True, 2330), ("30B", 2048, 8, 3, 504, True, 916), ("70B", 2048, 64, 8, 2048, True, 410),
        ("70B", 2048, 32, 2, 1024, True, 373),
    )  # fmt: skip
    return [mpt_row(gpu, *row) for row in (h100 if gpu == "h100" else a100)]


def mpt_row(gpu: str, size: str, tokens: int, gpus: int, at_once: int, batch: int, full: bool, published: float) -> Row:
    layout = laid(dp_shard=gpus, microbatch_sequences=at_once, recompute="full" if full else "none")
    label = f"MPT {size}, {gpus} {gpu}, {at_once} x {tokens} tokens"
    model = replace(gpt(*MPT[size], 50432), sequence_length=tokens)
    passes = batch // (gpus * at_once)
    return tokens_row("llm-foundry", label, model, layout, published, TORCH_2_0, gpu, passes=passes)


def open_replications() -> list[Row]:
    """BLOOM's 176B as bigscience's train/tr11-176B-ml/README.md at 00327f8 logs it (four 100 Gb/s links a node of eight GPUs),
    175B of arXiv 2205.01068 ("up to" 147 TFLOP/s; a batch of 2M tokens, ours 8 rows a rank), both with recomputation counted, as
    Megatron's code that they build upon counts."""
    return [
        Row("bigscience", "BLOOM 176B", "step_s", 104.7, gpt(14336, 70, 112, 250880),
            laid(tp=4, pp=12, dp_replicate=8, microbatch_sequences=2, recompute="full"), 2048, MEGATRON_2021,
            changes={"inter_node_gb_per_s": 6.25}),
        Row("2205.01068", "OPT 175B", "hardware_tflops_per_gpu", 147, gpt(12288, 96, 96, 50272),
            laid(tp=8, dp_shard=124, microbatch_sequences=8, recompute="full"), 992, MEGATRON_2021),
    ]  # fmt: skip


LLAMA_2 = {  # dim, layers, heads, feed-forward, vocabulary, tokens a row, heads of keys and values
    "7B": llama(4096, 32, 32, 11008, 32000, 4096), "13B": llama(5120, 40, 40, 13824, 32000, 4096),
    "34B": llama(8192, 48, 64, 22016, 32000, 4096, 8), "70B": llama(8192, 80, 64, 28672, 32000, 4096, 8),
}  # fmt: skip
LLAMA_3 = {
    "8B": llama(4096, 32, 32, 14336, 128256, 8192, 8), "70B": llama(8192, 80, 64, 28672, 128256, 8192, 8),
    "405B": llama(16384, 126, 128, 53248, 128256, 8192, 8),
}  # fmt: skip
NEMOTRON_340B = replace(gpt(18432, 96, 96, 256000), sequence_length=4096, n_kv_heads=8)


SLOWER_H100 = {"peak_bf16_tflops": 989 * (500 / 700) ** (1 / 3), "memory_gb_per_s": 2400.0}
"""torchtitan's: of 500 W and 2.4 TB/s; their peak taken as the cube root of the power."""


def tokens_row(
    source: str, label: str, model: ModelConfig, layout: Layout, published: float, plan: PlanConfig = NOW,
    gpu: str = "h100", changes: dict[str, float] | None = None, passes: int = 1,
) -> Row:  # fmt: skip
    """Tokens/s a GPU in `passes` microbatches a step."""
    label += f", recompute {layout.recompute}" + (' "op"' if plan.recompute_alternate else "")
    batch = passes * layout.dp * layout.microbatch_sequences
    return Row(source, label, "tokens_per_s_per_gpu", published, model, layout, batch, plan, gpu, changes or {})


def fsdp_of_torch() -> list[Row]:
    """FSDP on A100s, tokens/s a GPU: torchtitan's docs/performance.md at 0413364 (64 of them), and fms-fsdp's README at 0d31998
    (128). Of the latter a later README gives the network, 400 Gb/s a node; ours are that "HSDP" shards inside a node and that
    gradients are reduced in bf16, its mixed precision's default. On H100s: torchtitan's benchmarks/llama3_h100_202412 at 31a17bf,
    the rows in bf16 that are compiled, and 70B of its asyncTP_llama3_h100_2025-06 at b5bcd76 without async TP (rows of 8,192
    tokens: ours)."""
    rows = []
    for name, model, at_once, recompute, published in (
        ("Llama 3 8B", LLAMA_3["8B"], 1, "selective", 2973), ("Llama 3 70B", LLAMA_3["70B"], 1, "full", 331),
        ("Llama 2 13B", LLAMA_2["13B"], 2, "none", 2162), ("Llama 2 13B", LLAMA_2["13B"], 2, "selective", 1904),
        ("Llama 2 70B", LLAMA_2["70B"], 2, "full", 353),
    ):  # fmt: skip
        layout = laid(dp_shard=64, microbatch_sequences=at_once, recompute=recompute)
        plan = TORCHTITAN if recompute == "selective" else NOW
        rows.append(tokens_row("torchtitan", f"{name}, 64 A100", model, layout, published, plan, "a100_80gb"))
    for gpus, published in ((8, 6667), (128, 6514)):
        layout = laid(dp_shard=gpus, microbatch_sequences=2, recompute="selective")
        label = f"Llama 3.1 8B, {gpus} H100"
        rows.append(tokens_row("torchtitan", label, LLAMA_3["8B"], layout, published, TORCHTITAN, changes=SLOWER_H100))
    layout = laid(dp_shard=32, tp=8, microbatch_sequences=16, recompute="full")
    label = "Llama 3 70B, 256 H100, tp 8"
    rows.append(tokens_row("torchtitan", label, LLAMA_3["70B"], layout, 597.3, changes=SLOWER_H100))
    for size, shard, at_once, recompute, published in (
        ("7B", 8, 2, "none", 3760), ("13B", 8, 1, "none", 1700), ("34B", 128, 8, "full", 772), ("70B", 128, 6, "full", 380),
    ):  # fmt: skip
        layout = laid(dp_replicate=128 // shard, dp_shard=shard, microbatch_sequences=at_once, recompute=recompute)
        rows.append(
            tokens_row("fms-fsdp", f"Llama 2 {size}", LLAMA_2[size], layout, published, replace(NOW, gradient_bytes=2),
                       "a100_80gb", {"inter_node_gb_per_s": 6.25})
        )  # fmt: skip
    return rows


def nvidia() -> list[Row]:
    """NVIDIA's own on H100, bf16. dgxc-benchmarking's README files at v25.04.02 (0efdb23; from their seconds a step; rows of
    8,192 tokens in llama3.1, 4,096 in nemotron) and 175B at v25.01.1 (e6afea3); NeMo's settings of that time: nothing is
    recomputed, tensor parallel communication overlaps, gradients are reduced in bf16, the optimizer is sharded (in one stage that
    moves what replicas do)."""
    rows = []
    nemotron_15b = replace(gpt(6144, 32, 48, 256000), sequence_length=4096, n_kv_heads=8)
    for name, model, degrees, virtual, passes, runs in (
        ("Llama 3.1 8B", LLAMA_3["8B"], {"cp": 2}, 1, 32, ((8, 12.27), (128, 12.33))),
        ("Llama 3.1 70B", LLAMA_3["70B"], {"tp": 4, "pp": 4, "cp": 2}, 5, 64, ((64, 14.66), (2048, 14.66))),
        ("Llama 3.1 405B", LLAMA_3["405B"], {"tp": 8, "pp": 8, "cp": 2}, 8, 64, ((512, 19.78), (2048, 19.87))),
        ("Nemotron 4 15B", nemotron_15b, {"tp": 2, "microbatch_sequences": 2}, 1, 4, ((16, 2.66), (2048, 2.78))),
        ("Nemotron 4 340B", NEMOTRON_340B, {"tp": 8, "pp": 8}, 12, 16, ((256, 4.36), (2048, 4.43))),
        ("GPT 3 175B", gpt(12288, 96, 96), {"tp": 4, "pp": 8}, 12, 64, ((128, 8.91), (2048, 9.02))),
    ):
        for gpus, seconds in runs:
            rows.append(nvidia_row(f"{name}, {gpus:,} H100", model, gpus, degrees, virtual, passes, seconds))
    return rows


def megatron_h100() -> list[Row]:
    """Megatron-LM's images/model_table.png (f2e5db4; 48 data parallel ranks; gradients reduced in fp32, parameters gathered
    in bf16: 3 bytes each way where an all-reduce stands for both). Its TFLOP/s count the masked half of attention too, and it
    states neither microbatches nor groups of layers: ours, four rows a pass without a pipeline and the most even groups up to 12
    with one."""
    rows = []
    for size, heads, dim, layers, tp, pp, batch, tflops in (
        ("1.7B", 16, 2048, 24, 1, 1, 192, 408.8), ("7.1B", 32, 4096, 30, 2, 1, 192, 465.9),
        ("16B", 48, 6144, 32, 4, 1, 192, 489.1), ("32B", 56, 7168, 48, 8, 1, 192, 459.6),
        ("70B", 64, 8192, 84, 8, 2, 384, 419.7), ("119B", 80, 10240, 92, 8, 4, 768, 420.5),
        ("177B", 96, 12288, 96, 8, 6, 1152, 432.8), ("314B", 128, 16384, 96, 8, 8, 1536, 474.4),
        ("462B", 144, 18432, 112, 8, 16, 3072, 459.9),
    ):  # fmt: skip
        virtual = 1 if pp == 1 else max(v for v in range(1, 13) if layers % (pp * v) == 0)
        shared = {"dp_replicate": 48, "microbatch_sequences": 4} if pp == 1 else {"dp_shard": 48}
        plan = replace(NVIDIA, gradient_bytes=3 if pp == 1 else 4)
        model = replace(gpt(dim, layers, heads, 131072), sequence_length=4096)
        flops = 72 * layers * dim**2 * (1 + 4096 / (6 * dim) + 131072 / (12 * layers * dim))  # a token's
        rows.append(
            Row("Megatron-LM", f"{size}, {48 * tp * pp:,} H100, {tflops} TFLOP/s", "tokens_per_s_per_gpu",
                tflops * 1e12 / flops, model, laid(virtual, tp=tp, pp=pp, **shared), batch, plan, "h100")
        )  # fmt: skip
    return rows


def nvidia_row(
    label: str, model: ModelConfig, gpus: int, degrees: dict[str, int], virtual: int, passes: int, step_s: float,
    gpu: str = "h100", changes: dict[str, float] | None = None,
) -> Row:  # fmt: skip
    ranks = gpus // (degrees.get("tp", 1) * degrees.get("pp", 1) * degrees.get("cp", 1))
    data_parallel = {"dp_shard" if "pp" in degrees else "dp_replicate": ranks}
    layout = laid(virtual, **degrees, **data_parallel)
    published = passes * ranks * layout.microbatch_sequences * model.sequence_length / step_s / gpus
    return tokens_row("dgxc-benchmarking", label, model, layout, published, NVIDIA, gpu, changes, passes)


def newer_gpus() -> list[Row]:
    """B200: 8B in NeMo 25.09 (vuiseng9/nemo-perf-nvfp4's README at 13bdb29); GB200, whose peak it gives as 2,450 TFLOP/s, as
    B200s of that peak in nodes of 8 (dgxc-benchmarking at v25.05, 68eaf7e). H200: 70B in MaxText (AI-Hypercomputer/gpu-recipes at
    2e1fd5e), which repeats some products: between our selective and full. H100 in MaxText: 70B of dgxc-benchmarking at v25.03
    (1b9bb6b), which repeats all but q, k and v."""
    rows = [
        tokens_row("nemo-perf-nvfp4", "Llama 3 8B, 8 B200", LLAMA_3["8B"], laid(dp_replicate=8, microbatch_sequences=2),
                   21618, NVIDIA, "b200", passes=8)
    ]  # fmt: skip
    gb200 = {"peak_bf16_tflops": 2450.0}
    for name, model, degrees, virtual, passes, gpus, seconds in (
        ("Llama 3.1 405B", LLAMA_3["405B"], {"tp": 4, "pp": 8, "cp": 2}, 8, 32, 128, 9.347),
        ("Llama 3.1 405B", LLAMA_3["405B"], {"tp": 4, "pp": 8, "cp": 2}, 8, 32, 512, 9.508),
        ("Nemotron 4 340B", NEMOTRON_340B, {"tp": 8, "pp": 4}, 12, 8, 128, 2.189),
        ("Nemotron 4 340B", NEMOTRON_340B, {"tp": 8, "pp": 4}, 12, 8, 512, 2.229),
        ("Nemotron 4 340B, 512 rows a step", NEMOTRON_340B, {"tp": 8, "pp": 4}, 12, 128, 128, 32.66),
    ):
        label = f"{name}, {gpus} GB200"
        rows.append(nvidia_row(label, model, gpus, degrees, virtual, passes, seconds, "b200", gb200))
    for how in ("selective", "full"):
        layout = laid(dp_replicate=2, dp_shard=128, microbatch_sequences=2, recompute=how)
        rows.append(tokens_row("gpu-recipes", "Llama 3.1 70B, 256 H200", LLAMA_3["70B"], layout, 1055.9, gpu="h200"))
    for gpus, seconds in ((128, 15.563), (2048, 15.898)):
        layout = laid(dp_replicate=gpus // 128, dp_shard=128, microbatch_sequences=2, recompute="full")
        label = f"Llama 3 70B in MaxText, {gpus:,} H100"
        rows.append(tokens_row("dgxc-benchmarking", label, LLAMA_3["70B"], layout, 2 * 8192 / seconds))
    return rows


INTERNLM_7B = llama(4096, 32, 32, 11008, 103168)
DEEPSPEED = PlanConfig(name="deepspeed", sequence_parallel=False, gradient_bytes=2, recompute_whole=True)


def internlm(gpus: int, at_once: int, passes: int, full: bool, published: float, tp: int = 1) -> Row:
    """doc/en/train_performance.md of InternLM at 20fe5ac: its "hybrid zero", gradients reduced among all ranks, optimizer shared
    inside a node; four 100 Gb/s links a node. The vocabulary is InternLM's, which the page does not state."""
    layout = laid(dp_replicate=gpus // tp, tp=tp, microbatch_sequences=at_once, recompute="full" if full else "none")
    label = f"InternLM 7B, {gpus:,} A100, tp {tp}, {passes} x {at_once} rows"
    return tokens_row("InternLM", label, INTERNLM_7B, layout, published, DEEPSPEED, "a100_80gb",
                      {"inter_node_gb_per_s": 6.25}, passes)  # fmt: skip


def flagperf(
    label: str, model: ModelConfig, gpus: int, degrees: dict[str, int], passes: int, published: float, gpu: str = "h100",
    **changes: float,
) -> Row:  # fmt: skip
    """FlagPerf's training/nvidia/*megatron*/README.md (llama3_8B at 0e0fc76, llama3_70B at 61ac079, llama2_70B at 0171aca,
    llama2_7b-megatron-deepspeed at 0f139fc). Of its H800s, NVLink of 200 GB/s each way and 25 GB/s of network a GPU are ours."""
    dp = gpus // (degrees.get("tp", 1) * degrees.get("pp", 1))
    layout, plan = laid(dp_replicate=dp, **degrees), replace(NOW, gradient_bytes=2)
    return tokens_row("FlagPerf", label, model, layout, published, plan, gpu, changes, passes)


def of_strangers() -> list[Row]:
    """Looked up after all constants were set, by somebody who had not seen the forecast of any: InternLM's and FlagPerf's tables,
    atorch's (dlrover's atorch/examples/llama2/README.md at 11bf2fb; recomputation counted; rows of 4,096 tokens: ours),
    TinyLlama's README at 026587c (A100s of 40 GB), 70B in MaxText, which repeats some products (dgxc-benchmarking's
    maxtext/README_70b.md at 143b90d), and 405B of torchtitan's performance.md. What is off by more than 15% is in misses()."""
    h800 = {"intra_node_gb_per_s": 200.0, "inter_node_gb_per_s": 25.0}
    fsdp = replace(NOW, recompute_whole=True)
    rows = [
        internlm(8, 2, 4, False, 4078), internlm(128, 2, 4, False, 3928), internlm(8, 8, 1, True, 3314),
        internlm(1024, 8, 1, True, 3163), internlm(512, 4, 1, True, 2963),
        flagperf("Llama 3 8B, 8 A100, pp 2", LLAMA_3["8B"], 8, {"pp": 2}, 128, 3698.7, "a100_80gb"),
        flagperf("Llama 3 8B, 8 H100, tp 2", LLAMA_3["8B"], 8, {"tp": 2}, 128, 8103),
        flagperf("Llama 3 8B, 16 H100, tp 2", LLAMA_3["8B"], 16, {"tp": 2}, 64, 7914),
        flagperf("Llama 3 70B, 64 H100, tp 8, pp 4", LLAMA_3["70B"], 64, {"tp": 8, "pp": 4}, 256, 851),
        flagperf("Llama 2 70B, 32 H800, tp 8, pp 4", LLAMA_2["70B"], 32, {"tp": 8, "pp": 4}, 44, 641.9, **h800),
        flagperf("Llama 2 70B, 32 H800, tp 4, pp 8", LLAMA_2["70B"], 32, {"tp": 4, "pp": 8}, 44, 791.4, **h800),
        *(atorch(f"FSDP, {gpus} A100", laid(dp_shard=gpus, microbatch_sequences=4, recompute="full"), 1, tflops, fsdp)
          for gpus, tflops in ((8, 204.67), (64, 195.14))),
        atorch("DeepSpeed, 8 A100, pp 2", laid(dp_replicate=4, pp=2, microbatch_sequences=8, recompute="full"), 64, 190.27),
        tokens_row("TinyLlama", "1.1B, 16 A100", llama(2048, 22, 32, 5632, 32000, 2048, 4),
                   laid(dp_shard=16, microbatch_sequences=8), 24000, gpu="a100_80gb", changes={"memory_gb_per_s": 1555},
                   passes=8),
        tokens_row("torchtitan", "Llama 3.1 405B, 128 H100, tp 8", LLAMA_3["405B"],
                   laid(dp_shard=16, tp=8, microbatch_sequences=2, recompute="full"), 109, changes=SLOWER_H100),
    ]  # fmt: skip
    for gpus, shard, seconds in ((64, 64, 6.999), (256, 256, 7.153), (2048, 128, 7.066)):
        for how in ("selective", "full"):
            layout = laid(dp_replicate=gpus // shard, dp_shard=shard, microbatch_sequences=2, recompute=how)
            label = f"Llama 2 70B in MaxText, {gpus:,} H100"
            rows.append(tokens_row("dgxc-benchmarking", label, LLAMA_2["70B"], layout, 2 * 4096 / seconds))
    return rows


def atorch(label: str, layout: Layout, passes: int, tflops: float, plan: PlanConfig = DEEPSPEED) -> Row:
    batch = passes * layout.dp * layout.microbatch_sequences
    return Row("atorch", f"Llama 2 7B, {label}", "hardware_tflops_per_gpu", tflops, LLAMA_2["7B"], layout, batch, plan,
               changes={"inter_node_gb_per_s": 12.5})  # fmt: skip


def misses() -> list[Row]:
    """What is off by more, and docs/plan.md says why. 20B of arXiv 2204.06745 on A100s of 40 GB, four 200 Gb/s links a node;
    GPU-hours of LLaMA 2 (2307.09288, table 2), which states no layout: LLaMA's own, with rows twice as long; GPU-hours of 405B's
    model card over 15.6T tokens; 70B of torchtitan's performance.md with "selective op", its asyncTP rows; torchao's
    docs/source/workflows/training.md at 36027d8 (torchtitan on 8 GPUs of one row each); OLMo-core's README at b9e9193 (its number
    of GPUs is not stated: ours, 64); long rows of llm-foundry's; of_strangers()' others, and 5B in Paxml (dgxc-benchmarking's
    paxml/README_5b.md at 143b90d)."""
    rows = [
        Row("2204.06745", "GPT-NeoX 20B", "hardware_tflops_per_gpu", 117, gpt(6144, 44, 64, 50432),
            laid(tp=2, pp=4, dp_replicate=12, microbatch_sequences=4, recompute="full"), 1536, MEGATRON_2021,
            changes={"inter_node_gb_per_s": 12.5, "memory_gb_per_s": 1555}),
    ]  # fmt: skip
    for size, hours, degrees in (
        ("7B", 184_320, {"dp_replicate": 32, "dp_shard": 32}),
        ("13B", 368_640, {"tp": 2, "dp_replicate": 16, "dp_shard": 64}),
        ("34B", 1_038_336, {"tp": 4, "dp_replicate": 2, "dp_shard": 256, "microbatch_sequences": 2}),
        ("70B", 1_720_320, {"tp": 8, "dp_replicate": 4, "dp_shard": 64, "microbatch_sequences": 4}),
    ):
        layout, published = laid(recompute="selective", **degrees), 2e12 / hours / 3600
        rows.append(
            Row("2307.09288", f"LLaMA 2 {size}", "tokens_per_s_per_gpu", published, LLAMA_2[size], layout, 1024, NOW)
        )
    llama3_405b = llama3()[1]
    rows.append(
        replace(llama3_405b, source="model card", label="Llama 3.1 405B, GPU-hours", figure="tokens_per_s_per_gpu",
                published=15.6e12 / 30.84e6 / 3600)
    )  # fmt: skip
    layout = laid(dp_shard=64, recompute="selective")
    rows.append(tokens_row("torchtitan", "Llama 2 70B, 64 A100", LLAMA_2["70B"], layout, 355, TORCHTITAN, "a100_80gb"))
    async_op = replace(TORCHTITAN, async_tp=True)
    eight, seventy = LLAMA_3["8B"], LLAMA_3["70B"]
    for label, model, shards, at_once, how, plan, published in (
        ("Llama 3 70B, 256 H100, async tp 8", seventy, 32, 16, "full", replace(NOW, async_tp=True), 652.4),
        ("Llama 3 8B, 64 H100, tp 8", eight, 8, 12, "selective", TORCHTITAN, 4378),
        ("Llama 3 8B, 64 H100, async tp 8", eight, 8, 12, "selective", async_op, 4809.4),
    ):
        layout = laid(dp_shard=shards, tp=8, microbatch_sequences=at_once, recompute=how)
        rows.append(tokens_row("torchtitan", label, model, layout, published, plan, changes=SLOWER_H100))
    layout = laid(dp_shard=8, recompute="selective")
    for gpu, published in (("h100", 6150), ("mi300x", 5376.5)):
        rows.append(tokens_row("torchao", f"Llama 3 8B, 8 {gpu}", eight, layout, published, TORCHTITAN, gpu))
    for name, at_once, passes, published in (("7B", 2, 8, 10000), ("13B", 1, 32, 4600)):
        model = replace(LLAMA_2[name], vocab_size=100352)
        layout = laid(dp_replicate=8, dp_shard=8, microbatch_sequences=at_once)
        rows.append(tokens_row("OLMo-core", f"OLMo 2 {name}, H100", model, layout, published, passes=passes))
    rows += [
        mpt_row(*row)
        for row in (
            ("a100_80gb", "1B", 8192, 8, 3, 96, False, 13814), ("a100_80gb", "30B", 8192, 8, 1, 168, True, 574),
            ("a100_80gb", "7B", 32768, 8, 2, 32, True, 1672), ("h100", "7B", 32768, 8, 2, 32, True, 3318),
            ("h100", "1B", 65536, 8, 1, 16, True, 5506),
        )
    ]  # fmt: skip
    rows += [
        internlm(1024, 2, 4, False, 3625), internlm(8, 4, 4, False, 3761, tp=2), internlm(1024, 4, 4, False, 3486, tp=2),
        internlm(1024, 4, 1, True, 2796), internlm(1024, 2, 1, True, 2341), internlm(512, 2, 2, False, 3084),
        internlm(1024, 2, 2, False, 2817), internlm(1024, 2, 1, False, 2346),
        flagperf("Llama 2 7B in DeepSpeed, 8 A100 of 40 GB, tp 4", LLAMA_2["7B"], 8, {"tp": 4}, 32, 2868, "a100_80gb",
                 memory_gb_per_s=1555.0),
        atorch("DeepSpeed, 8 A100, tp 2", laid(dp_replicate=4, tp=2, microbatch_sequences=8, recompute="full"), 64, 159.19),
        atorch("DeepSpeed, 8 A100, tp 2, pp 2",
               laid(dp_replicate=2, tp=2, pp=2, microbatch_sequences=8, recompute="full"), 64, 155.73),
        *(tokens_row("dgxc-benchmarking", f"GPT 5B in Paxml, {gpus} H100", gpt(4096, 24, 32),
                     laid(dp_shard=gpus, microbatch_sequences=4), 4 * 2048 / seconds)
          for gpus, seconds in ((16, 0.634), (128, 0.651))),
        tokens_row("OLMo-core", "OLMo 2 1B, H100", llama(2048, 16, 16, 8192, 100352, 4096),
                   laid(dp_replicate=8, dp_shard=8, microbatch_sequences=8), 45000, passes=2),
    ]  # fmt: skip
    return rows


def tables() -> list[Row]:
    """All of them, but LLaMA's four, which are whole experiments."""
    return [
        *megatron(), *selective(), *llama3(), *open_replications(), *fsdp_of_torch(), *mpt("a100_80gb"), *mpt("h100"),
        *nvidia(), *megatron_h100(), *newer_gpus(), *of_strangers(), *misses(),
    ]  # fmt: skip
