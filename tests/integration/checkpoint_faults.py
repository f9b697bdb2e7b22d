"""A local disk that fails where a test says, and ranks as real processes that can be killed. Used by test_checkpoint_*."""

import errno
import faulthandler
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from model.checkpoint.policy import CheckpointConfig
from model.checkpoint.store import CheckpointStore, OnEvent

PRELOADED = [
    "torch._dynamo",  # the first step of an optimizer imports it
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]

Fault = Callable[[], None]


class FaultyFileSystem(LocalFileSystem):
    """A local disk at `faulty:///path`. `faults` maps (operation, part of a path) to what then happens.

    Operations: open, write (of the first block), close, read, rm.
    """

    protocol = "faulty"
    faults: ClassVar[dict[tuple[str, str], Fault]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).removeprefix("faulty://")))

    @classmethod
    def strike(cls, operation: str, path: str) -> None:
        for (when, where), fault in list(cls.faults.items()):
            if when == operation and where in path:
                fault()

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        self.strike("read" if "r" in mode else "open", path)
        return FaultyFile(path, mode, fs=self)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self.strike("rm", path)
        super().rm(path, recursive, maxdepth)


class FaultyFile(LocalFileOpener):  # type: ignore[misc]
    def write(self, *args: Any) -> Any:
        FaultyFileSystem.strike("write", self.path)
        return super().write(*args)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        writing = "r" not in self.mode and not self.f.closed
        super().close()
        if writing:
            FaultyFileSystem.strike("close", self.path)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int, times: int | None = None) -> Fault:
    """Raises OSError, always or so many times."""
    left = [times]

    def fault() -> None:
        if left[0] is not None:
            if left[0] == 0:
                return
            left[0] -= 1
        raise OSError(number, os.strerror(number))

    return fault


def eio(times: int | None = None) -> Fault:
    return failing(errno.EIO, times)


class Events(list[tuple[str, int, str]]):
    """What the user is told."""

    def __call__(self, kind: str, step: int, detail: str) -> None:
        self.append((kind, step, detail))

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self]

    def detail(self, kind: str) -> str:
        return next(detail for k, _, detail in self if k == kind)


def make_store(url: str, events: OnEvent | None = None, **values: Any) -> CheckpointStore:
    settings: dict[str, Any] = {"retries": 0, "retry_wait_s": 0.0, "retry_save_s": 0.0, "keep_last": 9, **values}
    return CheckpointStore(
        url, CheckpointConfig(name="test", **settings), on_event=Events() if events is None else events
    )


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any, timeout_s: float = 60) -> list[Any]:
    """`function(rank, *args)` on so many gloo ranks: each one's result, or its exit code if it was killed.

    Raises AssertionError with the traceback of a rank that raised.
    """
    context = multiprocessing.get_context("forkserver")  # imports torch once for all ranks of all tests
    context.set_forkserver_preload([*PRELOADED, __name__])
    meeting = folder / f"meeting-{os.urandom(4).hex()}"
    started = []
    for rank in range(world):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(function, rank, world, str(meeting), send, args), daemon=True)
        process.start()
        send.close()
        started.append((process, receive))
    results = []
    try:
        for process, receive in started:
            assert receive.poll(timeout_s), f"a rank has not answered for {timeout_s} s"
            try:
                error, result = receive.recv()
                assert not error, error
            except EOFError:
                process.join(timeout_s)
                result = process.exitcode
            results.append(result)
    finally:
        for process, _ in started:
            process.kill()
            process.join()
    return results


def _rank(function: Callable[..., Any], rank: int, world: int, meeting: str, send: Any, args: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a rank that a signal ends tells where
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        send.send(("", function(rank, *args)))
    except BaseException:
        send.send((traceback.format_exc(), None))
    threading.Event().wait()  # stays until all are done: a rank that leaves early would look like a dead one
