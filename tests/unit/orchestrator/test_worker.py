"""What rank 0 writes down of the steps, where a run is started twice at one moment."""

from pathlib import Path
from typing import Any

from orchestrator.record import kept_steps, read_all_steps
from orchestrator.run_dir import RunDir
from orchestrator.worker import RunRecorder


def step(number: int) -> dict[str, Any]:
    return {"step": number, "tokens": number, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "step_s": 1.0, "tokens_per_s": 1.0,
            "mfu": None}  # fmt: skip


def test_records_of_the_start_that_goes_on_are_read_last_whichever_attempt_it_is(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    first, second, third = (RunRecorder(run, run.take_attempt(), is_main=True) for _ in range(3))
    third.is_overtaken = lambda: True  # by the first, which takes its epoch last
    second.step(**step(1))
    for recorder, numbers in ((first, (1, 2)), (second, (2, 3)), (third, (1, 2, 3, 4)), (first, (3,))):
        for number in numbers:
            recorder.step(**step(number))
    assert [(r.attempt, r.step) for r in kept_steps(read_all_steps(run.records))] == [(1, 1), (1, 2), (1, 3)]
    assert {r.attempt for r in read_all_steps(run.records)} == {1, 2}


def test_a_start_by_itself_has_files_of_its_number_also_after_one_without_a_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for attempt in (1, 2, 3):
        recorder = RunRecorder(run, run.take_attempt(), is_main=True)
        if attempt != 2:
            recorder.step(**step(attempt))
    assert sorted(p.name for p in run.records.iterdir()) == ["attempt-0001.jsonl", "attempt-0003.jsonl"]
