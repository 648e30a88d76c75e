"""The optimiser: AdamW on single-precision masters, whatever the precision of the model.

A bfloat16 weight has 8 bits of mantissa, and most steps are smaller than its last bit. Masters keep what
rounding would lose; gradients of micro-batches are added up there too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(step: float, steps: int, warmup: int, schedule: Schedule) -> float:
    """Factor of the learning rate at `step` (from 0): a linear warm-up, then constant or falling to 0 after the last."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1.0 - left
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * left))
    return 1.0


class Optimiser:
    """AdamW with masters; its whole state goes into named tensors and back.

    Args:
        parameters: trainable weights by name.
        rates: the learning rate of those that have one of their own.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        lr: float,
        weight_decay: float,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.masters = {
            name: value if value.dtype in (torch.float32, torch.float64) else nn.Parameter(value.detach().float())
            for name, value in self.parameters.items()
        }
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            by_rate.setdefault((rates or {}).get(name, lr), []).append(master)
        groups: list[dict[str, Any]] = [{"params": some, "rate": rate} for rate, some in by_rate.items()]
        self.adam = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)

    def gather(self) -> None:
        """Add the weights' gradients to their masters' and clear them."""
        for name, master in self.masters.items():
            value = self.parameters[name]
            if value is not master and value.grad is not None:
                grad = value.grad.float()
                master.grad = grad if master.grad is None else master.grad + grad
                value.grad = None

    def forget(self) -> None:
        """Clear all gradients, those of the weights and those that were gathered."""
        for name, master in self.masters.items():
            self.parameters[name].grad = master.grad = None

    def step(self, clip: float, factor: float) -> float:
        """One update; returns the gradient's norm before clipping.

        Weights with a learning rate of their own are clipped on their own: a value head's large error must not shrink the
        policy's step.
        """
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], clip) for group in self.adam.param_groups]
        norm = torch.stack([n.cpu() for n in norms]).norm()
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * factor
        if torch.isfinite(norm):  # one bad batch must not destroy the weights
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, master in self.masters.items():
                if self.parameters[name] is not master:
                    self.parameters[name].copy_(master)
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """Masters and Adam's moments by name."""
        out = {f"weight.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                out[f"adam.{key}.{name}"] = value
        return out

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"weight.{name}"])
                if self.parameters[name] is not master:
                    self.parameters[name].copy_(master)
                state = {
                    key: tensors[f"adam.{key}.{name}"].clone()
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"adam.{key}.{name}" in tensors
                }
                if state:
                    moved = {k: v if k == "step" else v.to(master.device) for k, v in state.items()}
                    self.adam.state[master] = moved
