"""A rank whose arithmetic goes wrong is named on every layout: exactly, or as one of those that compute each layer together."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_faults import run_ranks
from rank_trainer import make_trainer

from model.layout import Layout
from orchestrator.faults import Fault, write
from orchestrator.faulty_trainer import FaultyTrainer

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp x cp": {"dp_shard": 2, "cp": 2},
    "tp x pp": {"tp": 2, "pp": 2, "recompute": "selective"},
    "zero_bubble": {"pp": 2, "pipeline_schedule": "zero_bubble"},
}


def train(rank: int, layout: Layout, steps: int, faults: str) -> tuple[list[float], list[dict[str, Any]]]:
    """The loss of each step, and what each recomputation has found."""
    losses: list[float] = []
    found: list[dict[str, Any]] = []

    def event(kind: str, step: int, detail: str, /, **data: Any) -> None:
        if kind == "recomputed":
            found.append({"step": step, "detail": detail, **data})

    store: Any = SimpleNamespace(
        history_steps=list,
        load_latest=lambda state: None,
        save=lambda *_, **__: False,
        finish=lambda: None,
        is_idle=lambda within_s: True,
    )
    store.save_due = False
    trainer = make_trainer(rank, layout, steps, store, event, losses, kind=FaultyTrainer, faults=Path(faults))
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
