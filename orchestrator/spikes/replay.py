"""What a rule would have done to a run, from its log: a table for the terminal and a picture that needs nothing else.

Reads CSV (step, loss, and if there is one: grad_norm), also as W&B's charts export it, JSON lines (our step records, or W&B's
exported rows), a run directory, and W&B's `.wandb` files through `wandb leet inspect`.
"""

import csv
import html
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.record import kept_steps, read_all_steps
from orchestrator.run_dir import RunDir
from orchestrator.spikes.config import SpikesConfig
from orchestrator.spikes.finding import STOPPING, Finding, Kind
from orchestrator.spikes.rules import make_rule

# The names under which logs keep the three columns, the plainest first; a name also counts behind "train/" and the like, and
# behind "the run's name - ", as W&B exports a chart.
STEP_NAMES = ("step", "_step", "global_step", "iteration", "iter", "trainer/global_step")
LOSS_NAMES = ("loss", "train_loss", "training_loss", "lm_loss", "lm loss", "lm-loss-training/lm loss")
GRAD_NAMES = ("grad_norm", "gradient_norm", "grad-norm", "gnorm", "total_norm", "grad norm")
QUIET = 32  # observations without an alarm after which the next one is a new alarm, as score.py counts


@dataclass(frozen=True)
class Observation:
    step: int
    loss: float
    grad_norm: float | None


@dataclass(kw_only=True)
class Log:
    """What a log holds, and how much of it is no observation or was undone."""

    observations: list[Observation]
    unreadable: int = 0  # rows with a step or loss that is no number, lines that are no JSON
    first_unreadable: str = ""
    without_loss: int = 0  # rows of evaluations, samples and the like
    undone: int = 0  # observations, by rows that go back to their step or below
    returns: int = 0  # such rows
    rows: int = 0  # with a step and a loss, the undone ones too
    undone_judged: bool = False

    @property
    def notes(self) -> list[str]:
        said = []
        if self.unreadable:
            said.append(f"{_rows(self.unreadable)} not read, the first: {self.first_unreadable}")
        if self.without_loss:
            said.append(f"{_rows(self.without_loss)} passed over: no step or no loss in them")
        if self.returns:
            which = "all are judged (--undone)" if self.undone_judged else "the later rows count"
            unsorted = (
                "; most are: is it only out of order? sort it by its steps" if self.undone > self.rows / 2 else ""
            )
            times = "once" if self.returns == 1 else f"{self.returns:,} times"
            said.append(
                f"{_rows(self.undone)} undone: the log goes back to an earlier step {times}, and {which}{unsorted}"
            )
        return said


def _rows(count: int) -> str:
    return f"{_count(count, 'row')} {'was' if count == 1 else 'were'}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Findings of one stretch. `stopping`: the run would have been watched, stopped or rewound.

    Kind, first step, onset and reason are of one finding: the first that stops, or the first; the reason also tells of
    worse ones that followed.
    """

    kind: Kind
    worst: Kind
    first_step: int
    last_step: int
    onset_step: int
    findings: int
    reason: str

    @property
    def stopping(self) -> bool:
        return self.kind in STOPPING


@dataclass(frozen=True, kw_only=True)
class Replay:
    path: str
    rule: str
    log: Log
    judged: int  # observations that could have raised an alarm: a rule must have seen some before
    alarms: list[Alarm]  # by step

    @property
    def observations(self) -> list[Observation]:
        return self.log.observations

    @property
    def seems_smoothed(self) -> bool:
        """Whether successive losses are averages over the same steps: of independent ones two in three turns of the curve
        go back, of running means only one in two. Every rule expects single losses."""
        losses = [o.loss for o in self.observations if math.isfinite(o.loss)]
        turns = [(c - b) * (b - a) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
        moved = [t for t in turns if t]
        return len(moved) > 200 and sum(t < 0 for t in moved) < 0.53 * len(moved)

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        steps = [o.step for o in self.observations]
        return {
            "path": self.path,
            "rule": self.rule,
            "observations": len(steps),
            "judged": self.judged,
            "undone": self.log.undone,
            "returns_to_an_earlier_step": self.log.returns,
            "unreadable_rows": self.log.unreadable,
            "rows_without_loss": self.log.without_loss,
            "first_step": steps[0],
            "last_step": steps[-1],
            "seems_smoothed": self.seems_smoothed,
            "has_grad_norm": any(o.grad_norm is not None for o in self.observations),
            "alarms": [
                {
                    "kind": a.kind.value,
                    "stopping": a.stopping,
                    "first_step": a.first_step,
                    "last_step": a.last_step,
                    "onset_step": a.onset_step,
                    "reason": a.reason,
                }
                for a in self.alarms
            ],
        }


def params(rule_name: str, words: Sequence[str]) -> dict[str, float]:
    """The rule's parameters as NAME=VALUE. Raises UserError for a rule, a name or a value that cannot be."""
    found: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(f"--param {word}: give NAME=NUMBER") from None
    if problems := SpikesConfig(name="replay", rule=rule_name, params=found).problems():
        raise UserError("\n".join(problems))
    return found


