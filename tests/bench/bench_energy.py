"""What the energy account costs: the sampler beside a run, and the report over a ledger of a long one."""

import os
import time
from pathlib import Path

import psutil

from orchestrator.energy.ledger import EnergyReading, Tick, consumption, encode, read_ledger
from orchestrator.energy.sampler import start_sampler

WATCH_S = 20.0


def test_sampler_cpu_time(tmp_path: Path) -> None:
    for sample_s in (1.0, 15.0):
        run = tmp_path / f"every-{sample_s:g}-s"
        begun = time.monotonic()
        sampler = start_sampler(run, 1, os.getpid(), sample_s)
        ledger = run / "energy"
        while not list(ledger.glob("*.jsonl")) or not next(ledger.iterdir()).read_text():
            time.sleep(0.1)
        process = psutil.Process(sampler.pid)
        start_cpu_s, start_s = sum(process.cpu_times()[:2]), time.monotonic()
        time.sleep(WATCH_S)
        cpu_s, seconds = sum(process.cpu_times()[:2]) - start_cpu_s, time.monotonic() - start_s
        memory_mb = process.memory_info().rss / 1e6
        sampler.terminate()
        sampler.wait(timeout=30)
        print(
            f"\nsampler, every {sample_s:g} s: {start_s - begun:.1f} s and {start_cpu_s:.1f} CPU-s until its first line, "
            f"then {100 * cpu_s / seconds:.3f}% of one core ({100 * cpu_s / seconds / os.cpu_count():.3f}% of this node's "
            f"{os.cpu_count()}, {100 * cpu_s / seconds / 128:.4f}% of 128), {memory_mb:.0f} MB"
        )


def test_report_of_a_long_run(tmp_path: Path) -> None:
    """One node of eight GPUs for two days at 15 s: times 256 nodes and 10 for a run of LLaMA-65B."""
    path = tmp_path / "0001-n1.jsonl"
    ticks = 2 * 24 * 240
    with path.open("w") as out:
        for i in range(ticks):
            gpus = [EnergyReading(f"GPU-{g:036d}", 1e9 + 350.0 * 15 * i, "counter") for g in range(8)]
            host = [
                EnergyReading("n1/cpu", 200.0 * 15 * i, "modelled"),
                EnergyReading("n1/ram", 60.0 * 15 * i, "modelled"),
            ]
            out.write(encode(Tick(1.79e9 + 15 * i, "n1", "b", "s", 1, "7", (*gpus, *host))))
    start_s = time.perf_counter()
    read, _ = read_ledger(path)
    read_s = time.perf_counter() - start_s
    found = consumption(read)
    total_s = time.perf_counter() - start_s
    print(
        f"\nreport: {ticks} lines ({path.stat().st_size / 1e6:.1f} MB) read in {read_s:.2f} s, accounted in "
        f"{total_s - read_s:.2f} s ({len(found.intervals)} intervals)"
    )
