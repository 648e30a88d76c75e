"""Priors and policies: a language model under a law, with one of its adapters on (or none)."""

from __future__ import annotations

import copy
import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiltlm.errors import InputError
from tiltlm.lm.adapters import AdapterSwitch, LoRA
from tiltlm.lm.backbone import Backbone
from tiltlm.lm.generators.drawing import exact, weighted
from tiltlm.lm.generators.protocol import Generator as CompletionGenerator
from tiltlm.lm.head import apply_law, token_kl, token_log_prob
from tiltlm.lm.heads import ValueHead
from tiltlm.lm.kinds import backbone_of, reads_images
from tiltlm.lm.sample import sample
from tiltlm.lm.score import batches, completion_features, scatter
from tiltlm.lm.stops import StopStrings, tokens_and_texts
from tiltlm.lm.text import Reader, decode, encode
from tiltlm.lm.walk import ModelWalk, redraw
from tiltlm.protocols import Law
from tiltlm.records import Draws, Forward, Prompts
from tiltlm.target import Target

if TYPE_CHECKING:
    from tiltlm.lm.critic import ModelCritic
    from tiltlm.protocols import Evidence

SCORING_TOKENS = 2048
"""Completion tokens in one scoring pass without gradient; bounds its memory."""


@dataclass(frozen=True)
class Body:
    """A loaded model with what runs it: shared by the priors and policies that are views of it.

    Attributes:
        eos: ids that end a completion, whatever its law.
        processor: transformers' processor, for a model that reads images.
        key: tells this body from any other of the process.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    backbone: Backbone
    adapters: AdapterSwitch
    eos: tuple[int, ...]
    name: str
    processor: Any = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def vocabulary(self) -> int:
        """Tokens that a completion may be made of."""
        return self.backbone.vocabulary

    @property
    def reader(self) -> Reader:
        """How prompts become what the model reads."""
        sees, encoder = reads_images(self.model), self.backbone.has_encoder
        return Reader(self.tokenizer, self.eos, self.processor, encoder, encoder and sees, sees)

    @property
    def templater(self) -> Any:
        """Whose chat template holds: the processor's, if it has one, or the tokenizer's."""
        return self.reader.templater

    def texts(self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> tuple[str, ...]:
        """Completions as texts, without special tokens."""
        rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
        return decode(rows, self.tokenizer, on_its_own=self.backbone.has_encoder)


@dataclass(frozen=True, eq=False)
class View:
    """A sampler: `body` under `law`, with `adapter` on.

    Attributes:
        chat: whether plain strings are sent through the chat template; None and False leave them as they are.
        column: the column that holds the prompt, where prompts come as rows.
        image: the column that holds its image, where the model reads images.
        rows: most completions in the model at a time when drawing.
        progress: called with the number of completions that have just been drawn.
        generator: draws whole completions for this sampler, such as `VLLM()`; None leaves it to our own. The law is the same.
    """

    body: Body
    law: Law
    adapter: str | None = None
    chat: bool | None = None
    column: str = "prompt"
    image: str = "image"
    rows: int = 256
    progress: Callable[[int], None] | None = None
    generator: CompletionGenerator | None = None

    def encode(self, data: Prompts | Sequence[Any]) -> Prompts:
        """Tokenise prompts: strings, conversations, rows, images. `Prompts` pass through."""
        if isinstance(data, Prompts):
            return data
        room = self.body.backbone.room(self.law.max_new_tokens)
        if isinstance(data, str):
            data = [data]
        return encode(data, self.body.reader, room=room, chat=self.chat, column=self.column, image=self.image)

    def draw(self, prompts: Prompts, n: int, rng: Generator) -> Draws:
        """Draw `n` completions of every prompt; the rows of one prompt are neighbours.

        The draw depends on `rng` and the prompts, not on how rows are batched (up to rounding in the model).
        """
        if self.generator is not None:
            return exact(self, self.generator, prompts, n, rng)
        return self.draw_part(prompts, n, rng, range(len(prompts)))

    def draw_part(self, prompts: Prompts, n: int, rng: Generator, part: range) -> Draws:
        """What `draw` gives for the prompts in `part`, as draws for those alone; `rng` moves on as if all had been drawn."""
        with self.body.adapters.on(self.adapter):
            raw = sample(
                self.body.backbone,
                prompts,
                n,
                self.law,
                self.eos,
                rng,
                rows=self.rows,
                stops=self.stops,
                progress=self.progress,
                part=part,
            )
        return Draws(
            prompts=prompts if len(part) == len(prompts) else prompts.select(part),
            tokens=raw.tokens,
            mask=raw.mask,
            ended=raw.ended,
            prompt_index=torch.arange(len(part)).repeat_interleave(n),
            log_q=raw.log_q,
            texts=self.body.texts(raw.tokens, raw.mask),
            sampler=self.identity,
        )

    def draw_weighted(self, prompts: Prompts, n: int, rng: Generator) -> Draws:
        """The same for training: a generator's draws come as they are, with `log_mu`, and count by weights (`tiltlm.mismatch`)."""
        if self.generator is None:
            return self.draw(prompts, n, rng)
        return weighted(self, self.generator, prompts, n, rng)

    def log_prob(self, draws: Draws) -> Float[Tensor, "B T"]:
        """Log-probability of each token of `draws` under this law, without gradient."""
        if draws.sampler and draws.sampler == self.identity:
            return draws.log_q
        with torch.inference_mode():
            parts = [self._log_prob(draws.select(rows)) for rows in batches(draws, SCORING_TOKENS)]
        return torch.cat(parts).clone()

    def walk(self, prompts: Prompts, n: int) -> ModelWalk:
        """`n` empty rows of every prompt, to be extended token by token."""
        return ModelWalk.start(self, prompts, n)

    def redraw(self, draws: Draws, keep: Int[Tensor, " B"], rng: Generator) -> Draws:
        """Draw each completion anew from its token `keep` on; what is before stays, its log-probability taken under this law."""
        return redraw(self, draws, keep, rng)

    def complete(self, prompts: Prompts, index: Tensor, completions: Sequence[Sequence[int]]) -> Draws:
        """Draws made from given token ids (someone else's completions), scored under this law."""
        width = max(1, max(map(len, completions), default=1))
        tokens = torch.zeros(len(completions), width, dtype=torch.long)
        mask = torch.zeros(len(completions), width, dtype=torch.bool)
        for row, ids in enumerate(completions):
            tokens[row, : len(ids)] = torch.as_tensor(ids, dtype=torch.long)
            mask[row, : len(ids)] = True
        ended = torch.tensor([self.ends(ids) for ids in completions])
        texts = self.body.texts(tokens, mask)
        draws = Draws(prompts, tokens, mask, ended, index, torch.zeros(mask.shape), texts)
        return replace(draws, log_q=self.log_prob(draws), sampler=self.identity)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether a completion of these tokens is over: by an end token, or by a stop string."""
        ids = [int(token) for token in ids]
        return bool(ids) and (ids[-1] in self.eos or (self.stops is not None and self.stops.within(ids)))

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a completion: the model's, and those of the law's stops that are special tokens."""
        tokens, _ = tokens_and_texts(self.body.tokenizer, self.law.stop)
        return tuple(dict.fromkeys((*self.body.eos, *tokens)))

    @property
    def stops(self) -> StopStrings | None:
        """What ends a completion besides an end token."""
        _, texts = tokens_and_texts(self.body.tokenizer, self.law.stop)
        return StopStrings(self.body.tokenizer, texts, self.body.backbone.has_encoder) if texts else None

    @property
    def identity(self) -> str:
        """Names this law while it does not change; a policy in training has none."""
        return f"{self.body.key}/{self.adapter}/{self.law}"

    def _features(self, draws: Draws) -> tuple[Tensor, Tensor]:
        with self.body.adapters.on(self.adapter):
            return completion_features(self.body.backbone, draws)

    def _log_prob(self, draws: Draws) -> Float[Tensor, "B T"]:
        features, mask = self._features(draws)
        log_q = self._head_log_prob(features, mask, draws)
        return scatter(log_q, mask, draws.tokens.shape[1])

    def _next(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Log-probabilities of the next token under this law, from the features that predict it."""
        return apply_law(self.body.backbone.head.logits(features), self.law).log_softmax(-1)

    def _head_log_prob(self, features: Tensor, mask: Tensor, draws: Draws) -> Tensor:
        targets = draws.tokens[:, : mask.shape[1]][mask].to(features.device)
        return token_log_prob(features, self.body.backbone.head, targets, self.law)


@dataclass(frozen=True, eq=False)
class ModelPrior(View):
    """The base model as a prior, or the base with a frozen adapter. `prior * evidence` is the posterior."""

    def __mul__(self, evidence: Evidence) -> Target:
        return Target(self, evidence)

    def policy(
        self,
        *,
        lora: LoRA | None = LoRA(),
        start: str | Path | None = None,
        seed: int = 0,
        values: bool = False,
    ) -> ModelPolicy:
        """A trainable policy; this prior stays the reference, whatever the policy starts from.

        Args:
            lora: the adapter to train; None trains all weights of a copy of the model.
            start: folder of a PEFT adapter to start from. The policy continues this adapter (of whatever rank it is); the
                reference of the KL remains this prior.
            seed: of the adapter's initial weights.
            values: give it a value head as well.
        """
        if self.law.top_k is not None:
            raise InputError(
                f"top_k is {self.law.top_k}: a policy's top tokens are not the prior's, so that their KL is infinite; train "
                f"without top_k"
            )
        if lora is None:
            if start is not None:
                raise InputError(f"start is {start} with full fine-tuning; load the adapter into the model first")
            return ModelPolicy(
                **self._parts(self._full_copy(), None), prior=self, value_head=self._values(values, seed)
            )
        switch = self.body.adapters
        if start is not None:
            adapter = switch.load(start)
        elif self.adapter is not None:
            adapter = switch.copy(self.adapter)
        else:
            adapter = switch.new(lora, self.body.name, seed)
        switch.train(adapter)
        return ModelPolicy(**self._parts(self.body, adapter), prior=self, value_head=self._values(values, seed))

    def _values(self, wanted: bool, seed: int) -> ValueHead | None:
        """A value head on the features as they are now: an adapter on the output layer, which is run whole, makes them logits."""
        return ValueHead(self.body.backbone.width, seed).to(self.body.model.device) if wanted else None

    def critic(self, *, lora: LoRA | None = LoRA(), start: str | Path | None = None, seed: int = 0) -> ModelCritic:
        """A trainable Q-function on this model, whose law is this prior tilted by it; see `tiltlm.lm.critic`.

        Args:
            lora: the adapter that it learns its features with; None learns on the prior's own features.
            start: folder of a saved critic to start from, with its adapter if it has one.
            seed: of the initial weights.
        """
        from tiltlm.lm.critic import new_critic

        return new_critic(self, lora, start, seed)

    def fingerprint(self) -> str:
        """A hash of architecture, precision and a sample of the weights, the prior's adapter included."""
        digest = hashlib.sha256(f"{type(self.body.model).__name__}{self.body.model.dtype}".encode())
        base, unread = self.body.model.named_parameters(), self.body.backbone.unread
        weights = {
            name.replace("base_layer.", ""): value
            for name, value in base
            if "lora_" not in name and not name.startswith(unread)
        }
        if self.adapter is not None:
            weights |= self.body.adapters.parameters(self.adapter)
        for name, value in weights.items():
            digest.update(f"{name}{tuple(value.shape)}".encode())
            sample = value.detach().flatten()[:: max(1, value.numel() // 16)][:16].clone()  # numpy pins what it shares
            digest.update(sample.double().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def policy_of(self, body: Body) -> ModelPolicy:
        """Another model with the same vocabulary as a policy with this prior as its reference."""
        sizes = [b.vocabulary for b in (self.body, body)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"policy {body.name!r} has {sizes[1]} tokens and the prior {self.body.name!r} has {sizes[0]}; they must share a "
                f"tokenizer"
            )
        return ModelPolicy(**self._parts(body, None), prior=self)

    def _parts(self, body: Body, adapter: str | None) -> dict[str, Any]:
        kept = {
            name: getattr(self, name) for name in ("law", "chat", "column", "image", "rows", "progress", "generator")
        }
        return {"body": body, "adapter": adapter, **kept}

    def _full_copy(self) -> Body:
        switch = self.body.adapters
        if switch.peft is None:
            model = copy.deepcopy(self.body.model)
        else:
            whole: Any = copy.deepcopy(switch.peft)
            if self.adapter is None:
                model = whole.unload()
            else:
                model = whole.merge_and_unload(adapter_names=[self.adapter])
        model.requires_grad_(True).eval()
        fresh = {"backbone": backbone_of(model), "adapters": AdapterSwitch(model), "key": uuid.uuid4().hex}
        return replace(self.body, model=model, **fresh)


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelPolicy(View):
    """A policy in training: one of the body's adapters, or all weights of a body of its own.

    Attributes:
        prior: the reference of the KL.
        value_head: V(s) for engines that need it; trained with the policy, and no part of its law.
    """

    prior: ModelPrior
    value_head: ValueHead | None = None

    @property
    def identity(self) -> str:
        return ""  # its weights change, so no earlier log-probability is still valid

    def forward(self, draws: Draws, needs: frozenset[str]) -> Forward:
        """Score `draws` with gradient."""
        if "values" in needs and self.value_head is None:
            raise InputError("this policy has no value head; make it with prior.policy(values=True)")
        unknown = needs - {"log_q", "kl", "values"}
        if unknown:
            raise ValueError(f"a policy cannot provide {sorted(unknown)}; it provides log_q, kl and values")
        width = draws.tokens.shape[1]
        prior_features = self._prior_features(draws) if "kl" in needs else None
        features, mask = self._features(draws)
        log_q = scatter(self._head_log_prob(features, mask, draws), mask, width)
        kl = values = None
        if prior_features is not None:
            heads = self.body.backbone.head, self.prior.body.backbone.head
            kl = scatter(token_kl(features, heads[0], prior_features, heads[1], self.law), mask, width)
        if "values" in needs and self.value_head is not None:
            if self.value_head.inner.in_features != features.shape[-1]:
                raise InputError(
                    "another policy of this model has an adapter on the output layer, whose features are logits, and the values of this "
                    "one are of hidden states; leave the output layer out of that one's targets"
                )
            values = scatter(self.value_head(features), mask, width)
        return Forward(log_q, kl, values)

    def token_kl(self, draws: Draws) -> Float[Tensor, "B T"]:
        """Exact KL(pi(.|s_t) || pi0(.|s_t)) at every position of `draws`, without gradient."""
        with torch.inference_mode():
            parts = []
            for rows in batches(draws, SCORING_TOKENS):
                some = draws.select(rows)
                prior_features = self._prior_features(some)
                features, mask = self._features(some)
                heads = self.body.backbone.head, self.prior.body.backbone.head
                kl = token_kl(features, heads[0], prior_features, heads[1], self.law)
                parts.append(scatter(kl, mask, draws.tokens.shape[1]))
        return torch.cat(parts).clone()

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable weights, by names that do not depend on this run."""
        own = self.body.model.named_parameters() if self.adapter is None else ()
        weights = self.body.adapters.parameters(self.adapter) if self.adapter is not None else dict(own)
        head = self.value_head.named_parameters() if self.value_head is not None else ()
        return {**weights, **{f"head:{name}": value for name, value in head}}

    def fingerprint(self) -> str:
        """Identifies the reference, so that weights are not loaded onto another one."""
        return self.prior.fingerprint()

    def save(self, folder: str | Path) -> None:
        """Write the adapter (PEFT's format) or the whole model (transformers'), with the tokenizer and what reads its images."""
        folder = Path(folder)
        if self.adapter is not None:
            self.body.adapters.save(self.adapter, folder)
        else:
            self.body.model.save_pretrained(folder)
        self.body.tokenizer.save_pretrained(folder)
        if self.body.processor is not None:
            self.body.processor.save_pretrained(folder)
        if self.value_head is not None:
            save_file(self.value_head.state_dict(), folder / "value_head.safetensors")

    def discard(self) -> None:
        """Free the adapter's memory; the policy cannot be used afterwards."""
        if self.adapter is not None:
            self.body.adapters.remove(self.adapter)

    def _prior_features(self, draws: Draws) -> Tensor:
        with torch.no_grad():
            return self.prior._features(draws)[0]
