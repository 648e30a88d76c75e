"""A Llama-like body, run by ourselves: on real tokens alone, with prompts stored once and adapters added into products.

transformers' own forward pass of such a model moves padding through every layer, copies a prompt's cache for each of its
completions and makes a new one at every token, and PEFT's wraps each linear layer in four more operations. For models of
a few classes that differ in nothing that matters here, `LightBody` reads the layers' weights and does the arithmetic itself.
It is used only where it gives the model's own features, which is looked at when the model is loaded; everything else, and
every kind of adapter that is not a plain low-rank one, goes through the model's own forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from tiltlm.lm.attention import Groups, Sight, attend
from tiltlm.lm.operations import Formed, Gated, Given, Normed, Projection, project, rms_norm, rotate
from tiltlm.lm.packing import Packed, Packer, worth_packing
from tiltlm.lm.shared_cache import Layer, SharedCache

Linears = tuple[Projection, ...] | Packed

KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Bodies whose layers are a norm, rotary attention, a norm and a gated network."""
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the text."""


@dataclass(frozen=True)
class LayerPlan:
    """What one layer computes with. Each `Linears` are the layers that read the same input."""

    norm: Tensor
    qkv: Linears
    head_norms: tuple[Tensor, Tensor] | None
    out: Linears
    mlp_norm: Tensor
    gate_up: Linears
    down: Linears

    def weights(self) -> list[Tensor]:
        """The base weights of all linear layers."""
        groups = (self.qkv, self.out, self.gate_up, self.down)
        return [layer.weight for group in groups if not isinstance(group, Packed) for layer in group]

    def packed(self, packer: Packer, number: int) -> LayerPlan:
        """The same, as layer `number`, with weights laid out for small products."""
        names = ("qkv", "out", "gate_up", "down")
        return replace(self, **{name: packer.pack((number, name), getattr(self, name)) for name in names})


class LightBody:
    """The body of a model of a known class.

    Args:
        body: transformers' model without its output layer.
    """

    def __init__(self, body: nn.Module) -> None:
        self._body: Any = body
        config = self._body.config
        self.eps: float = config.rms_norm_eps
        self.width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._packer = Packer()
        self._recompute = False

    @staticmethod
    def of(body: nn.Module | None) -> LightBody | None:
        """The light form of a body; None for one that is not known, or whose features it does not give."""
        if body is None or not _is_known(body):
            return None
        light = LightBody(body)
        return light if light._agrees() else None

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Passes inside keep of each layer what goes in, and run it again for its gradient (Chen et al. 2016)."""
        before, self._recompute = self._recompute, True
        try:
            yield
        finally:
            self._recompute = before

    def open(self, rows: int) -> SharedCache | None:
        """An empty cache for `rows` prompts, with the weights as they are now; None if an adapter is on that is not a plain one."""
        plans = [_layer_plan(layer) for layer in self._body.layers]
        if not all(plans) or not _is_bare(self._body):
            return None
        if not torch.is_grad_enabled() and worth_packing([w for plan in plans if plan for w in plan.weights()]):
            plans = [plan.packed(self._packer, number) for number, plan in enumerate(plans) if plan]
        owner = torch.arange(rows, device=self._body.embed_tokens.weight.device)
        return SharedCache([], Groups(owner, rows), plans)

    def features(
        self, ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B L"], cache: SharedCache
    ) -> Float[Tensor, "B S D"]:
        """Features after each of `ids`, 0 on padding; the cache grows by them. What it reads first are the prompts.

        Args:
            mask: True on real tokens, over the cache and `ids` together.
        """
        block = _Block.of(mask, ids.shape[1], cache.groups, cache.shared, cache.used)
        hidden = self._body.embed_tokens(_at(block.places, ids))
        return block.padded(self._run(hidden, [block], cache)).view(*ids.shape, -1)

    def prompts_and_completions(
        self,
        prompts: Int[Tensor, "P L"],
        of_prompts: Bool[Tensor, "P L"],
        owner: Int[Tensor, " B"],
        ids: Int[Tensor, "B S"],
        mask: Bool[Tensor, "B S"],
    ) -> tuple[Float[Tensor, "P L D"], Float[Tensor, "B S D"]] | None:
        """Features after each token of prompts, padded on the left, and of completions, in one pass; 0 on padding.

        None if an adapter is on that is not a plain one.

        Args:
            of_prompts, mask: True on real tokens.
            owner: the prompt of each completion; every prompt has one.
        """
        cache = self.open(len(prompts))
        if cache is None:
            return None
        seen = torch.cat([of_prompts[owner], mask], dim=-1)
        blocks = [
            _Block.of(of_prompts, prompts.shape[1], cache.groups),
            _Block.of(seen, ids.shape[1], Groups(owner, len(prompts)), prompts.shape[1]),
        ]
        tokens = torch.cat([_at(block.places, x) for block, x in zip(blocks, (prompts, ids), strict=True)])
        found = self._run(self._body.embed_tokens(tokens), blocks, cache).split([block.count for block in blocks])
        of_prompt, after = (
            block.padded(x).view(*block.sight.asks.shape, -1) for block, x in zip(blocks, found, strict=True)
        )
        return of_prompt, after

    def _run(self, hidden: Float[Tensor, "N D"], blocks: Sequence[_Block], cache: SharedCache) -> Float[Tensor, "N D"]:
        """All layers on the embeddings of the blocks' real tokens, one block after the other; each looks at those before it."""
        positions = torch.cat([block.positions for block in blocks])
        cos, sin = (x[0, :, None] for x in self._body.rotary_emb(hidden, position_ids=positions[None]))
        scale = self.width**-0.5
        once = _Pass(self, blocks, (cos * scale, sin * scale), (cos, sin))
        first = not cache.layers
        for number, plan in enumerate(cache.plans):
            if self._recompute and torch.is_grad_enabled():
                found = checkpoint(
                    once.through, hidden, plan, cache.layer(number), use_reentrant=False, preserve_rng_state=False
                )
            else:
                found = once.through(hidden, plan, cache.layer(number))
            hidden, layer = found
            cache.keep(number, layer)
        own = blocks[1:] if first else blocks  # what is read first are the prompts
        cache.used += sum(block.sight.asks.shape[1] for block in own)
        return rms_norm(hidden, self._body.norm.weight, self.eps)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether two layers give in double precision what transformers makes of them, on padded prompts and on what follows."""
        few = copy.copy(self._body)
        parts = {"layers": self._body.layers[:2], "norm": self._body.norm, "rotary_emb": self._body.rotary_emb}
        few._modules = {**self._body._modules, **{name: copy.deepcopy(part).double() for name, part in parts.items()}}
        light, device = LightBody(few), self._body.norm.weight.device
        embedded = torch.linspace(-1, 1, 12 * len(self._body.norm.weight), dtype=torch.float64, device=device).sin()
        embedded = embedded.view(2, 6, -1)
        mask = torch.ones(2, 6, dtype=torch.bool, device=device)
        mask[0, :2] = False
        cache, theirs = light.open(2), DynamicCache(config=self._body.config)
        if cache is None:
            return False
        for new in (slice(0, 4), slice(4, 6)):
            seen, asks = mask[:, : new.stop], mask[:, new]
            block = _Block.of(seen, asks.shape[1], cache.groups, cache.shared, cache.used)
            got = light._run(embedded[:, new][asks], [block], cache)
            expected = few(
                inputs_embeds=embedded[:, new],
                attention_mask=seen.long(),
                position_ids=_positions(seen, asks.shape[1]),
                past_key_values=theirs,
            ).last_hidden_state[asks]
            if not (got - expected).norm() <= 1e-5 * expected.norm():
                return False
        return True


@dataclass(frozen=True)
class _Block:
    """New tokens of several rows: a rectangle of positions, some of them padding.

    Attributes:
        groups: the prompt of each row.
        used: positions that the rows have beyond their prompts already.
        places: where the real tokens stand among all positions of all rows; None if all are real.
        positions: the place of each real token in its text.
    """

    groups: Groups
    used: int
    sight: Sight
    places: Int[Tensor, " N"] | None
    positions: Int[Tensor, " N"]

    @staticmethod
    def of(mask: Bool[Tensor, "B L"], new: int, groups: Groups, shared: int = 0, used: int = 0) -> _Block:
        """The last `new` positions of rows whose prompts have `shared` ones."""
        asks = mask[:, mask.shape[1] - new :]
        places = None if bool(asks.all()) else asks.flatten().nonzero().flatten()
        return _Block(groups, used, Sight(mask, asks, shared), places, _at(places, _positions(mask, new)))

    @property
    def count(self) -> int:
        """Real tokens."""
        return len(self.positions)

    def padded(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "BS D"]:
        """Real tokens back among the padding."""
        if self.places is None:
            return x
        return x.new_zeros(self.sight.asks.numel(), x.shape[-1]).index_copy(0, self.places, x)

    def attend(
        self, q: Float[Tensor, "N H D"], k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"], before: Layer | None
    ) -> tuple[Float[Tensor, "N E"], Layer]:
        """What the tokens see, and the layer's memory with them in it."""
        by_head = [self._by_head(x, k.shape[1]) for x in (q, k, v)]
        new = by_head[1][:, :, 0], by_head[2][:, :, 0]
        layer, keys, values = Layer.of_prompts(*new) if before is None else before.grown(*new, self.used)
        out = attend(by_head[0], keys, values, self.groups, self.sight).permute(1, 3, 0, 2, 4)
        out = out.reshape(self.sight.asks.numel(), -1)
        return out if self.places is None else out[self.places], layer

    def _by_head(self, x: Float[Tensor, "N H D"], heads: int) -> Float[Tensor, "K B R S D"]:
        """Real tokens as rows again, the heads of the keys first."""
        rows = self.padded(x.reshape(len(x), -1)).view(*self.sight.asks.shape, heads, -1, x.shape[-1])
        return rows.permute(2, 0, 3, 1, 4)


