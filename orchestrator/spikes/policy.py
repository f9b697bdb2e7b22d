"""What to do about a finding: watch, rewind and skip, lower the learning rate, or stop and call a person.

Pure: `decide` takes plain data and returns the verdict and the policy's next state. The state is never rewound with the
model: it stands in the audit records, and the last one of a run is where the next start goes on.

* Watch or rewind by cost. Watching costs a step a step; a rewind costs the steps since the checkpoint and a restart. Nobody
  knows how long a spike lasts, so we watch until that has cost as much as the rewind would have: never more than twice the
  best (the ski-rental rule; Karlin et al., "Competitive snoopy caching", 1988). Diverged or not finite: rewind at once.
* The checkpoint is the newest trusted one before the onset: saved `margin_steps` and `vet_steps` of clean steps before it.
* Skipped are the data batches from before the onset to after the alarm, as PaLM did by hand (Chowdhery et al. 2022, section
  5.1: about 100 steps back, 200 to 500 batches skipped). Nothing is reseeded: a batch is a function of its index.
* The same incident again: further back and more batches, doubled each time; then at a lower learning rate; then stop.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from orchestrator.spikes.config import SpikesConfig
from orchestrator.spikes.finding import Finding, Kind

Act = Literal["accept", "watch", "skip", "rewind", "lower_lr", "stop"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the run does next. `rewind` and `lower_lr` load the checkpoint of `to_step` and leave out the data batches
    `skip_from` ... `skip_to - 1`; `skip` leaves them out without a rewind: the step is done with the next batch."""

    act: Act
    reason: str
    to_step: int | None = None  # steps done, as in a checkpoint
    skip_from: int | None = None  # first data batch
    skip_to: int | None = None  # the data batch after the last
    lr_scale: float = 1.0  # of the whole schedule, from now on


@dataclass(frozen=True, kw_only=True)
class PolicyState:
    """All that the policy remembers, as JSON by `asdict`."""

    skips: tuple[tuple[int, int], ...] = ()  # data batches [first, end) that are not trained on; only ever appended to
    rewound_to: tuple[int, ...] = ()  # the checkpoint's step of every rewind so far, in order
    incident_rewinds: int = 0
    incident_onset: int | None = None  # of the incident that is open
    incident_end: int = 0  # the incident is over when this step passes cleanly
    watched_since: int | None = None
    lr_scale: float = 1.0
    lowered_at: tuple[
        int, ...
    ] = ()  # the first step of each lower learning rate: the loss then falls faster for a while
    stopped: bool = False

    @property
    def rewinds(self) -> int:
        return len(self.rewound_to)

    @property
    def skipped_batches(self) -> int:
        return sum(end - first for first, end in _merged(self.skips))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PolicyState":
        skips = tuple((int(a), int(b)) for a, b in values["skips"])
        steps = {name: tuple(values.get(name, ())) for name in ("rewound_to", "lowered_at")}
        return cls(**{**values, **steps, "skips": skips})


def decide(
    finding: Finding,
    elevated: bool,
    checkpoints: Sequence[int],
    data_batch: Callable[[int], int],
    state: PolicyState,
    config: SpikesConfig,
) -> tuple[Verdict, PolicyState]:
    """The verdict on one step's finding; call it for every step, the calm ones too.

    `finding.step` counts steps done, this one included. `elevated`: the loss still stands above its trend. `data_batch`
    maps a 0-based step to its data batch under the present skip list. `checkpoints` are the steps of those of the run's history:
    the store leaves out what was saved in a past that has been undone.
    """
    step = finding.step
    if not finding.stopping:
        return _calm(step, elevated, checkpoints, data_batch, state, config)
    if state.stopped:
        return Verdict(act="stop", reason="the run is stopped"), state
    if not config.act:
        return Verdict(act="accept", reason=f"{finding.reason}; spikes.act=false: only written down"), state
    return _incident(finding, checkpoints, data_batch, state, config)


def skip_batch(batch: int, reason: str, state: PolicyState, config: SpikesConfig) -> tuple[Verdict, PolicyState]:
    """The gate's verdict on one bad data batch: leave it out and do the step with the next one."""
    if state.skipped_batches + 1 > config.max_skipped_batches:
        return _stop(f"{reason}; but {state.skipped_batches} batches are skipped already", state, config)
    grown = replace(state, skips=(*state.skips, (batch, batch + 1)))
    return Verdict(act="skip", reason=reason, skip_from=batch, skip_to=batch + 1, lr_scale=state.lr_scale), grown


