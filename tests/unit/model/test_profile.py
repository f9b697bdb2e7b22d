"""A trace holds the steps that it was asked for, and what can't be traced is told."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from model.config import ProfileConfig
from model.profile import StepProfiler


class Told(list[tuple[int, str]]):
    def __call__(self, kind: str, step: int, detail: str) -> None:
        assert kind == "profiled"
        self.append((step, detail))


def profiler(folder: Path, told: Told, rank: int = 0, **config: object) -> StepProfiler:
    asked = ProfileConfig(name="test", **config)  # type: ignore[arg-type]
    return StepProfiler(asked, folder, 1, rank, torch.device("cpu"), told, lambda step: None)


def traced(path: Path) -> dict[str, int]:
    """How many products each step's range holds."""
    events = [e for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if e.get("ph") == "X"]
    steps = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith("step ")}
    products = [e["ts"] for e in events if e["name"] == "aten::mm"]
    return {name: sum(begin <= t <= end for t in products) for name, (begin, end) in steps.items()}


def train(profiler: StepProfiler, steps: list[int]) -> None:
    for step in steps:
        profiler.step_begins(step)
        for _ in range(step):
            torch.mm(torch.ones(2, 2), torch.ones(2, 2))


def test_the_steps_that_were_asked_for_are_traced_each_in_its_range(tmp_path: Path) -> None:
    told = Told()
    watching = profiler(tmp_path / "profiles", told, first_step=3, steps=2)
    train(watching, [1, 2, 3, 4, 5, 2, 3, 4])  # goes back once
    watching.end()
    (path,) = (tmp_path / "profiles").iterdir()
    assert path.name == "attempt-0001-rank-0000-step-000000003.json.gz"
    assert traced(path) == {"step 3": 3, "step 4": 4}
    assert told == [(4, f"steps 3 to 4: {path} (opens in ui.perfetto.dev)")]


@pytest.mark.parametrize(("steps", "last"), [([2, 3], 3), ([2, 3, 1], 3)])
def test_a_start_that_ends_or_goes_back_in_the_middle_leaves_what_it_has(
    tmp_path: Path, steps: list[int], last: int
) -> None:
    told = Told()
    watching = profiler(tmp_path, told, first_step=2, steps=5)
    train(watching, steps)
    watching.end()
    (path,) = tmp_path.iterdir()
    assert traced(path) == {"step 2": 2, "step 3": 3}
    assert [step for step, _ in told] == [last]


def test_a_start_after_the_first_step_says_so_once_unless_an_earlier_one_has_traced(tmp_path: Path) -> None:
    for expected in (["nothing: this start trains from step 7 on, after profile.first_step"], []):
        told = Told()
        late = profiler(tmp_path, told, first_step=2)
        train(late, [7, 8])
        late.end()
        assert [detail for _, detail in told] == expected
        early = profiler(tmp_path, Told(), first_step=2)
        train(early, [2])
        early.end()


def test_ranks_that_were_not_asked_and_runs_without_a_first_step_trace_nothing(tmp_path: Path) -> None:
    told = Told()
    for quiet in (profiler(tmp_path, told, rank=1, first_step=1), profiler(tmp_path, told)):
        train(quiet, [1, 2])
        quiet.end()
    assert (list(tmp_path.iterdir()), told) == ([], [])


def test_a_trace_that_cannot_be_written_is_told_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = Told()
    watching = profiler(tmp_path / "file" / "profiles", told, first_step=1, steps=1)
    train(watching, [1, 2])
    assert [step for step, _ in told] == [1]
    assert "could not be written" in told[0][1]
