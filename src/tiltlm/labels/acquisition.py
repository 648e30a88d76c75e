"""Which pair to ask about next, from draws of a reward's posterior: the `members`, one row of rewards each.

Members are compared by their differences within a prompt only, so what a member adds to a whole prompt does not matter.
Every rule chooses a batch, one pair after the other, and says how it keeps from asking nearly the same twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from tiltlm.errors import InputError
from tiltlm.labels.candidates import Candidates

EXPLAINED = 0.5
"""A pair is nearly asked already if the batch's answers explain more than this share of its variance."""


class Acquisition(Protocol):
    """A rule that chooses pairs.

    Attributes:
        name: how files and the command line call it.
        least_members: how many members it needs; 0 for a rule that looks at none.
    """

    name: ClassVar[str]
    least_members: ClassVar[int]

    def choose(
        self,
        candidates: Candidates,
        members: Float[Tensor, "K B"],
        free: Bool[Tensor, " M"],
        n: int,
        rng: Generator,
    ) -> list[tuple[int, float | None]]:
        """At most `n` of the pairs that are `free`, in the order of choice, each with its score if the rule has one."""
        ...


@dataclass(frozen=True)
class BALD:
    """The pair whose answer says most about the reward: H(E sigma(dr)) - E H(sigma(dr)), in nats (Houlsby et al. 2011).

    In a batch, after each choice the members are conditioned on it as if it had been answered (`conditioned`), and the
    scores are taken anew, so that what the first answer would tell is not asked for again.
    """

    name: ClassVar[str] = "bald"
    least_members: ClassVar[int] = 2

    def choose(
        self,
        candidates: Candidates,
        members: Float[Tensor, "K B"],
        free: Bool[Tensor, " M"],
        n: int,
        rng: Generator,
    ) -> list[tuple[int, float | None]]:
        """The `n` pairs, greedily; equal scores in random order."""
        free, chosen = free.clone(), []
        members = members.detach().to(torch.float64)
        for _ in range(min(n, int(free.sum()))):
            score = information(candidates.differences(members))
            pair = _best(score, free, rng)
            chosen.append((pair, float(score[pair])))
            free[pair] = False
            members = conditioned(members, candidates.pairs[pair])
        return chosen


@dataclass(frozen=True)
class Margin:
    """The pair whose answer is least sure: uncertainty sampling, blind to whether the doubt can be cured.

    In a batch, a pair is passed over while the pairs chosen before explain more than half of its variance under the members;
    a single member has no variance, and then no completion is asked about twice. Both only as long as other pairs are left.

    Attributes:
        of: "reward" looks for the smallest |E dr|, "probability" for E sigma(dr) nearest to 1/2.
    """

    of: Literal["reward", "probability"] = "reward"
    name: ClassVar[str] = "margin"
    least_members: ClassVar[int] = 1

    def choose(
        self,
        candidates: Candidates,
        members: Float[Tensor, "K B"],
        free: Bool[Tensor, " M"],
        n: int,
        rng: Generator,
    ) -> list[tuple[int, float | None]]:
        """The `n` pairs with the smallest margins; equal ones in random order. The score is minus the margin."""
        d = candidates.differences(members)
        score = -d.mean(0).abs() if self.of == "reward" else -(d.sigmoid().mean(0) - 0.5).abs()
        free, near, chosen = free.clone(), torch.zeros_like(free), []
        spread, left = d.var(0, correction=0), members.detach().to(torch.float64)
        for _ in range(min(n, int(free.sum()))):
            allowed = free & ~near
            pair = _best(score, allowed if allowed.any() else free, rng)
            chosen.append((pair, float(score[pair])))
            free[pair] = False
            if len(members) > 1:
                left = conditioned(left, candidates.pairs[pair])
                near = candidates.differences(left).var(0, correction=0) < (1 - EXPLAINED) * spread
            else:
                near |= torch.isin(candidates.pairs, candidates.pairs[pair]).any(-1)
        return chosen


@dataclass(frozen=True)
class DoubleThompson:
    """The best completion by one member against the best by another (Dwaracherla et al. 2024, double Thompson sampling).

    A prompt is drawn, then two members until they disagree on its best completion. The law of that pair is f(i) f(j), with
    f(i) the share of members that think i best; it is computed and drawn from, so that nothing is tried in vain. Where all
    members agree, or the pairs on which they differ are not to be asked, the prompt's pair is drawn uniformly. It looks for
    the best completions and not for the best reward model: it leaves the order among bad ones open.

    In a batch, every prompt gets a question before one gets its second.
    """

    name: ClassVar[str] = "double-thompson"
    least_members: ClassVar[int] = 2

    def choose(
        self,
        candidates: Candidates,
        members: Float[Tensor, "K B"],
        free: Bool[Tensor, " M"],
        n: int,
        rng: Generator,
    ) -> list[tuple[int, float | None]]:
        """`n` pairs, drawn. The score is the pair's unnormalised probability within its prompt, 2 f(i) f(j)."""
        law, owner = double_thompson_law(candidates, members), candidates.owner
        free, chosen = free.clone(), []
        waiting: list[int] = []
        for _ in range(min(n, int(free.sum()))):
            waiting = [prompt for prompt in waiting if free[owner == prompt].any()]
            if not waiting:
                open_prompts = owner[free].unique()
                waiting = open_prompts[torch.randperm(len(open_prompts), generator=rng)].tolist()
            rows = (free & (owner == waiting.pop(0))).nonzero().flatten()
            weight = law[rows] if law[rows].sum() > 0 else torch.ones(len(rows), dtype=torch.float64)
            pair = int(rows[torch.multinomial(weight, 1, generator=rng)])
            chosen.append((pair, float(law[pair])))
            free[pair] = False
        return chosen


