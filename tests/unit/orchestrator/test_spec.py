"""The configuration: the paper's numbers, and everything that is wrong told at once."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from model.config import swiglu_ffn_dim
from model.cost import parameter_count
from orchestrator import spec as specs
from orchestrator.errors import UserError
from orchestrator.spec import compose


@pytest.mark.parametrize(
    ("name", "billions", "dim", "heads", "layers", "lr"),
    [
        ("llama_7b", 6.7, 4096, 32, 32, 3.0e-4),
        ("llama_13b", 13.0, 5120, 40, 40, 3.0e-4),
        ("llama_33b", 32.5, 6656, 52, 60, 1.5e-4),
        ("llama_65b", 65.2, 8192, 64, 80, 1.5e-4),
    ],
)
def test_sizes_of_the_paper(name: str, billions: float, dim: int, heads: int, layers: int, lr: float) -> None:
    spec = compose([f"experiment={name}"])
    model = spec.model
    assert (model.dim, model.n_heads, model.n_layers) == (dim, heads, layers)
    assert model.ffn_dim == swiglu_ffn_dim(dim)
    assert (model.vocab_size, model.sequence_length) == (32_000, 2048)
    # 7B has 6.738e9 parameters, which the paper cuts to 6.7; the others round.
    assert int(parameter_count(model) / 1e8) / 10 == billions or round(parameter_count(model) / 1e9, 1) == billions
    assert spec.optim.lr == lr
    assert (spec.optim.beta1, spec.optim.beta2, spec.optim.weight_decay, spec.optim.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert (spec.optim.warmup_steps, spec.optim.min_lr_ratio) == (2000, 0.1)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama2_70b", 68_976_648_192), ("llama3_8b", 8_030_261_248), ("llama3_70b", 70_553_706_496)],
)
def test_sizes_of_later_llamas_are_those_of_the_released_weights(name: str, parameters: int) -> None:
    assert parameter_count(compose([f"model={name}"]).model) == parameters


def test_llama_65b_is_the_published_run() -> None:
    spec = compose(["experiment=llama_65b"])
    assert spec.cluster.gpus == spec.layout.gpus == 2048
    assert spec.gpu.name == "a100_80gb"
    assert spec.batch_tokens == 4 * 1024 * 1024
    assert spec.steps * spec.batch_tokens == pytest.approx(1.4e12, rel=1e-5)
    shares = {n: s.proportion for n, s in spec.data.sources.items()}
    assert shares == {
        "commoncrawl": 0.67,
        "c4": 0.15,
        "github": 0.045,
        "wikipedia": 0.045,
        "books": 0.045,
        "arxiv": 0.025,
        "stackexchange": 0.02,
    }


def test_parameter_count_is_the_models_own() -> None:
    import torch

    from model.transformer import Transformer

    for name in ("tiny", "llama_65b", "llama3_8b"):
        config = compose([f"model={name}"]).model
        with torch.device("meta"):
            model = Transformer(config)
        assert sum(p.numel() for p in model.parameters()) == parameter_count(config)


def problems(*overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        compose(list(overrides))
    return str(refused.value)


def test_everything_wrong_is_told_together() -> None:
    text = problems("modell=x", "optim.lr=abc", "optim.foo=1", "+zz=1", "model.n_heads=3", "carbon.pue=0.5")
    assert "there are 6 problems" in text
    for part in (
        "modell=x",
        "optim.lr=abc",
        "'foo' not in 'OptimConfig'",
        "'zz' not in",
        "model.n_heads=3",
        "carbon.pue=0.5",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.n_heads=3"], ["model.dim=256", "model.n_heads=3", "set model.n_heads=2"]),
        (
            ["experiment=llama_65b", "cluster.nodes=64"],
            ["2048 GPUs (dp 256 x tp 8)", "the cluster has 512", "set layout.dp_shard=16"],
        ),
        (["optim.batch_sequences=9"], ["optim.batch_sequences=9", "8 rows", "set optim.batch_sequences=8"]),
        (["data.sources.licences.proportion=0.5"], ["sum to 1.455, not 1", "change one by -0.455"]),
        (["optim.warmup_steps=300"], ["warmup_steps=300", "steps=300"]),
        (["model=llama_9b"], ["model/llama_9b", "llama_7b"]),
        (["cluster.nodes=2"], ["cluster.nodes=2", "set cluster.nodes=1"]),
        (
            ["cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=6", "layout.tp=4", "layout.dp_shard=3"],
            ["layout.tp=4", "cluster.gpus_per_node=6", "choose a divisor of 6"],
        ),
        (["layout.pipeline_schedule=zero_bubble"], ["zero_bubble with layout.pp=1", "layout.pipeline_schedule=1f1b"]),
        (["layout=auto", "layout.virtual_stages=0"], ["layout.virtual_stages=0 must be at least 1"]),
        (["gpu.peak_bf16_tflops=0"], ["gpu.peak_bf16_tflops=0", "above 0"]),
        (["gpu.matmul_fraction=2", "gpu.cores=0"], ["gpu.matmul_fraction=2", "at most 1", "gpu.cores=0"]),
        (["gpu.usd_per_hour=[5,1,0.1]"], ["gpu.usd_per_hour=[5.0, 1.0, 0.1]", "[low,central,high]"]),
        (
            ["plan.restart_s=[1,nan,3]", "optim.lr=inf"],
            ["plan.restart_s=nan", "optim.lr=inf must be a finite number"],
        ),
        (["carbon.zone=XXX"], ["carbon.zone=XXX is not in codecarbon's table"]),
        (["carbon.zone=USA", "carbon.region=Atlantis"], ["carbon.region=Atlantis", "there are: alabama"]),
        (["carbon.cloud=gcp/nope"], ["carbon.cloud=gcp/nope: no such region", "europe-west1"]),
        (["carbon.series=/nope.csv"], ["carbon.series=/nope.csv does not exist"]),
        (
            ["data.tokenizer.vocab_size=32000"],
            ["data.tokenizer.vocab_size=32000", "model.vocab_size=4096", "set model.vocab_size=32000"],
        ),
        (["checkpoint.url=foo://x"], ["checkpoint.url=foo://x: Protocol not known: foo", "s3://bucket/folder"]),
        (["data.sources.licences.path=foo://x"], ["data.sources.licences.path=foo://x: Protocol not known"]),
        (["run_root=s3://bucket/runs"], ["run_root=s3://bucket/runs must be a folder"]),
        (["name="], ["name='' must name a folder below run_root"]),
        (["name=../out"], ["name='../out'"]),
        (["name=/tmp/out"], ["name='/tmp/out'"]),
        (["name=.data"], ["name='.data'"]),
        (["name='two\nlines'"], ["name='two\\nlines'"]),
    ],
)
def test_each_problem_names_both_numbers_and_the_way_out(overrides: list[str], parts: list[str]) -> None:
    text = problems(*overrides)
    for part in parts:
        assert part in text


def test_every_choice_of_every_group_composes() -> None:
    from importlib import resources

    groups = [g for g in resources.files("hydra_conf").iterdir() if g.is_dir() and not g.name.startswith("__")]
    seen = 0
    for group in groups:
        for choice in group.iterdir():
            if choice.name.endswith(".yaml") and group.name != "experiment":
                specs._compose([f"{group.name}={choice.name.removesuffix('.yaml')}"])
                seen += 1
    assert seen > 20


def test_a_spec_comes_back_from_its_run_directory(tmp_path) -> None:  # type: ignore[no-untyped-def]
    spec = compose(["experiment=llama_65b", "seed=7"])
    (tmp_path / "spec.yaml").write_text(specs.to_yaml(spec))
    assert specs.load(tmp_path / "spec.yaml") == spec


def test_a_users_own_group_is_found(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "name: mine\ndim: 128\nn_layers: 2\nn_heads: 2\nffn_dim: 384\nvocab_size: 512\nsequence_length: 64\n"
    )
    assert compose(["model=mine"], tmp_path).model.dim == 128


def test_composing_many_gives_what_composing_each_gives() -> None:
    many = [
        ["model=nano", "optim.lr=1e-3", "seed=2"],
        ["model=nano", "optim.lr=2e-3", "optim.lr=4e-3", "name=x"],
        ["model.vocab_size=1024", "model=tiny"],  # the tokenizer's size follows the model's
        ["experiment=first_run", "steps=7", "optim.warmup_steps=3"],
        ["data.sources.licences.proportion=0.5", "data.sources.books_two={path: x, format: text, proportion: 0.1}"],
        ["+data.sources.more={path: x, format: jsonl, proportion: 0.1}", "data.sources.licences.proportion=0.01"],
        ["model=nano", "model.n_heads=3"],
        ["model=nano", "no.such=1"],
        ["model=nothere"],
        ["+model.nope=1", "seed=2"],
        ["+model.nope=1", "seed=3"],  # the composition that they would share is refused again
        ["+cluster.sbatch.begin=now+1hour", "seed=2"],
        ["+nope=1"],
        ["optim.lr=abc"],
        ["steps=1.5"],
        ["dashboard.entity=null", "cluster.setup=[a,b]", "cluster.sbatch={x: y}", "seed=3"],
    ]
    for overrides, found in zip(many, specs.compose_many(many), strict=True):
        try:
            one: specs.RunSpec | str = compose(overrides)
        except UserError as error:
            one = str(error)
        assert found == one, overrides


@pytest.mark.parametrize("each", [["steps=100"], ["+cluster.sbatch.begin=now+1hour"]])
def test_points_that_only_set_values_share_one_composition(each: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 0.1 s, so that 200 points would wait 20 s before they are submitted."""
    calls = []

    def counted(*args: Any, _real: Any = specs.hydra_compose, **more: Any) -> Any:
        calls.append(args)
        return _real(*args, **more)

    monkeypatch.setattr(specs, "hydra_compose", counted)
    found = specs.compose_many([["model=nano", *each, f"seed={n}"] for n in range(20)])
    assert [s.seed for s in found if isinstance(s, specs.RunSpec)] == list(range(20))
    assert len(calls) == 1


