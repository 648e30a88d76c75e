"""Bayesian heads: the MAP against scikit-learn, the Hessian against autograd, the posterior against Markov chains."""

import math

import pytest
import torch
from scipy.integrate import quad
from sklearn.linear_model import BayesianRidge, LogisticRegression
from torch.testing import assert_close

from tiltlm.errors import InputError, TiltWarning
from tiltlm.reward_models.glm import Categorical, Gaussian, Logistic, best_mode, best_noise, hessian, mode, spread
from tiltlm.reward_models.posterior import (
    Ensemble,
    LinearPosterior,
    SoftmaxPosterior,
    Standardiser,
    bootstrap_rows,
    laplace,
    preference_probability,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeros(count):
    return torch.zeros(count, dtype=torch.float64)


def comparisons(rows=200, width=6, seed=0, scale=1.0):
    """Features of winners and losers under a known reward, by Bradley and Terry's model."""
    a, b = normal(rows, width, seed=seed), normal(rows, width, seed=seed + 1)
    truth = scale * torch.linspace(-1, 1, width, dtype=torch.float64)
    wins = torch.rand(rows, generator=torch.Generator().manual_seed(seed + 2)) < ((a - b) @ truth).sigmoid()
    return torch.where(wins[:, None], a, b), torch.where(wins[:, None], b, a), truth


def sure(rows):
    return Logistic(torch.ones(rows, dtype=torch.float64), zeros(rows))


# --- the mode ---


@pytest.mark.parametrize("precision", [0.1, 1.0, 30.0])
def test_the_map_of_comparisons_is_scikit_learns(precision):
    won, lost, _ = comparisons()
    plain = Standardiser.identity(6)
    found = laplace(won, sure(200), other=lost, precision=precision, scaling=plain)
    flip = torch.arange(200) % 2 == 0  # scikit-learn wants both classes; a comparison reads the same from either side
    design = torch.where(flip[:, None], won - lost, lost - won)
    theirs = LogisticRegression(C=1 / precision, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(design, flip)
    assert_close(found.weights, torch.tensor(theirs.coef_[0]), rtol=0, atol=1e-6)


def test_the_map_of_three_classes_is_scikit_learns():
    features = normal(150, 4)
    label = (features @ normal(4, 3, seed=5) + normal(150, 3, seed=6)).argmax(-1)
    found = laplace(features, Categorical(label, 3), precision=2.0, scaling=Standardiser.identity(4))
    theirs = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(features, label)
    assert isinstance(found, SoftmaxPosterior)
    assert_close(found.weights, torch.tensor(theirs.coef_), rtol=0, atol=1e-6)


def test_regression_finds_the_noise_and_prior_that_bayesian_ridge_finds():
    features = normal(300, 5)
    target = features @ torch.tensor([1.0, -2.0, 0.5, 0.0, 0.3], dtype=torch.float64) + 0.7 * normal(300, seed=9)
    target, features = target - target.mean(), features - features.mean(0)
    noise = best_noise(features, target, None, bias=False)
    found = best_mode(features, Gaussian(target, noise), bias=False)
    flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
    theirs = BayesianRidge(fit_intercept=False, tol=1e-10, max_iter=1000, **flat).fit(features, target)
    assert noise == pytest.approx(1 / theirs.alpha_, rel=0.01)
    assert float(found.precision[0]) == pytest.approx(theirs.lambda_, rel=0.05)
    assert_close(found.weights[0], torch.tensor(theirs.coef_), rtol=0, atol=1e-3)
    assert_close(torch.cholesky_inverse(found.factor), torch.tensor(theirs.sigma_), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        Logistic(
            torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64), 0.3 * normal(40, seed=4)
        ),
        Categorical(torch.arange(40) % 3, 3, smoothing=0.1),
        Gaussian(normal(40, seed=5), 0.4),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_gradient_and_hessian_are_autograds(loss):
    design, precision = normal(40, 4), torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
    weights = 0.5 * normal(loss.outputs, 4, seed=7)

    def penalised(flat):
        w = flat.view(loss.outputs, 4)
        return loss.value(design @ w.T) + 0.5 * (precision * w.square()).sum()

    theirs = torch.autograd.functional.hessian(penalised, weights.flatten())
    assert_close(hessian(design, loss, precision, weights), theirs, rtol=1e-10, atol=1e-10)
    found = mode(design, loss, precision)
    at = found.weights.flatten().requires_grad_()
    (slope,) = torch.autograd.grad(penalised(at), at)
    assert slope.abs().max() < 1e-7
    assert_close(found.factor @ found.factor.T, hessian(design, loss, precision, found.weights))


def test_the_evidence_of_a_gaussian_is_exact():
    design, target = normal(30, 3), normal(30, seed=1)
    found = mode(design, Gaussian(target, 0.5), torch.full((3,), 2.0, dtype=torch.float64))
    covariance = 0.5 * torch.eye(30, dtype=torch.float64) + design @ design.T / 2
    marginal = torch.distributions.MultivariateNormal(zeros(30), covariance).log_prob(target)
    assert found.log_evidence == pytest.approx(float(marginal), abs=1e-9)


def test_the_evidence_of_comparisons_is_close_to_the_integral():
    design = normal(25, 1)
    loss = sure(25)

    def joint(w):
        value = float(loss.value(torch.full((25, 1), w, dtype=torch.float64) * design))
        return math.exp(-value - 0.5 * w * w) / math.sqrt(2 * math.pi)

    truth = math.log(quad(joint, -20, 20, epsabs=1e-14)[0])
    assert mode(design, loss, torch.ones(1, dtype=torch.float64)).log_evidence == pytest.approx(truth, abs=0.02)


def test_the_prior_that_the_evidence_chooses_predicts_better_than_none():
    """Few comparisons of many features: the plain fit is sure and wrong."""
    won, lost, _ = comparisons(rows=60, width=40, seed=1, scale=0.4)
    new_won, new_lost, _ = comparisons(rows=2000, width=40, seed=11, scale=0.4)

    def nll(posterior, plain=False):
        difference, variance = posterior.difference(new_won, new_lost)
        p = difference.sigmoid() if plain else preference_probability(difference, variance)
        return -float(p.log().mean())

    bayesian = laplace(won, sure(60), other=lost)
    assert isinstance(bayesian, LinearPosterior)
    plain = laplace(won, sure(60), other=lost, precision=1e-4)
    print("NLL", nll(bayesian), "MAP of the same prior", nll(bayesian, plain=True), "no prior", nll(plain, plain=True))
    assert nll(bayesian) < nll(bayesian, plain=True) < nll(plain, plain=True)


def test_the_evidence_says_when_there_is_nothing_to_learn():
    a, b = normal(300, 2, seed=20), normal(300, 2, seed=21)
    half = torch.full((300,), 0.5, dtype=torch.float64)
    with pytest.warns(TiltWarning, match="say nothing"):
        laplace(a, Logistic(half, zeros(300)), other=b)


def test_margins_and_smoothing_move_the_mode():
    won, lost, _ = comparisons(rows=400)
    ones = torch.ones(400, dtype=torch.float64)

    def size(loss):
        return float(laplace(won, loss, other=lost, precision=1.0, scaling=Standardiser.identity(6)).weights.norm())

    base = size(Logistic(ones, zeros(400)))
    assert size(Logistic(ones, 0.5 * ones)) > base > size(Logistic(0.9 * ones, zeros(400)))


# --- the posterior ---


def chain(design, loss, precision, start, root, steps=40_000, seed=0):
    """Random-walk Metropolis with the posterior's own shape for steps; returns the kept states."""
    rng = torch.Generator().manual_seed(seed)
    width = len(start)

    def log_density(w):
        return -float(loss.value((design @ w)[:, None])) - 0.5 * float((precision * w.square()).sum())

    at, value, kept = start, log_density(start), []
    noise = torch.randn(steps, width, generator=rng, dtype=torch.float64) @ root.T * (2.4 / math.sqrt(width))
    uniform = torch.rand(steps, generator=rng, dtype=torch.float64).log().tolist()
    for step in range(steps):
        there = at + noise[step]
        other = log_density(there)
        if uniform[step] < other - value:
            at, value = there, other
        kept.append(at)
    return torch.stack(kept[steps // 10 :])


def test_the_posterior_is_the_markov_chains():
    won, lost, _ = comparisons(rows=150, width=3)
    posterior = laplace(won, sure(150), other=lost, precision=1.0, scaling=Standardiser.identity(3))
    states = chain(won - lost, sure(150), spread(1.0, 3, bias=False), posterior.weights, posterior.root, steps=15_000)
    sd = states.std(0)
    print("means apart by", ((states.mean(0) - posterior.weights) / sd).tolist(), "sds")
    assert ((states.mean(0) - posterior.weights) / sd).abs().max() < 0.25  # Laplace is at the mode, not at the mean
    assert_close(posterior.root @ posterior.root.T, states.T.cov(), rtol=0.25, atol=0.1 * float(sd.min()) ** 2)
    new_a, new_b = normal(50, 3, seed=30), normal(50, 3, seed=31)
    exact = ((new_a - new_b) @ states.T).sigmoid().mean(-1)
    got = posterior.preference(new_a, new_b)
    print("preference probabilities differ by", float((got - exact).abs().max()))
    assert (got - exact).abs().max() < 0.03


def test_mean_covariance_and_members_agree():
    won, lost, _ = comparisons()
    posterior = laplace(won, sure(200), other=lost, precision=1.0)
    few = normal(4, 6, seed=3)
    drawn = posterior.members(few, 20_000, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 4)
    sd = posterior.variance(few).sqrt()
    assert ((drawn.mean(0) - posterior.mean(few)) / sd).abs().max() < 0.03
    assert_close(drawn.T.cov(), posterior.covariance(few), rtol=0.05, atol=0.03 * float(sd.max()) ** 2)
    again = posterior.members(few[:2], 5, torch.Generator().manual_seed(7))
    assert_close(again, posterior.members(few, 5, torch.Generator().manual_seed(7))[:, :2])  # the same rewards


def test_a_preference_needs_the_variance_of_the_difference():
    """The negative control: the sum of the variances forgets what two completions share, here nearly everything."""
    width = 4
    root = torch.eye(width, dtype=torch.float64)
    posterior = LinearPosterior(torch.tensor([0.5, 0, 0, 0], dtype=torch.float64), root, Standardiser.identity(width))
    shared = 3 * normal(200, width, seed=1)
    a, b = shared + 0.3 * normal(200, width, seed=2), shared + 0.3 * normal(200, width, seed=3)
    states = posterior.draw(20_000, torch.Generator().manual_seed(0))
    exact = ((a - b) @ states.T).sigmoid().mean(-1)
    difference, variance = posterior.difference(a, b)
    pair = torch.stack([posterior.covariance(torch.stack([x, y])) for x, y in zip(a, b, strict=True)])
    assert_close(variance, pair[:, 0, 0] + pair[:, 1, 1] - 2 * pair[:, 0, 1], rtol=1e-9, atol=1e-9)
    wrong = preference_probability(difference, posterior.variance(a) + posterior.variance(b))
    print("right", float((posterior.preference(a, b) - exact).abs().max()), "wrong", float((wrong - exact).abs().max()))
    assert (posterior.preference(a, b) - exact).abs().max() < 0.01
    assert (wrong - exact).abs().max() > 0.04
    assert ((wrong - 0.5).abs() < 0.5 * (exact - 0.5).abs()).double().mean() > 0.8  # it hardly dares to say anything


def test_mackays_probability_is_close_to_the_integral():
    for mean in (-3.0, -0.5, 0.0, 1.0, 4.0):
        for variance in (0.01, 1.0, 10.0):
            sd = math.sqrt(variance)

            def integrand(z, mean=mean, sd=sd):
                return math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / (1 + math.exp(-(mean + sd * z)))

            truth = quad(integrand, -10, 10)[0]
            got = float(preference_probability(torch.tensor([mean]), torch.tensor([variance])))
            assert abs(got - truth) < 0.02


def test_three_classes_by_draws_and_as_rewards():
    features = normal(90, 3)
    label = (features @ normal(3, 3, seed=5)).argmax(-1)
    posterior = laplace(features, Categorical(label, 3), precision=1.0, bias=True)
    rng = torch.Generator().manual_seed(0)
    shares = posterior.probabilities(features, rng)
    assert_close(shares.sum(-1), torch.ones(90, dtype=torch.float64))
    assert (shares.argmax(-1) == label).double().mean() > 0.9
    rewards = [posterior.reward(c) for c in range(3)]
    total = sum(r.mean(features) for r in rewards)
    assert total.abs().max() < 1e-9  # each against the mean of the others
    noise = torch.randn(20_000, 12, generator=rng, dtype=torch.float64) @ posterior.root.T
    drawn = (posterior.weights.flatten() + noise).view(-1, 3, 4)
    contrast = drawn[:, 1] - (drawn[:, 0] + drawn[:, 2]) / 2
    assert_close(contrast.T.cov(), rewards[1].root @ rewards[1].root.T, rtol=0.1, atol=0.02)


# --- ensembles ---


def heads(count=5, within=False):
    won, lost, _ = comparisons()
    rng, parts = torch.Generator().manual_seed(0), []
    for _ in range(count):
        rows = bootstrap_rows(200, rng)
        parts.append(laplace(won[rows], sure(200), other=lost[rows], precision=1.0, scaling=Standardiser.identity(6)))
    return Ensemble(tuple(parts), within)


def test_an_ensemble_has_the_same_interface():
    few, rng = normal(4, 6, seed=3), torch.Generator().manual_seed(0)
    ensemble = heads()
    drawn = ensemble.members(few, 5, rng)
    assert drawn.shape == (5, 4)
    assert_close(drawn.mean(0), ensemble.mean(few))
    assert_close(drawn.T.cov(correction=0), ensemble.covariance(few))
    assert ensemble.members(few, 12, rng).shape == (12, 4)
    assert_close(ensemble.members(few.expand(5, 4, 6), 5, rng).sort(0).values, drawn.sort(0).values)
    wide = heads(within=True)
    total = wide.members(few, 30_000, rng)
    assert_close(total.T.cov(), wide.covariance(few), rtol=0.06, atol=0.002)
    assert (wide.covariance(few).diagonal() > ensemble.covariance(few).diagonal()).all()


def test_bootstrapped_heads_spread_as_the_posterior_does():
    """Bayes and the bootstrap agree where there are plenty of data."""
    won, lost, _ = comparisons(rows=1000, width=3)
    posterior = laplace(won, sure(1000), other=lost, precision=0.1, scaling=Standardiser.identity(3))
    rng, found = torch.Generator().manual_seed(0), []
    for _ in range(100):
        rows = bootstrap_rows(1000, rng)
        found.append(
            laplace(won[rows], sure(1000), other=lost[rows], precision=0.1, scaling=Standardiser.identity(3)).weights
        )
    ratio = torch.stack(found).std(0) / (posterior.root.square().sum(-1)).sqrt()
    print("bootstrap / posterior sd", ratio.tolist())
    assert ((ratio > 0.75) & (ratio < 1.33)).all()


# --- what cannot be used ---


def test_bad_input_is_said():
    won, lost, _ = comparisons()
    with pytest.raises(InputError, match="precision is -1"):
        laplace(won, sure(200), other=lost, precision=-1)
    with pytest.raises(InputError, match="NaN or infinite"):
        laplace(won * torch.nan, sure(200), other=lost)
    posterior = laplace(won, sure(200), other=lost, precision=1.0)
    with pytest.raises(InputError, match="5 columns"):
        posterior.mean(normal(2, 5))
    with pytest.raises(InputError, match="k is 0"):
        posterior.members(won, 0, torch.Generator())
