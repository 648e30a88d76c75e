"""The law that an objective settles at on a language that can be listed, found by following its own expected updates.

The policy is a free table of conditionals. A step of the updates wants some amount of each token's log-probability; what
it wants on average over the other draws of the group is the token's signal. The law is stationary when, after every
prefix, the expected signal is the same for every next token. Nothing here knows a closed form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.explanation.objective import KLTerm, Objective
from tiltlm.explanation.tree import Tree, tree
from tiltlm.posterior.exact import Exact

TOLERANCE = 1e-12
STEPS = 4_000
TUPLES = 200_000
"""Groups that may be listed when the advantage depends on the whole group."""


def implied_law(
    objective: Objective, exact: Exact, *, start: Float[Tensor, " K"] | None = None, steps: int = STEPS
) -> Float[Tensor, " K"]:
    """log-probabilities of the completions under the law that `objective` settles at, in float64.

    Args:
        exact: the posterior whose prior and reward are meant; its own beta is not looked at.
        start: where to start; the prior by default. Objectives with several stable laws have one from each start.
        steps: the most updates.

    Raises:
        InputError: if the objective has no KL to settle against, has a part that is not modelled, or did not settle.
    """
    require_modelled(objective)
    branches = tree(exact)
    law = exact.log_prior if start is None else start
    rate, highest, size = 0.5, 0.9, math.inf
    wanted = drift(objective, exact, branches, law)
    for _ in range(steps):
        size = float(wanted.abs().max()) / objective.beta
        if size < TOLERANCE:
            return law
        mass = branches.log_mass(law)
        step = (rate * wanted / objective.beta).clamp(-0.5, 0.5)
        trial = branches.law(mass - mass[branches.parent] + step)
        new = drift(objective, exact, branches, trial)
        growth = float(new.abs().max()) / float(wanted.abs().max())
        if not growth < 1.5 and rate > 1e-4:
            rate /= 2
            continue
        if growth > 1 and size > 10 * TOLERANCE:  # going round; below, it may be rounding
            highest = max(0.9 * highest, 0.02)
        rate = min(rate * 1.02, highest)
        law, wanted = trial, new
    raise InputError(
        f"the objective did not settle in {steps} updates (remaining drift {size:.1e}); it may have no stationary law inside, "
        f"so raise beta or give another start"
    )


def drift(objective: Objective, exact: Exact, branches: Tree, law: Float[Tensor, " K"]) -> Float[Tensor, " N"]:
    """What an update wants of each conditional's logit at `law`, relative to its siblings; zero at a stationary law."""
    wanted = signal(objective, exact, branches, law)
    return branches.centre(law, branches.children_mean(law, wanted))


def require_modelled(objective: Objective) -> None:
    """Raise if `implied_law` cannot speak for this objective.

    Raises:
        InputError: naming the field.
    """
    term = objective.loss_kl
    holds = (objective.reward_kl and objective.reward_kl.beta > 0) or (
        term and term.beta > 0 and (term.estimator != "k1" or term.corrected)
    )
    if not holds:
        raise InputError("beta is 0 (or acts nowhere), so the objective has no law to settle at; give it a KL penalty")
    plain = {
        "sampling": objective.sampling.top_p == 1 and not objective.sampling.top_k and not objective.sampling.min_p,
        "scoring_temperature": objective.sampling.temperature == objective.scoring_temperature,
        "mask_truncated": not objective.mask_truncated,
        "sync_every": objective.sync_every == 0,
        "kl_target": objective.kl_target is None,
        "entropy": objective.entropy == 0,
        "drops_uniform_groups": not objective.drops_uniform_groups,
        "unmodelled": not objective.unmodelled,
        "importance": objective.importance == "token" or term is None or not term.corrected,
        "baseline": objective.baseline not in {"greedy", "other"},
        "loss_kl_length": objective.loss_kl_length in {None, objective.length},
    }
    for name, good in plain.items():
        if not good:
            raise InputError(
                f"{name} is {getattr(objective, name)!r}, which implied_law does not model; take it out to see the rest"
            )


