"""The trainer of a run directory that holds faults.json: the same, but that faults strike it (orchestrator/faults.py)."""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.train import Trainer
from model.transformer import Block
from orchestrator.faults import read

_SIGNALS = {
    "kill": signal.SIGKILL,
    "segv": signal.SIGSEGV,
    "freeze": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr2": signal.SIGUSR2,
}
_SAVE_S = 2.0  # the run of a campaign trains five steps in less than a save takes on a crowded machine


def _nan(module: object, inputs: object, x_BTD: Tensor) -> Tensor:
    return x_BTD * float("nan")


def _nan_grad(module: object, inputs: object, x_BTD: Tensor) -> None:
    x_BTD.register_hook(lambda grad_BTD: grad_BTD * float("nan"))  # type: ignore[no-untyped-call]


def _stuck_grad(module: object, inputs: object, x_BTD: Tensor) -> None:
    """Most values, which are small, become 65,536 times as large."""
    bits, bit = (torch.int32, 1 << 27) if x_BTD.dtype == torch.float32 else (torch.int16, 1 << 11)  # bfloat16
    x_BTD.register_hook(lambda grad_BTD: (grad_BTD.view(bits) | bit).view(grad_BTD.dtype))  # type: ignore[no-untyped-call]


_ARITHMETIC = {"nan": _nan, "nan_grad": _nan_grad, "stuck_grad": _stuck_grad}


class FaultyTrainer(Trainer):
    """A trainer to which `faults` happen."""

    def __init__(self, *args: Any, faults: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._marks = faults.with_suffix("")
        self._marks.mkdir(exist_ok=True)
        every = list(enumerate(read(faults)))
        self._poisoned = {b for _, f in every if f.kind == "poison" for b in f.batches}
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._mine = [(n, f) for n, f in every if f.rank == rank]

    def resume(self) -> None:
        saved = self.store.history_steps()
        if saved and self._strikes("kill_in_resume", saved[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        super().resume()

    def next_batch(self) -> Tensor:
        for kind, number in _SIGNALS.items():
            if self._strikes(kind, self.step + 1):
                self.store.finish()  # else a death costs what the save in flight would have kept
                os.kill(os.getpid(), number)
        if self._strikes("raise", self.step + 1):
            raise RuntimeError("[/a/file.cc:1] as PyTorch words it")
        if (gate := self._striking("wait", self.step + 1)) is not None:
            while not (self._marks / f"{gate}.go").exists() and not self.stop_requested():
                time.sleep(0.01)
        if self._strikes("gil", self.step + 1):
            self.store.finish()
            mutex, libc = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)  # waits for itself; no signal ends it, not even the one that asks for stacks
        self._strikes("slow", self.step + 1)  # marks when it began
        time.sleep(sum(f.seconds for _, f in self._mine if f.kind == "slow" and f.step <= self.step + 1))
        rows_BT = super().next_batch()
        batch = self.loader.data_batch(self.step)
        if batch not in self._poisoned:
            return rows_BT
        whole = (self.config.optim.batch_sequences, rows_BT.shape[1])  # the same whatever the number of ranks
        tokens = torch.randint(0, self.config.model.vocab_size, whole, generator=torch.Generator().manual_seed(batch))
        return tokens[self.ranks.dp_rank * len(rows_BT) :][: len(rows_BT)]

    def forward_backward(self, rows_BT: Tensor) -> tuple[float, Tensor, bool, bool]:
        fault = next((f for k, f in _ARITHMETIC.items() if self._strikes(k, self.step + 1)), None)
        if fault is None:
            return super().forward_backward(rows_BT)
        last_layer = [m for m in self.model.modules() if isinstance(m, Block)][-1]
        hook = last_layer.register_forward_hook(fault)
        try:
            return super().forward_backward(rows_BT)
        finally:
            hook.remove()

    def save(self, wait: bool) -> None:
        self.store.is_idle(_SAVE_S)  # else it is skipped, and a fault costs more than lies between two saves
        if self._strikes("kill_in_commit", self.step):
            self.store._commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
        super().save(wait)
        if self._strikes("term_in_save", self.step):
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(self) -> None:
        if self._strikes("term_in_evaluation", self.step):
            os.kill(os.getpid(), signal.SIGTERM)
        super().evaluate()

    def rewind(self) -> None:
        if self._strikes("kill_in_rewind"):
            os.kill(os.getpid(), signal.SIGKILL)
        super().rewind()

    def _strikes(self, kind: str, step: int | None = None) -> bool:
        """Whether a fault of this kind strikes this rank now (from `step` on): true once, also over restarts."""
        return self._striking(kind, step) is not None

    def _striking(self, kind: str, step: int | None) -> int | None:
        """The number of the fault that strikes."""
        for number, fault in self._mine:
            mark = self._marks / str(number)
            if fault.kind == kind and (step is None or step >= fault.step) and not mark.exists():
                mark.touch()
                return number
        return None
