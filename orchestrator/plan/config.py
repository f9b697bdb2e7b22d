"""What a forecast takes for granted: kernels, the rate of failures, how long restarts and queues take, prices."""

from dataclasses import dataclass, field

ATTENTION = ("flash", "unfused")


@dataclass(kw_only=True)
class PlanConfig:
    """Ranges are [low, central, high]. Sources: docs/numbers.md."""

    name: str
    attention: str = "flash"  # flash | unfused: scores go through memory, as before 2022
    sequence_parallel: bool = True  # norms and residuals are shared among the tensor parallel ranks
    recompute_whole: bool = False  # full recomputation repeats a layer's last product too, as before torch 2.1
    recompute_alternate: bool = False  # selective repeats every second matrix product too, as torchtitan's (time only)
    async_tp: bool = False  # tensor parallel communication overlaps with products, as with compile=on since Hopper
    gradient_bytes: int = 4  # of one gradient on the network: 4 as the trainer reduces, 2 for bf16
    failures_per_1000_node_days: list[float] = field(default_factory=lambda: [2.34, 3.79, 16.0])  # nodes of 8 GPUs
    restart_s: list[float] = field(default_factory=lambda: [180.0, 600.0, 1800.0])  # from a failure to training again
    save_gb_per_s: float = 10.0  # per GPU, into the host's memory: for this long training waits for a save
    # For `arriero simulate`, with cluster.spare_nodes.
    rack_nodes: int = 16  # that fail together
    rack_share: float = 0.05  # of the failures take the whole rack (power, switch)
    failed_restart_share: float = 0.1  # of the restarts do not come up and are tried again
    repair_h: float = 24.0  # until a node that failed is back
    queue_wait_s: float = 3600.0  # mean wait for each node in place of one that failed, where no spare is left

    def problems(self) -> list[str]:
        found = []
        if self.attention not in ATTENTION:
            found.append(f"plan.attention={self.attention} is none of {', '.join(ATTENTION)}")
        for name in ("failures_per_1000_node_days", "restart_s"):
            value = getattr(self, name)
            if len(value) != 3 or sorted(value) != list(value) or value[0] < 0:
                found.append(f"plan.{name}={list(value)} must be three numbers from 0 up: [low,central,high]")
        for name in ("rack_share", "failed_restart_share"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"plan.{name}={getattr(self, name)} must be at least 0 and below 1")
        for name in ("save_gb_per_s", "gradient_bytes", "rack_nodes"):
            if getattr(self, name) <= 0:
                found.append(f"plan.{name}={getattr(self, name)} must be above 0")
        for name in ("repair_h", "queue_wait_s"):
            if getattr(self, name) < 0:
                found.append(f"plan.{name}={getattr(self, name)} must be 0 or more")
        return found
