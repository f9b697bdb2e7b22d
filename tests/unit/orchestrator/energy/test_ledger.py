"""The ledger against a made-up world whose true energy is known."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.energy.ledger import (
    Consumption,
    EnergyReading,
    LedgerWriter,
    Tick,
    consumption,
    decode,
    encode,
    read_ledger,
)

T0 = 1_790_000_000.0


def power_w(time_s: float) -> float:
    """A GPU at 300 W, 400 W every second minute."""
    return 400.0 if int(time_s // 60) % 2 else 300.0


def true_j(start_s: float, end_s: float) -> float:
    whole = [start_s, *(m for m in range(int(start_s // 60) * 60 + 60, int(end_s) + 1, 60) if m < end_s), end_s]
    return sum(power_w(a) * (b - a) for a, b in pairwise(whole))


def counter(time_s: float) -> float:
    """NVML's counter: joules since the driver was loaded, long before the run."""
    return 5e6 + true_j(T0 - 3600, time_s)


def tick(time_s: float, *readings: EnergyReading, node: str = "n1", attempt: int = 1, **fields: str) -> Tick:
    fields = {"boot": f"boot-{node}", "sampler": f"s{attempt}", "job": "7", "run": "r"} | fields
    return Tick(time_s=time_s, node=node, attempt=attempt, readings=readings, **fields)


def gpu(time_s: float, value: Callable[[float], float] = counter, **fields: object) -> EnergyReading:
    return EnergyReading("GPU-1", value(time_s), "counter", **fields)  # type: ignore[arg-type]


