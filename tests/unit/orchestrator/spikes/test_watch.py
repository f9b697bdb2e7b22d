"""A run's spike guard as the trainer meets it: what is written before what is done, and what a later start makes of it."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from model.data.mixture import Skip, data_batch_index
from orchestrator.record import Event
from orchestrator.spikes.config import SpikesConfig
from orchestrator.spikes.watch import SpikeWatch, stopped_for_a_person

CONFIG = SpikesConfig(name="test", patience=0.0, margin_steps=3, vet_steps=5, max_rewinds_per_incident=2)
SAVE_EVERY = 50

Loss = Callable[[int], float]


def calm(step: int) -> float:
    return 3 + random.Random(step).gauss(0, 0.03)


def spike_at(at: int, until: int = 10**9) -> Loss:
    return lambda step: calm(step) + (1.0 if at <= step < until else 0.0)


class Run:
    """A run without a model: the events on its disk, its checkpoints, and the guard of the start that is at work."""

    def __init__(self, config: SpikesConfig = CONFIG) -> None:
        self.events: list[Event] = []
        self.saved: dict[int, str] = {}
        self.step = 0
        self.start(config)

    def start(self, config: SpikesConfig, changes: tuple[int, ...] = ()) -> None:
        listed = list(self.events)
        self.watch = SpikeWatch(config, listed, lambda: list(self.saved), self.data_batch, self.event, changes)

    def data_batch(self, step: int) -> int:
        return data_batch_index(step, [Skip(*s) for s in self.watch.skips])

    def event(self, kind: str, step: int, detail: str, /, **data: Any) -> None:
        told = json.loads(json.dumps(data, allow_nan=False))
        self.events.append(Event(time_utc="", kind=kind, step=step, detail=detail, data=told))

    def train(self, loss: Loss, to_step: int) -> str:
        """Trains until something other than applying is to be done."""
        while self.step < to_step:
            if self.step % SAVE_EVERY == 0:
                self.saved[self.step] = json.dumps(self.watch.state())
            self.step += 1
            act = self.watch.judged(self.step, loss(self.step), 1.0 + (loss(self.step) - 3) ** 2)
            if act != "apply":
                return act
        return "apply"

    def rewind(self) -> None:
        assert self.watch.rewind_to is not None
        self.step = self.watch.rewind_to
        self.watch.restore(json.loads(self.saved[self.step]))
        self.watch.rewound(self.step)
        self.saved = {s: v for s, v in self.saved.items() if s <= self.step}

    def acts(self) -> list[str]:
        return [e.data["act"] for e in self.events if e.kind == "spike"]


def test_a_verdict_is_written_down_whole_before_it_is_so() -> None:
    run = Run()
    before: list[tuple[Any, Any]] = []
    write = run.watch._event

    def event(*args: Any, **data: Any) -> None:
        before.append((run.watch.skips, run.watch.rewind_to))
        write(*args, **data)

    run.watch._event = event
    assert run.train(spike_at(180), 300) == "rewind"
    assert before == [((), None)]
    (told,) = run.events
    assert told.data["to_step"] == run.watch.rewind_to == 150
    assert [list(s) for s in run.watch.skips] == [[told.data["skip_from"], told.data["skip_to"]]]
    window = told.data["window"]
    assert [row[0] for row in window] == list(range(run.step - 63, run.step + 1))
    assert window[-1][1] > 3.9
    assert window[-1][3] > 3 > abs(window[0][3])  # tails above what was expected


def test_a_start_after_a_kill_between_verdict_and_act_does_the_same_rewind() -> None:
    run = Run()
    run.train(spike_at(180), 300)
    verdict = (run.watch.rewind_to, run.watch.skips)
    run.start(CONFIG)
    assert (run.watch.rewind_to, run.watch.skips) == verdict
    run.rewind()
    run.start(CONFIG)
    assert (run.watch.rewind_to, run.watch.skips) == (None, verdict[1])


def test_the_detector_goes_back_with_the_checkpoint_and_skips_and_budgets_do_not() -> None:
    run = Run()
    run.train(spike_at(180), 300)
    skips = run.watch.skips
    run.rewind()
    saved, now = json.loads(run.saved[150]), run.watch.state()
    assert now["learnt"] == saved["learnt"]
    assert (saved["policy"]["skips"], now["policy"]["skips"]) == ([], skips)
    assert (saved["policy"]["incident_rewinds"], now["policy"]["incident_rewinds"]) == (0, 1)
    assert run.train(calm, 300) == "apply"
    assert [e.kind for e in run.events] == ["spike", "rewound", "recovered"]


def test_a_lower_learning_rate_is_a_change_that_the_detector_knows_of() -> None:
    run = Run()
    lasting = spike_at(180)
    assert run.train(lasting, 300) == "rewind"
    run.rewind()
    assert run.train(lasting, 300) == "rewind"
    assert (run.acts(), run.watch.lr_scale) == (["rewind", "lower_lr"], 0.5)
    run.rewind()
    changed = run.step
    assert run.train(lambda step: calm(step) + 0.5, changed + 100) == "apply"  # a new level from there on
    run.start(CONFIG)  # and a later start still knows
    run.watch.restore(json.loads(run.saved[changed]))
    run.step = changed
    assert run.train(lambda step: calm(step) + 0.5, changed + 100) == "apply"


def test_a_change_of_the_schedule_or_one_that_the_user_declares_is_no_spike() -> None:
    for config, changes in ((CONFIG, (180,)), (replace(CONFIG, declared_steps=[180]), ()), (CONFIG, ())):
        run = Run()
        run.start(config, changes)
        assert run.train(spike_at(180), 300) == ("rewind" if config is CONFIG and not changes else "apply")


def test_a_spike_that_nothing_helps_against_stops_for_a_person_until_spikes_is_changed() -> None:
    run = Run()
    while (act := run.train(spike_at(180), 300)) == "rewind":
        run.rewind()
    assert (act, run.acts()) == ("stop", ["rewind", "lower_lr", "stop"])
    assert "a person" in (stopped_for_a_person(run.events, CONFIG) or "")
    changed = replace(CONFIG, max_rewinds_per_incident=3)
    assert stopped_for_a_person(run.events, changed) is None
    run.start(changed)
    assert not run.watch.state()["policy"]["stopped"]


def test_a_rewind_that_cannot_be_done_is_dropped_when_spikes_is_changed() -> None:
    run = Run()
    run.train(spike_at(180), 300)
    run.start(replace(CONFIG, act=False))
    assert run.watch.rewind_to is None
    assert run.events[-1].kind == "rewind_dropped"
    run.start(CONFIG)
    assert run.watch.rewind_to is None


def test_watching_only_writes_down_and_changes_nothing() -> None:
    run = Run(replace(CONFIG, act=False))
    assert run.train(spike_at(180, until=190), 300) == "apply"
    assert run.acts() == ["accept"]
    assert "only written down" in run.events[0].detail
    assert run.watch.skips == ()


def test_a_batch_that_gives_nan_twice_is_skipped_and_the_fourth_is_blamed_on_the_weights() -> None:
    run = Run()
    run.train(calm, 180)
    acts = []
    for _ in range(4):
        assert run.watch.withhold(181, math.nan, math.nan)
        acts.append(run.watch.recomputed(181, math.nan, math.nan))
    assert acts == ["skip", "skip", "skip", "rewind"]
    assert run.watch.skips[:3] == ((180, 181), (181, 182), (182, 183))
    assert run.events[-1].data["config"] == asdict(CONFIG)
    assert run.watch.rewind_to == 150
