"""The laws that `explain` names, proved on languages that can be listed.

Three independent computations meet here: closed forms (`explain.laws`, `explain.fixed_points`), the expected updates followed
to rest (`implied_law`), and the libraries' losses written down as they are, whose gradient over every group of draws must
vanish at that law.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tiltlm.errors import InputError
from tiltlm.explanation import (
    FORMATS,
    KLTerm,
    Objective,
    Sampling,
    detect,
    explain,
    implied_law,
    law_of,
    laws,
    rest_points,
)
from tiltlm.explanation.fixed_points import advantage_gap
from tiltlm.explanation.implied import drift
from tiltlm.explanation.tree import tree
from tiltlm.posterior import exact as ex
from tiltlm.testing import fixture_a, fixture_b, posterior_policy, small_language

LANGUAGES = {"a": fixture_a, "b": fixture_b, "small": small_language}
TOLERANCE = 1e-9


@pytest.fixture(scope="module", params=LANGUAGES)
def exact(request):
    world = LANGUAGES[request.param]()
    return ex.posterior(world.target, world.prompts)


@pytest.fixture(scope="module")
def small():
    world = small_language()
    return ex.posterior(world.target, world.prompts)


def gap(law, other):
    return float((law.exp() - other.exp()).abs().max())


# --- closed forms against the updates followed to rest; each with the wrong formula that must not pass ---

LAWS = {
    "RLOO, k1 in the reward": (
        lambda b: Objective(reward_kl=KLTerm(b, "k1", "sequence")),
        laws.tilted,
        lambda e, b: laws.tilted(e, 1.05 * b),
    ),
    "Dr. GRPO, KL of the completion in the loss": (
        lambda b: Objective(loss_kl=KLTerm(b, "k2", "sequence"), baseline="group mean", group=4, length="constant"),
        lambda e, b: laws.tilted(e, b / (1 - 1 / 4)),
        laws.tilted,
    ),
    "OpenRLHF's dr_grpo: the KL is in the reward, but not in the baseline": (
        lambda b: Objective(
            reward_kl=KLTerm(b), baseline="group mean", baseline_on="reward", group=2, length="batch mean"
        ),
        lambda e, b: laws.tilted(e, 2 * b),
        laws.tilted,
    ),
    "group mean with the KL inside": (
        lambda b: Objective(reward_kl=KLTerm(b), baseline="group mean", group=2),
        laws.tilted,
        lambda e, b: laws.tilted(e, 2 * b),
    ),
    "k3 of the completion in the loss": (
        lambda b: Objective(loss_kl=KLTerm(b, "k3", "sequence")),
        laws.forward_kl_law,
        laws.tilted,
    ),
    "k3 of the completion times its ratio": (
        lambda b: Objective(loss_kl=KLTerm(b, "k3", "sequence", corrected=True)),
        laws.tilted,
        laws.forward_kl_law,
    ),
    "k3 of the completion in reward and loss": (
        lambda b: Objective(reward_kl=KLTerm(b, "k3", "sequence"), loss_kl=KLTerm(b, "k3", "sequence")),
        laws.tilted,
        lambda e, b: laws.tilted(e, 2 * b),
    ),
    "token k2 in the loss": (
        lambda b: Objective(loss_kl=KLTerm(b, "k2")),
        laws.own_token_law,
        laws.tilted,
    ),
    "token k3 times its ratio (TRL's default)": (
        lambda b: Objective(
            loss_kl=KLTerm(b, "k3", corrected=True), baseline="group mean", group=8, length="batch mean"
        ),
        lambda e, b: laws.own_token_law(e, b / (1 - 1 / 8)),
        lambda e, b: laws.own_token_forward_law(e, b / (1 - 1 / 8)),
    ),
    "token k3 in the loss (GRPO as published)": (
        lambda b: Objective(loss_kl=KLTerm(b, "k3")),
        laws.own_token_forward_law,
        laws.own_token_law,
    ),
    "discounted": (
        lambda b: Objective(reward_kl=KLTerm(b), baseline="critic", gamma=0.9),
        lambda e, b: laws.discounted_law(e, b, 0.9),
        laws.tilted,
    ),
    "1/|x| with the KL inside": (
        lambda b: Objective(reward_kl=KLTerm(b, "k1", "sequence"), length="sequence mean"),
        laws.tilted,
        lambda e, b: laws.tilted(e, 1.05 * b),
    ),
    "GRPO normalisation of reward and KL together": (
        lambda b: Objective(
            reward_kl=KLTerm(b, "k1", "sequence"), baseline="group mean", scale="group std", group=None
        ),
        laws.tilted,
        lambda e, b: laws.tilted(e, 1.05 * b),
    ),
    "CISPO's clamp at 0.2": (
        lambda b: Objective(loss_kl=KLTerm(b, "k2", "sequence"), policy_scale=0.2),
        lambda e, b: laws.tilted(e, 5 * b),
        laws.tilted,
    ),
    "clipped reward": (
        lambda b: Objective(reward_kl=KLTerm(b), reward_clip=(-0.2, 0.5)),
        lambda e, b: laws.tilted(e, b, e.reward.clamp(-0.2, 0.5) - e.reward),
        laws.tilted,
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_updates_settle_at_the_law_that_is_named(exact, name):
    objective, truth, wrong = LAWS[name]
    beta = exact.beta
    law = implied_law(objective(beta), exact)
    assert abs(float(law.exp().sum()) - 1) < 1e-12
    assert gap(law, truth(exact, beta)) < TOLERANCE
    assert gap(law, wrong(exact, beta)) > 1e-3


def test_length_bonus_has_the_known_kappa():
    world = fixture_b()
    exact = ex.posterior(world.target, world.prompts)
    law, kappa = laws.length_bonus_law(exact, exact.beta)
    lengths = tree(exact).lengths
    assert kappa == pytest.approx(0.077401, abs=5e-7)
    assert float((law.exp() * lengths).sum()) == pytest.approx(3.5132, abs=5e-5)
    assert float((exact.log_posterior.exp() * lengths).sum()) == pytest.approx(3.2972, abs=5e-5)
    objective = Objective(loss_kl=KLTerm(exact.beta, "k2", "sequence"), length="sequence mean")
    settled = implied_law(objective, exact)
    assert gap(settled, law) < TOLERANCE
    assert gap(settled, exact.log_posterior) > 1e-2
    numbers = explain(objective, exact=exact).numbers
    assert numbers["E|x| there"] == pytest.approx(3.513235, abs=1e-6)
    assert numbers["E|x| at p*"] == pytest.approx(3.297160, abs=1e-6)


def test_without_a_baseline_one_over_length_tilts_even_a_kl_in_the_reward():
    world = fixture_b()
    exact = ex.posterior(world.target, world.prompts)
    objective = Objective(reward_kl=KLTerm(exact.beta, "k1", "sequence"), baseline="none", length="sequence mean")
    law = implied_law(objective, exact)
    residual = exact.reward - exact.beta * (law - exact.log_prior)
    slope = residual / tree(exact).lengths
    assert float(slope.max() - slope.min()) < 1e-10, "reward - KL is a multiple of the length, as the formula says"
    assert abs(float(slope.mean())) > 0.01


def test_whitened_token_rewards_pay_for_length():
    world = fixture_b()
    exact = ex.posterior(world.target, world.prompts)
    objective = Objective(reward_kl=KLTerm(exact.beta), baseline="critic", reward_whitening="tokens")
    law = implied_law(objective, exact)
    branches = tree(exact)
    paid = -exact.beta * (branches.conditionals(law) - branches.conditionals(exact.log_prior))
    paid[torch.arange(len(law)), branches.lengths.long() - 1] += exact.reward
    share = law.exp()[:, None] * branches.mask
    share = share / share.sum()
    mean = (share * paid).sum()
    deviation = (share * (paid - mean) ** 2).sum().sqrt()
    bonus = mean * (deviation - 1) * branches.lengths
    assert gap(law, laws.tilted(exact, exact.beta, bonus)) < TOLERANCE
    assert gap(law, exact.log_posterior) > 1e-2


def test_a_normalised_advantage_is_self_consistent(small):
    """pi proportional to pi0 exp(A_G / beta), the advantage listed over all pairs of other draws, not as implied_law does."""
    objective = Objective(
        loss_kl=KLTerm(0.7, "k2", "sequence"), baseline="group mean", scale="group std", group=3, ddof=1, eps=1e-4
    )
    law = implied_law(objective, small)
    reward, p = small.reward, law.exp()
    advantage = torch.zeros_like(reward)
    for i, j, k in itertools.product(range(len(p)), repeat=3):
        group = reward[[i, j, k]]
        advantage[i] += p[j] * p[k] * (group[0] - group.mean()) / (group.std() + 1e-4)
    joint = small.log_prior + advantage / 0.7
    assert gap(law, joint - joint.logsumexp(0)) < TOLERANCE
    assert gap(law, laws.tilted(small, 0.7)) > 1e-2


# --- whatever the verdict names is where the updates settle: every combination of the settings that have closed forms ---

NAMED = {
    "p*": laws.tilted,
    "forward-KL law": laws.forward_kl_law,
    "own-token-KL law": laws.own_token_law,
    "own-token forward-KL law": laws.own_token_forward_law,
}


def combinations() -> Iterator[Objective]:
    estimators = [
        KLTerm(0.7, estimator, level, corrected)
        for estimator in ("k1", "k2", "k3")
        for level in ("token", "sequence")
        for corrected in (False, True)
    ]
    places = [{"loss_kl": term} for term in estimators]
    places += [{"reward_kl": term} for term in estimators if not term.corrected]
    places += [{"reward_kl": KLTerm(0.4), "loss_kl": replace(term, beta=0.3)} for term in estimators]
    baselines = [
        {"baseline": "leave-one-out"},
        {"baseline": "none"},
        {"baseline": "group mean", "group": 3},
        {"baseline": "group mean", "group": 3, "baseline_on": "reward"},
        {"baseline": "critic"},
        {"baseline": "group mean", "group": None, "scale": "group std"},
        {"baseline": "leave-one-out", "group": None, "scale": "batch std"},
    ]
    lengths = [{"length": "constant"}, {"length": "sequence mean"}]
    for place, baseline, length in itertools.product(places, baselines, lengths):
        settings: dict[str, Any] = place | baseline | length
        yield Objective(**settings)


def test_the_verdict_is_where_the_updates_settle(small):
    """p* is said of nothing that settles elsewhere, and no other law is said of what settles at p*."""
    checked = dict.fromkeys(NAMED, 0)
    for objective in combinations():
        law = law_of(objective)
        if law.name in NAMED and law.beta is not None:
            truth = NAMED[law.name](small, law.beta)
            assert drift_at(objective, small, truth) < TOLERANCE, (law, objective)
            checked[law.name] += 1
        elif law.name == "none":
            assert objective.reward_kl is None
            assert drift_at(objective, small, laws.tilted(small, objective.beta)) > 1e-3, (law, objective)
        else:
            assert drift_at(objective, small, laws.tilted(small, objective.beta)) > 1e-6, (law, objective)
    assert all(count >= 2 for count in checked.values()), checked
    assert checked["p*"] > 30


def drift_at(objective, exact, law):
    return float(drift(objective, exact, tree(exact), law).abs().max())


# --- the same laws against the losses that libraries compute, summed over every pair of draws ---


def trl_grpo(log_q, old, ref, reward, mask, *, beta, corrected, std, aggregate):
    """TRL's GRPOTrainer._compute_loss at beta, for one group."""
    advantage = reward - reward.mean()
    if std:
        advantage = advantage / (reward.std() + 1e-4)
    ratio = (log_q - old).exp()
    kl = (ref - log_q).exp() - (ref - log_q) - 1
    token = -ratio * advantage[:, None] + beta * (kl * ratio if corrected else kl)
    if aggregate == "grpo":
        return ((token * mask).sum(-1) / mask.sum(-1)).mean()
    return (token * mask).sum() / (len(reward) * 4)


