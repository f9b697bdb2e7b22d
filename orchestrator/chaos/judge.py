"""What came of a fault: one row, from the run's own records, its events and what its launches printed. Pure but for reading."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.chaos.plan import Planned
from orchestrator.chaos.stage import BATCH_TOKENS, Injection, Stage
from orchestrator.record import StepRecord, kept_steps, unix_s

_CLOSE = 2e-2  # of the loss: sums of bfloat16 products over other groups of rows


@dataclass(kw_only=True)
class Row:
    """One fault of the campaign. `passed`: None where it was not done, and `why` says why not."""

    fault: str
    scene: str
    injected: str
    detected: str = ""
    recovered: bool = False
    launches: int = 0  # of the whole scene, the first included
    recovery_s: float | None = None  # from the injection to the end of the next good step
    tokens_repeated: int | None = None
    tokens_skipped: int | None = None
    loss: str = ""
    passed: bool | None = False
    why: str = ""


Losses = dict[int, tuple[float, float]]


def losses(records: Sequence[StepRecord]) -> Losses:
    return {r.step: (r.loss, r.grad_norm) for r in kept_steps(list(records))}


def rows(stage: Stage, planned: Sequence[Planned], control: Losses, problem: str = "") -> list[Row]:
    """A row for each planned fault. `problem`: what ended the scene early."""
    stage.note_struck()
    records = stage.records()
    order = sorted((p for p in planned if p.name in stage.done), key=lambda p: stage.done[p.name].time_s)
    found = []
    for each in planned:
        row = Row(fault=each.name, scene=each.scene, injected=each.injected, launches=len(stage.launches))
        found.append(row)
        if each.name not in stage.done:
            row.why = problem or "it has not struck"
            continue
        done, later = stage.done[each.name], [p for p in order if p.name != each.name]
        until_s = min((t for p in later if (t := stage.done[p.name].time_s) > done.time_s), default=float("inf"))
        alone = len(order) == 1
        span = _Span(records, done, until_s, alone)
        row.detected = done.detected or _detected(stage, each, done, until_s, alone)
        row.recovered = stage.finished()
        row.recovery_s = span.recovery_s if done.seconds is None else done.seconds
        repeated = span.repeated if done.steps_repeated is None else done.steps_repeated
        row.tokens_repeated, row.tokens_skipped = repeated * BATCH_TOKENS, span.skipped * BATCH_TOKENS
        row.loss, equal = _compared(each, span, control)
        wrong = list(done.problems)
        if not row.detected:
            wrong.append("nothing told of it")
        if not row.recovered:
            wrong.append(f"not finished: {problem or stage.last_words()}")
        if repeated > each.repeats:
            wrong.append(f"{repeated} steps trained again, and {each.repeats} may be")
        if (span.skipped > 0) != each.skips:
            wrong.append(f"{span.skipped} batches skipped")
        if not equal:
            wrong.append("the loss is not the control's")
        row.passed, row.why = not wrong, "; ".join(wrong)
    return found


class _Span:
    """The part of a run's records that one fault answers for: until the next fault."""

    def __init__(self, records: Sequence[StepRecord], done: Injection, until_s: float, alone: bool) -> None:
        mine = (lambda at_s: True) if alone else (lambda at_s: done.time_s < at_s <= until_s)
        kept = kept_steps(list(records))
        before = [r for r in records if unix_s(r.time_utc) <= done.time_s]
        after = [r for r in kept if unix_s(r.time_utc) > done.time_s]
        first = after[0].step if after else 0
        # where it ended a start: to the next one's first step, for the old one may have got a step further while it saved
        attempt = max((r.attempt for r in before), default=0)
        good = [r for r in after if r.attempt > attempt and unix_s(r.time_utc) <= until_s] or after
        self.recovery_s = unix_s(good[0].time_utc) - done.time_s if good else None
        # trained, and then trained again: each undone record is laid to the fault before the record that undid it
        self.repeated = 0
        lowest, undone_by = float("inf"), None
        for record in reversed(records):
            if record.step < lowest:
                lowest, undone_by = record.step, record
            elif undone_by is not None and mine(unix_s(undone_by.time_utc)):
                self.repeated += 1
        self.skipped = sum(
            (b.data_batch or 0) - (a.data_batch or 0) - 1 for a, b in pairwise(kept) if mine(unix_s(b.time_utc))
        )
        begin = 1 if alone else first
        last = [r.step for r in after if unix_s(r.time_utc) <= until_s]
        self.steps = [r for r in kept if begin <= r.step <= (last[-1] if last else 0)]
        self.before = before

    def first_skip(self) -> int:
        return next((r.step for r in self.steps if r.data_batch != r.step - 1), 0)


def _compared(planned: Planned, span: _Span, control: Losses) -> tuple[str, bool]:
    """In words, and whether it is as it should be."""
    steps = span.steps
    if not steps:
        return "no step", False
    if planned.loss == "until the rewind":
        cut = span.first_skip()
        steps = [r for r in steps if r.step < cut]
    differing = [r for r in steps if control.get(r.step) != (r.loss, r.grad_norm)]
    if planned.loss == "close":
        most = max(abs(r.loss - control[r.step][0]) for r in steps if r.step in control)
        return f"within {most:.1e}", most < _CLOSE
    if differing:
        return f"differs at step {differing[0].step}", False
    return "equal" if planned.loss == "bitwise" else f"equal to step {steps[-1].step}, then other data", True


def _detected(stage: Stage, planned: Planned, done: Injection, until_s: float, alone: bool) -> str:
    """The first event, or line of a launch, that tells of it."""
    pattern = re.compile(planned.seen)
    for event in stage.events():
        at_s = unix_s(event.time_utc)
        if (alone or done.time_s - 1 <= at_s <= until_s) and pattern.search(f"{event.kind}: {event.detail}"):
            return f"{event.kind}: {event.detail}"
    for launch in stage.launches:
        if launch.output.stat().st_mtime >= done.time_s and launch.began_s <= until_s:
            for line in launch.text().splitlines():
                if pattern.search(line):
                    return f"launch: {line.strip()}"
    return ""
