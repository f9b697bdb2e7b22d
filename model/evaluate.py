"""Loss on held-out rows, per source and for the mix."""

import numpy as np
import torch
import torch.distributed as dist

from model.data.loader import Loader
from model.parallel import Ranks
from model.pipeline import Pipeline
from model.transformer import Transformer


@torch.no_grad()
def held_out_losses(
    model: Transformer | Pipeline, loader: Loader, ranks: Ranks, rows_per_source: int, microbatch: int
) -> dict[str, float]:
    """Mean nats per token of each source that has held-out rows. Every rank takes its share and ends with all the means.

    Ranks run the same number of forward passes (FSDP2 gathers parameters in each): shares that don't divide are filled up
    with rows whose targets are not counted.
    """
    rows, owner = [], []
    for number, source in enumerate(loader.sources):
        held_out = loader.held_out_rows(source, rows_per_source)
        rows.append(held_out)
        owner += [number] * len(held_out)
    if not owner:
        return {}
    all_rows = np.concatenate([r for r in rows if len(r)])
    stride = ranks.dp * microbatch
    sums = torch.zeros(2, len(loader.sources), dtype=torch.float64)
    for start in range(0, len(owner), stride):
        mine = range(start + ranks.dp_rank * microbatch, start + (ranks.dp_rank + 1) * microbatch)
        for i in mine:
            row = torch.from_numpy(all_rows[min(i, len(owner) - 1)].astype(np.int64))[None].to(ranks.device)
            loss = model(row[:, :-1], row[:, 1:])
            if i < len(owner):
                sums[0, owner[i]] += loss.double().cpu()
                sums[1, owner[i]] += (row.shape[1] - 1) / ranks.cp  # context parallel ranks return parts of the loss
    if ranks.mesh is not None:
        on_device = sums.to(ranks.device)
        dist.all_reduce(on_device)
        sums = on_device.cpu()
    return {s: (sums[0, n] / sums[1, n]).item() for n, s in enumerate(loader.sources) if sums[1, n] > 0}
