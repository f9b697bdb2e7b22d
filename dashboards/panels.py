"""THE list of panels: what is shown of a run, in which section, in which unit, and which recorded figure it is drawn from.

Both faces are built from it: the HTML page (`page.py`) and the W&B mirror and workspace (`wandb_run.py`, `workspace.py`).
A source is `WHAT.FIELD`:

- `step.FIELD`       of every step record
- `event.KIND.KEY`   of the `data` of events of a kind; `event.KIND` is the event itself, of one `act` where the line names it
- `ledger.FIELD`     of an energy reading, one device at one time
- `carbon.FIELD`     of the carbon statement
- `life.KIND`        time, by what the run did with it
- `mix.FIELD`, `forecast.FIELD`, `log.FIELD`   of `run_view`'s own lines

A test fails when a source names what nothing writes down.
"""

from dataclasses import dataclass

SECTIONS = ("Training", "Throughput", "Reliability", "Memory", "Energy", "Data")

# How a panel is drawn. steps: lines over the step. clock: lines over the time of day. life: attempts as bars in time.
# shares: one bar cut into parts. table: rows.
KINDS = ("steps", "clock", "life", "shares", "table")


@dataclass(frozen=True)
class Line:
    source: str
    label: str
    points: bool = False  # seldom measured: dots on the line
    act: str = ""  # of events whose `data` has this act alone


@dataclass(frozen=True, kw_only=True)
class Panel:
    key: str
    section: str
    title: str
    unit: str  # as it is shown, after `scale`; empty where every figure carries its own
    lines: tuple[Line, ...]
    kind: str = "steps"
    scale: float = 1.0  # shown = recorded x scale
    log: bool = False  # logarithmic
    about: str = ""  # one sentence below the title

    @property
    def step_lines(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.source.startswith("step."))


# What came of a withheld update, where it was not applied as it was computed: the second computation tells, not `withheld`.
_NOT_AS_COMPUTED = (
    Line("event.recomputed", "update left out", act="leave_out"),
    Line("event.spike", "update left out", act="skip"),
    Line("event.recomputed", "update applied clipped", act="clip"),
)

