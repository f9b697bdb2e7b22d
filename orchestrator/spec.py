"""The whole configuration of a run: composes every section with Hydra, and checks across them before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashboards.config import DashboardConfig
from model.checkpoint.policy import CheckpointConfig
from model.config import ModelConfig, OptimConfig
from model.cost import GpuConfig
from model.data.config import DataConfig
from model.layout import Layout
from orchestrator.energy.config import CarbonConfig
from orchestrator.spikes.config import SpikesConfig
from slurm.request import ClusterConfig


class UserError(Exception):
    """The user's mistake: shown as text with exit code 2, never as a traceback."""


@dataclass(kw_only=True)
class RunSpec:
    """A run, resolved: what `spec.yaml` in its run directory holds."""

    name: str
    seed: int
    steps: int
    eval_every_steps: int
    run_root: str  # run directories are made below it
    model: ModelConfig
    data: DataConfig
    layout: Layout
    optim: OptimConfig
    cluster: ClusterConfig
    gpu: GpuConfig
    checkpoint: CheckpointConfig
    spikes: SpikesConfig
    carbon: CarbonConfig
    dashboard: DashboardConfig
    experiment: Any = None

    @property
    def run_dir(self) -> Path:
        return Path(self.run_root) / self.name

    @property
    def batch_tokens(self) -> int:
        return self.optim.batch_sequences * self.model.sequence_length

    def problems(self) -> list[str]:
        """Every combination that cannot be, all at once."""
        found = [p for p in (f"{f}={getattr(self, f)} must be at least 1" for f in ("steps", "eval_every_steps") if getattr(self, f) < 1)]
        sections = (self.model, self.data, self.optim, self.cluster, self.checkpoint, self.carbon, self.dashboard)
        for section in sections:
            found += section.problems()
        if not self.model.problems():
            found += self.layout.problems(
                self.model, self.optim.batch_sequences, self.cluster.gpus, self.cluster.gpus_per_node
            )
        if self.optim.warmup_steps >= self.steps:
            found.append(f"optim.warmup_steps={self.optim.warmup_steps} leaves no step of steps={self.steps} to train: lower it")
        return found
