"""What a checkpoint's bytes mean: how tensors lie in a rank's file, and how to find their parts again.

torch.distributed.checkpoint's planners decide who writes which part of which tensor, and which parts a rank of another
layout needs; the bytes are ours: one safetensors file a rank, and one JSON index. Nothing is pickled, nothing unpickled.
"""

import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem, SavePlan, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

# safetensors' names of dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Index = dict[str, Any]  # {"tensors": {name: {dtype, shape, chunks: [[rank, start, offsets, sizes], ...]}}}


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Slot:
    """One part of a tensor, and where it lies in the data of its rank's file."""

    item: WriteItem
    start: int
    bytes: int

    @property
    def dtype(self) -> torch.dtype:
        assert self.item.tensor_data is not None
        return self.item.tensor_data.properties.dtype

    @property
    def sizes(self) -> list[int]:
        assert self.item.tensor_data is not None
        return list(self.item.tensor_data.chunk.sizes)

    @property
    def offsets(self) -> list[int]:
        assert self.item.tensor_data is not None
        return list(self.item.tensor_data.chunk.offsets)

    def view(self, data: Tensor) -> Tensor:
        """This part's bytes in a buffer (uint8) of the whole file's data, as a tensor."""
        return data[self.start : self.start + self.bytes].view(self.dtype).view(self.sizes)


def lay_out(items: Iterable[WriteItem]) -> tuple[list[Slot], int]:
    """Slots without holes and the bytes they take; wide types first, so that each is aligned. Empty parts take none."""
    parts = []
    for item in items:
        if item.type == WriteItemType.BYTE_IO:
            continue
        assert item.tensor_data is not None
        width = item.tensor_data.properties.dtype.itemsize
        if size := math.prod(item.tensor_data.chunk.sizes) * width:
            parts.append((width, size, item))
    parts.sort(key=lambda p: -p[0])
    slots, start = [], 0
    for _, size, item in parts:
        slots.append(Slot(item, start, size))
        start += size
    return slots, start


def header(slots: list[Slot]) -> bytes:
    """The safetensors header: any reader of that format opens a rank's file. A part's name ends in its offsets."""
    entries = {
        f"{s.item.index.fqn}@{','.join(map(str, s.offsets))}": {
            "dtype": NAMES[s.dtype],
            "shape": s.sizes,
            "data_offsets": [s.start, s.start + s.bytes],
        }
        for s in slots
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(plans: list[SavePlan]) -> bytes:
    """Where every part of every tensor lies, over all ranks: JSON."""
    tensors: dict[str, Any] = {}
    for rank, plan in enumerate(plans):
        for slot in lay_out(plan.items)[0]:
            data = slot.item.tensor_data
            assert data is not None
            tensor = tensors.setdefault(
                slot.item.index.fqn, {"dtype": NAMES[slot.dtype], "shape": list(data.size), "chunks": []}
            )
            tensor["chunks"].append([rank, slot.start, slot.offsets, slot.sizes])
    return json.dumps({"tensors": tensors}, separators=(",", ":")).encode()


def first_non_finite(slots: list[Slot], data: Tensor) -> str | None:
    """The name of a tensor with an infinite or undefined value, if there is one."""
    for slot in slots:
        if slot.dtype.is_floating_point:
            values = slot.view(data)
            low, high = torch.aminmax(values if slot.dtype.itemsize > 1 else values.float())  # both carry a NaN on
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return slot.item.index.fqn
    return None


def signature(flat_state: dict[str, Any]) -> list[Any]:
    """Equal for two states that are laid out alike: then the plan of the one serves the other."""
    found: list[Any] = []
    for name, value in flat_state.items():
        if isinstance(value, DTensor):
            found.append((name, value.shape, value.dtype, value.placements, value.to_local().shape))
        elif isinstance(value, Tensor):
            found.append((name, value.shape, value.dtype))
        else:
            found.append(name)
    return found


class _Planner(DefaultLoadPlanner):
    """The default planner, but for values that are no tensors: JSON instead of a pickle."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("torch.load must never see a checkpoint")

    def set_value(self, name: str) -> None:
        value: Any = self.values[name]
        if isinstance(self.state_dict[name], tuple):
            value = tuple(value)
        *path, last = self.mappings[name]
        container: Any = self.original_state_dict
        for key in path:
            container = container[key]
        container[last] = value


def fill(
    state: dict[str, Any], index: Index, values: dict[str, Any], read: Callable[[int, int, int], Tensor]
) -> set[str]:
    """Copies a checkpoint into `state`, in place, whatever layout either has. Returns the names it asked for.

    `read(rank, start, end)` returns bytes of the data of a rank's file as a uint8 tensor.
    Raises ValueError or RuntimeError where a name is missing or a shape differs.
    """
    planner = _Planner(values)
    planner.set_up_planner(state)
    tensors = index["tensors"]
    described: dict[str, Any] = {}
    for name in planner.state_dict:
        if name in tensors:
            t = tensors[name]
            described[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=DTYPES[t["dtype"]]),
                size=torch.Size(t["shape"]),
                chunks=[ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for _, _, o, s in t["chunks"]],
            )
        elif name in values:
            described[name] = BytesStorageMetadata()
        elif isinstance(value := planner.state_dict[name], Tensor) and value.numel() == 0:
            described[name] = TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.size(), [])
    planner.metadata = Metadata(described)
    for item in planner.create_local_plan().items:
        if item.type == LoadItemType.BYTE_IO:
            planner.set_value(item.dest_index.fqn)
            continue
        tensor = tensors[item.storage_index.fqn]
        assert item.storage_index.index is not None
        rank, start, _, sizes = tensor["chunks"][item.storage_index.index]
        dtype = DTYPES[tensor["dtype"]]
        if sizes:  # only the rows that are wanted: they lie together
            row_bytes = math.prod(sizes[1:]) * dtype.itemsize
            first, rows = item.storage_offsets[0], item.lengths[0]
            part = read(rank, start + first * row_bytes, start + (first + rows) * row_bytes).view(dtype)
            part = part.view([rows, *sizes[1:]])
            for dim in range(1, len(sizes)):
                part = part.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        else:
            part = read(rank, start, start + dtype.itemsize).view(dtype).view([])
        planner.resolve_tensor(item).detach().copy_(part)
    return set(planner.state_dict)
