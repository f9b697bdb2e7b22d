"""Forecast against published tables, as docs/plan.md shows them: python tests/bench/bench_plan.py"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/unit/orchestrator/plan")]

import published  # noqa: E402

from orchestrator import spec as specs  # noqa: E402
from orchestrator.plan import forecast  # noqa: E402


def main() -> None:
    print("| source | run | figure | published | forecast | off by |\n|---|---|---|---|---|---|")
    for name, hours in (("7b", 82_432), ("13b", 135_168), ("33b", 530_432), ("65b", 1_022_362)):
        found = forecast.plan(specs.compose([f"experiment=llama_{name}"]), 0).figures["gpu_hours"].central
        print(
            f"| 2302.13971 | LLaMA {name} | gpu_hours | {hours:,} | {found:,.0f} | {100 * (found / hours - 1):+.1f}% |"
        )
    for row in published.tables():
        print(
            f"| {row.source} | {row.label} | {row.figure} | {_figure(row.published)} | {_figure(row.forecast)} | "
            f"{100 * row.error:+.1f}% |"
        )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
