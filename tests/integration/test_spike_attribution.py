"""A rank whose arithmetic goes wrong is named on every layout: exactly, or as one of those that compute each layer together."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_faults import run_ranks

from model.checkpoint.policy import CheckpointConfig
from model.config import ModelConfig, OptimConfig
from model.layout import Layout
from model.parallel import place_ranks
from model.train import TrainConfig
from orchestrator.faults import Fault, write
from orchestrator.faulty_trainer import FaultyTrainer
from orchestrator.spikes.config import SpikesConfig
from orchestrator.spikes.watch import SpikeWatch
from slurm.pulse import Pulse

pytestmark = pytest.mark.slow

MODEL = ModelConfig(name="t", dim=32, n_layers=4, n_heads=4, ffn_dim=64, vocab_size=96, sequence_length=32)
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp x cp": {"dp_shard": 2, "cp": 2},
    "tp x pp": {"tp": 2, "pp": 2, "recompute": "selective"},
    "zero_bubble": {"pp": 2, "pipeline_schedule": "zero_bubble"},
}


class Rows:
    """A loader of random rows."""

    skips: tuple[Any, ...] = ()

    def batch(self, step: int, rank: int, ranks: int) -> Any:
        rows = np.random.default_rng(step).integers(0, MODEL.vocab_size, (8, MODEL.sequence_length + 1))
        return np.split(rows, ranks)[rank]

    def data_batch(self, step: int) -> int:
        return step


def train(rank: int, layout: Layout, steps: int, faults: str) -> tuple[list[float], list[dict[str, Any]]]:
    """The loss of each step, and what each recomputation has found."""
    losses: list[float] = []
    found: list[dict[str, Any]] = []

    def event(kind: str, step: int, detail: str, /, **data: Any) -> None:
        if kind == "recomputed":
            found.append({"step": step, "detail": detail, **data})

    recorder = SimpleNamespace(event=event, step=lambda **fields: losses.append(fields["loss"]))
    store: Any = SimpleNamespace(
        history_steps=list, load_latest=lambda state: None, save=lambda *_, **__: None, finish=lambda: None
    )
    store.retry_due = False
    rows: Any = Rows()
    gpu: Any = SimpleNamespace(peak_bf16_tflops=1.0)
    config = TrainConfig(
        seed=1,
        steps=steps,
        eval_every_steps=10**6,
        eval_rows_per_source=1,
        compute_dtype=torch.float32,
        compiled=False,
        model=MODEL,
        layout=layout,
        optim=OptimConfig(name="t", lr=1e-3, warmup_steps=1, batch_sequences=8),
        checkpoint=CheckpointConfig(name="t"),
        gpu=gpu,
    )
    watch = SpikeWatch(SpikesConfig(name="t"), [], list, rows.data_batch, event)
    trainer = FaultyTrainer(
        config,
        place_ranks(layout, torch.device("cpu")),
        rows,
        store,
        recorder,
        lambda: False,
        watch,
        f"node{rank}",
        Pulse(),
        faults=Path(faults),
    )
    trainer.evaluate = lambda: None  # type: ignore[method-assign]
    trainer.run()
    return losses, found


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_rank_struck_in_turn_is_named(name: str, tmp_path: Path) -> None:
    layout = Layout(name="t", **LAYOUTS[name])
    kinds = [(kind, rank) for rank in range(layout.gpus) for kind in ("nan", "nan_grad")]
    faults = tmp_path / "faults.json"
    write(faults, [Fault(kind=kind, rank=rank, step=2 + i) for i, (kind, rank) in enumerate(kinds)])
    steps = 2 + len(kinds)
    losses, found = run_ranks(train, layout.gpus, tmp_path, layout, steps, str(faults), timeout_s=150)[0]

    assert all(map(math.isfinite, losses))
    together = layout.tp * layout.cp
    assert [f["step"] for f in found] == list(range(2, steps))
    for (kind, rank), named in zip(kinds, found, strict=True):
        group = range(rank // together * together, (rank // together + 1) * together)
        assert named["cause"] == "hardware"
        assert rank in named["ranks"], (kind, rank, named)
        assert set(named["ranks"]) <= set(group), (kind, rank, named)
        assert named["nodes"] == sorted(f"node{r}" for r in named["ranks"])


def test_a_step_computed_again_leaves_no_trace(tmp_path: Path) -> None:
    layout, written = Layout(name="t", dp_shard=2), []
    for name, faults in (
        ("struck", [Fault(kind="nan", rank=1, step=3), Fault(kind="nan_grad", step=5)]),
        ("clean", []),
    ):
        write(tmp_path / f"{name}.json", faults)
        written += run_ranks(train, 2, tmp_path, layout, 8, str(tmp_path / f"{name}.json"), timeout_s=150)[:1]
    (struck, found), (clean, none) = written
    assert ([f["ranks"] for f in found], none) == ([[1], [0]], [])
    assert struck == clean