def run_over(
    path: Path,
    rule_name: str,
    declared_steps: Sequence[int] = (),
    undone: bool = False,
    rule_params: Mapping[str, float] | None = None,
) -> Replay:
    """Runs a rule over a log, as it would have run: each observation once, in order.

    `undone`: also judge the steps that a rewind or a restart has undone.
    """
    log = read_log(path, undone)
    rule = make_rule(rule_name, rule_params, declared_steps)
    findings = [rule.judge(o.step, o.loss, o.grad_norm) for o in log.observations]
    judged = sum(f.judged for f in findings)
    return Replay(path=str(path), rule=rule_name, log=log, judged=judged, alarms=alarms(findings))


def alarms(findings: Iterable[Finding]) -> list[Alarm]:
    """Stretches: findings within QUIET observations of each other are one alarm, unless the log goes back between them; an
    outlier stands alone, and is dropped where the alarm after it says that it was its beginning."""
    found: list[Alarm] = []
    open_at: int | None = None  # index of the stretch that may still go on
    quiet = 0
    for finding in findings:
        quiet += 1
        if finding.kind is Kind.OK:
            continue
        if open_at is not None and quiet <= QUIET and finding.step > found[open_at].last_step:
            if finding.kind is not Kind.OUTLIER:
                found[open_at] = _joined(found[open_at], finding)
                quiet = 0
            continue
        if finding.kind is not Kind.OUTLIER:
            while found and found[-1].kind is Kind.OUTLIER and found[-1].first_step >= finding.onset_step:
                found.pop()
            open_at, quiet = len(found), 0
        found.append(
            Alarm(
                kind=finding.kind,
                worst=finding.kind,
                first_step=finding.step,
                last_step=finding.step,
                onset_step=finding.onset_step,
                findings=1,
                reason=finding.reason,
            )
        )
    return found


_WORSE = (Kind.OUTLIER, Kind.SHIFT, Kind.SPIKE, Kind.SLOW_DIVERGENCE, Kind.NONFINITE)


def _joined(alarm: Alarm, finding: Finding) -> Alarm:
    joined = replace(alarm, last_step=finding.step, findings=alarm.findings + 1)
    if finding.stopping and not alarm.stopping:
        return replace(
            joined,
            kind=finding.kind,
            worst=finding.kind,
            first_step=finding.step,
            onset_step=finding.onset_step,
            reason=finding.reason,
        )
    if _WORSE.index(finding.kind) > _WORSE.index(alarm.worst):
        said = f"{finding.kind.replace('_', ' ')} at step {finding.step}: {finding.reason}"
        return replace(joined, worst=finding.kind, reason=f"{alarm.reason}; then {said}")
    return joined


