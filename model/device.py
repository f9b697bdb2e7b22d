"""What is right for the device, chosen here and nowhere else: the type to compute in, compiled code, memory, communication.

Attention needs no choice here: model/attention.py asks for a fused kernel by name (FlashAttention on CUDA). AdamW is torch's
fused one on CPU and CUDA. float8 is off: it changes the loss curve, which a user must ask for, and nothing here does.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from model import heap
from model.layout import Layout

COMPILE_FLOPS = 1.5e14
"""A rank with less to compute than this is done before compiled code has paid for its compilation: some 80 s of one core for
the first time (a dozen C++ kernels), seconds from the cache after that."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What was chosen, and why where a user may ask."""

    compile: bool  # layers and loss through torch.compile, one layer's code for all of them
    why: str
    remake_passes: bool = False  # compiled layers keep products for the backward pass, no pass between them
    async_tp: bool = False  # tensor parallel products in pieces, so that they overlap with their communication


def choose(device: torch.device, compile: str, rank_flops: float, layout: Layout) -> Choices:
    """`compile`: auto | on | off. `rank_flops`: what this rank computes in the whole run, the same after any restart: a
    resumed run must compute as it did before, bit by bit. Where ranks are joined, all of them must call this.

    CUDA graphs are left out on purpose: FSDP2's and tensor parallelism's communication between the layers cannot be captured
    by torch.compile, and the kernels of a model worth a GPU are longer than their launches.
    """
    if compile == "off":
        return Choices(compile=False, why="compile=off")
    if compile == "auto" and rank_flops < COMPILE_FLOPS:
        return Choices(compile=False, why=f"a short run ({rank_flops:.1e} of {COMPILE_FLOPS:.0e} FLOPs a rank)")
    failed = _compile_fails(device)
    if dist.is_initialized():  # all ranks, or none
        fails = torch.tensor(float(bool(failed)), device=device)
        dist.all_reduce(fails, dist.ReduceOp.MAX)
        failed = failed or ("on another rank" if fails.item() else "")
    if failed:
        return Choices(compile=False, why=f"torch.compile does not work here: {failed}")
    nvidia = device.type == "cuda" and torch.version.hip is None  # AMD's MI300X calls itself (9, 4) too
    hopper = nvidia and torch.cuda.get_device_capability(device) >= (9, 0)
    return Choices(
        compile=True,
        why="compiled",
        remake_passes=device.type == "cpu" and layout.recompute == "none",
        async_tp=hopper and layout.tp > 1 and compile == "on",
    )


def has_bf16(device: torch.device) -> bool:
    """Whether its hardware computes in bf16: what precision=auto goes by."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prepare(choices: Choices, mesh: DeviceMesh | None) -> None:
    """Tells torch, once, before the model is built, in the thread that will compile it."""
    if choices.compile:
        import torch._functorch.config as functorch

        # What one pass over memory makes from what is kept anyway: norms, rotations, SwiGLU's product, matrices in bf16. Never
        # a product: `activation_memory_budget`, which counts fp32 matrices as memory, repeats three of seven on wide layers.
        functorch.ban_recompute_used_far_apart = not choices.remake_passes
        functorch.ban_recompute_long_fusible_chains = not choices.remake_passes
        functorch.ban_recompute_materialized_backward = not choices.remake_passes
    if choices.async_tp and mesh is not None:
        import torch._inductor.config
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        enable_symm_mem_for_group(mesh["tp"].get_group().group_name)
        torch._inductor.config._micro_pipeline_tp = True


def keep_memory(device: torch.device) -> str:
    """Has the allocator keep what it frees, so that a step finds its memory where the last one left it. Returns what it did."""
    if device.type == "cuda":
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # freed blocks of any size fit again
        return "expandable segments"
    return heap.keep()


def _compile_fails(device: torch.device) -> str:
    """Why torch.compile cannot make code here (on a CPU it needs a C++ compiler and Python's headers): empty where it can."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache_dir()))  # kept: the next start takes seconds
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # more are processes that each import torch, in every rank of a node
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # whatever the tool chain raises: the run goes on without it
        return str(error).strip().splitlines()[0]
    return ""


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.exp() + 1


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arriero" / "torchinductor"
