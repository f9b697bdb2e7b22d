"""All rules on the labelled curves of ../shared/spikes, where they are: `make bench`, or this file by itself.

Prints, for real curves and for synthetic ones, F1 and false alarms of the alarms that stop or rewind, and the time a step.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.spikes.finding import STOPPING
from orchestrator.spikes.rules import RULES, make_rule

SHARED = Path(__file__).resolve().parents[3] / "shared" / "spikes"


def _scorer() -> Any:
    spec = importlib.util.spec_from_file_location("spike_score", SHARED / "score.py")
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
    score = _scorer()
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


def main() -> None:
    if not (SHARED / "score.py").exists():
        print(f"no labelled curves at {SHARED}: nothing to score")
        return
    score = _scorer()
    print("\nreal curves, alarms that stop or rewind (latency in observations)")
    print(table(score.load_real(), pre=3))
    with tempfile.TemporaryDirectory() as folder:
        for split in ("dev", "test"):
            subprocess.run(
                [sys.executable, SHARED / "generate.py", folder, split, "80"], check=True, capture_output=True
            )
            curves = score.load_synth(split, folder)
            print(f"\nsynthetic curves ({split}), changes of schedule and mix declared")
            print(table(curves, pre=0))
            if split == "test":
                print("\nthe same, nothing declared")
                print(table(curves, pre=0, declared=False, rules=["cusum"]))
                print("\nthe same, without gradient norms")
                print(table([(c[0], c[1], None, *c[3:]) for c in curves], pre=0, rules=["cusum"]))
                print("\nrecall by kind:", row("cusum", curves, 0)["recall_by_kind"])


if __name__ == "__main__":
    main()
