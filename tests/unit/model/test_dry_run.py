"""The plan's memory against the trainer's own code, run without values on a fake process group of all ranks."""

import json

import pytest

from model.dry_run import dry_run
from orchestrator import spec as specs
from orchestrator.cli import main
from orchestrator.plan.memory import memory, rank_memory

SMALL = "model=small model.n_layers=4"
LAYOUTS = {
    "one rank": f"{SMALL} optim.batch_sequences=8",
    "fsdp, several microbatches": f"{SMALL} layout=fsdp cluster.gpus_per_node=8 optim.batch_sequences=128 "
    "layout.microbatch_sequences=1",
    "fsdp, selective": f"{SMALL} layout=fsdp cluster.gpus_per_node=8 optim.batch_sequences=8 layout.recompute=selective "
    "layout.microbatch_sequences=1",
    "hsdp, full": f"{SMALL} layout.dp_replicate=2 layout.dp_shard=2 cluster.gpus_per_node=4 optim.batch_sequences=32 "
    "layout.recompute=full",
    "fsdp x tp": f"{SMALL} layout.dp_shard=2 layout.tp=2 cluster.gpus_per_node=4 optim.batch_sequences=32",
    "cp": f"{SMALL} layout.cp=2 cluster.gpus_per_node=2 optim.batch_sequences=16",
    "tp x pp, selective": f"{SMALL} layout.tp=2 layout.pp=2 layout.microbatch_sequences=2 cluster.gpus_per_node=4 "
    "optim.batch_sequences=8 layout.recompute=selective",
    "fsdp x interleaved pp": f"{SMALL} layout.dp_shard=2 layout.pp=2 layout.virtual_stages=2 "
    "layout.pipeline_schedule=interleaved_1f1b layout.microbatch_sequences=2 cluster.gpus_per_node=4 optim.batch_sequences=16",
    "interleaved pp of one group each": f"{SMALL} layout.pp=4 layout.pipeline_schedule=interleaved_1f1b "
    "layout.microbatch_sequences=2 cluster.gpus_per_node=4 optim.batch_sequences=16 model.n_layers=12",
    "interleaved pp, one long round": f"{SMALL} model.n_layers=16 layout.pp=4 layout.virtual_stages=2 "
    "layout.pipeline_schedule=interleaved_1f1b layout.microbatch_sequences=1 cluster.gpus_per_node=4 optim.batch_sequences=7",
    "interleaved pp, two long rounds": f"{SMALL} model.n_layers=16 layout.pp=4 layout.virtual_stages=2 "
    "layout.pipeline_schedule=interleaved_1f1b layout.microbatch_sequences=1 cluster.gpus_per_node=4 optim.batch_sequences=10",
    "interleaved pp, as few microbatches as ranks": f"{SMALL} model.n_layers=8 layout.pp=2 layout.virtual_stages=2 "
    "layout.pipeline_schedule=interleaved_1f1b layout.microbatch_sequences=2 cluster.gpus_per_node=2 optim.batch_sequences=4",
    "zero bubble, a rank in the middle is fullest": f"{SMALL} model.n_layers=19 layout.pp=4 model.vocab_size=512 "
    "layout.pipeline_schedule=zero_bubble layout.microbatch_sequences=2 cluster.gpus_per_node=4 optim.batch_sequences=16",
    "interleaved pp, the first rank's groups fuller": f"{SMALL} model.n_layers=10 layout.pp=4 layout.virtual_stages=2 "
    "layout.pipeline_schedule=interleaved_1f1b layout.microbatch_sequences=2 cluster.gpus_per_node=4 optim.batch_sequences=16",
    "interleaved pp, first groups fuller": f"{SMALL} model.n_layers=8 layout.pp=2 layout.virtual_stages=3 "
    "layout.pipeline_schedule=interleaved_1f1b layout.microbatch_sequences=2 cluster.gpus_per_node=2 optim.batch_sequences=16",
    "zero bubble, 2 stages": f"{SMALL} layout.pp=2 layout.pipeline_schedule=zero_bubble layout.microbatch_sequences=2 "
    "cluster.gpus_per_node=2 optim.batch_sequences=16",
    "zero bubble, 4 stages": f"{SMALL} layout.pp=4 layout.pipeline_schedule=zero_bubble layout.microbatch_sequences=2 "
    "cluster.gpus_per_node=4 optim.batch_sequences=16",
    "zero bubble, fsdp x tp": f"{SMALL} layout.pp=2 layout.tp=2 layout.dp_shard=2 layout.pipeline_schedule=zero_bubble "
    "cluster.gpus_per_node=8 optim.batch_sequences=64",
    "7B on 2,048, selective": "experiment=llama_7b model.n_layers=3",
    "33B on 2,048, selective": "experiment=llama_33b model.n_layers=3",
    "65B on 2,048, none": "experiment=llama_65b model.n_layers=3 layout.recompute=none layout.microbatch_sequences=4",
    "65B on 2,048, full": "experiment=llama_65b model.n_layers=3 layout.recompute=full",
}


# Gradients of a group are there when those of another are not, and what arrives meanwhile is not in the peak.
PEAK_ALONE = {
    "interleaved pp, one long round",
    "interleaved pp, two long rounds",
    "interleaved pp, as few microbatches as ranks",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plans_memory_is_that_of_the_trainers_code_within_5_percent(name: str) -> None:
    spec = specs.compose(LAYOUTS[name].split())
    shapes = list(dry_run(spec.model, spec.layout, spec.optim.batch_sequences))
    assert [s.pp_stage for s in shapes] == list(range(spec.layout.pp))
    assert sum(s.ranks for s in shapes) == spec.layout.gpus
    for shape in shapes:
        plan = rank_memory(spec.model, spec.layout, spec.plan, spec.optim.batch_sequences, shape.pp_stage)
        assert plan.parameters_bytes == pytest.approx(shape.parameters_bytes, rel=0.05)
        assert plan.optimizer_bytes == pytest.approx(shape.optimizer_bytes, rel=0.05)
    fullest = max(shapes, key=lambda s: s.total_bytes)
    plan = rank_memory(spec.model, spec.layout, spec.plan, spec.optim.batch_sequences, fullest.pp_stage)
    if name not in PEAK_ALONE:
        if spec.layout.pipeline_schedule != "zero_bubble":  # its gradients are most when its peak is not
            assert plan.gradients_bytes == pytest.approx(fullest.gradients_bytes, rel=0.05)
        assert plan.activations_bytes == pytest.approx(fullest.activations_bytes, rel=0.05)
    assert plan.total_bytes - plan.overhead_bytes == pytest.approx(fullest.total_bytes, rel=0.05)
    most = memory(spec.model, spec.layout, spec.plan, spec.optim.batch_sequences)
    assert most.total_bytes - most.overhead_bytes == pytest.approx(fullest.total_bytes, rel=0.05)


def test_the_command_tells_every_rank_shape_and_the_plans_figures(capsys: pytest.CaptureFixture[str]) -> None:
    words = "model=tiny layout.tp=2 layout.recompute=auto cluster.gpus_per_node=2 optim.batch_sequences=8"
    assert main(["plan", "--dry-run", "--json", *words.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"]["recompute"] == "none"
    (shape,) = found["rank_shapes"]
    assert (shape["ranks"], shape["tp_ranks"]) == (2, [0, 1])
    assert found["peak_bytes"] == shape["total_bytes"]
    assert shape["planned"]["total_bytes"] == pytest.approx(shape["total_bytes"], rel=0.05)
