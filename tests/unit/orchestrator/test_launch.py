"""What a launch writes before anything is submitted."""

import json
from dataclasses import replace
from pathlib import Path

from orchestrator import launch
from orchestrator import spec as specs
from orchestrator.record import Event, JsonlWriter, utc_now
from orchestrator.run_dir import RunDir


def test_a_run_is_graded_by_what_was_expected_at_its_first_start(tmp_path: Path) -> None:
    spec = specs.compose(["experiment=llama_7b"])
    slower = replace(spec, gpu=replace(spec.gpu, matmul_fraction=0.3))
    run_dir = RunDir(tmp_path)

    def written() -> float:
        return float(json.loads(run_dir.plan.read_text())["tokens_per_s"]["central"])

    launch.write_plan(run_dir, launch.forecast_of(slower, 0.0))
    refused = written()
    launch.write_plan(run_dir, launch.forecast_of(spec, 0.0))  # it never started: what was expected then is gone
    first = written()
    assert first > refused
    launch.write_plan(run_dir, None)
    assert not run_dir.plan.exists()

    launch.write_plan(run_dir, launch.forecast_of(spec, 0.0))
    run_dir.events.mkdir()
    with JsonlWriter(run_dir.events / "rank0.jsonl") as events:
        events.write(Event(time_utc=utc_now(), kind="started", step=0, detail=""))
    launch.write_plan(run_dir, launch.forecast_of(slower, 0.0))
    launch.write_plan(run_dir, None)
    assert written() == first
