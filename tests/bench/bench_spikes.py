"""All rules on the labelled curves of ../shared/spikes, where they are: `make bench`, or this file by itself.

Prints, for real curves and for synthetic ones, F1 and false alarms of the alarms that stop or rewind, and the time a step.
"""

import importlib.util
import time
from pathlib import Path
from typing import Any

from orchestrator.spikes.finding import STOPPING
from orchestrator.spikes.rules import RULES, make_rule

SHARED = Path(__file__).resolve().parents[3] / "shared" / "spikes"
FRESH_SEED = 40_000


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"spikes_{name}", SHARED / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alarms(rule_name: str, curve: Any, declared: bool = True) -> Any:
    """One bool a step: whether the rule would have stopped or rewound."""
    import numpy as np

    loss, grad_norm = curve[1].tolist(), None if curve[2] is None else curve[2].tolist()
    known = [s for s, _, known in curve[4] if known] if declared and len(curve) > 4 else []
    judge = make_rule(rule_name, declared_steps=known).judge
    if grad_norm is None:
        return np.array([judge(i, x).kind in STOPPING for i, x in enumerate(loss)])
    return np.array([judge(i, x, g).kind in STOPPING for i, (x, g) in enumerate(zip(loss, grad_norm, strict=True))])


def row(rule_name: str, curves: list[Any], pre: int, declared: bool = True) -> dict[str, Any]:
    score = _module("score")
    started = time.process_time()
    found = [alarms(rule_name, c, declared) for c in curves]
    us = (time.process_time() - started) * 1e6 / sum(len(c[1]) for c in curves)
    rows = [score.score_curve(b, c[3], len(c[1]), "S", pre) for b, c in zip(found, curves, strict=True)]
    return {**score.aggregate(rows), "us_per_step": us}


def table(curves: list[Any], pre: int, declared: bool = True, rules: list[str] | None = None) -> str:
    lines = [f"{'rule':<18}{'F1':>7}{'recall':>8}{'precision':>11}{'false/100k':>12}{'latency':>9}{'us/step':>9}"]
    for name in rules or list(RULES):
        r = row(name, curves, pre, declared)
        lines.append(
            f"{name:<18}{r['f1']:>7.3f}{r['recall']:>8.3f}{r['precision']:>11.3f}{r['fa_per_100k']:>12.2f}"
            f"{r['latency_median'] if r['latency_median'] is not None else '-':>9}{r['us_per_step']:>9.2f}"
        )
    return "\n".join(lines)


def test_print_the_table_of_all_rules() -> None:
    main()


def synthetic(first_seed: int, count: int) -> list[Any]:
    """Curves as score.load_synth gives them, from seeds of our choice."""
    make = _module("generate").make_curve
    made = [(f"seed {s}", make(s)) for s in range(first_seed, first_seed + count)]
    return [(name, c["loss"], c["grad_norm"], c["labels"], c["shifts"], c["lr"]) for name, c in made]


def main() -> None:
    if not (SHARED / "score.py").exists():
        print(f"no labelled curves at {SHARED}: nothing to score")
        return
    print("\nreal curves, alarms that stop or rewind (latency in observations)")
    print(table(_module("score").load_real(SHARED), pre=3))
    for what, seed in (("seeds on which the numbers were set", 10_000), ("seeds on which nothing was set", FRESH_SEED)):
        curves = synthetic(seed, 80)
        print(f"\nsynthetic curves, {what}; changes of schedule and mix declared")
        print(table(curves, pre=0))
    print("\nthe last ones, nothing declared")
    print(table(curves, pre=0, declared=False, rules=["cusum"]))
    print("\nthe last ones, without gradient norms")
    print(table([(c[0], c[1], None, *c[3:]) for c in curves], pre=0, rules=["cusum"]))
    print("\nrecall of cusum by kind:", row("cusum", curves, 0)["recall_by_kind"])


if __name__ == "__main__":
    main()
