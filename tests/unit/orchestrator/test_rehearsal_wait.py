"""When a rehearsal waits, and when no more."""

from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import spec as specs
from orchestrator.record import Event, JsonlWriter
from orchestrator.rehearsal import DidNotHold, _Rehearsal
from slurm.virtual import VirtualCluster


def test_a_requeue_that_nobody_asked_for_ends_the_wait(tmp_path: Path) -> None:
    cluster = VirtualCluster(directory=tmp_path, name="none", nodes=2, gpus_per_node=1, accounting=False, first_port=1)
    rehearsal = _Rehearsal(specs.compose([]), cluster, tmp_path / "run", Console(), [])
    with JsonlWriter(rehearsal.run_dir.events / "supervise.jsonl") as events:
        for cause in ("requeued", "crash"):
            events.write(
                Event(time_utc="2026-01-01T00:00:00.000Z", kind="requeued", step=3, detail=f"requeued: {cause}")
            )
    rehearsal.asked_requeues = 1
    with pytest.raises(DidNotHold, match="nobody asked for: requeued: crash"):
        rehearsal._wait(lambda: False, "a step")
    rehearsal.asked_requeues = 2
    rehearsal._wait(lambda: True, "a step")
