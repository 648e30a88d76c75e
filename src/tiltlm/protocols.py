"""What the parts of TiltLM ask of each other. Anything that has these methods fits; nothing is registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
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
        stop: texts that end a completion as soon as it contains one of them.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
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
        fixed_point: the law that the engine settles at or returns: "p*", another law's name, or "none".
        objective: what a training engine minimises, e.g. "KL(q||p*)"; for decoding engines "law".
        bias: distance between the expected gradient (or the returned law) and what is claimed.
        data: whose draws the loss may see.
        needs: fields of `Forward` that the loss reads.
        source: paper and equation.
    """

    fixed_point: str
    objective: str
    bias: Literal["none", "1/n", "unknown"] = "unknown"
    data: Literal["on-policy", "any"] = "on-policy"
    needs: frozenset[str] = frozenset({"log_q"})
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

    def policy(self, *, lora: Any = ..., start: str | Path | None = None, seed: int = 0) -> Policy:
        """A trainable policy that starts at this prior, or at the adapter in `start`."""
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


class TrainingEngine(Protocol[State]):
    """A loss whose minimum is the claim's fixed point. A pure function of log-probabilities.

    Attributes:
        group: completions of each prompt in a step.
        updates: steps of the optimiser on each batch of draws.
    """

    claim: ClassVar[Claim]

    updates: ClassVar[int]

    @property
    def group(self) -> int: ...

    def init(self, prompts: Prompts) -> State:
        """What the engine carries along: an `nn.Module` to be trained with the policy, or None."""
        ...

    def loss(self, forward: Forward, scored: Scored, state: State) -> tuple[Tensor, Info]:
        """A scalar loss, and what to log of it."""
        ...


class DecodingEngine(Protocol):
    """A way to posterior samples without training.

    An engine whose output is a choice among independent draws also has
    `selection(target, scored) -> Float[Tensor, " B"]`, the probability that each of the given draws is the one returned;
    the conformance suite proves its law by enumeration with it.
    """

    claim: ClassVar[Claim]

    def sample(self, target: Target, prompts: Prompts, *, proposal: Sampler | None = None, rng: Generator) -> Weighted:
        """Weighted draws of every prompt."""
        ...