def read_log(path: Path, undone: bool = False) -> Log:
    """The observations of a log, by what it is. Raises UserError where it holds none.

    A step that is there again undoes the earlier rows of its step or above, as in `record.kept_steps`; `undone` keeps them.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    torn = 0
    columns: tuple[str, ...] = ()
    if path.is_dir():
        rows: list[dict[str, Any]] = _run_dir_rows(path)
    elif path.suffix == ".wandb":
        rows = _wandb_rows(path)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        rows, torn = _json_rows(path)
    else:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file)
            try:
                columns, rows = tuple(reader.fieldnames or ()), list(reader)
            except csv.Error as error:
                raise UserError(f"{path} is no CSV: {error}") from None
        _of_one_run(path, rows[0] if rows else {})
    log = _observed(rows)
    if torn:
        log.unreadable += torn
        log.first_unreadable = log.first_unreadable or "a line that is no JSON object"
    if not log.observations:
        raise UserError(f"{path} holds no loss: {_why_none(columns, rows, log)}")
    return _without_undone(log, undone)


def _observed(rows: Iterable[Mapping[str, Any]]) -> Log:
    log = Log(observations=[])
    for number, row in enumerate(rows, 1):
        step, loss, grad_norm = (_value(row, names) for names in (STEP_NAMES, LOSS_NAMES, GRAD_NAMES))
        wrong = ""
        if any(row.get(None, ())):  # type: ignore[call-overload]  # where csv.DictReader puts what has no column
            wrong = "more cells than columns (a decimal comma?)"
        elif isinstance(step, str) or (step is not None and not math.isfinite(step)):
            wrong = f"step {step}, which is no number"
        elif isinstance(loss, str):
            wrong = f"loss {loss}, which is no number" + (" (a decimal comma?)" if "," in loss else "")
        if wrong or isinstance(step, str) or isinstance(loss, str):
            log.unreadable += 1
            log.first_unreadable = log.first_unreadable or f"row {number} has {wrong}"
        elif loss is None or step is None:
            log.without_loss += 1
        else:
            log.observations.append(Observation(int(step), loss, None if isinstance(grad_norm, str) else grad_norm))
    return log


def _without_undone(log: Log, judge_undone: bool) -> Log:
    kept = kept_steps(log.observations)
    log.returns = sum(after.step <= before.step for before, after in pairwise(log.observations))
    log.rows, log.undone_judged = len(log.observations), judge_undone
    log.undone = log.rows - len(kept)
    if not judge_undone:
        log.observations = kept
    return log


def _why_none(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], log: Log) -> str:
    """Of a log without an observation: what it has, what it lacks, and the way out."""
    names = list(columns) or list(dict.fromkeys(k for row in rows[:1000] for k in row))
    lacking = [
        f"no {what} column ({', '.join(known[:4])})"
        for what, known in (("step", STEP_NAMES), ("loss", LOSS_NAMES))
        if not any(_plain_name(n) in known or n in known for n in names)
    ]
    if len(columns) == 1 and (mark := next((m for m in ";\t" if m in columns[0]), None)):
        return f"its header line is {columns[0]!r}: separate the columns by commas, not by {mark!r}"
    if names and lacking:
        return f"it has {' and '.join(lacking)}; what it has: {', '.join(names[:8])}" + ", ..." * (len(names) > 8)
    if not rows and log.unreadable:
        return f"none of its {_count(log.unreadable, 'line')} is a JSON object"
    if not rows:
        what = f"a header line ({', '.join(columns)}) and no rows" if columns else "no rows"
        return f"it has {what}; a log is CSV with a header line or one JSON object a line"
    if log.unreadable:
        return f"none of its {_count(len(rows), 'row')} can be read, the first: {log.first_unreadable}"
    return f"none of its {_count(len(rows), 'row')} has both a step and a loss"


def _plain_name(column: str | None) -> str:
    return (column or "").rsplit(" - ", 1)[-1].rsplit("/", 1)[-1].lower()


def _of_one_run(path: Path, row: Mapping[str, Any]) -> None:
    """A chart's export may hold several runs: their losses are not one curve."""
    runs = [k.rsplit(" - ", 1)[0] for k in row if k and " - " in k and _plain_name(k) in LOSS_NAMES]
    if len(set(runs)) > 1:
        raise UserError(
            f"{path} holds the losses of {len(set(runs))} runs ({', '.join(dict.fromkeys(runs))}): export one run at a time"
        )


