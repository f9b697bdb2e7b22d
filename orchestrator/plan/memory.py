"""What one rank keeps in its GPU's memory, in bytes, on the pipeline stage that needs most.

Written after the trainer's code, tensor by tensor, and held against it by `arriero plan --dry-run` (model/dry_run.py): who
changes what a layer saves changes `saved_bytes_per_layer`, or a test says so.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from model.config import ModelConfig
from model.layout import Layout, microbatches_in_round, stage_layers
from orchestrator.plan.config import PlanConfig

CHUNK_LOGITS = 1 << 24  # model/loss.py: logits alive at a time, without torch.compile
NORM_BYTES = 8  # that a norm saves of each element of its input
CONTEXT_BYTES = 2.5e9  # CUDA context, NCCL's buffers, cuBLAS workspaces
FRAGMENTATION = 0.05  # of what torch's allocator holds


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Each part by itself at its largest, and their peak together: activations are gone when gradients are complete."""

    parameters_bytes: float  # fp32 masters, sharded over dp_shard
    gradients_bytes: float
    optimizer_bytes: float  # AdamW's two moments, fp32
    activations_bytes: float  # saved for the backward pass, of all microbatches that are alive at once
    buffers_bytes: float  # gathered layers, the layer at work and its gradients
    overhead_bytes: float  # context and fragmentation, which no tensor shows
    total_bytes: float


def matrix_parameters(model: ModelConfig) -> int:
    """Of one layer, those that tensor parallel ranks share."""
    return 2 * model.dim * (model.dim + model.kv_dim) + 3 * model.dim * model.ffn_dim


def layer_parameters(model: ModelConfig) -> int:
    return matrix_parameters(model) + 2 * model.dim