def trl_rloo(log_q, old, ref, reward, mask, *, beta):
    """TRL's RLOOTrainer: k1 of the whole completion in the reward, leave-one-out, one ratio a completion."""
    total = reward - beta * ((old - ref) * mask).sum(-1)
    advantage = total - (total.sum() - total) / (len(total) - 1)
    return -(((log_q - old) * mask).sum(-1).exp() * advantage).mean()


def openrlhf(log_q, old, ref, reward, mask, *, beta):
    """OpenRLHF's dr_grpo: the reward minus the group's mean, then minus the KL to go, then PPO's loss."""
    centred = reward - reward.mean()
    paid = -beta * (old - ref) * mask
    last = mask.sum(-1).long() - 1
    paid = paid + torch.nn.functional.one_hot(last, mask.shape[1]) * centred[:, None]
    to_go = paid.flip(-1).cumsum(-1).flip(-1)
    return -((log_q - old).exp() * to_go * mask).sum() / (len(reward) * 4)


def drift_of_loss(loss, exact, law, group=2):
    """Largest gradient of the expected loss with respect to any logit of a free table, at `law`."""
    branches = tree(exact)
    ref, at = branches.conditionals(exact.log_prior), branches.conditionals(law)
    mask = branches.mask.double()
    wanted = torch.zeros_like(at)
    for rows in itertools.product(range(len(law)), repeat=group):
        index = list(rows)
        leaf = at[index].clone().requires_grad_()
        value = loss(leaf, at[index], ref[index], exact.reward[index], mask[index])
        (grad,) = torch.autograd.grad(value, leaf)
        wanted.index_add_(0, torch.tensor(index), grad * float(law[index].sum().exp()))
    wanted = torch.where(branches.mask, wanted / law.exp()[:, None], 0.0)
    centred = branches.centre(law, branches.children_mean(law, wanted))
    return float((branches.log_mass(law).exp() * centred).abs().max())


