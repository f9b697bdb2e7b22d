"""How long a save stops training, beside one copy of the shard in memory. The goal: at most 1.2 times that copy.

`CHECKPOINT_BENCH_MB` sets the size of the shard (default 1024).
"""

import os
import statistics
import time
from pathlib import Path

import torch

from model.checkpoint.policy import CheckpointConfig
from model.checkpoint.storage import checksum
from model.checkpoint.store import CheckpointStore

SHARD_BYTES = int(os.environ.get("CHECKPOINT_BENCH_MB", "1024")) << 20


def a_state(layers: int = 16) -> dict[str, dict[str, torch.Tensor]]:
    """A shard as AdamW leaves it: for each of 9 tensors a layer, weight and two moments."""
    each = SHARD_BYTES // 4 // (layers * 9 * 3)
    names = [f"layers.{layer}.{tensor}" for layer in range(layers) for tensor in range(9)]
    return {kind: {n: torch.randn(each) for n in names} for kind in ("model", "exp_avg", "exp_avg_sq")}


def test_stall_of_a_save(tmp_path: Path) -> None:
    state = a_state()
    source = torch.randn(SHARD_BYTES // 4)
    target = torch.zeros(SHARD_BYTES // 4)
    store = CheckpointStore(str(tmp_path), CheckpointConfig(name="bench", keep_last=1), on_event=lambda *_: None)
    store.load_latest(state)  # makes the buffers

    copies, stalls, wholes = [], [], []
    for step in range(1, 12):  # taken in turn, so that a neighbour's noise meets both
        started = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - started)
        started = time.perf_counter()
        store.save(step, state, {})
        stalls.append(time.perf_counter() - started)
        store.finish()
        wholes.append(time.perf_counter() - started)

    started = time.perf_counter()
    store.load_latest(state)
    load_s = time.perf_counter() - started
    started = time.perf_counter()
    checksum(memoryview(source.numpy().view("uint8")))
    hash_s = time.perf_counter() - started

    gigabytes = SHARD_BYTES / 1e9
    print(f"\nshard {gigabytes:.2f} GB in {sum(map(len, state.values()))} tensors, {torch.get_num_threads()} threads")
    for name, times in (("one copy", copies), ("stall of a save", stalls), ("whole save", wholes)):
        print(f"  {name:16} {statistics.median(times):7.3f} s median, {min(times):.3f} to {max(times):.3f} s")
    print(f"  verified load    {load_s:7.3f} s")
    print(f"  checksum         {hash_s:7.3f} s ({gigabytes / hash_s:.1f} GB/s)")
    ratio = statistics.median(s / c for s, c in zip(stalls, copies, strict=True))
    print(f"  stall / copy     {ratio:7.2f}   (goal: at most 1.2)")
