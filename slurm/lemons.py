"""Nodes that have let a job down, and for how long to stay away from them. Append-only; each failure halves with time."""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

HALF_LIFE_DAYS = 3.0
EXCLUDED_FROM = 0.5  # one failure keeps a node out for a half-life, two for two, four for three


def add(ledger: Path, node: str, why: str, job_id: str = "", now_s: float | None = None) -> None:
    line = json.dumps({"time_s": time.time() if now_s is None else now_s, "node": node, "why": why, "job_id": job_id})
    with ledger.open("a", encoding="utf-8") as file:
        file.write(line + "\n")  # one write of less than a page: whole, also from many jobs at once
        file.flush()
        os.fsync(file.fileno())


def weights(ledger: Path, now_s: float | None = None) -> dict[str, float]:
    """Node -> what is left of its failures, heaviest first. A torn line is passed over."""
    now_s = time.time() if now_s is None else now_s
    found: dict[str, float] = {}
    for entry in _entries(ledger):
        age_days = max(0.0, now_s - float(entry["time_s"])) / 86_400  # a clock that was ahead counts as now
        found[entry["node"]] = found.get(entry["node"], 0.0) + 0.5 ** (age_days / HALF_LIFE_DAYS)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def excluded(ledger: Path, now_s: float | None = None) -> list[str]:
    """The nodes to keep away from now, for --exclude."""
    return sorted(node for node, weight in weights(ledger, now_s).items() if weight >= EXCLUDED_FROM)


def _entries(ledger: Path) -> Iterable[dict[str, str]]:
    if not ledger.exists():
        return
    for line in ledger.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            float(entry["time_s"])
            if isinstance(entry["node"], str):
                yield entry
        except (ValueError, KeyError, TypeError):
            continue
