"""The law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., arXiv 2203.15556, section 3.3), and what follows from it.

N parameters, D training tokens, L loss in nats per token. Training costs 6 N D FLOPs, inference 2 N per token.
"""

import math
from dataclasses import dataclass

import numpy as np

from orchestrator.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Law:
    E: float  # nats per token: what no model and no data would go below
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return float(self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta)

    @property
    def size_exponent(self) -> float:
        """a of N* ~ C^a; tokens go with 1 - a."""
        return self.beta / (self.alpha + self.beta)


# arXiv 2203.15556, equation 10; Besiroglu et al., arXiv 2404.10102, table 1.
PUBLISHED = {
    "hoffmann": Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "besiroglu": Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
}


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A size and the tokens to train it on."""

    parameters: float
    tokens: float
    loss: float  # nats per token
    inference_tokens: float = 0.0

    @property
    def training_flops(self) -> float:
        return 6 * self.parameters * self.tokens

    @property
    def inference_flops(self) -> float:
        return 2 * self.parameters * self.inference_tokens

    @property
    def flops(self) -> float:
        return self.training_flops + self.inference_flops


def best_for_training(law: Law, flops: float) -> Allocation:
    """The lowest loss that `flops` of training reach (arXiv 2203.15556, equation 4)."""
    share = law.size_exponent
    g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    parameters = g * (flops / 6) ** share
    tokens = flops / 6 / parameters
    return Allocation(parameters=parameters, tokens=tokens, loss=law.loss(parameters, tokens))


def cheapest_at_loss(law: Law, loss: float, inference_tokens: float = 0.0) -> Allocation:
    """The size and tokens that reach `loss` for the fewest FLOPs of training plus `inference_tokens` of inference.

    LLaMA's argument (arXiv 2302.13971, section 1): a smaller model trained for longer is cheaper to serve. Raises UserError
    for a loss that the law says no model reaches.
    """
    if loss <= law.E:
        raise UserError(
            f"--loss {loss:g} is not above E = {law.E:.4g} nats per token, which by this law no model reaches: give a higher one"
        )
    smallest = (law.A / (loss - law.E)) ** (1 / law.alpha)  # with endless tokens

    def tokens(u: np.ndarray) -> np.ndarray:
        """For a model e^u times the smallest: A / N^alpha takes its share of the loss above E, B / D^beta the rest."""
        with np.errstate(over="ignore"):
            return np.asarray((law.B / ((loss - law.E) * -np.expm1(-law.alpha * u))) ** (1 / law.beta))

    def flops(u: np.ndarray) -> np.ndarray:
        return np.asarray(smallest * np.exp(u) * (6 * tokens(u) + 2 * inference_tokens))

    # One minimum in log N; a grid finds it and three finer ones sharpen it.
    low, high = 1e-6, 40.0 / law.alpha
    for _ in range(4):
        u = np.linspace(low, high, 2001)
        at = int(np.argmin(flops(u)))
        low, high = u[max(0, at - 1)], u[min(len(u) - 1, at + 1)]
    best = np.array([u[at]])
    return Allocation(
        parameters=float(smallest * math.exp(best[0])),
        tokens=float(tokens(best)[0]),
        loss=loss,
        inference_tokens=inference_tokens,
    )