def _value(row: Mapping[str, Any], names: Sequence[str]) -> float | str | None:
    """The number under the first of the names that has one; else what stands there and is none."""
    said = None
    for name in names:
        value = row.get(name)
        if value is None:
            value = next((v for k, v in row.items() if _plain_name(k) == name), None)
        if value is None or value == "" or isinstance(value, (bool, dict, list)):
            continue
        try:
            return float(value)
        except ValueError:
            said = said or str(value)[:40]
    return said


def _run_dir_rows(path: Path) -> list[dict[str, Any]]:
    folder = RunDir(path).records
    if not folder.is_dir():
        raise UserError(f"{path} is no run directory: it has no {folder.name}/")
    return [vars(r) for r in read_all_steps(folder)]


def _json_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """One object a line, or one list of objects; and how many lines are torn or foreign."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}") from None
        rows = [row for row in whole if isinstance(row, dict)]
        return rows, len(whole) - len(rows)
    rows, torn = [], 0
    for line in filter(str.strip, text.splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    return rows, torn


def _wandb_rows(path: Path) -> list[dict[str, Any]]:
    """Through W&B's own reader, so that its format stays its business."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise UserError(f"wandb could not read {path}: {done.stderr.strip() or 'no reason given'}")
        output.seek(0)
        return [row for line in output for row in _wandb_history(line)]


def _wandb_history(line: str) -> Iterator[dict[str, Any]]:
    """The logged row of one printed record, if it is one."""
    try:
        history = json.loads(line).get("history")
    except (ValueError, AttributeError):
        return
    if isinstance(history, dict) and isinstance(history.get("item"), dict):
        yield history["item"]


def table(result: Replay, show_outliers: int = 10) -> str:
    """For the terminal."""
    steps = result.observations
    stops = [a for a in result.alarms if a.stopping]
    noted = [a for a in result.alarms if not a.stopping]
    every = (steps[-1].step - steps[0].step) / max(1, len(steps) - 1)
    lines = [
        f"{result.path}: {_count(len(steps), 'observation')}, steps {steps[0].step:,} to {steps[-1].step:,}"
        + (f", one every {every:.3g} steps" if every > 1.01 else "")
        + ("" if any(o.grad_norm is not None for o in steps) else ", no gradient norm"),
        f"rule {result.rule}, {result.judged:,} of {len(steps):,} judged: "
        f"{_count(len(stops), 'alarm')} that would call for the policy, "
        f"{_count(sum(a.kind is Kind.OUTLIER for a in noted), 'one-batch outlier')}, "
        f"{_count(sum(a.kind is Kind.SHIFT for a in noted), 'new level')}",
        *result.log.notes,
    ]
    if not result.judged:
        grad_norms = any(o.grad_norm is not None for o in steps)
        why = (
            "judges gradient norms alone"
            if result.rule == "zclip" and not grad_norms
            else "first learns from more than these"
        )
        lines.append(f"warning: nothing was judged: rule {result.rule} {why}")
    shown = sorted(stops + noted[:show_outliers], key=lambda a: a.first_step)
    if result.seems_smoothed:
        lines.append(
            "warning: these losses look like running means; rules expect single ones, so do not trust the alarms"
        )
    if shown:
        lines.append(f"{'step':>9}  {'onset':>9}  {'lasted':>7}  {'kind':<16}  why")
    for a in shown:
        lasted = a.last_step - a.first_step + 1
        lines.append(f"{a.first_step:>9}  {a.onset_step:>9}  {lasted:>7}  {a.kind.value:<16}  {a.reason}")
    if len(noted) > show_outliers:
        lines.append(f"... and {len(noted) - show_outliers} more that would only have been noted (--json lists all)")
    return "\n".join(lines)


_COLORS = {
    Kind.OUTLIER: "#5b8dd6",
    Kind.SHIFT: "#8a8a8a",
    Kind.SPIKE: "#d63a3a",
    Kind.SLOW_DIVERGENCE: "#b043b0",
    Kind.NONFINITE: "#111111",
}


