"""How one model is laid over many GPUs: the degrees of the device mesh and what they need. Pure: no torch."""

from dataclasses import dataclass, replace
from itertools import pairwise

from model.config import ModelConfig

RECOMPUTE = ("none", "selective", "full", "auto")
MICROBATCHES = range(1, 17)  # rows at a time among which the plan chooses
PIPELINE_SCHEDULES = ("1f1b", "interleaved_1f1b", "zero_bubble")


@dataclass(kw_only=True)
class Layout:
    """Mesh degrees. Ranks are numbered pp-major, tp-minor: neighbours of a tensor group share a node."""

    name: str
    dp_replicate: int = 1  # HSDP: copies of the sharded model
    dp_shard: int = 1  # FSDP2: ranks that share one copy of parameters, gradients and optimizer state
    tp: int = 1  # tensor (with sequence) parallel ranks
    pp: int = 1  # pipeline stages
    cp: int = 1  # context parallel ranks
    microbatch_sequences: int = 1  # rows that one data-parallel rank computes at a time; 0: for the plan to choose
    recompute: str = "none"  # in the backward pass: none | selective (the paper's) | full | auto: the least that fits
    pipeline_schedule: str = "1f1b"
    virtual_stages: int = 1  # groups of layers on each pipeline rank (interleaved_1f1b)

    @property
    def is_open(self) -> bool:
        """Whether something is left to the plan: what is 0."""
        return self.has_open_degrees or self.microbatch_sequences == 0

    @property
    def has_open_degrees(self) -> bool:
        """Whether more than the rows of a microbatch is left to the plan (layout=auto)."""
        return 0 in (self.dp_replicate, self.dp_shard, self.tp, self.pp, self.cp)

    @property
    def dp(self) -> int:
        """Data-parallel ranks: groups that see different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def gpus(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    def accumulation_steps(self, batch_sequences: int) -> int:
        """Microbatches that each data-parallel rank computes in one optimizer step."""
        return batch_sequences // (self.dp * self.microbatch_sequences)

    def problems(self, model: ModelConfig, batch_sequences: int, gpus: int, gpus_per_node: int) -> list[str]:
        """What cannot be, against the model, the batch and the cluster (`gpus` in all, `gpus_per_node` on each)."""
        degrees = ("dp_replicate", "dp_shard", "tp", "pp", "cp", "microbatch_sequences")
        least = {**dict.fromkeys(degrees, 0 if self.is_open else 1), "virtual_stages": 1}
        found = [
            f"layout.{name}={value} must be at least {at_least}"
            for name, at_least in least.items()
            if (value := getattr(self, name)) < at_least
        ]
        if self.recompute not in RECOMPUTE:
            found.append(f"layout.recompute={self.recompute} is none of {', '.join(RECOMPUTE)}")
        if self.pipeline_schedule not in PIPELINE_SCHEDULES:
            found.append(
                f"layout.pipeline_schedule={self.pipeline_schedule} is none of {', '.join(PIPELINE_SCHEDULES)}"
            )
        if found or self.has_open_degrees:
            return found
        if self.microbatch_sequences == 0:
            each = [
                replace(self, microbatch_sequences=rows).problems(model, batch_sequences, gpus, gpus_per_node)
                for rows in MICROBATCHES
            ]
            return [] if [] in each else each[0]
        rest = self.tp * self.pp * self.cp
        if self.gpus != gpus:
            parts = " x ".join(
                f"{label} {n}"
                for label, n in (("dp", self.dp), ("tp", self.tp), ("pp", self.pp), ("cp", self.cp))
                if n > 1 or label == "dp"
            )
            way_out = (
                f"set layout.dp_shard={gpus // (rest * self.dp_replicate)}"
                if gpus % (rest * self.dp_replicate) == 0
                else f"choose degrees whose product is {gpus}"
            )
            found.append(
                f"layout needs {self.gpus} GPUs ({parts}) but the cluster has {gpus}: {way_out}, "
                f"or choose another cluster or cluster.nodes"
            )
        for degree, field, size in (
            ("tp", "n_heads", model.n_heads),
            ("tp", "n_kv_heads", model.n_kv_heads or model.n_heads),
            ("tp", "ffn_dim", model.ffn_dim),
            ("tp", "vocab_size", model.vocab_size),
            ("tp", "sequence_length", model.sequence_length),
        ):
            n = getattr(self, degree)
            if size % n:
                found.append(
                    f"model.{field}={size} does not divide by layout.{degree}={n}: choose a divisor of {size}, or for "
                    f"model.{field} a multiple of {n}"
                )
        if self.tp > gpus_per_node:
            found.append(
                f"layout.tp={self.tp} is wider than a node of {gpus_per_node} GPUs: tensor parallelism needs the "
                f"node's own links, set layout.tp<={gpus_per_node}"
            )
        elif gpus > gpus_per_node and gpus_per_node % self.tp:
            found.append(
                f"layout.tp={self.tp} does not divide cluster.gpus_per_node={gpus_per_node}: some tensor parallel ranks would "
                f"be on two nodes, choose a divisor of {gpus_per_node}"
            )
        shares = self.tp * self.cp * (2 if self.cp > 1 else 1)  # context parallel ranks have two chunks of a row each
        if self.cp > 1 and model.sequence_length % shares:
            found.append(
                f"model.sequence_length={model.sequence_length} does not divide by {shares} (layout.tp={self.tp} x "
                f"2 layout.cp={self.cp}): choose a multiple of {shares}"
            )
        stages = self.pp * self.virtual_stages
        if stages > model.n_layers:
            found.append(
                f"layout.pp={self.pp} x layout.virtual_stages={self.virtual_stages} for "
                f"model.n_layers={model.n_layers}: their product must be at most {model.n_layers}"
            )
        if self.virtual_stages > 1 and (self.pipeline_schedule == "1f1b" or self.pp == 1):
            found.append(
                f"layout.virtual_stages={self.virtual_stages} is of interleaved pipelines: set "
                f"layout.pipeline_schedule=interleaved_1f1b and layout.pp>1, or layout.virtual_stages=1"
            )
        if self.pp > 1 and self.pipeline_schedule == "zero_bubble" and self.recompute not in ("none", "auto"):
            found.append(
                f"layout.recompute={self.recompute} with layout.pipeline_schedule=zero_bubble: its backward pass goes over "
                f"each layer twice, which recomputation forbids: set layout.recompute=none, or another schedule"
            )
        if self.pp == 1 and self.pipeline_schedule != "1f1b":
            found.append(
                f"layout.pipeline_schedule={self.pipeline_schedule} with layout.pp=1, which is no pipeline: set layout.pp>1, or "
                f"layout.pipeline_schedule=1f1b"
            )
        return found + self.batch_problems(batch_sequences)

    def batch_problems(self, batch_sequences: int) -> list[str]:
        """Why the batch does not divide among the data-parallel ranks, or is too small or uneven for the pipeline."""
        rows = self.dp * self.microbatch_sequences
        if batch_sequences % rows:
            return [
                f"optim.batch_sequences={batch_sequences} does not divide into dp {self.dp} x "
                f"layout.microbatch_sequences={self.microbatch_sequences} = {rows} rows: "
                f"set optim.batch_sequences={max(1, round(batch_sequences / rows)) * rows}"
            ]
        microbatches = batch_sequences // rows
        rounds = max(1, microbatches // self.pp)
        if microbatches < self.pp or (self.pipeline_schedule != "1f1b" and microbatches % rounds):
            return [
                f"optim.batch_sequences={batch_sequences} makes {microbatches} microbatches for layout.pp={self.pp} "
                f"stages: set optim.batch_sequences={rounds * self.pp * rows}"
            ]
        return []


def microbatches_in_round(microbatches: int, pp: int) -> int:
    """That a pipeline of `pp` ranks takes through each group of layers before the next one (torch's schedules)."""
    return microbatches // max(1, microbatches // pp)


def stage_layers(n_layers: int, pp: int, virtual_stages: int = 1) -> list[range]:
    """The layers of each stage, in order; rank r of the pipeline has the stages r, r + pp, ... The first ones are the fuller."""
    stages = pp * virtual_stages
    fewest, more = divmod(n_layers, stages)
    starts = [s * fewest + min(s, more) for s in range(stages + 1)]
    return [range(start, end) for start, end in pairwise(starts)]
