"""`arriero plan --dry-run`: memory of every rank shape as the trainer's own code takes it, beside the plan's arithmetic.

Torch runs in a process of its own (model/dry_run.py), so that `arriero plan` never imports it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from orchestrator.errors import Failure
from orchestrator.plan import forecast
from orchestrator.plan.memory import memory, rank_memory
from orchestrator.spec import RunSpec

PARTS = ("parameters_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "buffers_bytes", "total_bytes")


def dry_run(spec: RunSpec, as_json: bool) -> int:
    """Prints one line a rank shape as it is found. Raises UserError, and Failure where the trainer's code fails."""
    spec = forecast.resolved(spec)
    found = []
    if not as_json:
        print(f"{spec.model.name} on {spec.layout.gpus:,} ranks: {forecast.layout_sentence(spec.layout)}")
        print(
            "GB of tensors a rank, of the plan in brackets; the peak is not the sum: activations go as gradients come\n"
        )
        print(f"{'pp stage':>8} {'ranks':>6}" + "".join(f"{_title(part):>20}" for part in PARTS))
    for shape in rank_shapes(spec):
        stage = shape["pp_stage"]
        planned = asdict(rank_memory(spec.model, spec.layout, spec.plan, spec.optim.batch_sequences, stage))
        planned["total_bytes"] -= planned.pop("overhead_bytes")
        found.append({**shape, "planned": planned})
        if not as_json:
            cells = (f"{shape[p] / 1e9:.3f} ({planned[p] / 1e9:.3f})" for p in PARTS)
            print(f"{stage:>8} {shape['ranks']:>6}" + "".join(f"{c:>20}" for c in cells), flush=True)
    most = max(shape["total_bytes"] for shape in found)
    overhead = memory(spec.model, spec.layout, spec.plan, spec.optim.batch_sequences).overhead_bytes
    fits = most + overhead <= spec.gpu.memory_gb * 1e9
    if as_json:
        print(json.dumps({"layout": asdict(spec.layout), "rank_shapes": found, "peak_bytes": most,
                          "planned_overhead_bytes": overhead, "fits": fits}, indent=2))  # fmt: skip
        return 0
    print(
        f"\n{len(found)} rank shape(s) of {spec.layout.gpus:,} ranks; the fullest peaks at {most / 1e9:.2f} GB of tensors, with "
        f"{overhead / 1e9:.2f} GB of context and fragmentation (assumed) {(most + overhead) / 1e9:.2f} GB; "
        f"gpu={spec.gpu.name} has {spec.gpu.memory_gb:g} GB" + ("" if fits else ": it does not fit")
    )
    return 0


def rank_shapes(spec: RunSpec) -> Iterator[dict[str, Any]]:
    """model.dry_run.RankMemory of each rank shape of a closed layout, as they come. Raises Failure."""
    asked = {"model": asdict(spec.model), "layout": asdict(spec.layout),
             "batch_sequences": spec.optim.batch_sequences}  # fmt: skip
    words = [sys.executable, "-P", "-c", "from model.dry_run import main; main()"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        errors = process.stderr.read()
    if process.returncode:
        raise Failure(f"the trainer's code cannot build this layout:\n{errors[-2000:]}")


def _title(part: str) -> str:
    return "peak" if part == "total_bytes" else part.removesuffix("_bytes")
