"""Fewer nodes, the same global batch."""

from dataclasses import replace

import pytest

from model.layout import Layout
from orchestrator.shrink import nodes_to_use, problems, shrunk
from slurm.request import ClusterConfig

LAYOUT = Layout(name="l", dp_shard=8)
CLUSTER = ClusterConfig(name="c", kind="slurm", nodes=8, gpus_per_node=1, min_nodes=2)


def test_replicas_go_first_and_then_the_shards_are_fewer() -> None:
    assert shrunk(LAYOUT, 8, 64) is LAYOUT
    assert shrunk(LAYOUT, 4, 64).dp_shard == 4
    copies = Layout(name="l", dp_replicate=4, dp_shard=2, tp=2)
    fewer = shrunk(copies, 8, 64)
    assert (fewer.dp_replicate, fewer.dp_shard, fewer.tp) == (2, 2, 2)
    with pytest.raises(ValueError, match="does not divide into dp 7"):
        shrunk(LAYOUT, 7, 64)
    with pytest.raises(ValueError, match="tp 2"):
        shrunk(copies, 7, 64)


def test_the_most_nodes_that_the_batch_divides_by_are_used() -> None:
    assert [nodes_to_use(CLUSTER, LAYOUT, 64, fit) for fit in (9, 8, 7, 3, 1, 0)] == [8, 8, 4, 2, None, None]
    assert nodes_to_use(replace(CLUSTER, min_nodes=None), LAYOUT, 64, 7) is None


def test_a_pipeline_goes_on_only_with_whole_rounds_of_microbatches() -> None:
    pipeline = Layout(name="l", dp_shard=18, pp=2, pipeline_schedule="interleaved_1f1b", virtual_stages=2)
    with pytest.raises(ValueError, match=r"makes 9 microbatches for layout\.pp=2 stages"):
        shrunk(pipeline, 24, 108)  # dp 12
    assert shrunk(pipeline, 18, 108).dp_shard == 9  # 12 microbatches
    cluster = replace(CLUSTER, nodes=6, gpus_per_node=6)
    assert nodes_to_use(cluster, pipeline, 108, 5) == 3
    assert nodes_to_use(cluster, replace(pipeline, pipeline_schedule="1f1b", virtual_stages=1), 108, 5) == 4


def test_a_promise_that_cannot_be_kept_is_told_before_the_launch() -> None:
    assert problems(CLUSTER, LAYOUT, 64) == []
    (said,) = problems(replace(CLUSTER, min_nodes=5), LAYOUT, 64)
    assert "cluster.min_nodes=5" in said
    assert "dp 7" in said
