"""From hidden states to log-probabilities without holding the logits.

A vocabulary of 50,000 makes the logits of a batch larger than everything else in the model. Here they exist
only for a few rows at a time. The gradient needs no second pass: log q_i depends on the hidden state h_i
alone, so the row d log q_i / d h_i, of the size of h_i, is kept in the forward pass and scaled in the
backward one. The same holds for the KL between two laws at a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiltlm.lm.packing import multiply
from tiltlm.protocols import Law

CHUNK_BYTES = 32 * 2**20
"""What the logits of one product may take, in single precision."""
CACHED_BYTES = 2 * 2**20
"""Logits that a CPU's cache holds: what is done to them entry by entry is done to so many at a time."""


@dataclass(frozen=True)
class Head:
    """The map from features to logits.

    Attributes:
        weight: the unembedding (V, D); None where the features are the logits already.
        bias: added to the logits.
        scale: multiplies the logits (Cohere, Granite).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
        packed: the weight once more, laid out for products with few rows (`packing.py`); not for gradients.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    packed: Tensor | None = None

    @property
    def is_linear(self) -> bool:
        return self.weight is not None and self.softcap is None

    def logits(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits in at least single precision."""
        return self.finish(self.product(features))

    def product(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """The linear part of the logits, in the features' own precision."""
        if self.weight is None:
            return features if self.bias is None else features + self.bias
        if self.packed is not None and self.bias is None:
            return multiply(features, self.packed, None)
        return torch.nn.functional.linear(features, self.weight, self.bias)

    def finish(self, product: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Logits from their linear part, in at least single precision."""
        logits = at_least_float32(product)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def vocabulary(self, features: Tensor) -> int:
        return features.shape[-1] if self.weight is None else self.weight.shape[0]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes single; double stays double."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def apply_law(logits: Float[Tensor, "N V"], law: Law) -> Float[Tensor, "N V"]:
    """The logits of the law that is sampled: temperature, then top-k (ties at the k-th stay in)."""
    if law.temperature != 1.0:
        logits = logits / law.temperature
    if law.top_k is not None and law.top_k < logits.shape[-1]:
        least = logits.topk(law.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def chunks(features: Tensor, head: Head) -> Iterator[slice]:
    """Rows whose logits may exist at a time."""
    rows = max(1, CHUNK_BYTES // (4 * head.vocabulary(features)))
    for start in range(0, len(features), rows):
        yield slice(start, min(start + rows, len(features)))


def cached(product: Float[Tensor, "N V"]) -> Iterator[slice]:
    """Rows of a product that a cache holds in single precision; on an accelerator all of them."""
    rows = max(1, CACHED_BYTES // (4 * product.shape[-1])) if product.device.type == "cpu" else len(product)
    for start in range(0, len(product), max(1, rows)):
        yield slice(start, min(start + rows, len(product)))


class _ChunkedLogProb(torch.autograd.Function):
    """log softmax(W h)[target], a few rows at a time, with d log q_i / d h_i kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, law: Law
    ) -> Tensor:
        head = Head(weight, bias, scale)
        log_q = at_least_float32(features.new_empty(len(features)))
        jacobian = torch.empty_like(features) if ctx.needs_input_grad[0] else None
        for rows in chunks(features, head):
            log_q[rows], error = _look_up(head, features[rows], targets[rows], law, jacobian is not None)
            if jacobian is not None:
                jacobian[rows] = (error @ weight).mul_(-scale / law.temperature)
        ctx.save_for_backward(features, weight, bias, targets, jacobian)
        ctx.scale, ctx.law = scale, law
        return log_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        features, weight, bias, targets, jacobian = ctx.saved_tensors
        to_features = to_weight = to_bias = None
        if jacobian is not None:
            to_features = grad[:, None].to(jacobian.dtype) * jacobian
        if ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[2]):
            head = Head(weight, bias, ctx.scale)
            to_weight = torch.zeros_like(weight)
            to_bias = torch.zeros_like(bias) if bias is not None else None
            for rows in chunks(features, head):
                _, error = _look_up(head, features[rows], targets[rows], ctx.law, True)
                error *= (grad[rows, None] * (-ctx.scale / ctx.law.temperature)).to(error.dtype)
                to_weight += error.T @ features[rows]
                if to_bias is not None:
                    to_bias += error.sum(0)
        return to_features, to_weight, to_bias, None, None, None


