"""Small networks on the language model's hidden states: what a critic or a baseline learns beside it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiltlm.lm.head import at_least_float32

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


class CriticHead(nn.Module):
    """State value and tilt of a critic, Q(s, a) = V(s) + <g(s), e(a)>, from the features that predict the next token.

    The hidden state stands for the state, and e(a), the row of the unembedding, for the action: so g(s) lives where the features
    do, and the tilt of a whole vocabulary is one product with the unembedding. Both start at zero. Unlike a policy's values,
    a critic's own adapter learns from them, so the gradient goes on into the features.

    Args:
        features: D, their dimension.
        unit: nats by which a token's logit moves, at most, if every entry of the features moves by one; g is divided by it, so
            that a learning rate means the same for any model.
    """

    unit: Tensor

    def __init__(self, features: int, unit: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = nn.Linear(features, WIDTH)
            self.value = nn.Linear(WIDTH, 1)
            self.tilt = nn.Linear(WIDTH, features)
        for layer in (self.value, self.tilt):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("unit", torch.tensor(unit))

    def forward(self, features: Float[Tensor, "N D"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N D"]]:
        """V(s) and g(s)."""
        inner = nn.functional.silu(self.inner(unit_square(features).to(self.inner.weight.dtype)))
        return self.value(inner).squeeze(-1), self.tilt(inner) / self.unit


def standardised(features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """Features without gradient, of unit mean square, in single precision; a logit of -inf counts as a very small one."""
    return unit_square(features.detach()).float()


def unit_square(features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """Features of unit mean square, in at least single precision; a logit of -inf counts as a very small one."""
    features = at_least_float32(features).clamp(min=-1e4, max=1e4)
    return features * features.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
