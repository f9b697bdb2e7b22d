"""What is chosen for the device: when code is compiled, and what it computes."""

from collections.abc import Iterator

import pytest
import torch

from model import device as device_module
from model.config import ModelConfig
from model.device import COMPILE_FLOPS, Choices, choose, prepare
from model.layout import Layout
from model.transformer import Transformer

CPU = torch.device("cpu")
ONE_RANK = Layout(name="test")


def test_a_short_run_is_not_compiled_and_says_why() -> None:
    choices = choose(CPU, "auto", COMPILE_FLOPS / 2, ONE_RANK)
    assert not choices.compile
    assert "short run" in choices.why


@pytest.mark.parametrize(
    ("capability", "hip", "expected"), [((9, 0), None, True), ((8, 0), None, False), ((9, 4), "6.4", False)]
)
def test_tensor_parallel_products_overlap_on_hopper_and_later_where_asked_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: bool
) -> None:
    """AMD's MI300X calls itself (9, 4)."""
    monkeypatch.setattr(device_module, "_compile_fails", lambda _: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    gpu, two = torch.device("cuda"), Layout(name="test", tp=2)
    assert choose(gpu, "on", 0.0, two).async_tp is expected
    assert not choose(gpu, "auto", COMPILE_FLOPS * 2, two).async_tp
    assert not choose(gpu, "on", 0.0, ONE_RANK).async_tp


def test_without_a_compiler_a_long_run_goes_on_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(device_module.torch, "compile", _no_compiler)
    for wanted, flops in (("auto", COMPILE_FLOPS * 2), ("on", 0.0)):
        choices = choose(CPU, wanted, flops, ONE_RANK)
        assert not choices.compile
        assert "No working C++ compiler found" in choices.why


def _no_compiler(*_: object, **__: object) -> object:
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a trace")


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    import torch._functorch.config as functorch

    with functorch.patch(functorch.get_config_copy()):
        yield


@pytest.mark.slow
def test_compiled_training_computes_the_same_and_repeats_bit_by_bit(torch_as_it_was: None) -> None:
    config = ModelConfig(name="t", dim=64, n_layers=2, n_heads=4, ffn_dim=160, vocab_size=97, sequence_length=32)
    tokens = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(2))
    targets = tokens[:, 1:].clone()
    targets[0, :3] = -1

    def gradients(compiled: bool) -> dict[str, torch.Tensor]:
        model = Transformer(config)
        model.initialize(seed=1)
        if compiled:
            prepare(choose(CPU, "on", 0.0, ONE_RANK), None)
            model.compile_training()
        loss = model(tokens[:, :-1], targets)
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    expected, found, again = gradients(False), gradients(True), gradients(True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[name], again[name])


@pytest.mark.slow
def test_compiled_layers_keep_no_attention_scores_and_less_than_torch_would(torch_as_it_was: None) -> None:
    config = ModelConfig(name="t", dim=64, n_layers=2, n_heads=4, ffn_dim=160, vocab_size=97, sequence_length=256)
    tokens = torch.randint(0, 97, (2, 257), generator=torch.Generator().manual_seed(2))
    scores = 2 * config.n_heads * 128 * 256  # of the last block of queries

    def kept_bytes(choices: Choices) -> int:
        torch._dynamo.reset()
        prepare(choices, None)
        model = Transformer(config, torch.bfloat16)
        model.initialize(seed=1)
        model.compile_training()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                assert tensor.numel() < scores
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens[:, :-1], tokens[:, 1:])
        return sum(kept.values())

    chosen = choose(CPU, "on", 0.0, ONE_RANK)
    assert kept_bytes(chosen) < 0.85 * kept_bytes(Choices(compile=True, why="as torch would"))


@pytest.mark.slow
def test_compiled_layers_compute_no_product_again(torch_as_it_was: None) -> None:
    # Wide, of few tokens: its matrices are larger than all that could be kept.
    config = ModelConfig(name="t", dim=512, n_layers=1, n_heads=8, ffn_dim=1408, vocab_size=97, sequence_length=512)
    tokens = torch.randint(0, 97, (1, 513), generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()
    prepare(choose(CPU, "on", 0.0, ONE_RANK), None)
    model = Transformer(config, torch.bfloat16)
    model.initialize(seed=1)
    model.compile_training()
    model(tokens[:, :-1], tokens[:, 1:]).backward()  # compiles, for which torch computes some itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::mm"] == 3 * (7 + 1)  # seven matrices and the output: forward, and two gradients each
    assert calls["aten::bmm"] == 4 * 7  # four blocks of attention: two products forward, five back
