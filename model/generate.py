"""A sample of text from the model, to see what it has learned."""

import torch

from model.pipeline import Pipeline
from model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer | Pipeline,
    prompt: list[int],
    new_tokens: int,
    device: torch.device,
    temperature: float = 0.8,
    seed: int = 1,
) -> list[int]:
    """`prompt` continued by `new_tokens` sampled tokens; the last `sequence_length` tokens are looked at.

    Collective where the model is sharded: every rank calls it, and all draw the same tokens.
    """
    tokens = list(prompt)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(new_tokens):
        context = tokens[-model.config.sequence_length :]
        padding = [0] * (-len(context) % model.row_multiple)  # no token sees what comes after it
        logits = model(torch.tensor([context + padding], device=device))[0, len(context) - 1].float().cpu()
        tokens.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
    return tokens
