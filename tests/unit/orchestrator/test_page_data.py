"""What the dashboards take of a run directory, and the frame in a terminal."""

from pathlib import Path

from rich.console import Console

from dashboards.terminal import frame
from orchestrator import spec as specs
from orchestrator.page_data import run_view
from orchestrator.record import Event, JsonlWriter
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