PANELS = (
    Panel(
        key="loss",
        section="Training",
        title="Loss",
        unit="nats/token",
        lines=(
            Line("step.loss", "training"),
            Line("event.evaluated.loss", "held-out", points=True),
            *_NOT_AS_COMPUTED,
            Line("event.spike", "spike"),
            Line("event.rewound", "rewind"),
            Line("event.resumed", "resume"),
        ),
        about="Mean over the global batch. Steps that a rewind or a crash undid are grey.",
    ),
    Panel(
        key="held_out",
        section="Training",
        title="Held-out loss by source",
        unit="nats/token",
        lines=(Line("event.evaluated.loss_by_source", "by source", points=True),),
    ),
    Panel(
        key="grad_norm",
        section="Training",
        title="Gradient norm",
        unit="before clipping",
        lines=(
            Line("step.grad_norm", "gradient norm"),
            *_NOT_AS_COMPUTED,
            Line("event.spike", "spike"),
            Line("event.rewound", "rewind"),
        ),
        log=True,
    ),
    Panel(
        key="lr",
        section="Training",
        title="Learning rate",
        unit="",
        lines=(Line("step.lr", "learning rate"),),
    ),
    Panel(
        key="tokens_per_s",
        section="Throughput",
        title="Tokens per second",
        unit="tokens/s",
        lines=(Line("step.tokens_per_s", "all ranks"),),
    ),
    Panel(
        key="mfu",
        section="Throughput",
        title="Model FLOPs utilisation",
        unit="% of peak bf16",
        scale=100,
        lines=(Line("step.mfu", "MFU"),),
    ),
    Panel(
        key="step_time",
        section="Throughput",
        title="Step time",
        unit="s",
        lines=(Line("step.step_s", "whole step"), Line("step.data_s", "of it, waiting for data")),
    ),
    Panel(
        key="life",
        section="Reliability",
        title="Attempts",
        unit="",
        kind="life",
        lines=(
            Line("life.kept", "kept steps"),
            Line("life.lost", "lost steps"),
            Line("life.startup", "start-up"),
            Line("life.checkpoint", "checkpoints"),
            Line("life.evaluation", "evaluation"),
            Line("life.idle", "other"),
        ),
        about="Each start of the run, in time.",
    ),
    Panel(
        key="ettr",
        section="Reliability",
        title="Where the time went",
        unit="",
        kind="shares",
        lines=(
            Line("life.kept", "kept steps"),
            Line("life.lost", "lost steps"),
            Line("life.startup", "start-up"),
            Line("life.checkpoint", "checkpoints"),
            Line("life.evaluation", "evaluation"),
            Line("life.idle", "other"),
            Line("life.down", "between attempts"),
        ),
        about="ETTR, the effective training time ratio: kept steps over all time from the first start on.",
    ),
    Panel(
        key="events",
        section="Reliability",
        title="Events",
        unit="",
        kind="table",
        lines=(
            Line("event.started", "started"),
            Line("event.resumed", "resumed"),
            Line("event.spike", "spike"),
            Line("event.rewound", "rewound"),
            Line("event.withheld", "withheld"),
            Line("event.recomputed", "recomputed"),
            Line("event.recovered", "recovered"),
            Line("event.rewind_dropped", "rewind dropped"),
            Line("event.restarted", "ranks restarted"),
            Line("event.hung", "hung"),
            Line("event.straggler", "straggler"),
            Line("event.save_failed", "save failed"),
            Line("event.passed_over", "checkpoint passed over"),
            Line("event.stopped", "stopped"),
            Line("event.failed", "failed"),
            Line("event.finished", "finished"),
        ),
    ),
    Panel(
        key="logs",
        section="Reliability",
        title="Last errors in the logs",
        unit="",
        kind="table",
        lines=(Line("log.text", "error"), Line("log.file", "file")),
    ),
    Panel(
        key="memory",
        section="Memory",
        title="Peak memory of rank 0",
        unit="GiB",
        scale=1 / 2**30,
        lines=(Line("step.memory_bytes", "peak"),),
    ),
    Panel(
        key="power",
        section="Energy",
        title="Power",
        unit="W",
        kind="clock",
        lines=(Line("ledger.joules", "power"),),
        about="Of the devices, without PUE; between two readings the power is taken as even.",
    ),
    Panel(
        key="energy_by_class",
        section="Energy",
        title="What the energy was for",
        unit="",
        kind="shares",
        lines=(Line("carbon.by_class_kwh", "by use"),),
    ),
    Panel(
        key="energy_by_source",
        section="Energy",
        title="How it was measured",
        unit="",
        kind="shares",
        lines=(Line("carbon.by_source_kwh", "by source"),),
    ),
    Panel(
        key="carbon",
        section="Energy",
        title="Energy and carbon",
        unit="",
        kind="table",
        lines=(
            Line("carbon.energy_kwh", "energy"),
            Line("carbon.co2e_kg", "carbon"),
            Line("carbon.gpu_hours", "GPU-hours"),
        ),
    ),
    Panel(
        key="tokens",
        section="Data",
        title="Tokens trained",
        unit="tokens",
        lines=(Line("step.tokens", "tokens"),),
    ),
    Panel(
        key="mix",
        section="Data",
        title="Mix",
        unit="",
        kind="table",
        lines=(
            Line("mix.source", "source"),
            Line("mix.proportion", "share of rows"),
            Line("mix.tokens", "tokens there"),
            Line("mix.epochs", "epochs"),
        ),
        about="Epochs: how often the run has walked through a source so far.",
    ),
    Panel(
        key="forecast",
        section="Data",
        title="Forecast and measured",
        unit="",
        kind="table",
        lines=(
            Line("forecast.figure", "figure"),
            Line("forecast.forecast", "forecast"),
            Line("forecast.measured", "measured"),
        ),
    ),
)


def panels(section: str) -> tuple[Panel, ...]:
    return tuple(p for p in PANELS if p.section == section)


def step_fields() -> tuple[str, ...]:
    """The fields of step records that any panel draws."""
    return tuple(dict.fromkeys(s.source.removeprefix("step.") for p in PANELS for s in p.step_lines))


def metric(panel: Panel, line: Line) -> str:
    """The name of a line in W&B, which groups panels by what stands before the slash."""
    return f"{panel.section.lower()}/{line.source.split('.', 1)[1].replace('.', '_')}"
