"""A trainer of a small model on random rows, made by a rank of a test itself, without a command or a run directory."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from model.checkpoint.policy import CheckpointConfig
from model.config import ModelConfig, OptimConfig, ProfileConfig
from model.layout import Layout
from model.parallel import place_ranks
from model.profile import StepProfiler
from model.train import TrainConfig, Trainer
from orchestrator.spikes.config import SpikesConfig
from orchestrator.spikes.watch import SpikeWatch
from slurm.pulse import Pulse

MODEL = ModelConfig(name="t", dim=32, n_layers=4, n_heads=4, ffn_dim=64, vocab_size=96, sequence_length=32)


class Rows:
    """A loader of random rows."""

    skips: tuple[Any, ...] = ()

    def batch(self, step: int, rank: int, ranks: int) -> Any:
        rows = np.random.default_rng(step).integers(0, MODEL.vocab_size, (8, MODEL.sequence_length + 1))
        return np.split(rows, ranks)[rank]

    def data_batch(self, step: int) -> int:
        return step


def make_trainer(
    rank: int,
    layout: Layout,
    steps: int,
    store: Any,
    event: Callable[..., None],
    losses: list[float],
    *,
    kind: type[Trainer] = Trainer,
    checkpoint: CheckpointConfig | None = None,
    vet_steps: int = 50,
    mttf_s: float = math.inf,
    **more: Any,
) -> Trainer:
    """One that never evaluates, and appends the loss of each step to `losses`."""
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
        checkpoint=checkpoint or CheckpointConfig(name="t"),
        vet_steps=vet_steps,
        mttf_s=mttf_s,
        gpu=gpu,
    )
    trainer = kind(
        config,
        place_ranks(layout, torch.device("cpu")),
        rows,
        store,
        SimpleNamespace(event=event, step=lambda **fields: losses.append(fields["loss"])),
        lambda: None,
        SpikeWatch(SpikesConfig(name="t", vet_steps=vet_steps), [], list, rows.data_batch, event),
        f"node{rank}",
        Pulse(),
        StepProfiler(ProfileConfig(name="t"), Path(), 1, rank, torch.device("cpu"), event, lambda step: None),
        **more,
    )
    trainer.evaluate = lambda: None  # type: ignore[method-assign]
    return trainer
