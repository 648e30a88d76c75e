"""What the parts of TiltLM ask of each other. Anything that has these methods fits; nothing is registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from tiltlm.records import Draws, Forward, Info, Likelihood, Prompts, Scored, Weighted

if TYPE_CHECKING:
    from tiltlm.target import Target

State = TypeVar("State")


@dataclass(frozen=True)
class Law:
    """The law of one completion: what ends it, and how each token is drawn from the model's logits.

    The law is the support and the measure of everything that follows. A completion of at most
    `max_new_tokens`, ended by EOS (or a stop string) or cut there, is an outcome; with a temperature or a
    top-k, the tempered and renormalised probabilities are the ones that count.

    Attributes:
        max_new_tokens: longest completion, the EOS included.
        temperature: divides the logits.
        top_k: keep only the k most probable tokens, renormalised; None keeps all.
        stop: texts that end a completion as soon as it contains one of them; one text alone may be given as it is. What is one of
            the tokenizer's special tokens, such as "<|im_end|>", ends it as that token does, which is in no completion's text.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if not all(self.stop):
            raise ValueError(f"stop is {self.stop}; an empty text is in every completion, leave it out")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be positive (1 is the model as it is)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None to keep every token")


@dataclass(frozen=True)
class Claim:
    """What an engine says of itself; `tiltlm.testing.check_engine` proves or refutes it by enumeration.

    Attributes:
        fixed_point: the law that the engine settles at or returns: "p*", another law's name, or "none". An engine with
            another law may have `settles_at(exact) -> log-law`, which the suite then proves to be its fixed point; None
            where these settings have no law that is known. Where its value function or its state come to rest elsewhere
            than at V* and log Z, `values_at(exact)` and `rest(exact, state)` put them there.
        objective: what a training engine minimises, e.g. "KL(q||p*)"; for decoding engines "law".
        bias: distance between the expected gradient (or the returned law) and what is claimed.
        data: whose completions the loss may see: fresh ones of the policy ("on-policy"); the prior's ("prior"); those of any
            law whose log-probabilities are on the draws ("weighted"); any whatsoever ("any"); or any, but they have to be
            given, because they are what is learned ("given").
        needs: fields of `Forward` that the loss reads.
        zero_variance: whether not only the expected gradient but every single draw's vanishes at p*; looked at where the bias
            is none. False for estimators that are unbiased, and noisy even there.
        source: paper and equation.
    """

    fixed_point: str
    objective: str
    bias: Literal["none", "1/n", "unknown"] = "unknown"
    data: Literal["on-policy", "prior", "weighted", "any", "given"] = "on-policy"
    needs: frozenset[str] = frozenset({"log_q"})
    zero_variance: bool = True
    source: str = ""


@runtime_checkable
class Sampler(Protocol):
    """A law over completions that one can draw from."""

    @property
    def law(self) -> Law: ...

    def encode(self, data: Prompts | Sequence[Any]) -> Prompts:
        """Turn texts, messages or rows into `Prompts`; `Prompts` pass through."""
        ...

    def draw(self, prompts: Prompts, n: int, rng: Generator) -> Draws:
        """Draw `n` completions of every prompt; the rows of one prompt are neighbours."""
        ...

    def log_prob(self, draws: Draws) -> Float[Tensor, "B T"]:
        """Log-probability of each token of `draws` under this law, without gradient."""
        ...


class PrefixSampler(Sampler, Protocol):
    """A sampler that can be stopped at any token; `tiltlm.lm`'s all can."""

    def walk(self, prompts: Prompts, n: int) -> Walk:
        """`n` empty rows of every prompt, to be extended token by token."""
        ...

    def redraw(self, draws: Draws, keep: Int[Tensor, " B"], rng: Generator) -> Draws:
        """Draw each completion anew from its token `keep` on; what is before stays."""
        ...


class Policy(Sampler, Protocol):
    """A sampler with weights to train."""

    def forward(self, draws: Draws, needs: frozenset[str]) -> Forward:
        """Score `draws` with gradient; fills the fields of `Forward` named in `needs`."""
        ...

    def token_kl(self, draws: Draws) -> Float[Tensor, "B T"]:
        """Exact KL(pi(.|s_t) || pi0(.|s_t)) at every position of `draws`, without gradient."""
        ...

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable weights by a name that survives saving."""
        ...

    def fingerprint(self) -> str:
        """Identifies the frozen part of the model, so that weights are not loaded onto another one."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights that the rest of the ecosystem can load."""
        ...


