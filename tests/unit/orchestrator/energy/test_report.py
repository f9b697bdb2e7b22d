"""What a report says of the time that nobody measured."""

from pathlib import Path

import pytest

from dashboards.carbon import llama_form, sentence
from orchestrator import spec as specs
from orchestrator.carbon_report import accounted
from orchestrator.energy.ledger import EnergyReading, LedgerWriter, Tick
from orchestrator.energy.report import account
from orchestrator.record import Event, JsonlWriter, unix_s, utc
from orchestrator.run_dir import RunDir

START_S = unix_s("2026-11-24T03:53:00.000Z")


def a_run(root: Path, ticks: dict[str, int], seconds: int = 60) -> Path:
    """A minute on a machine of its own; `ticks`: how many readings each device has, over the whole of it."""
    paths = RunDir(root)
    root.mkdir()
    paths.spec.write_text(specs.to_yaml(specs.compose([f"name={root.name}"])))
    with JsonlWriter(paths.events / "attempt-0001.jsonl") as writer:
        for at_s, kind in ((0, "started"), (seconds, "finished")):
            writer.write(Event(time_utc=utc(START_S + at_s), kind=kind, step=0, detail="", attempt=1, data={}))
    if not ticks:
        return root
    ledger = LedgerWriter(paths.energy / f"0001-{root.name}.jsonl")
    for n in range(max(ticks.values())):
        readings = tuple(
            EnergyReading(f"{root.name}/{d}", 100.0 * n, "modelled") for d, many in ticks.items() if n < many
        )
        at_s = START_S + seconds * n / max(1, max(ticks.values()) - 1)
        ledger.append(Tick(at_s, root.name, "", root.name, 1, "", readings))
    ledger.close()
    return root


def test_a_ledger_of_one_line_measured_nothing(tmp_path: Path) -> None:
    (alone,) = account([accounted(a_run(tmp_path / "alone", {"cpu0": 1, "ram": 1}))], ask_slurm=False)
    assert alone.energy_kwh is None
    assert "nothing was measured" in sentence(alone)
    assert len(llama_form([alone])[1]) == 1  # the formula's row


def test_the_headline_says_how_much_of_the_time_its_figure_covers(tmp_path: Path) -> None:
    roots = [
        a_run(tmp_path / "whole", {"cpu0": 4, "ram": 4}),
        a_run(tmp_path / "part", {"cpu0": 4, "gpu0": 1}),
        a_run(tmp_path / "none", {}),
    ]
    whole, part, none, total = account([accounted(root) for root in roots], ask_slurm=False)
    assert whole.covered_share == 1
    assert "covers" not in sentence(whole)
    assert part.covered_share == pytest.approx(0.5)
    assert "covers 50% of the device-hours" in sentence(part)
    assert none.energy_kwh is None
    assert total.covered_share == pytest.approx((1 + 0.5 + 0) / 3)
    assert "covers 50% of the device-hours" in llama_form([whole, part, none, total])[1][-2][-1]