def layers_by_stage(model: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Layers on the fullest rank of the pipeline, and on its last rank, which also has the head."""
    cut = stage_layers(model.n_layers, layout.pp, layout.virtual_stages)
    by_rank = [sum(map(len, cut[rank :: layout.pp])) for rank in range(layout.pp)]
    return max(by_rank), by_rank[-1]


def saved_bytes_per_layer(model: ModelConfig, layout: Layout, plan: PlanConfig, recompute: str) -> float:
    """What the backward pass needs of one layer and microbatch, on one rank.

    none: both norms' input and normalized input (fp32), both sublayers' inputs (gathered over the tensor parallel ranks), q, k,
    v, attention and its logarithms of sums, and of the feed-forward w1, its silu, w3, their product. selective: the residual
    stream, the outputs of linear layers and attention (arXiv 2302.13971, section 2.4). full: the layer's input.
    """
    d, kv, f = model.dim, model.kv_dim, model.ffn_dim
    tokens = layout.microbatch_sequences * model.sequence_length / layout.cp
    residual = 1 / layout.tp if plan.sequence_parallel else 1.0
    if recompute == "full":
        return 2 * tokens * d * residual
    attention = (2 * (2 * d + 2 * kv) + 4 * model.n_heads) / layout.tp
    if recompute == "selective":
        return tokens * (4 * d * residual + attention + 4 * f / layout.tp)
    attention += 4 * kv * (layout.cp - 1) / layout.tp  # context parallel ranks keep the keys and values of whole rows
    saved = tokens * (2 * NORM_BYTES * d * residual + 4 * d + attention + 8 * f / layout.tp)
    if plan.attention == "unfused":
        # softmax, its dropout and mask: 5 bytes a score (arXiv 2205.05198, section 4.1)
        saved += 5 * tokens * model.sequence_length * model.n_heads / layout.tp
    return saved


def memory(model: ModelConfig, layout: Layout, plan: PlanConfig, batch_sequences: int) -> Memory:
    """Of the rank that needs most. `layout.recompute` must be one of none, selective, full here."""
    # Elsewhere the pipeline's first rank holds most microbatches, or its last one the head.
    ranks = range(layout.pp) if layout.pipeline_schedule == "zero_bubble" else {0, layout.pp - 1}
    return max(
        (rank_memory(model, layout, plan, batch_sequences, rank) for rank in ranks),
        key=lambda m: m.total_bytes,
    )


def rank_memory(model: ModelConfig, layout: Layout, plan: PlanConfig, batch_sequences: int, pp_rank: int) -> Memory:
    """Of a rank of the pipeline's rank `pp_rank`: the most of what it holds in the loss, and in the backward passes of its last
    layer, the one before, and its first."""
    microbatches = layout.accumulation_steps(batch_sequences)
    groups = tuple(map(len, stage_layers(model.n_layers, layout.pp, layout.virtual_stages)[pp_rank :: layout.pp]))
    layers = sum(groups)
    first, last = pp_rank == 0, pp_rank == layout.pp - 1
    layer = matrix_parameters(model) / layout.tp + 2 * model.dim
    vocabulary = model.vocab_size * model.dim / layout.tp
    ends = vocabulary * (first + last)  # embedding and head
    parameters = layers * layer + ends
    shards = layout.dp_shard * layout.cp
    sharded = parameters / shards
    several = microbatches > 1  # whose gradients add up: in shards, in a pipeline whole until the last
    put_together = several and layout.pp > 1
    alone = layout.gpus == 1  # no FSDP2: parameters are cast where they are used, gradients are fp32 at once

    d, f = model.dim, model.ffn_dim
    tokens = layout.microbatch_sequences * model.sequence_length / layout.cp
    residual = 1 / layout.tp if plan.sequence_parallel else 1.0
    saved = saved_bytes_per_layer(model, layout, plan, layout.recompute) + (
        2 * layer if alone and layout.recompute == "none" else 0
    )
    all_logits = tokens * model.vocab_size / layout.tp
    chunks = math.ceil(all_logits / CHUNK_LOGITS)  # whose products are summed in fp32 where there are several
    head = (tokens * (NORM_BYTES * d * residual + 2 * d) + (4 if chunks > 1 else 2) * vocabulary) if last else 0.0
    moments = frozenset({Held(layers, 1, 1, True, 1.0)})
    if layout.pp > 1:
        moments = _held_in_turn(groups, layout.pp, pp_rank, microbatches, layout.pipeline_schedule)
    boundary = 4 * tokens * d * residual if layout.pp > 1 else 0.0  # input and output of a group
    ahead = boundary if layout.virtual_stages > 1 else 0.0  # what has arrived for the next group
    zero_bubble = layout.pp > 1 and layout.pipeline_schedule == "zero_bubble"
    kept = {h: h.layers * saved + h.groups * boundary + h.heads * head + ahead for h in moments}
    activations = max(kept.values())
    # Of each pass of a group whose weight gradients are put off (one more on each later rank), what they are computed from: the
    # gradients of linear layers' and norms' outputs, and of the group's own. The head's last one stays in bf16.
    put_off = of_each = 0.0
    if zero_bubble:
        outputs = 2 * (3 * d + 2 * (model.kv_dim + f) / layout.tp) + 8 * d * residual
        of_each = tokens * (max(groups) * outputs + (4 * last + 2) * d * residual)
        put_off = min(pp_rank, microbatches - 1) * of_each + 2 * vocabulary * last

    gathered = 0.0 if alone else 2 * parameters if layout.pp > 1 else 2 * (layer + ends)
    norm = NORM_BYTES * d * residual + 2 * d
    attention_saved = tokens * (2 * d * residual + (2 * (2 * d + 2 * model.kv_dim) + 4 * model.n_heads) / layout.tp)
    # What the layer at work computes again, for its feed-forward and then for its attention, and gradients of activations.
    again = {
        "none": (0.0, 0.0),
        "selective": (tokens * (norm + 4 * f / layout.tp), tokens * norm),
        "full": (
            saved_bytes_per_layer(model, layout, plan, "none"),
            tokens * (norm - 2 * d * residual) + attention_saved,
        ),
    }[layout.recompute]
    feed = again[0] + tokens * (4 * f / layout.tp + 2 * d)
    attend = again[1] + tokens * (4 * (d + model.kv_dim) / layout.tp + 2 * d + 8 * d * residual)
    # The layer's gradients in bf16, those of the one before it in fp32 for the network, and the next layer arriving.
    reducing = 0.0 if alone or put_together else 6 * layer
    own = 0.0 if alone else 2 * layer
    head_gradient = (4 if alone else 2) * vocabulary * last
    logits = 0.0
    if last:  # of a chunk; and what is left of the one before it, or without the head's gradient, which comes after
        logits = 12 * all_logits / chunks + (
            2 * all_logits / chunks + 2 * vocabulary if chunks > 1 else -2 * vocabulary
        )
    summed = 4 * (parameters if layout.pp > 1 else sharded)
    there = {h: put_off + (h.summed * summed if several else 0.0) for h in moments}  # gradients, before a backward pass
    before = max(there[h] + kept[h] + h.at_loss * (head_gradient - head) for h in moments)
    before += of_each * (pp_rank > 0 or len(groups) > 1)
    # In the first layer, whose backward pass comes last: the others' gradients are there, their activations gone.
    gradients = max(4 * sharded, max(h.summed for h in moments) * summed if several else 0.0)
    late = (gradients if several else 4 * sharded * (1 - 1 / layers)) + head_gradient
    end = saved + attend + (0.0 if alone else 4 * ends)
    if layout.pp == 1 and not alone:  # embedding and head alone: in bf16 and fp32 for the network, gathered no more
        end = 4 * ends * (1 - 1 / shards) - 2 * layer
    working = max(
        max(there[h] + kept[h] for h in moments if h.at_loss) + logits,
        before + feed,
        before - saved + reducing + feed,
        before - 2 * saved + attention_saved * (layout.recompute != "full") + reducing + own + attend,
        late + saved + reducing + feed,
        late + attention_saved * (layout.recompute != "full") + reducing + own + attend,
        gradients + end,
    )
    held = 12 * sharded + gathered + working
    return Memory(
        parameters_bytes=4 * sharded,
        gradients_bytes=put_off + gradients,
        optimizer_bytes=8 * sharded,
        activations_bytes=activations,
        buffers_bytes=gathered + max(0.0, logits, feed + reducing),
        overhead_bytes=FRAGMENTATION * held + CONTEXT_BYTES,
        total_bytes=held * (1 + FRAGMENTATION) + CONTEXT_BYTES,
    )


class Held(NamedTuple):
    """What a pipeline rank holds before a backward pass for those to come, each counted once for each microbatch."""

    layers: int
    groups: int
    heads: int  # passes of its last group
    at_loss: bool  # a forward pass of that group was before it: on the pipeline's last rank, the loss
    summed: float  # part of the layers that have whole gradients from passes before


@lru_cache(maxsize=1 << 12)
def _held_in_turn(layers: tuple[int, ...], pp: int, pp_rank: int, microbatches: int, schedule: str) -> frozenset[Held]:
    """Of a pipeline rank with groups of so many `layers`.

    Forward passes go through its groups a round of microbatches at a time, backward passes the other way round, the first one
    after 1F1B's warm-up, interleaved (arXiv 2205.05198, section 4.2.3) or not. Zero bubble: a pass is held until its weight
    gradients are done, one more pass later on each later rank (arXiv 2401.10241, ZB-H1).
    """
    last = len(layers) - 1
    in_round = microbatches_in_round(microbatches, pp)
    passes = microbatches * len(layers)
    warm_up = min(passes, last * in_round + (2 if schedule == "interleaved_1f1b" else 1) * (pp - 1 - pp_rank))
    put_off = pp_rank if schedule == "zero_bubble" else 0
    counts, found = [0] * len(layers), set()
    for number in range(warm_up + put_off + 1 + in_round * len(layers)):  # then it repeats, or only goes down
        if number < passes:
            counts[number // in_round % len(layers)] += 1
        done = number - warm_up - put_off  # passes whose weight gradients are there
        if done > 0:
            counts[last - (done - 1) // in_round % len(layers)] -= 1
        in_layers = sum(count * size for count, size in zip(counts, layers, strict=True))
        at_loss = number < passes and number // in_round % len(layers) == last
        # The last round's gradients are reduced group by group, and none of them stays whole.
        begun = min(len(layers), -(-max(0, done) // in_round))
        reduced = min(len(layers), max(0, done) // in_round) if in_round == microbatches else 0
        summed = sum(layers[len(layers) - begun : len(layers) - reduced]) / sum(layers)
        found.add(Held(in_layers, sum(counts), counts[last], at_loss, summed))
    return frozenset(found)
