"""A Q-function on a language model, which is a sampler at the same time.

Q(s, a) = V(s) + <g(s), e(a)>: the state is the hidden state that predicts the next token, the action is the token's row of the
unembedding, and V and g are learned. The prior tilted by Q, pi0(a|s) exp Q(s, a) normalised, is then the model itself with g(s)
added to its features, so everything that draws from a model and scores it works unchanged and is exact. With an adapter of
its own, the critic's hidden states are h and the prior's h0, and g(s) is their difference plus what the head adds:

    Q(s, a) = V(s) + <h(s) + g(s) - h0(s), e(a)>     (times the model's logit scale, over the law's temperature)

It still draws with one pass of the model. Where logits are no linear function of the features (a softcap), the product is
replaced by the difference of the logits; where they are the features, e(a) is the a-th unit vector.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiltlm.errors import InputError, TiltWarning
from tiltlm.lm.adapters import LoRA
from tiltlm.lm.head import Head, apply_law, at_least_float32, chunks, token_log_prob
from tiltlm.lm.heads import CriticHead
from tiltlm.lm.score import completion_features, scatter
from tiltlm.lm.twist import CriticTwist
from tiltlm.lm.view import ModelPolicy, ModelPrior
from tiltlm.records import Draws, Forward, Prompts

OF_TARGET = frozenset({"q_target", "soft_target", "max_target", "double_target"})
PROVIDED = OF_TARGET | {"log_q", "q", "values"}


@dataclass(frozen=True)
class Look:
    """What one network says of N states.

    Attributes:
        value: V(s).
        direction: what the tilt of a token is the product of with e(a).
        features: those of the tilted law.
        prior: those of the prior.
    """

    value: Float[Tensor, " N"]
    direction: Float[Tensor, "N D"]
    features: Float[Tensor, "N D"]
    prior: Float[Tensor, "N D"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelCritic(ModelPolicy):
    """A critic; as a sampler it is pi_Q(a|s) = pi0(a|s) exp Q(s, a), normalised.

    The target network is a copy that moves only when `refresh_target` is called. All values are in nats.

    Attributes:
        head: V and g.
        target_head: their copy.
        target_adapter: the adapter's copy; None where the critic learns on the prior's own features.
    """

    head: CriticHead
    target_head: CriticHead
    target_adapter: str | None

    def forward(self, draws: Draws, needs: frozenset[str]) -> Forward:
        """The fields of `Forward` named in `needs`, and log pi_Q, which has a gradient only if it is named."""
        if unknown := needs - PROVIDED:
            raise InputError(f"needs names {sorted(unknown)}; a critic provides {', '.join(sorted(PROVIDED))}")
        with torch.no_grad():
            prior, mask = self._raw(draws, self.prior.adapter)
        tokens = draws.tokens[:, : mask.shape[1]][mask].to(prior.device)
        look = self.look(self._raw(draws, self.adapter)[0] if self.has_adapter else prior, prior, self.head)
        found: dict[str, Tensor] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(needs & {"log_q", "values"})):
            found["log_q"] = token_log_prob(look.features, self._head, tokens, self.law)
        if needs & {"q", "values"}:
            found["q"] = self.q_of(look, tokens)
        if "values" in needs:  # for every token, Q(s, a) - log pi_Q / pi0 is the same: the soft value
            with torch.no_grad():
                log_prior = token_log_prob(prior, self._head, tokens, self.law)
            found["values"] = found["q"] - (found["log_q"] - log_prior)
        if needs & OF_TARGET:
            found |= self._of_target(draws, prior, tokens, look, needs)
        width = draws.tokens.shape[1]
        return Forward(**{name: scatter(found[name], mask, width) for name in sorted(needs | {"log_q"})})

    def look(self, raw: Float[Tensor, "N D"], prior: Float[Tensor, "N D"], head: CriticHead) -> Look:
        """What a head says of states with these features; `prior` may be `raw` itself."""
        value, tilt = head(raw)
        direction = tilt
        if raw is not prior:
            moved = at_least_float32(raw) - at_least_float32(prior)
            direction = tilt + torch.where(prior.isfinite(), moved, 0.0)
        return Look(value, direction, raw + tilt.to(raw.dtype), prior)

    def q_of(self, look: Look, tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Q(s, a) of one token in each state, without a pass over the vocabulary."""
        head = self._head
        if head.softcap is None:
            tilt = _token_logits(replace(head, bias=None), look.direction, tokens)
        else:
            tilt = _token_logits(head, look.features, tokens) - _token_logits(head, look.prior, tokens)
        return look.value + tilt / self.law.temperature

    def soft_value(self, look: Look) -> Float[Tensor, " N"]:
        """log sum_a pi0(a|s) exp Q(s, a), without gradient."""
        return self._backups(look, look)["soft_target"]

    def twist_walk(self, prompts: Prompts, n: int) -> CriticTwist:
        """log psi of `n` rows of every prompt: Q of the last token, and the soft value before the first."""
        return CriticTwist(self, prompts, n)

    def refresh_target(self, rate: float) -> None:
        """Move the target network towards the critic by `rate` of the way; 1 makes it a copy (Lillicrap et al. 2016)."""
        online = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in self.named_buffers().items():
                value.lerp_(online[name.removeprefix("target:")].to(value.dtype), rate)

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """The adapter's weights, and those of the head under `head:`."""
        adapter = self.body.adapters.parameters(self.adapter) if self.has_adapter and self.adapter else {}
        return {**adapter, **{f"head:{name}": value for name, value in self.head.named_parameters()}}

    def named_buffers(self) -> Mapping[str, Tensor]:
        """The target network, each tensor by the name of what it copies."""
        adapter = self.body.adapters.parameters(self.target_adapter) if self.target_adapter is not None else {}
        copies = {**adapter, **{f"head:{name}": value for name, value in self.target_head.named_parameters()}}
        return {f"target:{name}": value.detach() for name, value in copies.items()}

    def save(self, folder: str | Path) -> None:
        """Write what `prior.critic(start=folder)` reads; the adapter in a folder of its own, as it is no policy by itself."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, folder / WEIGHTS)
        about = {"model": self.body.name, "fingerprint": self.fingerprint(), "adapter": self.has_adapter}
        (folder / ABOUT).write_text(json.dumps(about, indent=1))
        if self.target_adapter is not None and self.adapter is not None:
            self.body.adapters.save(self.adapter, folder / ADAPTER)

    def discard(self) -> None:
        """Free the memory of the adapter and its copy; the critic cannot be used afterwards."""
        if self.target_adapter is not None:
            self.body.adapters.remove(self.target_adapter)
            super().discard()

    @property
    def has_adapter(self) -> bool:
        """Whether its features are its own, and not the prior's."""
        return self.target_adapter is not None

    @property
    def _head(self) -> Head:
        return self.body.backbone.head

    def _raw(self, draws: Draws, adapter: str | None) -> tuple[Tensor, Tensor]:
        """Features without g, of the model with this adapter on, and the mask of their tokens."""
        with self.body.adapters.on(adapter):
            return completion_features(self.prior.body.backbone, draws)

    @torch.no_grad()
    def _of_target(
        self, draws: Draws, prior: Tensor, tokens: Tensor, online: Look, needs: frozenset[str]
    ) -> dict[str, Tensor]:
        """What the target network says."""
        raw = self._raw(draws, self.target_adapter)[0] if self.has_adapter else prior
        look = self.look(raw, prior, self.target_head)
        found = {"q_target": self.q_of(look, tokens)}
        if needs & (OF_TARGET - {"q_target"}):
            found |= self._backups(look, online if "double_target" in needs else look)
        return found

    @torch.no_grad()
    def _backups(self, look: Look, chooser: Look) -> dict[str, Tensor]:
        """Soft and hard maximum over the vocabulary, and the value of the token that `chooser` finds best; a few rows at a time."""
        parts: list[tuple[Tensor, ...]] = []
        for rows in chunks(look.prior, self._head):
            log_prior = apply_law(self._head.logits(look.prior[rows]), self.law).log_softmax(-1)
            possible = log_prior > -torch.inf
            tilt = self._tilts(look, rows)
            best = tilt if chooser is look else self._tilts(chooser, rows)
            choice = torch.where(possible, best, -torch.inf).argmax(-1, keepdim=True)
            soft = (log_prior + tilt).logsumexp(-1)
            hard = torch.where(possible, tilt, -torch.inf).amax(-1)
            parts.append((soft, hard, tilt.gather(-1, choice).squeeze(-1)))
        names = ("soft_target", "max_target", "double_target")
        return {name: look.value + torch.cat(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}

    def _tilts(self, look: Look, rows: slice) -> Float[Tensor, "N V"]:
        """Q(s, a) - V(s) of every token."""
        head = self._head
        if head.softcap is None:
            direction = look.direction[rows]
            if head.weight is not None:
                direction = direction.to(head.weight.dtype)
            return replace(head, bias=None).logits(direction) / self.law.temperature
        moved = head.logits(look.features[rows]) - head.logits(look.prior[rows])
        return moved / self.law.temperature


def _token_logits(head: Head, features: Float[Tensor, "N D"], tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The logit of one token in each row, in at least single precision."""
    features = at_least_float32(features)
    if head.weight is None:
        logits = features.gather(-1, tokens[:, None]).squeeze(-1)
    else:
        logits = (features * head.weight[tokens].to(features.dtype)).sum(-1)
        if head.bias is not None:
            logits = logits + head.bias[tokens]
    logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


WEIGHTS, ABOUT, ADAPTER = "critic.safetensors", "critic.json", "adapter"


def new_critic(prior: ModelPrior, lora: LoRA | None, start: str | Path | None, seed: int) -> ModelCritic:
    """A critic of `prior`, new or as it was saved in `start`; its law starts at the prior.

    Raises:
        InputError: for a law with top_k, and for a folder that holds no critic of such a model.
    """
    if prior.law.top_k is not None:
        raise InputError(
            f"top_k is {prior.law.top_k}: the top tokens of the tilted law are not the prior's; train a critic without top_k"
        )
    switch, backbone = prior.body.adapters, prior.body.backbone
    head = CriticHead(backbone.width, _unit(prior), seed)
    if start is not None and _load(prior, Path(start), head):
        adapter = switch.load(Path(start) / ADAPTER)
    elif start is not None or lora is None:
        adapter = None
    elif prior.adapter is not None:
        adapter = switch.copy(prior.adapter)
    else:
        adapter = switch.new(lora, prior.body.name, seed)
    if adapter is not None:
        switch.train(adapter)
    if backbone.width != head.inner.in_features:
        raise InputError(
            "the critic's adapter is on the output layer, whose features are logits; leave it out of targets, and load the model anew"
        )
    head = head.to(prior.body.model.device)
    return ModelCritic(
        **replace(prior, generator=None)._parts(  # whose models have no tilt
            replace(prior.body, backbone=backbone.tilted(lambda raw: head(raw)[1])), adapter or prior.adapter
        ),
        prior=prior,
        head=head,
        target_head=copy.deepcopy(head).requires_grad_(False),
        target_adapter=None if adapter is None else switch.copy(adapter),
    )


def _unit(prior: ModelPrior) -> float:
    """Nats by which a token's logit moves, at most, if every entry of the features moves by one; the mean over tokens."""
    head = prior.body.backbone.head
    total, count = 1.0, 1
    if head.weight is not None:
        total, count = 0.0, len(head.weight)
        for rows in _slices(count):
            total += float(head.weight[rows].detach().float().abs().sum())
    return total / count * abs(head.scale) / prior.law.temperature


def _slices(count: int, size: int = 4096) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def _load(prior: ModelPrior, folder: Path, head: CriticHead) -> bool:
    """Fill `head` from a folder; returns whether there is an adapter as well."""
    if not (folder / WEIGHTS).is_file() or not (folder / ABOUT).is_file():
        raise InputError(
            f"start is {str(folder)!r}, which holds no critic ({WEIGHTS}); give a folder that a critic was saved to"
        )
    about = json.loads((folder / ABOUT).read_text())
    try:
        head.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise InputError(
            f"the critic in {str(folder)!r} is of a model with other features; load it on {about['model']!r}"
        ) from error
    if about["fingerprint"] != prior.fingerprint():
        warnings.warn(
            f"the critic in {str(folder)!r} was trained on {about['model']!r} with other weights or in another precision; its "
            f"values may be off, so judge it with certify",
            TiltWarning,
            stacklevel=4,
        )
    return bool(about["adapter"])
