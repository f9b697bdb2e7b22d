"""What the dashboards take of a run directory, and the frame in a terminal."""

from pathlib import Path

import pytest
from rich.console import Console

from dashboards.terminal import frame
from orchestrator import spec as specs
from orchestrator.page_data import RunFollower, run_view
from orchestrator.record import Event, JsonlWriter, unix_s, utc
from orchestrator.run_dir import RunDir


def test_watch_says_what_became_of_a_withheld_step_and_each_step_once(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    paths.spec.write_text(specs.to_yaml(specs.compose(["name=mine", "steps=200"])))
    with JsonlWriter(paths.events / "attempt-0001.jsonl") as writer:
        for second, (kind, said) in enumerate(
            (("withheld", "loss 9"), ("recomputed", "clipped"), ("recovered", "over"))
        ):
            time_utc = f"2026-11-24T03:53:0{second}.000Z"
            writer.write(Event(time_utc=time_utc, kind=kind, step=121, detail=f"step 121: {said}", attempt=1))
    console = Console(record=True, width=100)
    console.print(frame(run_view(tmp_path), 100))
    shown = console.export_text()
    for kind, said in (("withheld", "loss 9"), ("recomputed", "clipped"), ("recovered", "over")):
        (line,) = [line for line in shown.splitlines() if f" {kind} " in line]
        assert line.count("121") == 1
        assert said in line


@pytest.mark.parametrize(
    ("kinds", "files", "age_s", "state"),
    [
        ([], [], 0, "not started"),
        ([], ["cancelled"], 0, "cancelled"),
        (["started"], [], 10, "training"),
        (["started"], [], 1000, "no sign of life"),
        (["started"], ["cancelled"], 10, "training"),  # it is saving
        (["started"], ["cancelled"], 1000, "cancelled"),
        (["started", "stopped"], [], 10, "stopped"),
        (["started", "stopped"], ["submission.json"], 10, "stopping"),
        (["started", "stopped"], ["submission.json"], 100, "stopped"),
        (["started", "stopped"], ["submission.json", "cancelled"], 10, "cancelled"),
        (["started", "stopped", "requeued"], ["submission.json"], 1000, "queued"),
        (["started", "stopped", "requeued", "started"], ["submission.json"], 10, "training"),
        (["started", "failed"], [], 1000, "failed"),
        (["started", "stopped", "cancelled"], ["submission.json"], 10, "cancelled"),
        (["started", "finished"], ["submission.json"], 1000, "finished"),
    ],
)
def test_a_state_is_told_as_the_directory_has_it(
    kinds: list[str], files: list[str], age_s: float, state: str, tmp_path: Path
) -> None:
    paths = RunDir(tmp_path)
    paths.spec.write_text(specs.to_yaml(specs.compose(["name=mine"])))
    for file in files:
        (tmp_path / file).write_text("{}")
    start_s = unix_s("2026-11-24T03:53:00.000Z")
    with JsonlWriter(paths.events / "attempt-0001.jsonl") as writer:
        for second, kind in enumerate(kinds):
            writer.write(Event(time_utc=utc(start_s + second), kind=kind, step=1, detail="", attempt=1))
    now_s = start_s + max(0, len(kinds) - 1) + age_s
    assert RunFollower(tmp_path, 100).view(now_s).state == state