@dataclass(frozen=True)
class RandomPairs:
    """Pairs drawn uniformly without replacement: the baseline that any other rule has to beat."""

    name: ClassVar[str] = "random"
    least_members: ClassVar[int] = 0

    def choose(
        self,
        candidates: Candidates,
        members: Float[Tensor, "K B"],
        free: Bool[Tensor, " M"],
        n: int,
        rng: Generator,
    ) -> list[tuple[int, float | None]]:
        """`n` of the free pairs; they have no score."""
        rows = free.nonzero().flatten()
        return [(int(row), None) for row in rows[torch.randperm(len(rows), generator=rng)[:n]]]


ACQUISITIONS: dict[str, Acquisition] = {rule.name: rule for rule in (BALD(), DoubleThompson(), Margin(), RandomPairs())}


def acquisition(name: str) -> Acquisition:
    """A rule by its name.

    Raises:
        InputError: naming the rules that there are.
    """
    if name not in ACQUISITIONS:
        raise InputError(f"by is {name!r}; use one of {', '.join(ACQUISITIONS)}")
    return ACQUISITIONS[name]


def preference_probability(differences: Float[Tensor, "K M"]) -> Float[Tensor, " M"]:
    """The probability that the first of each pair is preferred: the members' mean of sigma(dr), not sigma of their mean."""
    return differences.sigmoid().mean(0)


def information(differences: Float[Tensor, "K M"]) -> Float[Tensor, " M"]:
    """Mutual information between a pair's answer and the member, in nats: BALD, exact over these members.

    At most log 2, and 0 where the members agree on the probability, however near to 1/2 it is.
    """
    first, second = differences.sigmoid(), (-differences).sigmoid()
    total = torch.special.entr(first.mean(0)) + torch.special.entr(second.mean(0))
    noise = (torch.special.entr(first) + torch.special.entr(second)).mean(0)
    return (total - noise).clamp(min=0)


def double_thompson_law(candidates: Candidates, members: Float[Tensor, "K B"]) -> Float[Tensor, " M"]:
    """2 f(i) f(j) for each pair (i, j), f the share of members whose best completion of the prompt this is.

    A prompt's pairs add up to the probability that two members drawn independently disagree (if all its pairs are there).
    Members that hold several completions equally good share their vote.
    """
    candidates.differences(members)  # the shape and the values are checked there
    values, owner = members.detach().to(torch.float64), candidates.prompt_index
    top = torch.full((len(values), len(candidates.prompts)), -torch.inf, dtype=torch.float64)
    top = top.scatter_reduce(1, owner.expand_as(values), values, "amax")
    best = (values == top[:, owner]).to(torch.float64)
    votes = torch.zeros_like(top).index_add(1, owner, best)
    share = (best / votes[:, owner]).mean(0)
    return 2 * share[candidates.pairs[:, 0]] * share[candidates.pairs[:, 1]]


def conditioned(members: Float[Tensor, "K B"], pair: Int[Tensor, "2"]) -> Float[Tensor, "K B"]:
    """The members as they would spread if the pair's answer were known, whatever it is; their mean stays.

    The answer counts as a Gaussian observation of dr with the Fisher information E[sigma(dr) sigma(-dr)] of a Bradley–Terry
    label. The members' deviations are transformed so that their covariance becomes the conditional one,
    C - c c' / (v + 1 / w), exactly (Potter's square-root update; Andrews 1968).
    """
    mean = members.mean(0, keepdim=True)
    deviation = members - mean
    d = members[:, pair[0]] - members[:, pair[1]]
    along = deviation[:, pair[0]] - deviation[:, pair[1]]
    v, w = (along @ along) / len(members), (d.sigmoid() * (-d).sigmoid()).mean()
    c = along @ deviation / len(members)
    kept = 1 / (1 + w * v)  # the share of v that the answer leaves
    return mean + deviation - w * kept / (1 + kept.sqrt()) * torch.outer(along, c)


def _best(score: Float[Tensor, " M"], allowed: Bool[Tensor, " M"], rng: Generator) -> int:
    """The allowed row with the highest score; among equal ones any."""
    ranked = score.masked_fill(~allowed, -torch.inf)
    ties = ((ranked == ranked.max()) & allowed).nonzero().flatten()
    return int(ties[torch.randint(len(ties), (1,), generator=rng)])
