"""What one rank keeps in its GPU's memory, in bytes, on the pipeline stage that needs most."""

from dataclasses import asdict, dataclass

from model.config import ModelConfig
from model.layout import Layout
from orchestrator.plan.config import PlanConfig

CHUNK_LOGITS = 1 << 24  # model/loss.py: logits alive at a time
CONTEXT_BYTES = 2.5e9  # CUDA context, NCCL's buffers, cuBLAS workspaces
FRAGMENTATION = 0.05  # of what torch's allocator holds


@dataclass(frozen=True, kw_only=True)
class Memory:
    parameters_bytes: float  # fp32 masters, sharded over dp_shard
    gradients_bytes: float
    optimizer_bytes: float  # AdamW's two moments, fp32
    activations_bytes: float  # saved for the backward pass, of all microbatches that are alive at once
    buffers_bytes: float  # gathered layers, one layer's recomputation, logits, context, fragmentation

    @property
    def total_bytes(self) -> float:
        return float(sum(asdict(self).values()))


def layer_parameters(model: ModelConfig) -> int:
    return 2 * model.dim * (model.dim + model.kv_dim) + 3 * model.dim * model.ffn_dim + 2 * model.dim


def layers_by_stage(model: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Layers on the fullest rank of the pipeline, and on its last rank, which also has the head."""
    full = -(-model.n_layers // layout.pp)
    return full, max(0, model.n_layers - full * (layout.pp - 1))


def saved_bytes_per_layer(model: ModelConfig, layout: Layout, plan: PlanConfig, recompute: str) -> float:
    """What the backward pass needs of one layer and microbatch, on one rank. bf16, fused elementwise kernels.

    none: residual in, norm, q, k, v, attention, residual, norm, w1, w3, their product (as in arXiv 2205.05198, eq. 1,
    for SwiGLU and flash attention). selective: the outputs of linear layers and attention, and the residual stream
    (arXiv 2302.13971, section 2.4). full: the layer's input.
    """
    d, kv, f = model.dim, model.kv_dim, model.ffn_dim
    tokens = layout.microbatch_sequences * model.sequence_length / layout.cp
    residual = 1 / layout.tp if plan.sequence_parallel else 1.0
    if recompute == "full":
        return 2 * tokens * d * residual
    if recompute == "selective":
        elements = 2 * d * residual + (2 * d + 2 * kv + 2 * f) / layout.tp
    else:
        elements = 4 * d * residual + (2 * d + 2 * kv + 3 * f) / layout.tp
    saved = 2 * tokens * elements + 4 * tokens * model.n_heads / layout.tp
    if plan.attention == "unfused" and recompute == "none":
        # softmax, its dropout and mask: 5 bytes a score (arXiv 2205.05198, section 4.1)
        saved += 5 * tokens * model.sequence_length * model.n_heads / layout.tp
    return saved


def memory(model: ModelConfig, layout: Layout, plan: PlanConfig, batch_sequences: int) -> Memory:
    """`layout.recompute` must be one of none, selective, full here."""
    microbatches = layout.accumulation_steps(batch_sequences)
    full, last = layers_by_stage(model, layout)
    per_layer = layer_parameters(model) / layout.tp
    vocabulary = model.vocab_size * model.dim / layout.tp
    if layout.pp == 1:
        parameters = full * per_layer + 2 * vocabulary
    else:
        parameters = max(full, last) * per_layer + vocabulary
    shards = layout.dp_shard * (layout.cp if layout.dp_shard > 1 else 1)  # as FSDP meshes do: context ranks shard too
    sharded = parameters / shards
    # Gradients of several microbatches are added up whole, and reduced to shards after the last (model/parallel.py).
    whole_gradients = 4 * parameters if shards > 1 and microbatches > 1 else 0.0
    if shards == 1:
        gathered = 2 * per_layer  # a bf16 copy of the layer at work
    elif layout.pp > 1:
        gathered = 2 * parameters  # a pipeline rank gathers once a step and keeps it
    else:
        gathered = 2 * (2 * per_layer + max(vocabulary, per_layer))  # this layer, the next, embedding or head
    # 1F1B: the first rank has `pp` microbatches in flight; interleaved: 1 + (pp - 1) / (pp v) times that
    # (arXiv 2205.05198, section 4.2.3).
    in_flight = min(microbatches, layout.pp) / 1.0
    if layout.virtual_stages > 1:
        in_flight = min(float(microbatches), layout.pp * (1 + (layout.pp - 1) / (layout.pp * layout.virtual_stages)))
    saved = saved_bytes_per_layer(model, layout, plan, layout.recompute)
    tokens = layout.microbatch_sequences * model.sequence_length / layout.cp
    activations = full * saved * in_flight
    at_work = saved_bytes_per_layer(model, layout, plan, "none")
    logits = 3 * 4 * min(CHUNK_LOGITS, tokens * model.vocab_size) / layout.tp + 4 * vocabulary
    boundaries = 6 * 2 * tokens * model.dim  # the layer's input gathered over tp, its gradient, and what is sent
    working = at_work + boundaries + max(logits, 2 * per_layer)
    held = 12 * sharded + 4 * sharded + whole_gradients + gathered + activations + working
    return Memory(
        parameters_bytes=4 * sharded,
        gradients_bytes=4 * sharded + whole_gradients,
        optimizer_bytes=8 * sharded,
        activations_bytes=activations,
        buffers_bytes=gathered + working + FRAGMENTATION * held + CONTEXT_BYTES,
    )
