"""A policy's weights divided between processes, with torch's `fully_shard` (FSDP2).

A model is in one of two states. *Gathered*, each process holds all weights and runs it as always: any number of passes, and not a
word to the others. So one draws, scores and certifies, and processes whose completions differ in length cannot wait for each
other in vain. *Spread*, each holds its share, with its share of the gradients and of the optimiser's state; the weights of a layer
come together while it runs, forward and backward, and its gradients are added up. So one trains, and all processes have to
make the same passes.

What it costs, in bytes for P weights of b bytes in N processes, of which T are trained: gathered b P (1 + 1 / N), and the caches of
what is drawn; spread b P / N, the embeddings and one layer. The optimiser's masters, moments and gradients are 16 T / N throughout.
Without FSDP2 it is b P + 16 T. When all weights are trained the prior is a second model, and is divided as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from tiltlm.errors import InputError
from tiltlm.lm.critic import ModelCritic
from tiltlm.lm.kinds import reads_images
from tiltlm.lm.view import Body, ModelPolicy

T = TypeVar("T")


class _Root(nn.Module):
    """What `fully_shard` takes for the model: one pass of it is whatever `work` does with the model.

    So embeddings and unembedding are there for as long as `work` needs them, and it may run the body as often as it likes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


class Sharding:
    """A policy and its prior, divided between `processes`; gathered at first.

    Attributes:
        parameters: the trained weights as they are spread, by the policy's names; those outside the model are whole.

    Raises:
        InputError: for a model, or a policy, that cannot be divided.
    """

    def __init__(self, policy: Any, processes: int) -> None:
        _require_divisible(policy)
        mesh = init_device_mesh(policy.body.model.device.type, (processes,))
        self._own = _divide(policy.body, mesh)
        self._prior = self._own if policy.prior.body.model is policy.body.model else _divide(policy.prior.body, mesh)
        self._roots = [self._own] if self._prior is self._own else [self._own, self._prior]
        self.spread()
        self.parameters: Mapping[str, nn.Parameter] = dict(policy.named_parameters())
        if policy.adapter is not None:  # those that are to receive gradients are other tensors now
            policy.body.adapters.train(policy.adapter)
        self.gather()

    def gather(self) -> None:
        """Let every process hold all weights."""
        for root in self._roots:
            for module in _divided(root):
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()

    def spread(self) -> None:
        """Let every process hold its share only."""
        for root in self._roots:
            for module in _divided(root):
                # backward begins with the unembedding, which is the root's; a prior has no backward
                module.set_reshard_after_forward(module is not self._own, recurse=False)
                module.reshard()

    @contextmanager
    def spreading(self) -> Iterator[None]:
        """Spread inside, gathered again behind it; after an error it stays as it is, because the others may not come along."""
        self.spread()
        yield
        self.gather()

    def run(self, work: Callable[[], T], needs: frozenset[str]) -> T:
        """One pass while spread; the tensors of its result, a `Forward`, lead back through it.

        Args:
            needs: what the pass is for; with "kl" among them the prior is run as well.
        """
        found: list[Any] = []

        def own() -> Any:
            if "kl" in needs and self._prior is not self._own:
                self._prior(lambda: found.append(work()))
            else:
                found.append(work())
            return found[0].leaves()  # where torch hooks the backward pass in

        self._own(own)
        return found[0]


def _divided(root: _Root) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _divide(body: Body, mesh: DeviceMesh) -> Any:
    """Each layer is gathered by itself; the rest, embeddings and unembedding, together."""
    model: Any = body.model
    whole = torch.float32 if model.dtype in (torch.bfloat16, torch.float16) else None
    how: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=whole, cast_forward_inputs=False),
    }
    for layer in _layers(model):
        fully_shard(layer, **how)
    root: Any = fully_shard(_Root(model), **how)
    for module in _divided(root):  # the loss is of the whole batch, so gradients are summed and not averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    root(lambda: None)  # the first pass tells torch which module is the root
    return root


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers would not split between devices."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _require_divisible(policy: Any) -> None:
    remedy = "leave shard out: the processes then share the work, and each has all weights"
    if not isinstance(policy, ModelPolicy) or isinstance(policy, ModelCritic):
        raise InputError(f"shard is on, but a {type(policy).__name__}'s weights cannot be divided; {remedy}")
    body = policy.body
    if body.backbone.has_encoder or reads_images(body.model):
        raise InputError(
            f"shard is on, but {body.name} is not a decoder of text alone, and its weights cannot be divided; {remedy}"
        )
    if any(isinstance(module, FSDPModule) for module in body.model.modules()):
        raise InputError(f"shard is on, but {body.name} has been divided by an earlier run; load it anew for this one")


__all__ = ["Sharding"]