def series(start_s: float, end_s: float, every_s: float = 15.0, **fields: object) -> list[Tick]:
    """A sampler that reads GPU-1 from one time to another."""
    count = int((end_s - start_s) // every_s)
    return [
        tick(t, gpu(t), **fields)  # type: ignore[arg-type]
        for t in [start_s + i * every_s for i in range(count + 1)] + [end_s]
    ]


def total(found: Consumption, source: str | None = None) -> float:
    return sum(i.joules for i in found.intervals if source in (None, i.source))


def test_a_counter_gives_the_true_energy():
    found = consumption(series(T0, T0 + 3600))
    assert total(found) == pytest.approx(true_j(T0, T0 + 3600), rel=1e-6)
    assert {i.source for i in found.intervals} == {"counter"}


def test_a_killed_and_restarted_sampler_loses_no_energy_of_a_hardware_counter():
    first, second = series(T0, T0 + 600, sampler="a"), series(T0 + 1290, T0 + 1800, sampler="b")
    assert total(consumption(first + second)) == pytest.approx(true_j(T0, T0 + 1800), rel=1e-6)


def test_two_samplers_of_one_node_count_it_once():
    shifted = series(T0 + 7, T0 + 1797, sampler="b")
    both = consumption(series(T0, T0 + 1800, sampler="a") + shifted)
    assert total(both) == pytest.approx(true_j(T0, T0 + 1800), rel=1e-6)


def test_two_modelled_sums_of_one_device_count_it_once():
    def cpu(t: float, since: float, sampler: str) -> Tick:
        return tick(t, EnergyReading("n1/cpu", 100 * (t - since), "modelled"), sampler=sampler)

    ticks = [cpu(T0 + 15 * i, T0, "a") for i in range(41)] + [cpu(T0 + 4 + 15 * i, T0 + 4, "b") for i in range(40)]
    assert total(consumption(ticks)) == pytest.approx(100 * 600, rel=1e-6)


def test_a_driver_reset_is_estimated_and_tagged():
    reset_s = T0 + 1807

    def reloaded(t: float) -> float:
        return counter(t) if t < reset_s else true_j(reset_s, t)

    found = consumption([tick(T0 + 15 * i, gpu(T0 + 15 * i, reloaded)) for i in range(241)])
    assert total(found) == pytest.approx(true_j(T0, T0 + 3600), rel=0.01)
    estimated = [i for i in found.intervals if i.source == "estimated"]
    assert [(i.start_s, i.end_s) for i in estimated] == [(T0 + 1800, T0 + 1815)]


@pytest.mark.parametrize("gap_s", [15, 1500])  # one wrap between two readings, and several in a gap
def test_a_wrapped_counter_goes_on(gap_s: int):
    wraps_at_j = 65_536.0

    def cpu(t: float) -> Tick:
        value = (1e6 + 150 * (t - T0)) % wraps_at_j
        return tick(t, EnergyReading("n1/cpu0", value, "counter", 1.0, wraps_at_j))

    times = [T0 + 15 * i for i in range(100)] + [T0 + 1485 + gap_s + 15 * i for i in range(100)]
    found = consumption([cpu(t) for t in times])
    assert total(found) == pytest.approx(150 * (times[-1] - T0), rel=0.01)
    assert bool(total(found, "estimated")) == (gap_s > wraps_at_j / 150)


def test_a_gap_without_a_hardware_counter_is_estimated_and_tagged():
    def cpu(t: float, since: float, sampler: str) -> Tick:
        return tick(t, EnergyReading("n1/cpu", 80 * (t - since), "modelled"), sampler=sampler)

    first = [cpu(T0 + 15 * i, T0, "a") for i in range(21)]
    second = [cpu(T0 + 400 + 15 * i, T0 + 400, "b") for i in range(21)]
    found = consumption(first + second)
    assert total(found) == pytest.approx(80 * 700, rel=1e-6)
    assert total(found, "estimated") == pytest.approx(80 * 100, rel=1e-6)


def test_the_ends_of_an_attempt_that_no_sampler_saw_are_estimated():
    found = consumption(series(T0 + 20, T0 + 1000), {("r", 1): (T0, T0 + 1200)})
    assert total(found) == pytest.approx(true_j(T0, T0 + 1200), rel=0.01)
    assert total(found, "estimated") == pytest.approx(220 * 350, rel=0.03)


def test_requeue_to_the_same_node_leaves_out_what_others_did_between():
    ticks = series(T0, T0 + 600, attempt=1) + series(T0 + 4200, T0 + 4800, attempt=2)
    windows = {("r", 1): (T0, T0 + 605), ("r", 2): (T0 + 4195, T0 + 4800)}
    want = true_j(T0, T0 + 605) + true_j(T0 + 4195, T0 + 4800)
    assert total(consumption(ticks, windows)) == pytest.approx(want, rel=0.01)


def test_the_end_of_an_attempt_is_estimated_by_its_own_power_and_not_by_the_idle_time_after_it():
    def idle_after(t: float) -> float:
        return 400 * min(t - T0, 700) + 50 * max(0.0, t - T0 - 700)

    ticks = [tick(T0 + 15 * i, gpu(T0 + 15 * i, idle_after)) for i in range(41)]  # the last 100 s have no line
    ticks += [tick(T0 + 5000 + 15 * i, gpu(T0 + 5000 + 15 * i, idle_after), attempt=2) for i in range(3)]
    found = consumption(ticks, {("r", 1): (T0, T0 + 700)})
    assert sum(i.joules for i in found.intervals if i.end_s <= T0 + 700) == pytest.approx(400 * 700)


def test_a_hardware_counter_is_believed_before_a_model():
    counted = [tick(T0 + 15 * i, gpu(T0 + 15 * i), sampler="a") for i in range(41)]
    modelled = [
        tick(T0 + 5 * i, EnergyReading("GPU-1", 900.0 * 5 * i, "modelled"), sampler="b") for i in range(121)
    ]  # finer, and wrong
    assert total(consumption(counted + modelled)) == pytest.approx(true_j(T0, T0 + 600), rel=1e-6)


def test_requeue_to_another_node_counts_both_devices():
    there = [
        replace(t, node="n2", boot="boot-n2", readings=(replace(t.readings[0], device="GPU-2"),))
        for t in series(T0 + 700, T0 + 1300, attempt=2)
    ]
    found = consumption(series(T0, T0 + 600, attempt=1) + there)
    assert total(found) == pytest.approx(true_j(T0, T0 + 600) + true_j(T0 + 700, T0 + 1300), rel=1e-6)
    assert {i.device for i in found.intervals} == {"GPU-1", "GPU-2"}


def test_a_mig_instance_has_its_share_and_says_so():
    found = consumption([tick(T0 + 15 * i, gpu(T0 + 15 * i, share=3 / 7)) for i in range(41)])
    assert total(found) == pytest.approx(3 / 7 * true_j(T0, T0 + 600), rel=1e-6)
    assert all(i.share < 1 for i in found.intervals)


def test_runs_that_share_a_node_are_counted_by_their_shares_and_never_above_the_whole():
    def node(run: str, share: float) -> list[Tick]:
        return [tick(T0 + 15 * i, gpu(T0 + 15 * i, share=share), run=run, sampler=run) for i in range(41)]

    truth = true_j(T0, T0 + 600)
    quarter = consumption(node("a", 0.25) + node("b", 0.5))
    assert {r: sum(i.joules for i in quarter.intervals if i.run == r) for r in "ab"} == pytest.approx(
        {"a": 0.25 * truth, "b": 0.5 * truth}
    )
    claimed_twice = consumption(node("a", 1.0) + node("b", 1.0))
    assert total(claimed_twice) == pytest.approx(truth)


def test_four_nodes_of_a_virtual_cluster_on_one_machine_count_the_machine_once():
    ticks = [t for n in range(4) for t in series(T0 + n, T0 + 600, node=f"v{n}", sampler=f"v{n}", boot="host")]
    assert total(consumption(ticks)) == pytest.approx(true_j(T0, T0 + 600), rel=1e-6)


def test_clocks_a_little_apart_are_no_reset():
    late = [replace(t, time_s=t.time_s + 0.2, sampler="b") for t in series(T0, T0 + 600)]
    found = consumption(series(T0 + 0.1, T0 + 600) + late)
    assert total(found) == pytest.approx(true_j(T0, T0 + 600), rel=0.01)
    assert not total(found, "estimated")


def test_what_was_never_measured_counts_nothing_and_is_told():
    found = consumption([tick(T0, gpu(T0))], {("r", 1): (T0, T0 + 60)})
    assert (total(found), sum(found.unmeasured_device_s.values())) == (0, 60)


# --------------------------------------------------------------------------------------------------------- properties

_TICKS = (
    series(T0, T0 + 300, sampler="a")
    + series(T0 + 4, T0 + 500, sampler="b", attempt=2)
    + [
        tick(T0 + 10 * i, EnergyReading("n1/cpu", 90.0 * i * (1 + i % 3), "modelled"), sampler=f"m{i // 20}")
        for i in range(60)
    ]
)


@given(st.randoms(use_true_random=False), st.lists(st.integers(0, len(_TICKS) - 1)))
@settings(max_examples=40, deadline=None)
def test_order_and_repetition_change_nothing(rng: random.Random, repeated: list[int]):
    ticks = [*_TICKS, *(_TICKS[i] for i in repeated)]
    rng.shuffle(ticks)
    assert consumption(ticks) == consumption(_TICKS)


@given(st.sets(st.integers(1, 239)))
@settings(max_examples=40, deadline=None)
def test_lost_lines_cost_resolution_and_no_energy(lost: set[int]):
    ticks = [t for i, t in enumerate(series(T0, T0 + 3600)) if i not in lost]
    assert total(consumption(ticks)) == pytest.approx(true_j(T0, T0 + 3600), rel=1e-6)


@given(
    st.lists(st.tuples(st.floats(0, 3000), st.floats(60, 900)), min_size=1, max_size=6),
    st.lists(st.floats(100, 3500), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_any_samplers_and_resets_stay_within_one_percent(spans: list[tuple[float, float]], resets: list[float]):
    """Samplers that come and go as they like over a run whose records say when it ran, while the driver reloads."""
    resets_s = sorted(T0 + r for r in resets)

    def value(t: float) -> float:
        before = [r for r in resets_s if r <= t]
        return true_j(before[-1], t) if before else counter(t)

    ticks = [
        tick(T0 + start + 15 * i, gpu(T0 + start + 15 * i, value), sampler=str(n))
        for n, (start, length) in enumerate([(0.0, 3900.0), *spans])
        for i in range(int(length // 15) + 1)
    ]
    found = consumption(ticks, {("r", 1): (T0, T0 + 3900)})
    assert total(found) == pytest.approx(true_j(T0, T0 + 3900), rel=0.01)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_damage_to_a_file_is_dropped_and_counted(data: st.DataObject):
    lines = [encode(t) for t in series(T0, T0 + 300)]
    at = data.draw(st.integers(0, len(lines) - 1))
    where = data.draw(st.integers(0, len(lines[at]) - 2))
    new = data.draw(st.characters(codec="ascii", exclude_categories=["Cc"]).filter(lambda c: c != lines[at][where]))
    damaged = lines[at][:where] + new + lines[at][where + 1 :]
    assert decode(lines[at]) is not None
    assert decode(damaged) is None
    assert decode(lines[at][:where]) is None


def test_a_line_comes_back_as_it_was_written(tmp_path: Path):
    written = tick(T0, EnergyReading("n1/cpu0", 12.5, "counter", 0.5, 65_536.0), gpu(T0))
    writer = LedgerWriter(tmp_path / "energy" / "0001-n1.jsonl")
    writer.append(written)
    writer.close()
    assert read_ledger(tmp_path / "energy" / "0001-n1.jsonl", run="r") == ([written], 0)


def test_a_torn_tail_never_joins_the_next_samplers_first_line(tmp_path: Path):
    path = tmp_path / "0001-n1.jsonl"
    path.write_text(encode(tick(T0, gpu(T0))) + encode(tick(T0 + 15, gpu(T0 + 15)))[:-30])
    writer = LedgerWriter(path)
    writer.append(tick(T0 + 30, gpu(T0 + 30)))
    writer.close()
    ticks, dropped = read_ledger(path)
    assert ([t.time_s for t in ticks], dropped) == ([T0, T0 + 30], 1)


def test_files_read_in_any_order_give_one_account(tmp_path: Path):
    for attempt, ticks in ((1, series(T0, T0 + 300)), (2, series(T0 + 400, T0 + 700, attempt=2))):
        (tmp_path / f"{attempt}.jsonl").write_text("".join(map(encode, ticks)))

    def read(names: Sequence[str]) -> Consumption:
        return consumption(t for name in names for t in read_ledger(tmp_path / name)[0])

    assert read(["1.jsonl", "2.jsonl"]) == read(["2.jsonl", "1.jsonl", "2.jsonl"])
