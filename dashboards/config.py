"""Where a run is shown."""

from dataclasses import dataclass

WANDB_MODES = ("online", "offline", "disabled")


@dataclass(kw_only=True)
class DashboardConfig:
    name: str
    wandb: str = "disabled"  # online | offline | disabled
    project: str = "arriero"
    entity: str | None = None

    def problems(self) -> list[str]:
        if self.wandb not in WANDB_MODES:
            return [f"dashboard.wandb={self.wandb} is none of {', '.join(WANDB_MODES)}"]
        return []
