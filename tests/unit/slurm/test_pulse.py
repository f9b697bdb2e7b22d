"""When a rank is late: told the time, nothing else."""

import mmap

import pytest

from slurm.pulse import FLOOR_S, PHASES, SIZE_BYTES, Beat, Pulse, Watch


def beat(count: int, phase: str = "compute", steps: int = 5) -> Beat:
    return Beat(count, phase, 10, steps, 0.0)


def seconds_until_late(watch: Watch, standing: Beat, most_s: float = 5000.0, every_s: float = 0.5) -> float | None:
    now_s = 1000.0
    watch.look(now_s, standing)
    while now_s < 1000.0 + most_s:
        now_s += every_s
        if watch.look(now_s, standing) is not None:
            return now_s - 1000.0
    return None


def test_the_keeper_reads_what_the_rank_writes_through_shared_memory() -> None:
    memory = mmap.mmap(-1, SIZE_BYTES)
    rank, keeper = Pulse(), Pulse()
    rank.attach(memory)
    keeper.attach(memory)
    rank("data", 7)
    rank("collective", 7)
    rank.stepped(0.25)
    rank.stepped(0.5)
    assert keeper.read() == Beat(2, "collective", 7, 2, 0.75)


@pytest.mark.parametrize(
    ("standing", "allowed_s"),
    [(beat(1), 3.0), (beat(1, steps=0), 600.0), *((beat(1, p), 600.0) for p in ("start", "load", "evaluate", "save"))],
)
def test_a_step_has_its_deadline_and_what_takes_longer_another(standing: Beat, allowed_s: float) -> None:
    late_s = seconds_until_late(Watch(3.0, 600.0), standing)
    assert late_s == pytest.approx(allowed_s, abs=1.0)


def test_without_a_deadline_it_follows_the_steps_and_never_falls_below_the_floor() -> None:
    for step_s, expected_s in ((0.5, FLOOR_S), (40.0, 5 * 40.0)):
        watch, now_s = Watch(None, 600.0), 0.0
        for step in range(10):
            for n in range(int(step_s / 0.5)):
                now_s += 0.5
                watch.look(now_s, Beat(step * 1000 + n, "compute", step, step, 0.0))
        assert watch.allowed_s(beat(1, steps=9)) == pytest.approx(expected_s, rel=0.05)


def test_time_in_which_nobody_looked_is_not_the_ranks() -> None:
    watch = Watch(3.0, 600.0)
    assert watch.look(0.0, beat(1)) is None
    assert watch.look(500.0, beat(1)) is None  # the whole job was suspended
    assert watch.look(501.0, beat(1)) is None
    assert watch.look(501.5, beat(2)) is None


def test_phases_of_a_step_stand_in_its_order() -> None:
    assert [PHASES.index(p) for p in ("data", "compute", "collective", "update")] == sorted(
        PHASES.index(p) for p in ("data", "compute", "collective", "update")
    )
