"""Every rank shape of a layout in one process, without values: what each would hold in memory (`arriero plan --dry-run`).

The trainer's own code builds the model and computes one step's gradients, with fake tensors on a fake process group of all
ranks. Nothing is sent, and nothing computed. Every storage is seen when it is made, resized and freed.
"""

import json
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from model.config import ModelConfig
from model.layout import Layout, microbatches_in_round, stage_layers
from model.parallel import forward_backward, place_ranks, shape_part
from model.pipeline import Pipeline
from model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Of all ranks of one shape. Bytes of tensors; `total_bytes` is their peak, which the parts need not reach together."""

    pp_stage: int
    tp_ranks: list[int]  # the tensor parallel coordinates that have this shape
    ranks: int  # how many have it
    parameters_bytes: int
    gradients_bytes: int  # kept from microbatch to microbatch, or until the optimizer's step
    optimizer_bytes: int
    activations_bytes: int  # saved for the backward passes of all microbatches in flight
    buffers_bytes: int  # the rest at the peak: gathered parameters, the layer at work, what is sent and received
    total_bytes: int
    seconds: float


def dry_run(model: ModelConfig, layout: Layout, batch_sequences: int) -> Iterator[RankMemory]:
    """One RankMemory for each pipeline stage and each tensor parallel coordinate whose shapes differ, computing in bf16.

    Data-parallel ranks hold as much as their first: shards that do not divide are padded. So many microbatches are run as
    the peak needs, not more: a step of more of them only repeats it.
    """
    for stage in range(layout.pp):
        rank = stage * (layout.gpus // layout.pp)  # ranks are numbered pp-major, tp-minor
        last = layout.tp - 1
        # Tensor parallel shares never grow with the rank (torch.chunk): if the last has the first's shapes, all have.
        shapes = {tp: _shapes(model, layout, rank + tp) for tp in sorted({0, last})}
        if shapes[0] != shapes[last]:
            shapes = {tp: _shapes(model, layout, rank + tp) for tp in range(layout.tp)}
        alike: dict[tuple[Any, ...], list[int]] = {}
        for tp in range(layout.tp):
            alike.setdefault(shapes.get(tp, shapes[0]), []).append(tp)
        for tp_ranks in alike.values():
            started = time.perf_counter()
            seen = _step(model, layout, batch_sequences, rank + tp_ranks[0])
            held = seen.at_peak["parameters"] + seen.at_peak["optimizer"]
            yield RankMemory(
                pp_stage=stage,
                tp_ranks=tp_ranks,
                ranks=len(tp_ranks) * layout.dp * layout.cp,
                parameters_bytes=seen.at_peak["parameters"],
                gradients_bytes=seen.gradients_bytes,
                optimizer_bytes=seen.at_peak["optimizer"],
                activations_bytes=seen.saved_bytes,
                buffers_bytes=max(0, seen.peak_bytes - held - seen.at_peak["gradients"] - seen.at_peak["activations"]),
                total_bytes=seen.peak_bytes,
                seconds=time.perf_counter() - started,
            )


@contextmanager
def _fake_ranks(layout: Layout, rank: int) -> Iterator[Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.gpus)
    try:
        yield place_ranks(layout, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        # These know groups by names that are other groups for the next rank.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        _gen_transform_infos.cache_clear()


def _parts(model: ModelConfig, layout: Layout, ranks: Any) -> list[Transformer]:
    stage = ranks.mesh["pp"].get_local_rank() if ranks.mesh is not None else 0
    cut = stage_layers(model.n_layers, layout.pp, layout.virtual_stages)[stage :: layout.pp]
    return [shape_part(model, layout, ranks, torch.bfloat16, layers) for layers in cut]


def _shapes(model: ModelConfig, layout: Layout, rank: int) -> tuple[Any, ...]:
    with _fake_ranks(layout, rank) as ranks:
        return tuple(
            (name, tuple(_local(p).shape))
            for part in _parts(model, layout, ranks)
            for name, p in part.named_parameters()
        )


def _step(model: ModelConfig, layout: Layout, batch_sequences: int, rank: int) -> "_Storages":
    """Forward and backward passes of one rank, seen."""
    microbatches = layout.accumulation_steps(batch_sequences)
    enough = layout.pp + 1 if layout.pp > 1 else 2
    if layout.pp > 1 and layout.pipeline_schedule != "1f1b":  # two rounds, as long as the trainer's
        enough = 2 * microbatches_in_round(microbatches, layout.pp)
    microbatches = min(microbatches, enough)
    with _fake_ranks(layout, rank) as ranks:
        parts = _parts(model, layout, ranks)  # on the meta device: meshes need true values
        seen = _Storages(parts)
        # Context parallel: CUDA's kernels take the mask by its name; torch's tensor subclass for it can't be faked.
        no_mask = patch("model.attention.causal_lower_right", lambda queries, keys: None)
        # DTensor works out shapes on whole tensors, of which nothing is allocated.
        unseen = patch.object(ShardingPropagator, "_fake_mode_lock", _Paused(seen))
        with no_mask, unseen, FakeTensorMode(allow_non_fake_inputs=True), seen:
            for part in parts:
                part.to_empty(device="cpu")
            whole: Transformer | Pipeline = parts[0]
            if layout.pp > 1:
                whole = Pipeline(parts, layout, ranks.mesh["pp"].get_group(), ranks.device)
            moments = [torch.zeros_like(_local(p)) for p in whole.parameters() for _ in range(2)]
            seen.name("buffers", whole.buffers())
            seen.name("parameters", whole.parameters())
            seen.name("optimizer", moments)
            rows_BT = torch.zeros(
                microbatches * layout.microbatch_sequences, model.sequence_length + 1, dtype=torch.int64
            )
            seen.name("buffers", [rows_BT])
            forward_backward(whole, rows_BT, layout.microbatch_sequences, 1.0)
            seen.backward_ended()
    return seen


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Storages(TorchDispatchMode):
    """Bytes of all storages that are alive, by what they are, and their peak.

    activations: made in a forward pass; backward: made in a backward pass, and gradients where they outlive it; gathered:
    what FSDP2 frees and fills again, which is seen by its resizing.
    """

    def __init__(self, parts: list[Transformer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = parts
        self.bytes = dict.fromkeys(
            ("parameters", "optimizer", "buffers", "gathered", "activations", "backward", "gradients"), 0
        )
        self.at_peak = dict(self.bytes)
        self.peak_bytes = self.saved_bytes = self.gradients_bytes = 0
        self._alive: dict[int, tuple[str, int, Any]] = {}  # by id of the storage: kind, bytes, a weak reference
        self._in_backward = False
        self.paused = False

    def name(self, kind: str, tensors: Any) -> None:
        for tensor in tensors:
            self._set(_local(tensor).untyped_storage(), kind)

    def _name_if(self, before: str, kind: str, tensors: Any) -> None:
        for tensor in tensors:
            storage = _local(tensor).untyped_storage()
            if id(storage) in self._alive and self._alive[id(storage)][0] == before:
                self._set(storage, kind)

    def backward_ended(self) -> None:
        """What is left of a backward pass is gradients."""
        for key, (kind, size, reference) in self._alive.items():
            if kind == "backward":
                self._alive[key] = ("gradients", size, reference)
        self.bytes["gradients"] += self.bytes["backward"]
        self.bytes["backward"] = 0
        self.gradients_bytes = max(self.gradients_bytes, self.bytes["gradients"])

    def __enter__(self) -> "_Storages":
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._alive:
                self._set(storage, "gathered")
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local tensors come here again
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as it does with true tensors; the fake one would be a copy
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a schedule asks whether the ranks agree
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward != self._in_backward:
            self._in_backward = in_backward
            if in_backward:
                for part in self.parts:  # what stays gathered after the forward pass
                    self._name_if("activations", "gathered", part.parameters())
                self.saved_bytes = max(self.saved_bytes, self.bytes["activations"])
            else:
                self.backward_ended()
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            for tensor in tree_iter(result):
                if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    if id(storage) not in self._alive:
                        self._set(storage, "backward" if in_backward else "activations")
        return result

    def _set(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = id(storage)
        before, held, reference = self._alive.get(key) or (kind, 0, weakref.ref(storage, lambda _: self._freed(key)))
        self._alive[key] = (kind, storage.size(), reference)
        self.bytes[before] -= held
        self.bytes[kind] += storage.size()
        if (total := sum(self.bytes.values())) > self.peak_bytes:
            self.peak_bytes, self.at_peak = total, dict(self.bytes)

    def _freed(self, key: int) -> None:
        kind, held, _ = self._alive.pop(key)
        self.bytes[kind] -= held


class _Paused:
    """While it is entered, storages are not seen."""

    def __init__(self, seen: _Storages) -> None:
        self.seen = seen

    def __enter__(self) -> None:
        self.seen.paused = True

    def __exit__(self, *_: object) -> None:
        self.seen.paused = False


def main() -> None:
    """JSON of model, layout and batch on stdin; a line of JSON a rank shape on stdout, as they come."""
    warnings.filterwarnings("ignore")
    asked = json.load(sys.stdin)
    layout = Layout(**asked["layout"])
    for found in dry_run(ModelConfig(**asked["model"]), layout, asked["batch_sequences"]):
        print(json.dumps(asdict(found)), flush=True)
