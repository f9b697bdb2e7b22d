"""Where the points of a fit come from: finished runs, or a CSV of anybody's."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.cost import parameter_count
from orchestrator import spec as specs
from orchestrator.carbon_report import run_dirs
from orchestrator.errors import UserError
from orchestrator.record import read_events
from orchestrator.run_dir import RunDir
from orchestrator.scaling.fit import Points

_COLUMNS = {
    "parameters": ("parameters", "n", "params", "model size", "model_size"),
    "tokens": ("tokens", "d", "training tokens", "training_tokens"),
    "flops": ("flops", "c", "training flop", "training flops", "training_flops"),
    "loss": ("loss", "l", "held_out_loss"),
}


def from_csv(path: Path) -> tuple[Points, list[str]]:
    """Columns parameters, loss and tokens, or flops = 6 N D in place of tokens; their usual other names are known too."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    header = {str(name).strip().lower(): name for name in (rows[0] if rows else {})}
    column = {k: next((header[n] for n in names if n in header), None) for k, names in _COLUMNS.items()}
    if not (column["parameters"] and column["loss"] and (column["tokens"] or column["flops"])):
        raise UserError(
            f"{path} has columns {', '.join(header) or 'none'}: it needs parameters, loss, and tokens or flops (= 6 N D)"
        )

    def values(name: str) -> np.ndarray:
        found = []
        for number, row in enumerate(rows, 2):
            text = row[column[name]]
            try:
                found.append(float(text))
            except (TypeError, ValueError):
                raise UserError(f"{path}, line {number}: {column[name]} is {text!r}, not a number") from None
        return np.array(found)

    parameters = values("parameters")
    tokens = values("tokens") if column["tokens"] else values("flops") / (6 * parameters)
    return Points(parameters, tokens, values("loss")), []


def from_runs(paths: Sequence[Path]) -> tuple[Points, list[str]]:
    """The finished runs below `paths`: all parameters (embedding and output too), tokens trained, final held-out loss.

    Of runs that differ in anything but size, tokens and seed (a learning rate) the best one counts. Notes say what was left
    out. Only final losses count: before its schedule ends, a run's loss is not that of a run planned so short.
    """
    notes: list[str] = []
    best: dict[tuple[int, int, int], float] = {}
    seen = 0
    corpora: dict[str, Path] = {}
    for root in run_dirs(paths):
        spec = specs.load(RunDir(root).spec)
        events = read_events(RunDir(root).events)
        held_out = [
            e.data["loss"] for e in events if e.kind == "evaluated" and e.step == spec.steps and "loss" in e.data
        ]
        if not any(e.kind == "finished" for e in events) or not held_out:
            why = (
                "has no held-out loss of its last step"
                if any(e.kind == "finished" for e in events)
                else "is not finished"
            )
            notes.append(f"left out: {root.name} {why}")
            continue
        data = specs.as_dict(spec)["data"]
        corpora.setdefault(
            json.dumps([spec.model.vocab_size, data["sources"], data["tokenizer"]], sort_keys=True), root
        )
        if len(corpora) > 1:
            one, other = corpora.values()
            raise UserError(
                f"{one} and {other} differ in model.vocab_size or in data: losses per token of different tokens or texts "
                f"cannot share a law; fit them apart"
            )
        seen += 1
        key = (parameter_count(spec.model), spec.steps * spec.batch_tokens, spec.seed)
        best[key] = min(best.get(key, float("inf")), float(held_out[-1]))
    if seen > len(best):
        notes.append(f"{seen} finished runs are {len(best)} points: the best of each size, tokens and seed counts")
    n, d, _ = (np.array(v, dtype=float) for v in zip(*best, strict=True)) if best else (np.zeros(0),) * 3
    return Points(n, d, np.array(list(best.values()))), notes