# --- what an update wants of each token, averaged over the rest of the group ---


def signal(objective: Objective, exact: Exact, branches: Tree, law: Float[Tensor, " K"]) -> Float[Tensor, "K T"]:
    """Expected coefficient of each token's log-probability in an ascent step."""
    ratios = branches.conditionals(law) - branches.conditionals(exact.log_prior)
    weight = 1 / branches.lengths if objective.length == "sequence mean" else torch.ones(len(law), dtype=torch.float64)
    weight = weight[:, None].expand_as(ratios)
    wanted = objective.policy_scale * weight * _advantage(objective, exact, branches, law, ratios)
    if objective.loss_kl is not None:
        # The KL of a whole state is weighed alike whichever token follows: by what the state expects.
        kl_weight = _values(weight, branches, law) if objective.loss_kl.estimator == "full" else weight
        wanted = wanted - objective.loss_kl.beta * kl_weight * _slope(objective.loss_kl, ratios)
    return torch.where(branches.mask, wanted, 0.0)


def _advantage(objective: Objective, exact: Exact, branches: Tree, law: Tensor, ratios: Tensor) -> Tensor:
    reward = exact.reward if objective.reward_clip is None else exact.reward.clamp(*objective.reward_clip)
    term, gamma = objective.reward_kl, objective.gamma
    penalty = torch.zeros_like(ratios) if term is None else -term.beta * _estimate(term, ratios, branches)
    paid = penalty + _at_end(reward, branches)
    if objective.reward_whitening == "tokens":
        paid = _whiten(paid, branches, law)
    elif objective.reward_whitening == "score":
        paid = penalty + _at_end(reward, branches) / _moments(reward, law)[1]
    if objective.baseline == "critic" or gamma != 1:
        return _to_go(paid, gamma) - _values(_to_go(paid, gamma), branches, law)
    if objective.baseline_on == "total":
        common = objective.group is None or objective.scale == "batch std"
        # A division by one number of everything, KL and all, changes the size of a step and nothing else.
        scale = "none" if common and not objective.kl_outside_scale else objective.scale
        shaped = _normalise(objective, paid.sum(-1), law, scale)
        return shaped[:, None].expand_as(ratios)
    scale = objective.scale if objective.scale_on == "reward" else "none"
    shaped = _normalise(objective, (paid - penalty).sum(-1), law, scale)
    return shaped[:, None] + _to_go(penalty, 1.0)


def _normalise(objective: Objective, score: Tensor, law: Tensor, scale: str) -> Tensor:
    """E[advantage | own score] over the other draws of the group."""
    if scale == "group std" and objective.group is not None:
        return group_advantage(score, law, objective.group, objective.ddof, objective.eps)
    mean, std = _moments(score, law)
    shrink = 1.0
    if objective.baseline == "group mean" and objective.group is not None:
        shrink = 1 - 1 / objective.group
    centred = score if objective.baseline == "none" else shrink * (score - mean)
    if scale == "none":
        return centred
    return centred / (std + objective.eps) if std + objective.eps > 0 else torch.zeros_like(centred)


def group_advantage(
    score: Float[Tensor, " K"], log_law: Float[Tensor, " K"], group: int, ddof: int, eps: float
) -> Float[Tensor, " K"]:
    """E[(s_1 - mean) / (std + eps) | s_1] over the other group - 1 draws, by listing their multisets.

    A group whose scores are all equal has advantage 0.

    Raises:
        InputError: if there are more than `TUPLES` multisets.
    """
    values, which = score.unique(return_inverse=True)
    share = torch.zeros(len(values), dtype=torch.float64).index_add_(0, which, log_law.exp())
    count = math.comb(len(values) + group - 2, group - 1)
    if count > TUPLES:
        raise InputError(f"group is {group}: {count} groups of {len(values)} scores are too many to list; take fewer")
    others, ways = _multisets(len(values), group - 1)
    probability = ways * share[others].prod(-1)
    together = torch.cat(
        [values[:, None, None].expand(-1, len(others), 1), values[others].expand(len(values), -1, -1)], -1
    )
    mean, std = together.mean(-1), together.var(-1, correction=ddof).sqrt()
    flat = together.amax(-1) - together.amin(-1) <= 1e-14
    each = torch.where(flat, 0.0, (values[:, None] - mean) / (std + eps))
    return (each * probability).sum(-1)[which]