def _calm(
    step: int,
    elevated: bool,
    checkpoints: Sequence[int],
    data_batch: Callable[[int], int],
    state: PolicyState,
    config: SpikesConfig,
) -> tuple[Verdict, PolicyState]:
    """A step without an alarm. A watched incident goes on while the loss is still up."""
    if state.watched_since is not None:
        if elevated and config.act and not state.stopped:
            onset = state.incident_onset or state.watched_since
            still = Finding(Kind.SPIKE, step, onset, 1.0, f"the loss is still up since step {onset}")
            return _incident(still, checkpoints, data_batch, state, config)
        state = replace(state, watched_since=None, incident_end=max(state.incident_end, step + config.vet_steps))
        return Verdict(act="accept", reason="the loss has come back by itself", lr_scale=state.lr_scale), state
    if state.incident_onset is not None and step > state.incident_end:
        state = replace(state, incident_onset=None, incident_rewinds=0)
    return Verdict(act="accept", reason="", lr_scale=state.lr_scale), state


def _incident(
    finding: Finding,
    checkpoints: Sequence[int],
    data_batch: Callable[[int], int],
    state: PolicyState,
    config: SpikesConfig,
) -> tuple[Verdict, PolicyState]:
    step, onset = finding.step, min(finding.onset_step, finding.step)
    same = state.incident_onset is not None and step <= max(state.incident_end, step if state.watched_since else 0)
    if not same:
        state = replace(state, incident_rewinds=0, incident_onset=onset)
    else:
        onset = min(onset, state.incident_onset or onset) if state.watched_since is not None else onset
        state = replace(state, incident_onset=min(onset, state.incident_onset or onset))
    state = replace(state, incident_end=max(state.incident_end, step + config.vet_steps))

    reach = config.margin_steps * 2**state.incident_rewinds  # doubled with every rewind of this incident
    trusted = [c for c in checkpoints if c < onset and c + max(reach, config.vet_steps) <= onset]
    if state.incident_rewinds:  # further back than last time, where there is something further back
        further = [c for c in trusted if c < state.rewound_to[-1]]
        trusted = further or trusted
    target = max(trusted, default=None)

    if finding.kind is Kind.SPIKE and state.incident_rewinds == 0:
        cost = step - target + config.restart_steps if target is not None else config.max_watch_steps
        watch = min(config.patience * cost, config.max_watch_steps)
        since = state.watched_since if state.watched_since is not None else step
        if step - since < watch:
            reason = f"{finding.reason}; watched for {step - since} of {watch:.0f} steps: a rewind would cost {cost}"
            return Verdict(act="watch", reason=reason, lr_scale=state.lr_scale), replace(state, watched_since=since)
    state = replace(state, watched_since=None)

    if target is None:
        if finding.kind is Kind.SPIKE:
            return _stop(
                f"{finding.reason}; it does not pass, and no trusted checkpoint lies before step {onset}", state, config
            )
        return _stop(f"{finding.reason}; no trusted checkpoint lies before step {onset}", state, config)
    if state.incident_rewinds >= config.max_rewinds_per_incident:
        return _stop(f"{finding.reason}; {state.incident_rewinds} rewinds of this incident did not help", state, config)
    if state.rewinds >= config.max_rewinds_per_run:
        return _stop(f"{finding.reason}; the run has spent its {state.rewinds} rewinds", state, config)

    first = data_batch(max(target, onset - 1 - reach))
    end = data_batch(step - 1) + 1 + reach
    skips = (*state.skips, (first, end))
    grown = replace(state, skips=skips)
    if grown.skipped_batches > config.max_skipped_batches:
        budget = f"{grown.skipped_batches} skipped batches would exceed spikes.max_skipped_batches={config.max_skipped_batches}"
        return _stop(f"{finding.reason}; {budget}", state, config)
    last = state.incident_rewinds + 1 == config.max_rewinds_per_incident and config.max_rewinds_per_incident > 1
    scale = state.lr_scale * (config.lower_lr_factor if last else 1.0)
    after = replace(
        grown,
        rewound_to=(*state.rewound_to, target),
        incident_rewinds=state.incident_rewinds + 1,
        lr_scale=scale,
        lowered_at=(*state.lowered_at, target + 1) if last else state.lowered_at,
    )
    lowered = f", the learning rate times {scale:g}" if last else ""
    reason = f"{finding.reason}; back to step {target}, data batches {first} to {end - 1} skipped{lowered}"
    return Verdict(
        act="lower_lr" if last else "rewind",
        reason=reason,
        to_step=target,
        skip_from=first,
        skip_to=end,
        lr_scale=scale,
    ), after


def _stop(reason: str, state: PolicyState, config: SpikesConfig) -> tuple[Verdict, PolicyState]:
    return Verdict(act="stop", reason=f"{reason}: a person must look", lr_scale=state.lr_scale), replace(
        state, stopped=True
    )


def _merged(skips: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, end in sorted(skips):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((first, end))
    return merged