LIBRARIES = {
    "TRL RLOO": (lambda *a: trl_rloo(*a, beta=0.7), {"trainer": "rloo", "beta": 0.7}),
    "TRL GRPO, beta 0.7": (
        lambda *a: trl_grpo(*a, beta=0.7, corrected=True, std=True, aggregate="dr_grpo"),
        {"trainer": "grpo", "beta": 0.7, "num_generations": 2, "loss_type": "dr_grpo"},
    ),
    "TRL GRPO as published": (
        lambda *a: trl_grpo(*a, beta=0.7, corrected=False, std=True, aggregate="grpo"),
        {
            "trainer": "grpo",
            "beta": 0.7,
            "num_generations": 2,
            "loss_type": "grpo",
            "use_bias_correction_kl": False,
        },
    ),
    "TRL Dr. GRPO": (
        lambda *a: trl_grpo(*a, beta=0.7, corrected=False, std=False, aggregate="dr_grpo"),
        {
            "trainer": "grpo",
            "beta": 0.7,
            "num_generations": 2,
            "loss_type": "dr_grpo",
            "scale_rewards": False,
            "use_bias_correction_kl": False,
        },
    ),
    "OpenRLHF dr_grpo": (
        lambda *a: openrlhf(*a, beta=0.7),
        "openrlhf.cli.train_ppo_ray --advantage_estimator dr_grpo --init_kl_coef 0.7 --n_samples_per_prompt 2",
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_s_own_loss_rests_at_the_law_of_its_configuration(small, name):
    loss, config = LIBRARIES[name]
    objective = FORMATS[detect(config) or ""](config).objective
    assert isinstance(objective, Objective)
    law = implied_law(objective, small)
    assert drift_of_loss(loss, small, law) < TOLERANCE
    assert drift_of_loss(loss, small, laws.tilted(small, 0.9)) > 1e-3, "the loss does not rest anywhere else"
    if name != "TRL RLOO":
        assert drift_of_loss(loss, small, laws.tilted(small, 0.7)) > 1e-3, "and p* is not where it rests"


def test_p_star_is_where_rloo_rests_and_the_tabular_policy_agrees(small):
    world = small_language()
    policy = posterior_policy(world)
    law = implied_law(Objective(reward_kl=KLTerm(small.beta)), small)
    assert gap(law, small.log_prob(policy)) < TOLERANCE


# --- rewards of 0 or 1: every number of the table ---


@pytest.mark.parametrize(
    ("settings", "stable", "unstable"),
    [
        ({"beta": 1.0}, 0.681301, 0.934687),
        ({"beta": 2.0}, 0.408733, 0.994059),
        ({"beta": 0.5}, None, None),
        ({"beta": 0.5, "group": 2}, 0.648786, None),
        ({"beta": 0.5, "group": 4}, 0.878550, None),
        ({"beta": 0.5, "group": 8}, 0.976735, None),
        ({"beta": 0.5, "group": 16}, 0.998180, None),
        ({"beta": 0.5, "forward": True}, 0.870813, None),
        ({"beta": 0.5, "forward": True, "scale": "none"}, 0.653113, None),
    ],
)
def test_rest_points(settings, stable, unstable):
    points = rest_points(**settings)
    assert len(points.stable) == (stable is not None)
    assert len(points.unstable) == (unstable is not None)
    if stable is not None:
        assert points.stable[0] == pytest.approx(stable, abs=5e-7)
    if unstable is not None:
        assert points.unstable[0] == pytest.approx(unstable, abs=5e-7)


def test_rest_points_of_the_posterior_and_of_two_draws():
    assert rest_points(1.0).posterior == pytest.approx(0.404610, abs=5e-7)
    assert rest_points(2.0).posterior == pytest.approx(0.291875, abs=5e-7)
    two = rest_points(0.5, group=2)
    assert two.stable[0] == pytest.approx(two.posterior, abs=1e-12), (
        "two draws and the population's deviation are exact"
    )
    sample = rest_points(0.5, group=2, ddof=1).stable[0]
    assert math.log(sample / (1 - sample)) - math.log(0.25) == pytest.approx(2 / math.sqrt(2), abs=1e-10)
    none = rest_points(0.5, scale="none", shrink=0.75).stable[0]
    assert math.log(none / (1 - none)) - math.log(0.25) == pytest.approx(0.75 / 0.5, abs=1e-10)


@pytest.mark.parametrize("group", [2, 3, 5])
@pytest.mark.parametrize("ddof", [0, 1])
def test_the_advantage_of_a_success_by_listing_every_group(group, ddof):
    p, total = 0.3, 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=group - 1):
        share = math.prod(p if o else 1 - p for o in outcome)
        for first, sign in ((1.0, 1), (0.0, -1)):
            drawn = torch.tensor([first, *outcome], dtype=torch.float64)
            deviation = float(drawn.var(correction=ddof).sqrt())
            total += sign * share * (float(drawn[0] - drawn.mean()) / deviation if deviation else 0.0)
    assert advantage_gap(p, 1 - p, group, ddof) == pytest.approx(total, abs=1e-12)


def test_rest_points_are_those_of_the_updates_on_a_language_with_rewards_of_0_and_1(small):
    """A reward of 0 or 1 on seven strings: the group-normalised law's success probability is the table's."""
    good = (small.reward > small.reward.median()).double()
    binary = replace(small, scored=replace(small.scored, log_evidence=good / small.beta))
    p0 = float((small.log_prior.exp() * good).sum())
    objective = Objective(
        loss_kl=KLTerm(0.8, "k2", "sequence"), baseline="group mean", scale="group std", group=4, ddof=0
    )
    law = implied_law(objective, binary)
    found = rest_points(0.8, p0=p0, group=4)
    assert float((law.exp() * good).sum()) == pytest.approx(found.stable[0], abs=1e-9)


# --- what implied_law does not say ---


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Objective(), "beta is 0"),
        (Objective(loss_kl=KLTerm(0.1, "k1")), "beta is 0 (or acts nowhere)"),
        (Objective(reward_kl=KLTerm(0.1), sampling=Sampling(top_p=0.9)), "sampling"),
        (Objective(reward_kl=KLTerm(0.1), sync_every=10), "sync_every is 10"),
        (Objective(reward_kl=KLTerm(0.1), entropy=0.01), "entropy is 0.01"),
        (Objective(reward_kl=KLTerm(0.1, "full")), "estimator is 'full'"),
        (Objective(loss_kl=KLTerm(0.1, "k2"), scale="group std", group=200), "too many to list"),
    ],
)
def test_what_is_not_modelled_is_refused(small, objective, words):
    with pytest.raises(InputError) as refused:
        implied_law(objective, small)
    assert words in str(refused.value)


def test_an_objective_that_does_not_settle_is_reported():
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    objective = Objective(loss_kl=KLTerm(0.02, "k2", "sequence"), baseline="group mean", scale="group std", group=None)
    with pytest.raises(InputError, match="did not settle"):
        implied_law(objective, exact, steps=200)


@pytest.mark.parametrize(("beta", "p0"), [(0.0, 0.2), (1.0, 0.0), (1.0, 1.0)])
def test_rest_points_of_nonsense_are_refused(beta, p0):
    with pytest.raises(InputError):
        rest_points(beta, p0=p0)
