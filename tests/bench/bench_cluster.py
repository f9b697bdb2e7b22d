"""How long a virtual cluster of 2,048 GPUs takes: up, all tasks running, down."""

import time

from slurm.virtual import VirtualCluster


def test_bench_cluster() -> None:
    begun = time.monotonic()
    with VirtualCluster.up(nodes=256, gpus_per_node=8, name="bench") as cluster:
        print(f"\n256 nodes x 8 GPUs up: {cluster.up_s:.1f} s")
        started = time.monotonic()
        done = cluster.command("srun", "-N256", "--ntasks-per-node=8", "--gres=gpu:8", "true", timeout_s=280)
        print(f"srun of 2,048 tasks: {time.monotonic() - started:.1f} s (exit code {done.returncode})")
        started = time.monotonic()
    print(f"down: {time.monotonic() - started:.1f} s; in all {time.monotonic() - begun:.1f} s")
