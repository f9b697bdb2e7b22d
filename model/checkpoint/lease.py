"""One writer: a lease with a growing epoch, kept as empty-handed as it can be in `<checkpoints>/epochs/`.

    epoch-000007                  made exclusively by the seventh writer; says who it is
    epoch-000007.from-000000400   it went on from step 400

Whoever comes later takes the next number, and from then on every earlier writer is fenced: before each commit it looks
for a higher number. Between that look and its commit a newer writer may begin. That late commit is harmless: it is
either part of the history that the newer writer resumed from, or left behind (`policy.history`), because the newer
writer wrote down where it went on from. No clocks are compared.
"""

import json
import os
import re
import socket
import uuid
from datetime import UTC, datetime

from model.checkpoint.storage import Storage

FOLDER = "epochs"
_NAME = re.compile(r"epoch-(\d{6,})(?:\.from-(\d{9,}))?")


class Fenced(RuntimeError):
    """A newer writer has taken over: this one must stop."""


def who() -> str:
    """This process, for a person: host, process, Slurm job if any."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{socket.gethostname()} pid {os.getpid()}" + (f" Slurm job {job}" if job else "")


def read_epochs(storage: Storage) -> dict[int, int | None]:
    """Each writer's epoch, and the step from which it went on: one listing, no file is read."""
    found: dict[int, int | None] = {}
    for name in storage.list(FOLDER):
        if match := _NAME.fullmatch(name):
            step = int(match[2]) if match[2] else None
            known = found.get(int(match[1]))
            found[int(match[1])] = step if known is None else known if step is None else min(step, known)
    return found


class Lease:
    """The right to commit, until somebody takes the next epoch."""

    def __init__(self, storage: Storage, epoch: int) -> None:
        self.storage = storage
        self.epoch = epoch

    def check(self) -> None:
        """Raises Fenced if a newer writer exists."""
        newest = max(read_epochs(self.storage), default=0)
        if newest > self.epoch:
            raise Fenced(
                f"epoch {self.epoch} has been taken over by epoch {newest} ({_owner(self.storage, newest)}): "
                "this writer stops, and what it has not committed is dropped"
            )
        if newest < self.epoch:
            raise Fenced(f"epoch {self.epoch} is gone from {self.storage.root}/{FOLDER}: somebody removed it")

    def went_on_from(self, step: int) -> None:
        """Writes down where this writer's history branches off. Once, before its first commit."""
        self.storage.create(f"{FOLDER}/epoch-{self.epoch:06d}.from-{step:09d}", b"")
        self.storage.sync(FOLDER)


def acquire(storage: Storage, owner: str | None = None, after: Lease | None = None) -> Lease:
    """Takes the next epoch: every earlier writer is fenced from now on. With `after`, the one that follows it; raises Fenced
    where another writer has that."""
    mine = {
        "owner": owner or who(),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "nonce": uuid.uuid4().hex,  # tells two that believe to have made the same file
    }
    data = json.dumps(mine).encode()
    while True:
        newest = max(read_epochs(storage), default=0)
        if after and newest != after.epoch:
            after.check()
        epoch = newest + 1
        name = f"{FOLDER}/epoch-{epoch:06d}"
        if storage.create(name, data) and storage.read(name) == data:
            storage.sync(FOLDER)
            return Lease(storage, epoch)


def _owner(storage: Storage, epoch: int) -> str:
    try:
        return str(json.loads(storage.read(f"{FOLDER}/epoch-{epoch:06d}"))["owner"])
    except (OSError, ValueError, KeyError):
        return "unknown"
