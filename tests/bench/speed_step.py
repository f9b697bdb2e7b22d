"""One contender of bench_speed.py, in a process of its own: whole training steps (forward, backward, clipping, AdamW).

`python speed_step.py CONTENDER SHAPE TUNED STEPS PRECISION [without_products]` prints a JSON line; with 0 steps, where one goes.
`without_products` fills matrix products with a constant: memory, and the time of all else, on a processor that would take
minutes for a step in bf16 (of the peers' fused attention, one pass over what it reads and keeps is left). Peers run in the
environment that bench_speed.py makes, which shares this project's torch and nothing else; ours with what model/heap.py asks of
the environment of ranks.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES: dict[str, dict[str, int]] = {
    "S": {"dim": 512, "n_layers": 8, "n_heads": 8, "ffn_dim": 1536, "vocab_size": 32000, "sequence": 512, "batch": 4},
    "M": {
        "dim": 1024,
        "n_layers": 12,
        "n_heads": 16,
        "ffn_dim": 2816,
        "vocab_size": 32000,
        "sequence": 1024,
        "batch": 1,
    },
}
WARM_STEPS = 3
BUSY_ELSEWHERE = 0.05  # a step during which others took more of the processor than this does not count
CLIP, LR, BETAS, DECAY = 1.0, 3e-4, (0.9, 0.95), 0.1


def litgpt(shape: dict[str, int]) -> Callable[[Tensor], Tensor]:
    from litgpt.config import Config
    from litgpt.model import GPT

    return GPT(
        Config(
            block_size=shape["sequence"],
            n_layer=shape["n_layers"],
            n_head=shape["n_heads"],
            n_embd=shape["dim"],
            vocab_size=shape["vocab_size"],
            padded_vocab_size=shape["vocab_size"],
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=shape["ffn_dim"],
            parallel_residual=False,
            rotary_percentage=1.0,
            bias=False,
        )
    )


def torchtitan(shape: dict[str, int]) -> Callable[[Tensor], Tensor]:
    from unittest import mock

    # Its data loader is not asked for. For good: mock.patch.dict would take back what torch loads meanwhile, too.
    for absent in ("datasets", "datasets.distributed"):
        sys.modules[absent] = mock.MagicMock()
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs

    args = TransformerModelArgs(
        dim=shape["dim"],
        n_layers=shape["n_layers"],
        n_heads=shape["n_heads"],
        vocab_size=shape["vocab_size"],
        multiple_of=512 if shape["dim"] == 512 else 256,
        max_seq_len=shape["sequence"],
    )
    model = Transformer(args)
    with torch.no_grad():
        model.init_weights()
    assert model.layers["0"].feed_forward.w1.out_features == shape["ffn_dim"]
    return model


def transformers(shape: dict[str, int]) -> Callable[[Tensor], Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["dim"],
        intermediate_size=shape["ffn_dim"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        max_position_embeddings=shape["sequence"],
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def peer(name: str, shape: dict[str, int], tuned: bool, bf16: bool) -> Callable[[Tensor], float]:
    """A peer's model in the recipe that all three document: bf16 autocast, mean cross-entropy, clipping, fused AdamW."""
    model: Any = {"litgpt": litgpt, "torchtitan": torchtitan, "transformers": transformers}[name](shape)
    with torch.no_grad():
        for parameter in model.parameters():  # all begin alike: the losses can be compared
            parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)

    def loss_of(rows: Tensor) -> Tensor:
        logits = model(rows[:, :-1])
        logits = getattr(logits, "logits", logits)
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    compiled = torch.compile(loss_of) if tuned else loss_of
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)

    def step(rows: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = compiled(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def arriero(shape: dict[str, int], tuned: bool, bf16: bool) -> Callable[[Tensor], float]:
    """What the trainer's ranks run (model/train.py), without data and records."""
    from model.config import ModelConfig, OptimConfig
    from model.device import choose, keep_memory, prepare
    from model.layout import Layout
    from model.optim import clipped_step, global_grad_norm, make_optimizer
    from model.parallel import Ranks, build_model, forward_backward

    config = ModelConfig(
        name="bench",
        dim=shape["dim"],
        n_layers=shape["n_layers"],
        n_heads=shape["n_heads"],
        ffn_dim=shape["ffn_dim"],
        vocab_size=shape["vocab_size"],
        sequence_length=shape["sequence"],
    )
    device = torch.device("cpu")
    layout = Layout(name="bench", microbatch_sequences=shape["batch"])
    choices = choose(device, "on" if tuned else "off", 0.0, layout)
    if tuned:
        keep_memory(device)
    prepare(choices, None)
    model = build_model(config, layout, Ranks(device), torch.bfloat16 if bf16 else torch.float32, 1, choices.compile)
    optim = OptimConfig(name="bench", lr=LR, warmup_steps=0, batch_sequences=shape["batch"])
    optimizer = make_optimizer(model, optim)
    tokens = shape["batch"] * shape["sequence"]

    def step(rows: Tensor) -> float:
        optimizer.zero_grad()
        loss = forward_backward(model, rows, shape["batch"], 1 / tokens).item() / tokens
        norm = global_grad_norm(model.parameters())
        clipped_step(optimizer, CLIP, norm)
        return loss

    return step


def cpu_s() -> tuple[float, float]:
    """Processor seconds used so far: of this process, of the whole machine."""
    own = time.process_time()
    with open("/proc/stat") as file:
        fields = [int(f) for f in file.readline().split()[1:9]]
    return own, (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def without_products() -> None:
    """Products, also of compiled code, write a constant instead. Of the fused attention, which all but our compiled code calls,
    a pass over what it reads and keeps is left, without the softmax that our compiled code still computes."""
    from torch._inductor.select_algorithm import extern_kernels

    def fill(a: Tensor, b: Tensor, out: Tensor | None = None, **_: Any) -> Tensor:
        out = a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out
        return out.fill_(0.001)

    extern_kernels.mm = extern_kernels.bmm = fill
    torch.mm = Tensor.__matmul__ = fill  # type: ignore[assignment,method-assign]

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = (q + k + v) * 0.001
            ctx.save_for_backward(q, k, v, out)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            q, k, v, out = ctx.saved_tensors
            shared = grads[0] * 0.001 + out * 0.001
            return shared + k, shared + q, shared + v

    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: Attention.apply(q, k, v)


def breakdown(step: Callable[[], float]) -> str:
    """Where one step's processor time goes, by kernel; compiled ones are named for what they fuse."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    kernels = sorted(profile.key_averages(), key=lambda k: -k.self_cpu_time_total)
    whole = sum(k.self_cpu_time_total for k in kernels)
    shown = [f"{k.self_cpu_time_total / whole:7.1%} {k.count:>5} x {k.key[:90]}" for k in kernels[:24]]
    return "\n".join(shown)


def main(name: str, shape_name: str, tuned: bool, steps: int, bf16: bool, products: bool) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    torch.manual_seed(1)
    if not products:
        without_products()
    shape = SHAPES[shape_name]
    if steps == 0:
        from torch._inductor import config as inductor

        inductor.cpp.enable_kernel_profile = True
    step = arriero(shape, tuned, bf16) if name == "arriero" else peer(name, shape, tuned, bf16)
    # Zipf's law, as words have it: there is something to learn, and every contender sees the same rows.
    probabilities = 1.0 / torch.arange(1, shape["vocab_size"] + 1)
    generator = torch.Generator().manual_seed(2)

    def rows() -> Tensor:
        count = shape["batch"] * (shape["sequence"] + 1)
        return torch.multinomial(probabilities, count, replacement=True, generator=generator).view(shape["batch"], -1)

    began, losses = time.perf_counter(), []
    for _ in range(WARM_STEPS):
        losses.append(step(rows()))
    warm_s = time.perf_counter() - began
    if steps == 0:
        print(breakdown(lambda: step(rows())))
        return
    measured = []
    for _ in range(steps):
        batch = rows()
        (own, all_), started = cpu_s(), time.perf_counter()
        losses.append(step(batch))
        step_s, (own_after, all_after) = time.perf_counter() - started, cpu_s()
        others = max(0.0, (all_after - all_) - (own_after - own)) / (step_s * (os.cpu_count() or 1))
        measured.append((step_s, others, own_after - own))
    print(
        json.dumps(
            {
                "contender": name,
                "shape": shape_name,
                "tuned": tuned,
                "precision": ("bf16" if bf16 else "fp32") + ("" if products else " without products"),
                "tokens": shape["batch"] * shape["sequence"],
                "step_s": [s for s, _, _ in measured],
                "others": [o for _, o, _ in measured],
                "cpu_s": [c for _, _, c in measured],
                "warm_s": warm_s,
                "losses": losses,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    contender, shape_name, kind, count, precision, *products = sys.argv[1:]
    if precision not in ("bf16", "fp32"):
        sys.exit(f"precision {precision} is neither bf16 nor fp32")
    main(contender, shape_name, kind == "tuned", int(count), precision == "bf16", products != ["without_products"])
