"""glibc's heap, of ranks on CPUs: what is freed is kept, in one piece, for the next step. Torch-free: half of it can only be said
before a rank starts.
"""

import ctypes
import os
import sys

WITHOUT_THREAD_CACHES = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""Environment of ranks on CPUs. glibc keeps small freed blocks at hand for each thread, as in use: those between a model's large
blocks hold them apart, and within some steps the heap is a tenth larger (docs/speed.md)."""


def keep() -> str:
    """Returns what it did.

    glibc hands large blocks back to the kernel, which fills each page of the next one with zeros again: a tenth to a third of a
    step on a CPU. With WITHOUT_THREAD_CACHES this gives what jemalloc gives with decay off and huge pages, without a package or
    a preload.
    """
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
    uncached = WITHOUT_THREAD_CACHES.items() <= os.environ.items()
    return f"glibc's heap, kept{huge_pages}" + (", without thread caches" if uncached else "")


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