def test_a_run_with_a_key_that_is_gone_is_still_read(tmp_path: Path) -> None:
    spec = compose(["experiment=llama_7b"])
    text = specs.to_yaml(spec).replace("\nplan:\n", "\nplan:\n  spare_nodes: 0\n")
    assert "spare_nodes: 0\n  name" in text
    (tmp_path / "spec.yaml").write_text(text)
    assert specs.load(tmp_path / "spec.yaml") == spec


def test_a_run_of_before_a_section_existed_is_still_read(tmp_path: Path) -> None:
    spec = compose(["model=nano", "steps=77"])
    values = specs.as_dict(spec)
    del values["plan"]
    del values["checkpoint"]
    (tmp_path / "spec.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    assert specs.load(tmp_path / "spec.yaml") == spec


def test_steps_and_ranks_that_no_run_has_are_not_traced() -> None:
    with pytest.raises(UserError) as refused:
        compose(["model=nano", "steps=50", "profile.first_step=51", "profile.steps=0", "profile.ranks=[0,1]"])
    for told in (
        "profile.first_step=51 is no step of steps=50",
        "profile.steps=0",
        "profile.ranks has 1, and this run has 1",
    ):
        assert told in str(refused.value)
    assert compose(["steps=50", "profile.first_step=50"]).profile.first_step == 50


def test_checkpoints_that_go_with_the_process_are_refused() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.url=memory://x is gone with the process"):
        compose(["model=nano", "checkpoint.url=memory://x"])


def test_yaml_that_cannot_be_read_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: mine\nsources: {a: [}\n")
    with pytest.raises(UserError, match=r"data=mine: .*mine\.yaml"):
        compose(["data=mine"], tmp_path)
    for damage in ("name: [", "a: 1\n", "- a list\n", "\xff"):
        (tmp_path / "spec.yaml").write_text(damage, encoding="latin-1")
        with pytest.raises(UserError, match=r"spec\.yaml cannot be read"):
            specs.load(tmp_path / "spec.yaml")


def test_a_place_that_no_table_holds_is_refused_for_each_point_of_a_sweep() -> None:
    found = specs.compose_many([["carbon.zone=FRA", "seed=2"], ["carbon.zone=XXX", "seed=3"]])
    assert isinstance(found[0], specs.RunSpec)
    assert "carbon.zone=XXX" in str(found[1])


def test_a_run_may_be_named_into_a_group() -> None:
    assert compose(["name=group/mine"]).run_dir == Path("runs/group/mine")


def test_a_folder_of_groups_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for call in (lambda at: compose([], at), lambda at: specs.compose_many([["seed=2"]], at)):
        with pytest.raises(UserError, match=r"--config-dir .*nope is no folder"):
            call(tmp_path / "nope")


def test_the_tokenizer_of_a_mix_that_does_not_say_follows_the_model(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    mix = "sources:\n  a: {path: a.txt, proportion: 1.0}\n"
    (tmp_path / "data" / "silent.yaml").write_text(f"name: silent\n{mix}")
    (tmp_path / "data" / "says.yaml").write_text(f"name: says\ntokenizer: {{vocab_size: 300}}\n{mix}")
    for words, ids in ((["data=silent"], 4096), (["data=silent", "model=nano"], 512), (["data=says"], 300)):
        assert compose(words, tmp_path).data.tokenizer.vocab_size == ids
        assert isinstance(one := specs.compose_many([words], tmp_path)[0], specs.RunSpec)
        assert one.data.tokenizer.vocab_size == ids
