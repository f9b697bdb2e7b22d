"""The chunked loss against torch's cross entropy."""

import math

import pytest
import torch

from model import loss as loss_module
from model.loss import chunked_cross_entropy


@pytest.mark.parametrize("chunk_rows", [1, 7, 64])
def test_loss_and_gradients_equal_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    vocabulary, width, rows = 53, 16, 20
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_rows * vocabulary)
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[3] = -100
    twins = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    loss = chunked_cross_entropy(hidden, weight, targets)
    (loss * 0.5).backward()
    expected = torch.nn.functional.cross_entropy(twins[0] @ twins[1].T, targets, reduction="sum")
    (expected * 0.5).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, twins[0].grad)
    torch.testing.assert_close(weight.grad, twins[1].grad)


@pytest.mark.slow
def test_compiled_equals_plain_also_where_a_target_is_nearly_certain() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(24, 32).bfloat16(), torch.randn(300, 32), torch.randint(0, 300, (24,))
    # Token 7 has all but a thousandth of row 5: in bf16, its probability less 1 would be 0.
    others = (hidden[5].float() @ weight.bfloat16().float().T).logsumexp(0)
    weight[7] = hidden[5].float() * (others + 7) / hidden[5].float().square().sum()
    targets[5], targets[9] = 7, -100
    results = []
    for compiled in (False, True):
        ours = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = chunked_cross_entropy(*ours, targets, compiled=compiled)
        (loss * 0.5).backward()
        results.append([loss.detach(), *(x.grad for x in ours)])
    for plain, made in zip(*results, strict=True):
        torch.testing.assert_close(made, plain, rtol=1e-2, atol=1e-6)
    assert results[1][1][9].abs().max() == 0
    logits = torch.cat([torch.zeros(1, 299), torch.full((1, 1), math.log(299) + 7)], dim=1).bfloat16()
    expected = logits.float().softmax(-1)[0, -1] - 1
    _, gradient = loss_module._to_gradient_in_place(logits, torch.tensor([299]))
    torch.testing.assert_close(gradient[0, -1].float(), expected, rtol=1e-2, atol=0)


def test_never_holds_all_logits() -> None:
    rows, vocabulary, width = 4096, 8192, 8  # all logits: 128 MiB
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        chunked_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.long)).backward()
    assert 0 < largest <= loss_module.CHUNK_LOGITS < rows * vocabulary
