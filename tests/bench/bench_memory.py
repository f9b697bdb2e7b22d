"""The plan's memory against the trainer's own code (`model/dry_run.py`) on random layouts of LLaMA's widths.

    python tests/bench/bench_memory.py [--layouts 100] [--seed 1]

Prints each layout that is over 5% off, and their number. A layout takes some seconds; none is chosen for how it comes out.
"""

import argparse
import random
import warnings

from model.dry_run import dry_run
from orchestrator import spec as specs
from orchestrator.errors import UserError
from orchestrator.plan.memory import memory
from orchestrator.spec import RunSpec


def draw(rng: random.Random) -> RunSpec | None:
    """None where what was drawn cannot be."""
    pp, tp, cp = rng.choice([1, 1, 2, 2, 3, 4]), rng.choice([1, 1, 2, 4]), rng.choice([1, 1, 1, 2])
    shards, replicas, rows = rng.choice([1, 2, 4]), rng.choice([1, 1, 2]), rng.choice([1, 2, 3, 4])
    schedule = rng.choice(["1f1b", "interleaved_1f1b", "zero_bubble"]) if pp > 1 else "1f1b"
    groups = rng.choice([1, 2, 3, 4, 5]) if schedule != "1f1b" else 1
    recompute = rng.choice(["none", "selective", "full"]) if schedule != "zero_bubble" else "none"
    words = [
        f"model={rng.choice(['llama_7b', 'llama_13b', 'llama_65b', 'llama2_70b', 'llama3_8b'])}",
        f"model.vocab_size={rng.choice([32_000, 32_000, 128_256])}",
        f"model.sequence_length={rng.choice([2048, 4096, 8192])}",
        f"model.n_layers={rng.randint(max(8, pp * groups), max(24, 3 * pp * groups))}",
        f"layout.pp={pp}", f"layout.tp={tp}", f"layout.cp={cp}", f"layout.dp_shard={shards}",
        f"layout.dp_replicate={replicas}", f"layout.microbatch_sequences={rows}", f"layout.recompute={recompute}",
        f"layout.pipeline_schedule={schedule}", f"layout.virtual_stages={groups}", "cluster=slurm", "cluster.nodes=1",
        f"cluster.gpus_per_node={pp * tp * cp * shards * replicas}",
        f"optim.batch_sequences={rows * shards * replicas * rng.randint(1, 10)}",
    ]  # fmt: skip
    try:
        return specs.compose(words)
    except UserError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    rng, off = random.Random(args.seed), []
    while len(off) < args.layouts:
        if (spec := draw(rng)) is None:
            continue
        batch = spec.optim.batch_sequences
        fullest = max(dry_run(spec.model, spec.layout, batch), key=lambda shape: shape.total_bytes)
        planned = memory(spec.model, spec.layout, spec.plan, batch)
        off.append((planned.total_bytes - planned.overhead_bytes) / fullest.total_bytes - 1)
        if abs(off[-1]) > 0.05:
            model = f"{spec.model.name}, {spec.model.n_layers} layers, {spec.model.sequence_length} tokens a row"
            print(
                f"{off[-1]:+.1%} of {fullest.total_bytes / 1e9:.1f} GB: {model}, batch {batch}, {spec.layout}",
                flush=True,
            )
    over = sum(abs(o) > 0.05 for o in off)
    print(f"{len(off)} layouts: {over} over 5% off, from {min(off):+.1%} to {max(off):+.1%}")


if __name__ == "__main__":
    main()
