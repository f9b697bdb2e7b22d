"""The one list of panels names only what something writes down."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from dashboards.carbon import CarbonStatement
from dashboards.panels import KINDS, PANELS, SECTIONS, Line, metric, step_fields
from dashboards.run_view import ForecastLine, LogError, MixLine
from orchestrator.columns import NUMBERS
from orchestrator.energy.attribution import CLASSES
from orchestrator.energy.ledger import EnergyReading
from orchestrator.record import Event, StepRecord
from orchestrator.spikes.watch import Act

ROOT = Path(__file__).resolve().parents[3]
LINES = [(panel, line) for panel in PANELS for line in panel.lines]


def names(kind: type) -> set[str]:
    return {f.name for f in fields(kind)}


def event_kinds() -> set[str]:
    """What the code writes, and what the record's own description says that it may."""
    written = set()
    for folder in ("model", "orchestrator"):
        for path in (ROOT / folder).rglob("*.py"):
            written |= set(re.findall(r"\b_?(?:on_)?event\(\s*\"(\w+)\"", path.read_text()))
    assert {"started", "resumed", "evaluated"} <= written
    told = re.search(r"`kind`: ([\w\s]+) \.\.\.", str(Event.__doc__))
    assert told
    return written | set(told[1].split())


def event_keys(kind: str) -> set[str]:
    """The keyword arguments of the calls that write events of a kind: the keys of their data."""
    keys: set[str] = set()
    for path in [*(ROOT / "model").rglob("*.py"), *(ROOT / "orchestrator").rglob("*.py")]:
        for call in re.findall(rf"event\(\s*\"{kind}\".*?\n\s*\)", path.read_text(), re.DOTALL):
            keys |= set(re.findall(r"(\w+)=", call))
    return keys


def is_recorded(source: str) -> bool:
    what, _, name = source.partition(".")
    if what == "event":
        kind, _, key = name.partition(".")
        return kind in event_kinds() and (not key or key in event_keys(kind))
    recorded = {
        "step": names(StepRecord),
        "ledger": names(EnergyReading),
        "carbon": names(CarbonStatement),
        "life": {*CLASSES, "down"},
        "mix": names(MixLine),
        "forecast": names(ForecastLine),
        "log": names(LogError),
    }
    return name in recorded.get(what, set())


@pytest.mark.parametrize("line", [line for _, line in LINES], ids=lambda line: line.source)
def test_every_panel_names_what_is_recorded(line: Line) -> None:
    assert is_recorded(line.source), f"no record has {line.source}"


@pytest.mark.parametrize("line", [line for _, line in LINES if line.act], ids=lambda line: line.act)
def test_every_act_that_a_panel_tells_apart_is_one_of_the_guards(line: Line) -> None:
    assert line.act in get_args(Act)


@pytest.mark.parametrize(
    "source", ["step.losss", "event.exploded", "event.evaluated.perplexity", "carbon.kwh", "cat.loss"]
)
def test_a_panel_that_names_what_no_record_has_is_seen(source: str) -> None:
    assert not is_recorded(source)


def test_every_section_has_panels_and_every_panel_a_unique_key_and_a_known_kind() -> None:
    assert {p.section for p in PANELS} == set(SECTIONS)
    assert len({p.key for p in PANELS}) == len(PANELS)
    assert {p.kind for p in PANELS} <= set(KINDS)


def test_the_columns_hold_every_step_field_that_is_drawn() -> None:
    assert set(step_fields()) <= set(NUMBERS)


def test_metrics_of_steps_have_names_of_their_own() -> None:
    of_steps = [(metric(p, line), line.source) for p, line in LINES if line.source.startswith("step.")]
    assert len({m for m, _ in of_steps}) == len({s for _, s in of_steps})
