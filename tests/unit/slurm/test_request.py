"""What a cluster's configuration is refused for: one message for one mistake."""

from typing import Any

import pytest

from slurm.request import ClusterConfig


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"gres": "gpu:{}"}, "cluster.gres=gpu:{}: in braces stands {gpus_per_node}"),
        ({"gres": "gpu:{gpus}"}, "cluster.gres=gpu:{gpus}: in braces stands {gpus_per_node}"),
        ({"gres": "gpu:{"}, "cluster.gres=gpu:{: in braces"),
        ({"account": ""}, "cluster.account is empty"),
        ({"partition": ""}, "cluster.partition is empty: give it a value, or null for none"),
        ({"account": " "}, "cluster.account is empty"),
        ({"memory_gb_per_node": 0}, "cluster.memory_gb_per_node=0 must be at least 1, or null"),
        ({"nodes": 0}, "cluster.nodes=0 must be at least 1"),
        ({"nodes": -1, "min_nodes": 1}, "cluster.nodes=-1 must be at least 1"),
        ({"nodes": 0, "kind": "local"}, "cluster.nodes=0 must be at least 1"),
        ({"gpus_per_node": 0}, "cluster.gpus_per_node=0 must be at least 1"),
        ({"time_limit_min": 0}, "cluster.time_limit_min=0 must be at least 1"),
        ({"preflight_command": "True"}, "cluster.preflight_command=True is no line of bash"),
    ],
)
def test_a_mistake_is_told_once(values: dict[str, Any], told: str) -> None:
    (problem,) = ClusterConfig(**{"name": "c", "kind": "slurm", **values}).problems()
    assert problem.startswith(told)


def test_what_is_right_is_let_through() -> None:
    right = {"gres": None, "memory_gb_per_node": None, "partition": None, "preflight_command": "true"}
    for values in ({}, right, {"gres": "gpu:h100:{gpus_per_node}"}, {"gres": "shard:4"}):
        assert ClusterConfig(**{"name": "c", "kind": "slurm", **values}).problems() == []
