"""How long a rank computes by itself, waiting for no other: what tells a slow rank from those that wait for it.

FSDP2 gathers a layer's parameters before its forward pass begins and the rank then has all that it needs: the forward passes of
the layers, beside the time for data, are its own. (Inside them tensor and context parallel ranks wait for each other: with these,
a slow rank shows with its whole group.)
"""

import time

import torch
from torch import nn

from model.transformer import Block


class OwnTime:
    """Sums the forward passes of a model's layers: by events on a GPU, by the clock on a CPU."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began: list[torch.cuda.Event] = []  # reused in every step
        self._ended: list[torch.cuda.Event] = []
        self._used = 0
        self._seconds = self._began_s = 0.0
        for module in model.modules():
            if isinstance(module, Block):  # inside FSDP2's own hooks, which wait for parameters
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end, prepend=True)

    def reset(self) -> None:
        self._used, self._seconds = 0, 0.0

    def seconds(self) -> float:
        """Since the last reset. On a GPU, once it has done all that was asked of it."""
        for began, ended in zip(self._began[: self._used], self._ended[: self._used], strict=True):
            self._seconds += began.elapsed_time(ended) / 1000.0
        self._used = 0
        return self._seconds

    def _begin(self, module: nn.Module, inputs: object) -> None:
        if not self._on_gpu:
            self._began_s = time.perf_counter()
            return
        if self._used == len(self._began):
            self._began.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._ended.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._began[self._used].record()

    def _end(self, module: nn.Module, inputs: object, output: object) -> None:
        if not self._on_gpu:
            self._seconds += time.perf_counter() - self._began_s
            return
        self._ended[self._used].record()
        self._used += 1