def picture(result: Replay, width: int = 1200, height: int = 420) -> str:
    """One SVG: the loss (every column's lowest and highest value, so that no spike is lost), and each alarm at its step."""
    left, right, top, bottom = 64, 16, 56, 40
    shown = [o for o in result.observations if math.isfinite(o.loss)]
    title = f"{Path(result.path).name}: rule {result.rule}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{left}" y="20" font-size="15">{html.escape(title)}</text>'
    )
    if not shown:
        return head + f'<text x="{left}" y="80">no finite loss</text></svg>\n'
    first, last = result.observations[0].step, max(o.step for o in result.observations)
    # Where the fall of the first steps would squeeze the rest flat, the axis starts where 98 % of the losses lie below.
    ordered = sorted(o.loss for o in shown)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    if ordered[-1] - low < 2 * (high - low):
        high = ordered[-1]
    alarmed = [a for a in result.alarms if a.stopping and a.kind is not Kind.NONFINITE]
    near = {s for a in alarmed for s in range(a.onset_step, min(a.last_step, a.onset_step + 1000) + 1)}
    high = max([high] + [o.loss for o in shown if o.step in near])
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return left + (width - left - right) * (step - first) / max(1, last - first)

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (high - loss) / (high - low)

    columns: dict[int, tuple[float, float]] = {}
    for o in shown:
        column = round(x(o.step))
        least, most = columns.get(column, (o.loss, o.loss))
        columns[column] = (min(least, o.loss), max(most, o.loss))
    path = " ".join(f"{c},{y(least):.1f} {c},{y(most):.1f}" for c, (least, most) in sorted(columns.items()))
    parts = [head]
    for i in range(5):
        loss, step = low + (high - low) * i / 4, first + (last - first) * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#e6e6e6"/>'
            f'<text x="{left - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.3g}</text>'
            f'<text x="{x(step):.1f}" y="{height - 22}" text-anchor="{anchor}">{step:,.0f}</text>'
        )
    parts.append(f'<text x="{width - right}" y="{height - 6}" text-anchor="end" fill="#777">step</text>')
    parts.append(f'<text x="{left - 8}" y="{top - 10}" text-anchor="end" fill="#777">loss</text>')
    for a in result.alarms:
        color, at = _COLORS[a.kind], x(a.first_step)
        tip = f"<title>{html.escape(f'step {a.first_step}, {a.kind.value}: {a.reason}')}</title>"
        if a.stopping:
            wide = max(1.5, x(a.last_step) - x(a.onset_step))
            parts.append(
                f'<rect x="{x(a.onset_step):.1f}" y="{top}" width="{wide:.1f}" height="{height - top - bottom}" '
                f'fill="{color}" opacity="0.22">{tip}</rect>'
            )
        parts.append(f'<path d="M{at:.1f} {top - 2} l-4 -8 h8 z" fill="{color}">{tip}</path>')
    parts.append(
        f'<clipPath id="frame"><rect x="{left}" y="{top}" width="{width - left - right}" height="{height - top - bottom}"/>'
        f'</clipPath><polyline points="{path}" fill="none" stroke="#1c3d5a" stroke-width="1" clip-path="url(#frame)"/>'
    )
    if above := [o for o in shown if o.loss > high]:
        peak = max(above, key=lambda o: o.loss)
        parts.append(
            f'<text x="{width - right}" y="20" text-anchor="end" fill="#777">losses above the frame: '
            f"{len(above):,}, the highest {peak.loss:.4g} at step {peak.step:,}</text>"
        )
    at = float(left)
    for kind in dict.fromkeys(a.kind for a in result.alarms):
        label = f"{kind.value.replace('_', ' ')} ({sum(a.kind is kind for a in result.alarms)})"
        parts.append(
            f'<rect x="{at}" y="28" width="10" height="10" fill="{_COLORS[kind]}"/><text x="{at + 14}" y="37">{label}</text>'
        )
        at += 30 + 7.2 * len(label)
    return "".join(parts) + "</svg>\n"
