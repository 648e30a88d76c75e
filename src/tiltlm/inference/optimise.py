"""The optimiser: AdamW on single-precision masters, whatever the precision of the model.

A bfloat16 weight has 8 bits of mantissa, and most steps are smaller than its last bit. Masters keep what
rounding would lose; gradients of micro-batches are added up there too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiltlm.inference.shards import is_shared

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
        alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            alike.setdefault(((rates or {}).get(name, lr), is_shared(master)), []).append(master)
        groups: list[dict[str, Any]] = [
            {"params": some, "rate": rate, "fused": not shared} for (rate, shared), some in alike.items()
        ]
        self.adam = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)

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
        together: dict[float, list[list[nn.Parameter]]] = {}
        for group in self.adam.param_groups:
            together.setdefault(group["rate"], []).append(group["params"])
        norm = torch.stack([_clipped(kinds, clip).cpu() for kinds in together.values()]).norm()
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

    def shared(self) -> dict[str, Tensor]:
        """Those of `tensors` of which each process has a share, or in their place others of the same shape and division."""
        shares = {name: master.detach() for name, master in self.masters.items() if is_shared(master)}
        kinds = ("weight", "adam.exp_avg", "adam.exp_avg_sq")
        return {f"{kind}.{name}": share for kind in kinds for name, share in shares.items()}

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


def _clipped(kinds: Sequence[Sequence[nn.Parameter]], clip: float) -> Tensor:
    """Clip the norm of all these weights' gradients together; returns what it was. Shared ones and whole ones are two kinds."""
    if len(kinds) == 1:
        return _whole(torch.nn.utils.clip_grad_norm_(kinds[0], clip))
    grads = [[weight.grad for weight in kind if weight.grad is not None] for kind in kinds]
    norm = torch.stack([_whole(torch.nn.utils.get_total_norm(some)).cpu() for some in grads]).norm()
    for grad in (grad for some in grads for grad in some):
        grad.mul_(min(1.0, clip / (float(norm) + 1e-6)))
    return norm


def _whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a share (a DTensor), as one."""
    return tensor.full_tensor() if is_shared(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]
