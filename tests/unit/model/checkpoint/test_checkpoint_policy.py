"""When to save, what is history, what to keep: functions of plain data."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint.policy import (
    CheckpointConfig,
    CheckpointInfo,
    SaveSchedule,
    best_interval,
    history,
    keep,
    parse,
    removable,
)


def config(**values: object) -> CheckpointConfig:
    return CheckpointConfig(name="test", **values)  # type: ignore[arg-type]


def info(step: int, epoch: int = 1, **values: bool) -> CheckpointInfo:
    return CheckpointInfo(step=step, epoch=epoch, **values)  # type: ignore[arg-type]


infos = st.builds(
    CheckpointInfo,
    step=st.integers(0, 30),
    epoch=st.integers(1, 5),
    attempt=st.integers(1, 3),
    committed=st.booleans(),
    vetted=st.booleans(),
)
resumes = st.dictionaries(st.integers(1, 6), st.none() | st.integers(0, 30))


def saves(schedule: SaveSchedule, steps: range) -> list[int]:
    found = []
    for step in steps:
        if step == schedule.next_step:
            found.append(step)
            schedule.went_by(step)
    return found


def test_saves_at_the_multiples_wherever_a_start_stands() -> None:
    schedule = SaveSchedule(config(every_steps=10), 50, 1.0)
    assert saves(schedule, range(1, 26)) == [10, 20]
    schedule.stand_at(13, [13, 10], every_steps=7)  # of another time, when it was auto
    assert saves(schedule, range(14, 41)) == [20, 30, 40]


def test_auto_saves_early_and_then_so_many_steps_after_the_last_save() -> None:
    schedule = SaveSchedule(config(every_steps="auto"), 50, 1.0)
    assert saves(schedule, range(1, 12)) == [10]
    schedule.stand_at(120, [120, 90, 130], every_steps=30)
    assert (saves(schedule, range(121, 200)), schedule.saved_steps) == ([150, 180], {120, 90})


@pytest.mark.parametrize(
    ("took", "steps", "why"),
    [
        (
            {},
            447,
            "a save stalls 10 s, a step takes 2 s, a failure comes every 11.1 h",
        ),  # sqrt(2 x 10 x 40000) = 894.4 s
        ({"stall_s": 0.0}, 30, "auto_min_s=60"),
        ({"mttf_s": math.inf}, 1800, "auto_max_s=3600"),
        ({"mttf_s": math.inf, "write_s": 5000.0}, 3000, "a save takes 5e.03 s to be written"),
        ({"stall_s": 0.1, "step_s": 100.0}, 25, "a rewind needs a checkpoint 50 steps old"),
    ],
)
def test_the_best_interval_is_youngs_within_its_bounds(took: dict[str, float], steps: int, why: str) -> None:
    found = best_interval(config(), 50, **{"step_s": 2.0, "stall_s": 10.0, "write_s": 20.0, "mttf_s": 40000.0, **took})
    assert found.steps == steps
    assert found.steps >= found.least_steps >= 25  # of three that are kept the oldest gets 50 steps old
    assert re.search(why, found.why)


def test_an_interval_stays_until_it_matters_or_must_not_be_so_short() -> None:
    schedule = SaveSchedule(config(every_steps="auto"), 50, 40000.0)
    assert schedule.tune(2.0, 10.0, 20.0)
    assert [schedule.tune(2.0, stall_s, 20.0) for stall_s in (12.0, 8.0, 14.0, 7.0)] == [None] * 4
    assert schedule.tune(2.0, 20.0, 20.0)
    assert schedule.every_steps == 632
    assert schedule.tune(2.0, 20.0, 1054.0)  # by one step, but the next save would meet this one
    assert schedule.every_steps == 633
    assert schedule.tune(2.0, 5.0, 20.0)
    assert schedule.every_steps == 316


def test_only_saves_young_enough_are_asked_for_when_they_are_vetted() -> None:
    schedule = SaveSchedule(config(), 50, 1.0)
    for step in range(20, 121, 20):
        schedule.began(step, 1.0)
    assert schedule.saved_steps == {80, 100, 120}


def test_keeps_the_last_each_nth_and_the_vetted() -> None:
    all_of_them = [info(s, vetted=s == 3) for s in range(1, 11)]
    kept = keep(all_of_them, config(keep_last=2, keep_every_steps=5), {1: 0})
    assert {c.step for c in kept} == {3, 5, 9, 10}
    assert {c.step for c in keep(all_of_them, config(keep_last=1, keep_vetted=0), {1: 0})} == {10}


def test_a_zombies_late_commit_is_no_history() -> None:
    """Epoch 4 went on from 400; then epoch 3, long fenced, commits 500."""
    checkpoints = [info(400, 3), info(500, 3), info(450, 4)]
    assert [c.step for c in history(checkpoints, {3: 0, 4: 400})] == [450, 400]


def test_a_branch_that_was_rewound_is_no_history_and_goes() -> None:
    checkpoints = [info(s, 1) for s in (100, 200, 300)] + [info(250, 2)]
    resumed = {1: 0, 2: 200}
    assert [c.step for c in history(checkpoints, resumed)] == [250, 200, 100]
    assert [c.step for c in removable(checkpoints, config(keep_last=2), resumed, epoch=2)] == [100, 300]


def test_a_writer_that_has_not_said_where_it_went_on_from_hides_nothing() -> None:
    assert [c.step for c in history([info(500, 3)], {3: 0, 4: None})] == [500]


def test_debris_is_removed_but_never_a_newer_writers() -> None:
    debris = [info(5, 1, committed=False), info(6, 2, committed=False), info(7, 3, committed=False)]
    found = removable([*debris, info(4, 1)], config(), {}, epoch=2)
    assert [c.step for c in found] == [5, 6]


@given(st.lists(infos, unique_by=lambda c: c.order), resumes, st.integers(1, 4), st.integers(0, 7))
def test_retention_never_removes_the_newest_of_the_history(
    checkpoints: list[CheckpointInfo], resumed: dict[int, int | None], last: int, every: int
) -> None:
    settings = config(keep_last=last, keep_every_steps=every)
    lived = history(checkpoints, resumed)
    gone = removable(checkpoints, settings, resumed, epoch=9)
    assert not set(lived[:last]) & set(gone)
    assert not set([c for c in lived if c.vetted][:2]) & set(gone)
    assert not {c for c in lived if every and c.step % every == 0} & set(gone)
    # What stays has the same history, and removing is done in one go.
    left = [c for c in checkpoints if c not in gone]
    assert history(left, resumed)[:1] == lived[:1]
    assert removable(left, settings, resumed, epoch=9) == []


@given(st.lists(infos, unique_by=lambda c: c.order), resumes)
def test_history_goes_by_steps_and_never_back_in_epochs(
    checkpoints: list[CheckpointInfo], resumed: dict[int, int | None]
) -> None:
    """Where every writer said from which step it went on, and saved only later ones, newer epochs hold newer steps."""
    said = {e: s or 0 for e, s in resumed.items()}
    real = [c for c in checkpoints if c.epoch in said and c.step > said[c.epoch]]
    epochs = [c.epoch for c in history(real, said)]
    assert epochs == sorted(epochs, reverse=True)


@given(infos)
def test_a_name_tells_what_it_is(checkpoint: CheckpointInfo) -> None:
    files = ["COMMITTED"] * checkpoint.committed + ["VETTED"] * checkpoint.vetted
    assert parse(checkpoint.name, files) == checkpoint
    assert parse(checkpoint.name + "x", files) is None


def test_settings_that_cannot_be_are_named() -> None:
    wrong = config(every_steps=0, keep_last=0, keep_every_steps=-1, retries=-1, retry_wait_s=-1, write_timeout_s=0,
                   auto_min_s=9, auto_max_s=8)  # fmt: skip
    assert len(wrong.problems()) == 7
    for every in ("often", 1.5, True, -1):
        assert len(config(every_steps=every).problems()) == 1
    assert config().problems() == []