def _look_up(
    head: Head, features: Float[Tensor, "N D"], targets: Int[Tensor, " N"], law: Law, errors: bool
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """log-probabilities of the targets, and softmax - one-hot, which is -d log q[target] / d logits; it replaces the product."""
    product, found = head.product(features), []
    for rows in cached(product):
        log_p = apply_law(head.finish(product[rows]), law).log_softmax(-1)
        found.append(log_p.gather(-1, targets[rows, None]).squeeze(-1))
        if errors:
            p = log_p.exp_()
            p[torch.arange(len(p), device=p.device), targets[rows]] -= 1
            product[rows] = p
    return torch.cat(found), product


def token_log_prob(
    features: Float[Tensor, "N D"], head: Head, targets: Int[Tensor, " N"], law: Law
) -> Float[Tensor, " N"]:
    """log-probability of `targets` under the law at each row, differentiable in features and head."""
    if head.is_linear:
        assert head.weight is not None
        return _ChunkedLogProb.apply(features, head.weight, head.bias, targets, head.scale, law)  # pyright: ignore
    parts = [
        apply_law(head.logits(features[rows]), law).log_softmax(-1).gather(-1, targets[rows, None]).squeeze(-1)
        for rows in chunks(features, head)
    ]
    return torch.cat(parts) if parts else features.new_zeros(0)


def _kl_rows(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum_v q (log q - log p), where q = 0 counts for nothing even if log q - log p is inf - inf."""
    q = log_q.exp()
    difference = torch.where(q > 0, log_q - log_p, 0.0)  # before it is multiplied: the gradient of 0 * nan is nan
    return (q * difference).sum(-1)


class _ChunkedKL(torch.autograd.Function):
    """KL(q || p) at each row with respect to q's features; d KL_i / d h_i is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, head: Head, prior_features: Tensor, prior_head: Head, law: Law) -> Tensor:
        assert head.weight is not None
        kl = at_least_float32(features.new_empty(len(features)))
        jacobian = torch.empty_like(features) if ctx.needs_input_grad[0] else None
        for rows in chunks(features, head):
            log_q = apply_law(head.logits(features[rows]), law).log_softmax(-1)
            log_p = apply_law(prior_head.logits(prior_features[rows]), law).log_softmax(-1)
            kl[rows] = _kl_rows(log_q, log_p)
            if jacobian is not None:
                q = log_q.exp()
                slope = torch.where(q > 0, q * (log_q - log_p - kl[rows, None]), 0.0)
                slope *= head.scale / law.temperature
                jacobian[rows] = slope.to(head.weight.dtype) @ head.weight
        ctx.save_for_backward(jacobian)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (jacobian,) = ctx.saved_tensors
        return grad[:, None].to(jacobian.dtype) * jacobian, None, None, None, None


def token_kl(
    features: Float[Tensor, "N D"],
    head: Head,
    prior_features: Float[Tensor, "N D"],
    prior_head: Head,
    law: Law,
) -> Float[Tensor, " N"]:
    """Exact KL(q || p) over the vocabulary at each row; differentiable in q's features and head."""
    trains_head = head.weight is not None and head.weight.requires_grad and torch.is_grad_enabled()
    if head.is_linear and not trains_head:
        return _ChunkedKL.apply(features, head, prior_features, prior_head, law)  # pyright: ignore
    parts = []
    for rows in chunks(features, head):
        log_q = apply_law(head.logits(features[rows]), law).log_softmax(-1)
        with torch.no_grad():
            log_p = apply_law(prior_head.logits(prior_features[rows]), law).log_softmax(-1)
        parts.append(_kl_rows(log_q, log_p))
    return torch.cat(parts) if parts else features.new_zeros(0)