@dataclass(frozen=True)
class _Pass:
    """One pass through all layers. It changes nothing, so that a layer may be run again for its gradient.

    Attributes:
        turn_q, turn_k: cosine and sine of the real tokens' positions; those for queries have the scores' scale in them.
    """

    body: LightBody
    blocks: Sequence[_Block]
    turn_q: tuple[Float[Tensor, "N 1 D"], Float[Tensor, "N 1 D"]]
    turn_k: tuple[Float[Tensor, "N 1 D"], Float[Tensor, "N 1 D"]]

    def through(
        self, hidden: Float[Tensor, "N D"], plan: LayerPlan, before: Layer | None
    ) -> tuple[Float[Tensor, "N D"], Layer]:
        """One layer, and what is to be remembered of it."""
        normed = Normed(self.body.eps)
        parts = _apply(plan.qkv, normed, hidden, plan.norm)
        seen, layer = self._attention([part.view(len(part), -1, self.body.width) for part in parts], plan, before)
        hidden = hidden + _apply(plan.out, Given(), seen)[0]
        gate_up = _apply(plan.gate_up, normed, hidden, plan.mlp_norm)
        return hidden + _apply(plan.down, Gated(), *gate_up)[0], layer

    def _attention(
        self, qkv: Sequence[Float[Tensor, "N H D"]], plan: LayerPlan, layer: Layer | None
    ) -> tuple[Float[Tensor, "N E"], Layer]:
        q, k, v = qkv
        if plan.head_norms is not None:
            q, k = (rms_norm(part, weight, self.body.eps) for part, weight in zip((q, k), plan.head_norms, strict=True))
        q, k = rotate(q, *self.turn_q), rotate(k, *self.turn_k)
        counts = [block.count for block in self.blocks]
        seen: list[Tensor] = []
        parts = zip(q.split(counts), k.split(counts), v.split(counts), strict=True)
        for block, (its_q, its_k, its_v) in zip(self.blocks, parts, strict=True):
            out, layer = block.attend(its_q, its_k, its_v, layer)
            seen.append(out)
        assert layer is not None
        return seen[0] if len(seen) == 1 else torch.cat(seen), layer


