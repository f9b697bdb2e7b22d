"""A run's mirror in W&B: one W&B run whatever the number of starts, and W&B's own step is the run's: each stands there once.

W&B is never read to go on with training, and what it lacks can be uploaded again: the run directory is the truth. The API key
is taken by the client from its own places (WANDB_API_KEY, ~/.netrc) and never passes through here.
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from typing import Any
from urllib.parse import urlsplit

from dashboards.panels import PANELS, metric

FINISH_S = 600.0  # to hand over what is left; a server that takes longer is given up, and `sync` mends it later

ALERTS = {  # event -> W&B's level
    "spike": "WARN",
    "rewound": "WARN",
    "recomputed": "WARN",
    "rewind_dropped": "WARN",
    "recovered": "INFO",
    "save_failed": "ERROR",
    "passed_over": "WARN",
    "hung": "WARN",
    "restarted": "WARN",
    "straggler": "WARN",
    "resumed": "INFO",
    "stopped": "INFO",
    "failed": "ERROR",
    "finished": "INFO",
}


def has_key() -> bool:
    """Whether W&B's client will find a key of the server's here, in the places of its own."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


@dataclass(frozen=True, kw_only=True)
class About:
    """What W&B is told of a run once."""

    id: str
    name: str
    project: str
    entity: str | None
    config: Mapping[str, Any]
    commit: str
    host_metrics: bool  # this process runs where the training runs


class CannotRewind(Exception):
    """The server knows no rewind, or has less than what would be kept."""


class WandbRun:
    """An open W&B run. Its local files lie in a temporary folder that goes with it."""

    def __init__(self, about: About, rewind_to: int | None = None) -> None:
        """Raises CannotRewind; wandb.errors.Error where no server answers or none lets us in."""
        import wandb

        self._folder = tempfile.TemporaryDirectory(prefix="arriero-wandb-", ignore_cleanup_errors=True)
        where: dict[str, Any] = {"id": about.id, "resume": "allow"}
        if rewind_to is not None:
            where = {"resume_from": f"{about.id}?_step={rewind_to}"}
        try:
            self._run = wandb.init(
                project=about.project,
                entity=about.entity,
                name=about.name,
                config=dict(about.config),
                mode="online",
                dir=self._folder.name,
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_code=True,
                    disable_job_creation=True,
                    git_commit=about.commit,
                    init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", 30)),
                    finish_timeout=FINISH_S,
                    finish_timeout_raises=True,
                    x_disable_stats=not about.host_metrics,
                    x_disable_machine_info=not about.host_metrics,
                ),
                **where,
            )
        except Exception as error:
            with contextlib.suppress(Exception):
                wandb.teardown()
            self._folder.cleanup()
            if rewind_to is not None:
                raise CannotRewind(str(error).splitlines()[0]) from None
            raise
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    @property
    def url(self) -> str:
        return str(self._run.url)

    @property
    def next_step(self) -> int | None:
        """The first step that the server does not have; None where it does not say."""
        return int(self._run.starting_step) if self._run.resumed else None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Steps grow from call to call: W&B takes no step twice."""
        self._run.log({"step": step, **figures}, step=step, commit=True)

    def alert(self, kind: str, step: int, detail: str, data: Mapping[str, Any]) -> None:
        """An event as an alert, where W&B sends such. Kinds that nobody needs to hear of are left out."""
        if level := ALERTS.get(kind):
            act = data.get("act")
            what = f"{kind}: {act}" if act else kind
            level = "ERROR" if act == "stop" else level
            # W&B drops an alert of the same title within a minute: three batches skipped at one step are three alerts.
            self._run.alert(title=f"{what} at step {step}", text=detail[:1000], level=level, wait_duration=0.001)

    def summarize(self, figures: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(figures))

    def abandon(self) -> None:
        """After a failure: no run of this process is open any more, whatever became of it."""
        import wandb

        with contextlib.suppress(Exception):
            wandb.teardown()
        self._folder.cleanup()

    def finish(self) -> None:
        """Returns when everything is with the server; raises where the client's own process is gone before."""
        import wandb

        try:
            self._run.finish()
            wandb.teardown()  # the client tells nobody when its process has crashed; this notices
        finally:
            self._folder.cleanup()


def step_metrics() -> list[tuple[str, str, float]]:
    """Name in W&B, StepRecord's field, and the scale, for every figure of a step that a panel shows."""
    found = {
        metric(panel, line): (line.source.removeprefix("step."), panel.scale)
        for panel in PANELS
        for line in panel.step_lines
    }
    return [(name, field, scale) for name, (field, scale) in found.items()]


def event_metrics(kind: str, data: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an event that a panel shows, by their name in W&B."""
    found: dict[str, float] = {}
    for panel in PANELS:
        for line in panel.lines:
            what, _, rest = line.source.partition(".")
            event, _, key = rest.partition(".")
            if what != "event" or event != kind or key not in data:
                continue
            value, name = data[key], metric(panel, line)
            parts = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            found |= {k: float(v) * panel.scale for k, v in parts.items() if isinstance(v, (int, float)) and v - v == 0}
    return found
