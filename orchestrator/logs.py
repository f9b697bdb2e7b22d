"""What the ranks print: `arriero logs`, and the lines of it that look like errors.

Without the configuration's packages, which take longer to import than a log to read.
"""

import contextlib
import json
import os
import re
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from dashboards.run_view import LogError
from orchestrator.errors import UserError
from orchestrator.run_dir import RunDir

_RANK = re.compile(r"^\d+(?:_\d+)?_(\d+)_log\.(?:out|err)$")
LOG_TAIL_BYTES = 64 << 10
LOG_ERRORS = 30

_ERROR = re.compile(
    r"\b(Traceback|CRITICAL|FATAL|\w*Error|\w*Exception|[Oo]ut of memory|OOM|oom-kill|Killed|Segmentation fault|"
    r"NCCL WARN|CANCELLED|DUE TO TIME LIMIT|NODE FAILURE)\b"
)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def logs(root: Path, rank: int | None, everyone: bool, lines: int, follow: bool, as_json: bool) -> int:
    """Errors first, then the last lines of rank 0's log, of `rank`'s, or of `everyone`'s. All starts append to one file."""
    if lines < 1:
        raise UserError(f"--lines {lines}: give 1 or more")
    run = RunDir.existing(root)
    every = sorted(run.logs.glob("*_log.out"), key=lambda p: (p.stat().st_mtime, p.name))
    newest = {_rank(p): p for p in every}  # of each rank the log of the last job
    if rank is not None and rank not in newest:
        raise UserError(f"no log of rank {rank} in {run.logs}: there are those of {_ranges(sorted(newest)) or 'none'}")
    shown = [newest[r] for r in sorted(newest) if everyone or r == (rank or 0)]
    errors = [e for e in log_errors(run.logs) if rank is None or e.file in {p.name for p in shown}]
    tails = {p: _tail(p, lines) for p in shown}
    if as_json:
        logs_ = [{"file": str(p), "rank": _rank(p), "lines": tail} for p, tail in tails.items()]
        print(json.dumps({"errors": [asdict(e) for e in errors], "logs": logs_}, indent=2))
        return 0
    for error in errors:
        print(f"{error.file}:{error.line}: {error.text}")
    if errors:
        print()
    for path, tail in tails.items():
        if len(tails) > 1:
            print(f"==> rank {_rank(path)}")
        print("\n".join(tail))
    if not any(tails.values()):
        print(f"nothing in {run.logs} yet")
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            for path, line in _growing(run.logs, None if everyone else rank or 0, set(every)):
                print(f"{_rank(path)}: {line}" if everyone else line, end="", flush=True)
    return 0


def _tail(path: Path, lines: int) -> list[str]:
    """The last lines, without reading what lies before them."""
    with path.open("rb") as file:
        begin = file.seek(0, os.SEEK_END)
        tail = b""
        while begin > 0 and tail.count(b"\n") <= lines:
            size = min(65536, begin)
            begin -= size
            file.seek(begin)
            tail = file.read(size) + tail
    return tail.decode(errors="replace").splitlines()[-lines:]


def _growing(folder: Path, rank: int | None, seen: set[Path]) -> Iterator[tuple[Path, str]]:
    """What is written to the logs of a rank, or of all, from now on; a later job's file from its beginning."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a file a rank
    with contextlib.ExitStack() as stack:
        files: dict[Path, TextIO] = {}
        while True:
            for path in sorted(folder.glob("*_log.out")):
                if path not in files and rank in (None, _rank(path)):
                    files[path] = stack.enter_context(path.open(errors="replace"))
                    if path in seen:
                        files[path].seek(0, os.SEEK_END)
            came = [(path, line) for path, file in files.items() for line in file]
            yield from came
            if not came:
                time.sleep(0.3)


def _rank(path: Path) -> int:
    match = _RANK.match(path.name)
    return int(match[1]) if match else -1


def _ranges(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else ""


def log_errors(logs: Path) -> list[LogError]:
    """The last lines that look like errors, of the newest logs first; a traceback's repeated lines once."""
    found: list[LogError] = []
    files = [p for p in logs.glob("*") if p.suffix in (".out", ".err", ".log", ".txt") and p.is_file()]
    for path in sorted(files, key=lambda p: p.stat().st_mtime, reverse=True):
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            begun = file.tell()
            lines = file.read().decode("utf-8", "replace").splitlines()
        if begun:
            with path.open("rb") as file:
                before = file.read(begun).count(b"\n") if begun < (64 << 20) else 0
        else:
            before = 0
        here = [
            LogError(file=path.name, line=before + number, text=_ANSI.sub("", line).strip()[:400])
            for number, line in enumerate(lines, 1)
            if _ERROR.search(line)
        ]
        found += [a for a, b in pairwise([*here[-LOG_ERRORS:], None]) if a and (b is None or a.text != b.text)]
        if len(found) >= LOG_ERRORS:
            break
    return found[:LOG_ERRORS]