def _apply(layers: Linears, how: Formed, *kept: Tensor) -> tuple[Float[Tensor, "N O"], ...]:
    return layers(how.value(*kept)) if isinstance(layers, Packed) else project(layers, how, *kept)


def _at(places: Tensor | None, x: Tensor) -> Tensor:
    """The entries of real tokens."""
    return x.flatten() if places is None else x.flatten()[places]


def _positions(mask: Bool[Tensor, "B L"], last: int) -> Int[Tensor, "B S"]:
    """The place of each of the `last` tokens among its row's real ones."""
    return mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -last:]


def _is_known(body: nn.Module) -> bool:
    """Whether the class is one of `KNOWN`, without what some models of these classes have besides."""
    if type(body).__name__ not in KNOWN or not type(body).__module__.startswith("transformers.models."):
        return False
    config: Any = body.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    kinds = getattr(config, "layer_types", None)
    windowed = set(kinds) != {"full_attention"} if kinds else getattr(config, "sliding_window", None) is not None
    return config.hidden_act == "silu" and rope in FIXED_ROPES and not windowed


def _layer_plan(layer: Any) -> LayerPlan | None:
    """What a layer computes with now; None if something about it is not plain."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]
    found = [_projection(module) for module in modules]
    if any(p is None for p in found) or not all(map(_is_bare, (layer, attention, mlp))):
        return None
    q, k, v, out, gate, up, down = (p for p in found if p is not None)
    head_norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return LayerPlan(norms[0], (q, k, v), head_norms, (out,), norms[1], (gate, up), (down,))


def _projection(module: Any) -> Projection | None:
    """A linear layer with the adapter that is on, if it is a plain one."""
    if not _is_bare(module):
        return None
    if type(module) is nn.Linear:
        return Projection(module.weight, module.bias) if type(module.weight) is nn.Parameter else None
    base = _projection(module.base_layer) if isinstance(module, LoraLayer) and not module.merged else None
    return None if base is None else _adapted(base, module)


def _adapted(base: Projection, module: Any) -> Projection | None:
    """A linear layer under PEFT's, which may have an adapter on."""
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return base
    name = active[0]
    down, up = module.lora_A[name], module.lora_B[name]
    more = len(active) > 1 or name in module.lora_variant or up.bias is not None
    if more or type(module.lora_dropout[name]) is not nn.Identity or down.weight.dtype != base.weight.dtype:
        return None
    return replace(base, down=down.weight, up=up.weight, scale=module.scaling[name])


def _is_bare(module: nn.Module) -> bool:
    """Whether calling a module does no more than its class says: no hooks, as sharding and offloading have."""
    return not (module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))