class Prior(Sampler, Protocol):
    """The base model: the reference of the KL and the start of every policy."""

    def policy(
        self, *, lora: Any = ..., start: str | Path | None = None, seed: int = 0, values: bool = False
    ) -> Policy:
        """A trainable policy that starts at this prior, or at the adapter in `start`; with a value head if asked for."""
        ...

    def critic(self, *, lora: Any = ..., start: str | Path | None = None, seed: int = 0) -> Policy:
        """A trainable Q-function, new or from a folder; as a sampler it is the prior tilted by it, pi0(a|s) exp Q(s, a)."""
        ...


class Evidence(Protocol):
    """What is known about a text: a log-likelihood r / beta.

    Attributes:
        beta: the temperature, in reward units per nat; `beta * log` is the reward that is reported.
        log_bounds: smallest and largest log-likelihood possible, or None where unknown.
    """

    @property
    def beta(self) -> float: ...

    @property
    def log_bounds(self) -> tuple[float, float] | None: ...

    def log_likelihood(self, draws: Draws) -> Likelihood: ...

    def at(self, beta: float) -> Evidence:
        """The same rewards at another temperature."""
        ...


class Walk(Protocol):
    """Rows of a sampler that are extended token by token, for engines that look at prefixes.

    Rows of one prompt are neighbours, as in `draw`. All of them start empty.
    """

    @property
    def live(self) -> Bool[Tensor, " B"]:
        """The rows that go on: neither ended nor cut."""
        ...

    def log_probs(self) -> Float[Tensor, "B V"]:
        """Normalised log-probabilities of every row's next token."""
        ...

    def extend(self, tokens: Int[Tensor, " B"], live: Bool[Tensor, " B"]) -> None:
        """Append a token to the rows that are `live`; the others have ended and stay as they are."""
        ...

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Replace the rows by copies of those at `rows`."""
        ...

    def draws(self, rows: Int[Tensor, " B"] | None = None) -> Draws:
        """The rows so far, or those at `rows`, as draws of the sampler's law."""
        ...


class TwistWalk(Protocol):
    """A twist along the rows of a `Walk`."""

    def log_twist(self) -> Float[Tensor, " B"]:
        """log psi of every row so far, in nats; at an ended row it is not asked for."""
        ...

    def extend(self, tokens: Int[Tensor, " B"], live: Bool[Tensor, " B"]) -> None: ...

    def select(self, rows: Int[Tensor, " B"]) -> None: ...


class Twist(Protocol):
    """A guess at what the rest of a completion is worth; the best is log psi(s) = log E_pi0[exp(r / beta) | s]."""

    def twist_walk(self, prompts: Prompts, n: int) -> TwistWalk:
        """`n` empty rows of every prompt."""
        ...


class TrainingEngine(Protocol[State]):
    """A loss whose minimum is the claim's fixed point. A function of log-probabilities, never of a model.

    An engine may also have `observe(scored, state) -> None`, which `fit` calls once for every new batch before its loss: there
    it learns what needs no gradient, such as a running log Z or an adaptive beta, into buffers of its state.

    Attributes:
        group: completions of each prompt in a step.
        updates: steps of the optimiser on each batch of draws.
    """

    @property
    def claim(self) -> Claim: ...

    @property
    def updates(self) -> int: ...

    @property
    def group(self) -> int: ...

    def init(self, prompts: Prompts) -> State:
        """What the engine carries along: an `nn.Module` to be trained with the policy, or None."""
        ...

    def loss(self, forward: Forward, scored: Scored, state: State) -> tuple[Tensor, Info]:
        """A scalar loss, and what to log of it."""
        ...


class DecodingEngine(Protocol):
    """A way to posterior samples without training. What it costs is its field `n`, or what it says; see `decoding.budget`.

    An engine whose output is a choice among independent draws also has
    `selection(target, scored) -> Float[Tensor, " B"]`, the probability that each of the given draws is the one returned;
    the conformance suite proves its law by enumeration with it.
    """

    @property
    def claim(self) -> Claim: ...

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """Weighted draws of every prompt."""
        ...
