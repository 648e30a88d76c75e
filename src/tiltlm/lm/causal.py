"""Causal language models: the prompt is the beginning of the text, and may have images in it."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tiltlm.errors import InputError
from tiltlm.lm.backbone import Backbone, Memory, Prefix, joined, left_pad, right_pad, to_device
from tiltlm.lm.light import LightBody
from tiltlm.lm.shared_cache import SharedCache
from tiltlm.records import Prompts

BY_TOKEN = "token_type_ids"
"""Inputs whose names end so have a value for each token of the prompt, and are padded with it."""

SPARED = {"cpu": 256, "other": 4096}
"""So many tokens that need not be read repay one more pass through the layers, by device."""

LOOKED_AT = (6, 2, 3)
"""What a model is looked at with when it is loaded: tokens of a longer and of a shorter prompt, and of what follows."""

EXACT = (torch.float32, torch.float64)
ROUNDING = {True: 0.05, False: 0.25}
"""Nats a token that rounding may come to, in single precision or better, and in less. A wrong law is off by 0.3 to 3."""


class CausalBackbone(Backbone):
    """A decoder-only model. Pixels and the like go in with the prompt, and with nothing after it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        super().__init__(model)
        self._light = LightBody.of(self._body)

    def _find_body(self) -> nn.Module | None:
        prefix = self.model.base_model_prefix
        body = getattr(self.model, prefix, None) if prefix else None
        return body if isinstance(body, nn.Module) else None

    def _probe(self) -> tuple[Tensor, Tensor]:
        ids = torch.arange(1, 4, device=self.device)[None] % self.vocabulary
        mask = torch.ones_like(ids, dtype=torch.bool)
        expected = self.model(input_ids=ids, attention_mask=mask.long()).logits
        return expected[0], self.features(ids, mask)[0]

    def _run(
        self, ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B L"], memory: Memory | None, **inputs: Tensor
    ) -> Float[Tensor, "B S D"]:
        if memory is not None and isinstance(memory.cache, SharedCache):
            assert self._light is not None
            return self._light.features(ids, mask, memory.cache)
        positions = mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {"position_ids": positions} if "position_ids" in self._accepts else {}
        split = self._split
        run = split if split is not None else self.model
        out = run(
            input_ids=ids,
            attention_mask=mask.long(),
            past_key_values=None if memory is None else memory.cache,
            use_cache=memory is not None,
            **extra,
            **inputs,
        )
        return out.last_hidden_state if split is not None else out.logits

    def prefill(self, prompts: Prompts) -> Prefix:
        """Run the prompts once; inside they are padded on the left."""
        tokens, mask = self._left(prompts)
        return self._read(tokens, mask, self._inputs(prompts, tokens.shape[1]))

    def read(
        self, prompts: Prompts, rows: Int[Tensor, " B"], tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T+1 D"]:
        """In one pass if we run the layers, unless the prompts begin alike."""
        light = self._light if self._split is not None and not prompts.inputs else None
        ids, real = self._left(prompts)
        found = None
        if light is not None and tokens.shape[1] and not _common(ids, real):
            found = light.prompts_and_completions(ids, real, *(x.to(self.device) for x in (rows, tokens, mask)))
        if found is None:
            return super().read(prompts, rows, tokens, mask)
        of_prompts, after = found
        return self._tilted(torch.cat([of_prompts[rows.to(self.device), -1:], after], dim=1))

    def _left(self, prompts: Prompts) -> tuple[Int[Tensor, "P L"], Bool[Tensor, "P L"]]:
        """Prompts padded on the left."""
        if not int(prompts.mask.any(-1).all()):
            raise InputError("a prompt has no tokens; write a text that the tokenizer knows")
        return left_pad(prompts.tokens.to(self.device), prompts.mask.to(self.device))

    def resume(
        self, prompts: Prompts, rows: Int[Tensor, " B"], tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Prefix:
        """Read on from where completions stand: prompt and beginning together are what the model reads."""
        if not self.takes_ragged(prompts):
            return super().resume(prompts, rows, tokens, mask)
        whole = torch.cat([prompts.tokens[rows], tokens * mask], dim=-1).to(self.device)
        return self._read(*left_pad(whole, torch.cat([prompts.mask[rows], mask], dim=-1).to(self.device)), {})

    def takes_ragged(self, prompts: Prompts) -> bool:
        return not prompts.inputs  # an image token in a completion is no image, so prompts with pixels are read alone

    def recomputing(self) -> AbstractContextManager[None]:
        return super().recomputing() if self._light is None else self._light.recomputing()

    def require_own_law(self) -> None:
        """Two rows, the shorter one padded, are read, selected and gone on with, and compared with each one alone."""
        if self._light is not None:  # compared with transformers' in double precision already
            return
        limit = self._limit()
        longer, shorter, more = LOOKED_AT
        if limit is not None and limit < longer + more:
            return
        name = type(self.model).__name__
        remedy = "load another model (docs/models.md says which kinds there are)"
        try:
            with torch.no_grad():
                gap, allowed = self._gap(longer, shorter, more)
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model class stumbles over
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise InputError(
                f"{name} cannot be run on padded prompts with a cache, as completions are drawn and scored ({reason}); {remedy}"
            ) from error
        if gap == torch.inf:  # eager attention in double precision: what it masks with is infinite in single
            raise InputError(
                f"{name} gives no finite probabilities in {str(self.model.dtype).removeprefix('torch.')} for a text that is padded to "
                f"the length of another; load it in float32, or {remedy}"
            )
        if gap > allowed:
            raise InputError(
                f"{name} gives a text other log-probabilities beside longer ones, or read bit by bit, than alone: they differ by "
                f"{gap:.2g} nats a token, and rounding explains {allowed:.2g}; {remedy}"
            )

    def _gap(self, longer: int, shorter: int, more: int) -> tuple[float, float]:
        """How far rows run together are from the model's own logits, and how far they may be, in nats a token.

        In half precision a model differs from itself. So it may differ by a few times what it does where no law could, beside
        another text of the same length; but not by much more than rounding does anywhere, or a law that mixes rows would pass.
        """
        ids = self._some_ids(longer + shorter + 2 * more)
        texts = ids[: longer + more], ids[longer + more :]
        alone = [self._own(text[None])[0] for text in texts]
        beside = self._own(torch.stack([texts[0][: len(texts[1])], texts[1]]))[1]
        noise = _mean_gap(alone[1], beside)
        order = [1, 0, 1]  # rows are selected, repeated and put into another order
        ours = self._together([text[:-more] for text in texts], [texts[row][-more:] for row in order], order)
        gap = max(_mean_gap(alone[row][-more - 1 :], found) for row, found in zip(order, ours, strict=True))
        rounding = ROUNDING[all(weight.dtype in EXACT for weight in self.model.parameters())]
        return gap, min(max(rounding, 5 * noise), 4 * rounding)

    def _own(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """The model's own log-probabilities of what comes next, without padding."""
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().log_softmax(-1)

    def _together(self, prompts: list[Tensor], completions: list[Tensor], order: list[int]) -> Float[Tensor, "B T+1 V"]:
        """The log-probabilities of what comes after prompts and after each token of their completions, as we run them."""
        width = max(map(len, prompts))
        pad = [(width - len(prompt), 0) for prompt in prompts]
        tokens = torch.stack([nn.functional.pad(x, left) for x, left in zip(prompts, pad, strict=True)])
        mask = torch.stack([nn.functional.pad(torch.ones_like(x), left) for x, left in zip(prompts, pad, strict=True)])
        read = self.prefill(Prompts(tokens.cpu(), mask.bool().cpu(), ("",) * len(prompts)))
        prefix, rest = read.rows(torch.tensor(order)), torch.stack(completions)
        seen, features = prefix.mask, [prefix.last[:, None]]
        for new in (rest[:, :1], rest[:, 1:]):  # a token, as in drawing, and several, as in scoring
            seen = torch.cat([seen, torch.ones_like(new, dtype=torch.bool)], dim=-1)
            features.append(self.features(new, seen, prefix.memory))
        return self.head.logits(torch.cat(features, dim=1)).float().log_softmax(-1)

    def _some_ids(self, count: int) -> Int[Tensor, " N"]:
        """Ids from all over the vocabulary, without those that mean something to the model, such as an image."""
        configs = (self.model.config, self._config)
        special = [
            v for config in configs for k, v in vars(config).items() if k.endswith(("_token_id", "_token_index"))
        ]
        inputs = self.model.get_input_embeddings()
        known = min(self.vocabulary, getattr(inputs, "num_embeddings", self.vocabulary))
        plain = [i for i in range(known) if i not in special] or list(range(known))
        return torch.tensor([plain[n * len(plain) // count] for n in range(count)], device=self.device)

    def _limit(self) -> int | None:
        """Most tokens of prompt and completion together; None where the model sets no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def room(self, max_new_tokens: int) -> int | None:
        limit, short = self._limit(), _short_context(self.model.config.get_text_config())
        if short is not None and max_new_tokens >= short:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}, but beyond {short} tokens of prompt and completion the model (longrope) gives "
                f"every text of the batch other probabilities; give less than {short}"
            )
        limit = short if limit is None else limit if short is None else min(limit, short)
        room = None if limit is None else limit - max_new_tokens
        if room is not None and room < 1:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}, but the model has a context of {limit} tokens; lower max_new_tokens"
            )
        return room

    def _read(self, tokens: Tensor, mask: Tensor, inputs: dict[str, Tensor]) -> Prefix:
        light = self._light if self._split is not None and not inputs else None
        begin = 0 if light is None else _common(tokens, mask)
        cache = light.open(1 if begin else len(tokens)) if light is not None else None
        if cache is not None and begin:
            return self._read_apart(tokens, mask, begin, cache)
        memory = Memory(DynamicCache(config=self.model.config) if cache is None else cache)
        return Prefix(memory, mask, self.features(tokens, mask, memory, **inputs)[:, -1])

    def _read_apart(self, tokens: Tensor, mask: Tensor, begin: int, cache: SharedCache) -> Prefix:
        """Read the `begin` tokens that all rows begin with once, and then what each goes on with."""
        tokens, mask = right_pad(tokens, mask)
        self.features(tokens[:1, :begin], mask[:1, :begin], Memory(cache))
        every = cache.rows(torch.zeros(len(tokens), dtype=torch.long, device=tokens.device))
        rest, real = left_pad(tokens[:, begin:], mask[:, begin:])
        seen = torch.cat([mask[:, :begin], real], dim=-1)
        last = self.features(rest, seen, Memory(every))[:, -1]
        return Prefix(Memory(every.as_prompts()), seen, last)

    def _inputs(self, prompts: Prompts, width: int) -> dict[str, Tensor]:
        """What goes in beside the tokens, for all prompts together."""
        found = {}
        for name, parts in prompts.inputs.items():
            if name not in self._accepts:  # a processor says more than its model asks
                continue
            if name.endswith(BY_TOKEN):
                found[name] = torch.stack([nn.functional.pad(part[0], (width - part.shape[1], 0)) for part in parts])
            elif any(len(part) for part in parts):
                found[name] = joined(parts)
        return to_device(found, self.model)


def _mean_gap(some: Float[Tensor, "S V"], others: Float[Tensor, "S V"]) -> float:
    """Mean difference of log-probabilities, in nats: 0 for a token impossible in both, or where `some` are no numbers.

    Infinite where `others` alone are none.
    """
    gaps = torch.where((some == others) | some.isnan(), 0.0, (some - others).abs())
    return float(gaps.nan_to_num(nan=torch.inf).mean())


def _short_context(config: Any) -> int | None:
    """Up to how many tokens `longrope` keeps to its factors for short texts; None for other embeddings.

    Its factors are chosen by the longest text of a batch, so that beyond it a text's probabilities depend on its neighbours.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    every = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]  # some models have one by layer type
    found = [rope.get("original_max_position_embeddings") for rope in every if rope.get("rope_type") == "longrope"]
    return min((limit for limit in found if limit is not None), default=None)


def _common(tokens: Int[Tensor, "P L"], mask: Bool[Tensor, "P L"]) -> int:
    """How many tokens all rows begin with, such as a system prompt or examples, each row's last one apart; 0 if it is not worth it."""
    spared = SPARED.get(tokens.device.type, SPARED["other"])
    if (len(tokens) - 1) * tokens.shape[1] < spared:
        return 0
    tokens, mask = right_pad(tokens, mask)
    shortest = int(mask.sum(-1).min())
    same = (tokens[:, : shortest - 1] == tokens[:1, : shortest - 1]).all(0)
    begin = int(same.int().cumprod(0).sum())
    return begin if (len(tokens) - 1) * begin >= spared else 0
