"""checkpoint.every_steps=auto on real ranks, with a store that is slow."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_faults import Events, FaultyFileSystem, make_store, run_ranks
from rank_trainer import make_trainer

from model.checkpoint.policy import FIRST_SAVE_STEPS, WRITE_MARGIN
from model.layout import Layout

pytestmark = pytest.mark.slow
STEPS = 40
WRITE_STEPS = 8  # that a write takes
MTTF_S = 1e-3  # saves cost next to nothing beside it: without bounds every step would be saved


def train(rank: int, folder: str, steps: int, every_steps: Any, ranks: int) -> dict[str, Any]:
    events, store_events, losses = [], Events(), []  # type: ignore[var-annotated]

    def event(kind: str, step: int, detail: str, /, **data: Any) -> None:
        events.append({"kind": kind, "step": step, **data})

    def write_for_some_steps() -> None:
        begun = trainer.step
        while trainer.step < min(begun + WRITE_STEPS, steps):
            time.sleep(0.001)

    FaultyFileSystem.faults["open", "manifest"] = write_for_some_steps
    store = make_store(
        f"faulty://{folder}", store_events, every_steps=every_steps, auto_min_s=0.0, keep_last=2,
    )  # fmt: skip
    trainer = make_trainer(
        rank, Layout(name="t", dp_shard=ranks), steps, store, event, losses,
        checkpoint=store.config, vet_steps=4, mttf_s=MTTF_S,
    )  # fmt: skip
    assert trainer.run() == "finished"
    return {
        "losses": losses,
        "events": events,
        "saved": [step for kind, step, _ in store_events if kind == "saved"],
        "every_steps": trainer.schedule.every_steps,
        "vetted": [c.step for c in store.steps() if c.vetted],
    }


def test_a_slow_store_makes_the_interval_grow_on_all_ranks_alike_and_changes_no_loss(tmp_path: Path) -> None:
    first, other = run_ranks(train, 2, tmp_path, str(tmp_path / "auto"), STEPS, "auto", 2, timeout_s=150)
    fixed, _ = run_ranks(train, 2, tmp_path, str(tmp_path / "fixed"), STEPS, 1000, 2, timeout_s=150)
    changes = [e for e in first["events"] if e["kind"] == "save_interval"]
    assert changes == [e for e in other["events"] if e["kind"] == "save_interval"]  # both were told the slower's times
    assert first["every_steps"] == other["every_steps"] == changes[-1]["every_steps"]
    assert first["saved"][0] == FIRST_SAVE_STEPS
    assert changes[0]["every_steps"] == 4  # retention keeps two: four steps between them are vetted
    last = changes[-1]
    assert last["every_steps"] == math.ceil(WRITE_MARGIN * last["write_s"] / last["step_s"]) > 4
    assert first["losses"] == other["losses"] == fixed["losses"]
    assert first["vetted"]

    again = run_ranks(train, 1, tmp_path, str(tmp_path / "auto"), STEPS + first["every_steps"] + 1, "auto", 1)[0]
    assert again["saved"][0] == STEPS + first["every_steps"]  # it goes on with the interval that it had
