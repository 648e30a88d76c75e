"""Small networks on the language model's hidden states: what a critic or a baseline learns beside it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

WIDTH = 128


class ValueHead(nn.Module):
    """V(s) in nats, from the features that predict the next token.

    The features come in without gradient: what the value learns does not move the policy, whose gradient stays the
    engine's alone. They are scaled to unit mean square first, because their size differs by orders of magnitude
    between models; the last layer starts at zero, so that the first values are zero.

    Args:
        features: D, their dimension.
    """

    def __init__(self, features: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = nn.Linear(features, WIDTH)
            self.outer = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        return self.outer(nn.functional.silu(self.inner(standardised(features)))).squeeze(-1)


def standardised(features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """Features without gradient, of unit mean square, in single precision; a logit of -inf counts as a very small one."""
    features = features.detach().float().clamp(min=-1e4, max=1e4)
    return features * features.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
