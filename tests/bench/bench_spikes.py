"""All rules on the labelled curves of ../shared/spikes, where they are: `make bench`, or this file by itself.

Prints the two tables of docs/spikes.md: all rules, and ours on curves and under conditions of other kinds. What is counted are
alarms that stop or rewind.
"""

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from spike_curves import Curve, make_curve

from orchestrator.spikes.finding import STOPPING
from orchestrator.spikes.rules import RULES, make_rule

SHARED = Path(__file__).resolve().parents[3] / "shared" / "spikes"


@dataclass(frozen=True)
class Curves:
    """`pre`: steps before a label from which an alarm counts as right: real labels were set by eye."""

    curves: list[Curve]
    pre: int


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"spikes_{name}", SHARED / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def real() -> Curves:
    found = _module("score").load_real(SHARED)
    return Curves([Curve(name, loss, grad, labels, []) for name, loss, grad, labels in found], pre=3)


def synthetic(first_seed: int, count: int = 80) -> Curves:
    make = _module("generate").make_curve
    made = [make(s) for s in range(first_seed, first_seed + count)]
    declared = [[int(step) for step, _, known in c["shifts"] if known] for c in made]
    return Curves(
        [Curve("", c["loss"], c["grad_norm"], c["labels"], d) for c, d in zip(made, declared, strict=True)], pre=0
    )


def others(first_seed: int, count: int = 120) -> Curves:
    return Curves([make_curve(s) for s in range(first_seed, first_seed + count)], pre=1)


def without_declarations(of: Curves) -> Curves:
    return replace(of, curves=[replace(c, declared=[]) for c in of.curves])


def without_grad_norms(of: Curves) -> Curves:
    return replace(of, curves=[replace(c, grad_norm=None) for c in of.curves])


def alarms(rule_name: str, curve: Curve) -> npt.NDArray[np.bool_]:
    """One bool a step: whether the rule would have stopped or rewound."""
    loss = curve.loss.tolist()
    grad_norm: Sequence[float | None] = [None] * len(loss) if curve.grad_norm is None else curve.grad_norm.tolist()
    judge = make_rule(rule_name, declared_steps=curve.declared).judge
    return np.array([judge(i, x, g).kind in STOPPING for i, (x, g) in enumerate(zip(loss, grad_norm, strict=True))])


def measured(rule_name: str, of: Curves) -> dict[str, Any]:
    score = _module("score")
    started = time.process_time()
    found = [alarms(rule_name, c) for c in of.curves]
    us = (time.process_time() - started) * 1e6 / sum(len(c.loss) for c in of.curves)
    rows = [score.score_curve(b, c.labels, len(c.loss), "S", of.pre) for b, c in zip(found, of.curves, strict=True)]
    return {**score.aggregate(rows), "us_per_step": us}


def test_print_the_table_of_all_rules() -> None:
    main()


def main() -> None:
    if not (SHARED / "score.py").exists():
        print(f"no labelled curves at {SHARED}: nothing to score")
        return
    on_real, fresh = real(), synthetic(40_000)
    by_kind: list[str] = []
    print("\n| rule | real F1 | false/100k | latency (obs.) | synthetic F1 | false/100k | us/step |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in RULES:
        r, s = measured(name, on_real), measured(name, fresh)
        latency = "-" if r["latency_median"] is None else f"{r['latency_median']:g}"
        print(
            f"| `{name}` | {r['f1']:.3f} | {r['fa_per_100k']:.2f} | {latency} | {s['f1']:.3f} | {s['fa_per_100k']:.2f} "
            f"| {r['us_per_step']:.1f} |"
        )
    print("\n| `cusum` on | F1 | found | false/100k | latency (obs.) |\n|---|--:|--:|--:|--:|")
    again, other = synthetic(70_000), others(20_000)
    for what, curves in (
        ("real curves", on_real),
        ("real curves, without gradient norms", without_grad_norms(on_real)),
        ("synthetic, seeds 10000 on, which the numbers have seen", synthetic(10_000)),
        ("synthetic, seeds 40000 on", fresh),
        ("synthetic, seeds 70000 on", again),
        ("synthetic, seeds 70000 on, nothing declared", without_declarations(again)),
        ("synthetic, seeds 70000 on, without gradient norms", without_grad_norms(again)),
        ("another generator, a third of its curves without gradient norms", other),
        ("another generator, nothing declared", without_declarations(other)),
        ("another generator, no curve with gradient norms", without_grad_norms(other)),
    ):
        m = measured("cusum", curves)
        print(
            f"| {what} | {m['f1']:.3f} | {m['tp']}/{m['events']} | {m['fa_per_100k']:.2f} | {m['latency_median']:g} |"
        )
        if any(curves is c for c in (on_real, again, other)):
            by_kind.append(f"found on {what}: {m['recall_by_kind']}")
    print("", *by_kind, sep="\n")


if __name__ == "__main__":
    main()
