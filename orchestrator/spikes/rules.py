"""The rules by name. To add one: a file with `Params` and a class that fits `finding.Rule`, a line here, a YAML file in
hydra_conf/spikes/."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from orchestrator.spikes import cusum, kill_loss_spike, olmo_skip_step, zclip, zscore
from orchestrator.spikes.finding import Rule

RULES: dict[str, tuple[type[Any], type[Any]]] = {
    "cusum": (cusum.Cusum, cusum.Params),
    "olmo_skip_step": (olmo_skip_step.OlmoSkipStep, olmo_skip_step.Params),
    "kill_loss_spike": (kill_loss_spike.KillLossSpike, kill_loss_spike.Params),
    "zscore": (zscore.ZScore, zscore.Params),
    "zclip": (zclip.ZClip, zclip.Params),
}


def make_rule(name: str, params: Mapping[str, float] | None = None, declared_steps: Iterable[int] = ()) -> Rule:
    """The rule `name` with its defaults, but for `params`. `declared_steps`: from which a change of the loss is expected."""
    rule, rule_params = RULES[name]
    made: Rule = rule(rule_params(**(params or {})), declared_steps)
    return made


def param_names(name: str) -> list[str]:
    return [f.name for f in fields(RULES[name][1])]