def _multisets(kinds: int, size: int) -> tuple[Int[Tensor, "M n"], Float[Tensor, " M"]]:
    found = list(itertools.combinations_with_replacement(range(kinds), size))
    ways = [
        math.factorial(size) / math.prod(math.factorial(len(list(run))) for _, run in itertools.groupby(combination))
        for combination in found
    ]
    return torch.tensor(found).view(len(found), size), torch.tensor(ways, dtype=torch.float64)


# --- the KL's estimators: their values in a reward, their slopes in a loss ---

_VALUE: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda ratio: ratio,
    "rao-blackwell": lambda ratio: ratio,  # in expectation, both halves together
    "k2": lambda ratio: ratio**2 / 2,
    "k3": lambda ratio: (-ratio).exp() - 1 + ratio,
    "abs": torch.abs,
}
_SLOPE: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": torch.ones_like,
    "k2": lambda ratio: ratio,
    "k3": lambda ratio: 1 - (-ratio).exp(),
    "abs": torch.sign,
    "full": lambda ratio: ratio,  # in expectation over the next token
}


def _estimate(term: KLTerm, ratios: Tensor, branches: Tree) -> Tensor:
    """The estimator's value, put on each token (or on the last, for a sequence-level one)."""
    if term.estimator == "full":
        raise InputError("estimator is 'full' in the reward, which implied_law does not model; take k1")
    if term.level == "token":
        return torch.where(branches.mask, _VALUE[term.estimator](ratios), 0.0)
    return _at_end(_VALUE[term.estimator](ratios.sum(-1)), branches)


def _slope(term: KLTerm, ratios: Tensor) -> Tensor:
    """d estimator / d log pi, at pi_old = pi; with the ratio in front, the estimator's own value joins it."""
    if term.estimator == "rao-blackwell":
        return ratios.sum(-1, keepdim=True).expand_as(ratios)
    at = ratios if term.level == "token" else ratios.sum(-1, keepdim=True).expand_as(ratios)
    slope = _SLOPE[term.estimator](at)
    return slope + _VALUE[term.estimator](at) if term.corrected else slope


# --- sums over tokens ---


def _at_end(value: Tensor, branches: Tree) -> Tensor:
    last = branches.mask.sum(-1, keepdim=True) - 1
    return torch.zeros(branches.node.shape, dtype=torch.float64).scatter_(1, last, value[:, None])


def _to_go(paid: Tensor, gamma: float) -> Tensor:
    """Discounted sum of what a token and the later ones are paid."""
    out, total = torch.zeros_like(paid), torch.zeros(len(paid), dtype=torch.float64)
    for t in reversed(range(paid.shape[1])):
        total = paid[:, t] + gamma * total
        out[:, t] = total
    return out


def _values(returns: Tensor, branches: Tree, law: Tensor) -> Tensor:
    """E[return | prefix before the token]."""
    mean = branches.children_mean(law, returns)
    mass = branches.log_mass(law).exp()
    value = torch.zeros_like(mean).index_add_(0, branches.parent[1:], (mass * mean)[1:]) / mass
    return value[branches.parent][branches.node]


def _moments(score: Tensor, law: Tensor) -> tuple[Tensor, Tensor]:
    mean = (law.exp() * score).sum()
    return mean, (law.exp() * (score - mean) ** 2).sum().sqrt()


def _whiten(paid: Tensor, branches: Tree, law: Tensor) -> Tensor:
    """Token rewards divided by their deviation over the batch's tokens, their mean put back."""
    share = torch.where(branches.mask, law.exp()[:, None], 0.0)
    share = share / share.sum()
    mean = (share * paid).sum()
    std = (share * (paid - mean) ** 2).sum().sqrt()
    return torch.where(branches.mask, (paid - mean) / std + mean, 0.0)
