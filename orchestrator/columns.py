"""The step records of a run as columns: a million steps are read in seconds, and what is appended is read alone.

The files are append-only, so a reader remembers how far it has read and goes on from there: the page that refreshes, the terminal
view and the W&B mirror all follow a run that way. What the columns mean is `StepRecord`'s to say.
"""

import json
import re
from dataclasses import dataclass, field, fields
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from orchestrator.record import StepRecord, unix_s, utc

Column = np.ndarray[tuple[int], np.dtype[np.float64]]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]

NUMBERS = tuple(f.name for f in fields(StepRecord) if f.name != "time_utc")
_BLOCK_BYTES = 64 << 20
_ARROW_TYPES = {"time_utc": pa.timestamp("ms", "UTC"), "clipped": pa.bool_()}
_INTEGERS = ("attempt", "step", "tokens", "data_batch", "memory_bytes")
_SCHEMA = pa.schema(
    [
        (f.name, _ARROW_TYPES.get(f.name) or (pa.int64() if f.name in _INTEGERS else pa.float64()))
        for f in fields(StepRecord)
    ]
)
_NOT_FINITE = re.compile(rb":\s*-?(?:NaN|Infinity)")  # Python writes them, JSON does not know them


@dataclass(frozen=True)
class StepColumns:
    """Every step ever trained, in the order in which it was written. What is missing or not finite is NaN."""

    time_s: Column  # when the step ended, Unix seconds
    number: dict[str, Column]  # by StepRecord's field

    def __len__(self) -> int:
        return len(self.time_s)

    def __getitem__(self, name: str) -> Column:
        return self.number[name]

    def kept(self) -> Mask:
        """The steps that made the model: none at or below them was written later (`record.kept_steps`)."""
        step = self.number["step"]
        lowest_later = np.minimum.accumulate(np.append(step[1:], np.inf)[::-1])[::-1]
        return np.asarray(step < lowest_later, dtype=np.bool_)

    def where(self, mask: Mask) -> "StepColumns":
        return StepColumns(self.time_s[mask], {k: v[mask] for k, v in self.number.items()})

    def since(self, index: int) -> "StepColumns":
        return StepColumns(self.time_s[index:], {k: v[index:] for k, v in self.number.items()})


@dataclass
class _File:
    offset: int = 0
    blocks: list[StepColumns] = field(default_factory=list)


class StepReader:
    """Reads a folder of records, and on every further call only what was appended since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, _File] = {}

    def read(self) -> StepColumns:
        for path in self.folder.glob("*.jsonl"):
            _read_on(path, self._files.setdefault(path.name, _File()))
        blocks = []
        for name in sorted(self._files):
            file = self._files[name]
            if len(file.blocks) > 1:
                file.blocks = [_joined(file.blocks)]
            blocks += file.blocks
        return _joined(blocks)


def read_columns(folder: Path) -> StepColumns:
    return StepReader(folder).read()


def condensed(columns: StepColumns, apart: set[int]) -> list[StepRecord]:
    """Few records for many: steps that follow on each other without a pause, all kept or all undone, as one record.

    Its `step` is the last one's, its `step_s` the sum: for accounts of time, where only when and what for matter. A step in
    `apart` (one with an event) ends its record, so that the pause after it stays visible. Pauses below 2% of a step, or
    10 ms, are counted as part of the steps.
    """
    if not len(columns):
        return []
    step, attempt, step_s = columns["step"], columns["attempt"], columns["step_s"]
    start_s, kept = columns.time_s - step_s, columns.kept()
    pause_s = start_s[1:] - columns.time_s[:-1]
    new = np.ones(len(columns), dtype=np.bool_)
    new[1:] = (
        (pause_s > np.maximum(0.01, 0.02 * step_s[1:]))
        | (attempt[1:] != attempt[:-1])
        | (kept[1:] != kept[:-1])
        | (step[1:] != step[:-1] + 1)
        | np.isin(step[:-1], np.array(sorted(apart), dtype=np.float64))
    )
    firsts = np.flatnonzero(new)
    lasts = np.append(firsts[1:], len(columns)) - 1
    return [
        StepRecord(
            time_utc=utc(float(columns.time_s[last])),
            attempt=int(attempt[last]),
            step=int(step[last]),
            tokens=int(columns["tokens"][last]),
            loss=float(columns["loss"][last]),
            grad_norm=float(columns["grad_norm"][last]),
            lr=float(columns["lr"][last]),
            step_s=float(max(step_s[last], columns.time_s[last] - start_s[first])),
            tokens_per_s=float(columns["tokens_per_s"][last]),
            mfu=None,
        )
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
    ]


def _read_on(path: Path, file: _File) -> None:
    with path.open("rb") as source:
        source.seek(file.offset)
        while block := source.read(_BLOCK_BYTES):
            whole = block.rfind(b"\n") + 1  # what follows is torn, or still being written
            if not whole:
                return
            file.blocks.append(_parsed(block[:whole]))
            file.offset += whole
            source.seek(file.offset)


def _parsed(lines: bytes) -> StepColumns:
    if b"NaN" in lines or b"Infinity" in lines:
        lines = _NOT_FINITE.sub(b":null", lines)
    try:
        table = pa_json.read_json(
            BytesIO(lines),
            read_options=pa_json.ReadOptions(use_threads=True, block_size=max(1 << 20, len(lines))),
            parse_options=pa_json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return _parsed_one_by_one(lines)
    whole = table.filter(table["step"].is_valid())
    time_s = whole["time_utc"].cast(pa.int64()).to_numpy() / 1e3
    return StepColumns(time_s, {name: _floats(whole[name]) for name in NUMBERS})


def _floats(column: pa.ChunkedArray) -> Column:
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


def _parsed_one_by_one(lines: bytes) -> StepColumns:
    """The slow way, for a block with a line that a kill has torn."""
    values = []
    for line in lines.splitlines():
        try:
            value = json.loads(line)
            float(value["step"])
            values.append((unix_s(value["time_utc"]), value))
        except (ValueError, TypeError, KeyError):
            continue
    time_s = np.array([t for t, _ in values], dtype=np.float64)
    return StepColumns(
        time_s,
        {n: np.array([np.nan if v.get(n) is None else float(v[n]) for _, v in values], np.float64) for n in NUMBERS},
    )


def _joined(blocks: list[StepColumns]) -> StepColumns:
    if not blocks:
        return StepColumns(np.empty(0), {name: np.empty(0) for name in NUMBERS})
    if len(blocks) == 1:
        return blocks[0]
    return StepColumns(
        np.concatenate([b.time_s for b in blocks]),
        {name: np.concatenate([b.number[name] for b in blocks]) for name in NUMBERS},
    )
