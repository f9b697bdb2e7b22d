"""Memory that is freed is kept, and found again."""

import os
import subprocess
import sys

import pytest

from model.heap import WITHOUT_THREAD_CACHES

PAGE_FAULTS = """
import resource, sys, torch
from model import heap
print(heap.keep(), file=sys.stderr)
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24), torch.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
SMALL_BLOCKS_OF_A_THREAD = """
import ctypes, threading
from model import heap
print(heap.keep())
libc = ctypes.CDLL(None)
libc.aligned_alloc.restype, libc.aligned_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def anonymous_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
def work():
    before = anonymous_kib()
    for _ in range(50_000):
        libc.free(libc.aligned_alloc(64, 64))
    print(anonymous_kib() - before)
thread = threading.Thread(target=work)
thread.start(), thread.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_memory_that_is_freed_is_found_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True)
    assert "kept" in done.stderr
    assert int(done.stdout) < 100  # 24,576 pages of 4 KiB otherwise


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_small_blocks_of_a_thread_are_found_again_too() -> None:
    """Compiled kernels take vectors for their sums in each thread: kept memory must not mean that each touches a new page."""
    own = {k: v for k, v in os.environ.items() if k not in ("MALLOC_ARENA_MAX", "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, "-c", SMALL_BLOCKS_OF_A_THREAD], capture_output=True, text=True, check=True,
        env={**own, **WITHOUT_THREAD_CACHES},
    )  # fmt: skip
    told, grown_kib = done.stdout.splitlines()
    assert "without thread caches" in told
    assert int(grown_kib) < 4_000  # 9 MiB where the thread's heap grew by 64 MiB at a time
