"""What is right for the device, chosen here and nowhere else: the type to compute in, compiled code, memory, communication.

Attention needs no choice here: model/attention.py asks for a fused kernel by name (FlashAttention on CUDA). AdamW is torch's
fused one on CPU and CUDA. float8 is off: it changes the loss curve, which a user must ask for, and nothing here does.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from model.layout import Layout

COMPILE_FLOPS = 1.5e14
"""A rank with less to compute than this is done before compiled code has paid for its compilation: some 80 s of one core for
the first time (a dozen C++ kernels), seconds from the cache after that."""

KEPT_BY_COMPILED_CPU = 0.8
"""At most, of what torch.compile would keep of a layer for the backward pass beside its inputs. What costs least to have again
goes: norms, the product in SwiGLU, matrices in bf16. docs/speed.md has what that saves."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What was chosen, and why where a user may ask."""

    compile: bool  # layers and loss through torch.compile, one layer's code for all of them
    why: str
    kept: float = 1.0  # at most, of what compiled layers would keep for the backward pass
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
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    # What tensor and context parallel ranks exchange within a layer, torch cannot weigh against what it keeps.
    weighed = device.type == "cpu" and layout.recompute == "none" and layout.tp == layout.cp == 1
    return Choices(
        compile=True,
        why="compiled",
        kept=KEPT_BY_COMPILED_CPU if weighed else 1.0,
        async_tp=hopper and layout.tp > 1 and compile == "on",
    )


def has_bf16(device: torch.device) -> bool:
    """Whether its hardware computes in bf16: what precision=auto goes by."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prepare(choices: Choices, mesh: DeviceMesh | None) -> None:
    """Tells torch, once, before the model is built."""
    if choices.compile:
        import torch._functorch.config

        torch._functorch.config.activation_memory_budget = choices.kept
    if choices.async_tp and mesh is not None:
        import torch._inductor.config
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        enable_symm_mem_for_group(mesh["tp"].get_group().group_name)
        torch._inductor.config._micro_pipeline_tp = True


def keep_memory(device: torch.device) -> str:
    """Has the allocator keep what it has freed, so that a step finds its memory where the last one left it. Returns what it did.

    glibc hands large blocks back to the kernel, which fills each page of the next one with zeros again: a tenth to a third of a
    step on a CPU. What jemalloc with decay off and huge pages gives, without a package or a preload. The ranks' environment adds
    what cannot be chosen from within (orchestrator/incidents.py: CPU_HEAP).
    """
    if device.type == "cuda":
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # freed blocks of any size fit again
        return "expandable segments"
    if "jemalloc" in os.environ.get("LD_PRELOAD", "") or "tcmalloc" in os.environ.get("LD_PRELOAD", ""):
        return "the preloaded allocator"
    if not sys.platform.startswith("linux"):
        return "the system's allocator as it is"
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return "the system's allocator as it is (not glibc)"
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc.mallopt(mmap_max, 0)  # everything from one heap, large blocks too
    libc.mallopt(trim_threshold, -1)  # which never shrinks
    huge_pages = " in huge pages" if _advise_huge_pages(libc) else ""
    unbroken = ", no block held back" if "glibc.malloc.tcache_count=0" in os.environ.get("GLIBC_TUNABLES", "") else ""
    return f"glibc's heap, kept{huge_pages}{unbroken}"


def _advise_huge_pages(libc: ctypes.CDLL) -> bool:
    """Stretches the heap, untouched, over half of the free memory and asks for huge pages in it: what is allocated later lies
    there. Nothing is used by it until it is."""
    page, huge_page, advice = os.sysconf("SC_PAGE_SIZE"), 2 << 20, 14  # MADV_HUGEPAGE
    length = os.sysconf("SC_AVPHYS_PAGES") * page // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(length)
    if not block:
        return False
    start = -(-block // huge_page) * huge_page
    refused = libc.madvise(start, (block + length - start) // huge_page * huge_page, advice)
    libc.free(block)
    return bool(refused == 0)


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
