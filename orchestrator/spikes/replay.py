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
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.record import StepRecord, read_all_steps
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


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Findings of one stretch. `stopping`: the run would have been watched, stopped or rewound."""

    kind: Kind
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
    observations: list[Observation]
    alarms: list[Alarm]  # by step

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

    `undone`: of a run directory also judge the steps that a rewind or a restart has undone.
    """
    observations = read_log(path, undone)
    rule = make_rule(rule_name, rule_params, declared_steps)
    findings = [rule.judge(o.step, o.loss, o.grad_norm) for o in observations]
    return Replay(path=str(path), rule=rule_name, observations=observations, alarms=alarms(findings))


def alarms(findings: Iterable[Finding]) -> list[Alarm]:
    """Stretches: findings within QUIET observations of each other are one alarm, of the worst kind among them; an outlier
    stands alone, and is dropped where the alarm after it says that it was its beginning."""
    found: list[Alarm] = []
    open_at: int | None = None  # index of the stretch that may still go on
    quiet = 0
    for finding in findings:
        quiet += 1
        if finding.kind is Kind.OK:
            continue
        if open_at is not None and quiet <= QUIET:
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
    worse = _WORSE.index(finding.kind) > _WORSE.index(alarm.kind)
    return replace(
        alarm,
        kind=finding.kind if worse else alarm.kind,
        reason=finding.reason if worse else alarm.reason,
        last_step=finding.step,
        findings=alarm.findings + 1,
    )


def read_log(path: Path, undone: bool = False) -> list[Observation]:
    """The observations of a log, by what it is. Raises UserError where it holds none."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        rows: Iterable[Mapping[str, Any]] = _run_dir_rows(path, undone)
    elif path.suffix == ".wandb":
        rows = _wandb_rows(path)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        rows = _json_rows(path)
    else:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            try:
                rows = list(csv.DictReader(file))
            except csv.Error as error:
                raise UserError(f"{path} is no CSV: {error}") from None
        _of_one_run(path, rows[0] if rows else {})
    observations = list(_observations(rows))
    if not observations:
        raise UserError(
            f"{path} holds no loss: a log needs a step column ({', '.join(STEP_NAMES[:4])}) and a loss column "
            f"({', '.join(LOSS_NAMES[:4])}), as CSV with a header line or one JSON object a line"
        )
    return observations


def _observations(rows: Iterable[Mapping[str, Any]]) -> Iterator[Observation]:
    """Rows without a loss (evaluations, samples) are passed over."""
    for row in rows:
        step, loss = _value(row, STEP_NAMES), _value(row, LOSS_NAMES)
        if step is None or loss is None or not math.isfinite(step):
            continue
        yield Observation(int(step), loss, _value(row, GRAD_NAMES))


def _plain_name(column: str | None) -> str:
    return (column or "").rsplit(" - ", 1)[-1].rsplit("/", 1)[-1].lower()


def _of_one_run(path: Path, row: Mapping[str, Any]) -> None:
    """A chart's export may hold several runs: their losses are not one curve."""
    runs = [k.rsplit(" - ", 1)[0] for k in row if k and " - " in k and _plain_name(k) in LOSS_NAMES]
    if len(set(runs)) > 1:
        raise UserError(
            f"{path} holds the losses of {len(set(runs))} runs ({', '.join(dict.fromkeys(runs))}): export one run at a time"
        )


def _value(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    for name in names:
        value = row.get(name)
        if value is None:
            value = next((v for k, v in row.items() if _plain_name(k) == name), None)
        if value is None or value == "" or isinstance(value, (bool, dict, list)):
            continue
        try:
            return float(value)
        except ValueError:
            continue
    return None


def _run_dir_rows(path: Path, undone: bool) -> list[Mapping[str, Any]]:
    from orchestrator.record import kept_steps

    folder = RunDir(path).records
    if not folder.is_dir():
        raise UserError(f"{path} is no run directory: it has no {folder.name}/")
    records: list[StepRecord] = read_all_steps(folder)
    return [vars(r) for r in (records if undone else kept_steps(records))]


def _json_rows(path: Path) -> Sequence[Mapping[str, Any]]:
    """One object a line, or one list of objects. Torn or foreign lines are passed over."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}") from None
        return [row for row in whole if isinstance(row, dict)]
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _wandb_rows(path: Path) -> list[Mapping[str, Any]]:
    """Through W&B's own reader, so that its format stays its business."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise UserError(f"wandb could not read {path}: {done.stderr.strip() or 'no reason given'}")
        output.seek(0)
        return [row for line in output for row in _wandb_history(line)]


def _wandb_history(line: str) -> Iterator[Mapping[str, Any]]:
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
        f"{result.path}: {len(steps):,} observations, steps {steps[0].step:,} to {steps[-1].step:,}"
        + (f", one every {every:.3g} steps" if every > 1.01 else "")
        + ("" if any(o.grad_norm is not None for o in steps) else ", no gradient norm"),
        f"rule {result.rule}: {len(stops)} alarm{'s' * (len(stops) != 1)} that would call for the policy, "
        f"{sum(a.kind is Kind.OUTLIER for a in noted)} one-batch outliers, {sum(a.kind is Kind.SHIFT for a in noted)} new levels",
    ]
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
