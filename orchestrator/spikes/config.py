"""Which rule watches the loss, and what a run may spend on a spike."""

from dataclasses import dataclass, field

from orchestrator.spikes.rules import RULES, param_names


@dataclass(kw_only=True)
class SpikesConfig:
    """Steps are optimizer steps; batches are global data batches. docs/spikes.md explains each choice."""

    name: str
    rule: str = "cusum"  # one of rules.RULES
    params: dict[str, float] = field(default_factory=dict)  # of the rule, where they differ from its defaults
    declared_steps: list[int] = field(
        default_factory=list
    )  # from which the loss is expected to change: another mix, say
    act: bool = True  # false: the rule watches and writes down, and never changes the run
    # the gate before the update
    gate_tails: float = 4.0  # a loss or gradient norm so many learnt tails up is withheld and recomputed
    recompute_rtol: float = 1e-3  # a recomputed loss that differs by more is a hardware fault
    # the policy
    patience: float = 1.0  # watch a spike for so many times the steps that a rewind would cost; 0: rewind at once
    max_watch_steps: int = 100
    restart_steps: int = 10  # what a rewind costs beside the steps trained again
    margin_steps: int = 10  # between the checkpoint and the onset; batches skipped before and after the spike
    vet_steps: int = 50  # clean steps past a checkpoint before it is trusted
    max_rewinds_per_incident: int = 3  # the last of them at a lower learning rate
    max_rewinds_per_run: int = 20
    max_skipped_batches: int = 2000
    lower_lr_factor: float = 0.5

    def problems(self) -> list[str]:
        found = []
        if self.rule not in RULES:
            found.append(f"spikes.rule={self.rule} is none of {', '.join(RULES)}")
        else:
            known = param_names(self.rule)
            found += [
                f"spikes.params.{name}={value} is no parameter of rule {self.rule}: it has {', '.join(known)}"
                for name, value in self.params.items()
                if name not in known
            ]
            found += [
                f"spikes.params.{name}={value} must be above 0"
                for name, value in self.params.items()
                if name in known and not value > 0
            ]
        for name in (
            "patience",
            "max_watch_steps",
            "restart_steps",
            "margin_steps",
            "vet_steps",
            "max_rewinds_per_incident",
            "max_rewinds_per_run",
            "max_skipped_batches",
            "recompute_rtol",
        ):
            if getattr(self, name) < 0:
                found.append(f"spikes.{name}={getattr(self, name)} must be 0 or more")
        found += [f"spikes.declared_steps holds {s}: steps begin at 1" for s in self.declared_steps if s < 1]
        if self.gate_tails <= 1:
            found.append(
                f"spikes.gate_tails={self.gate_tails} must be above 1: below lies what the run's own batches do now and then"
            )
        if not 0 < self.lower_lr_factor <= 1:
            found.append(f"spikes.lower_lr_factor={self.lower_lr_factor} must lie above 0 and be at most 1")
        return found
