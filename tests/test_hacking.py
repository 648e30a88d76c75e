"""Reward hacking: the fitted curve, the predicted peak and the alarm, each against what is known exactly."""

import itertools
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.diagnostics.alarm import LEVEL, look, planned_tests, window_lengths
from tiltlm.diagnostics.frontier import PriorSample
from tiltlm.diagnostics.gold import _best_of_n, gold_frontier
from tiltlm.diagnostics.overoptimisation import curve, fit_overoptimisation
from tiltlm.diagnostics.tilt import best_of_n_kl, best_of_n_mean, best_of_n_shares, tilt_jackknife, tilt_mean
from tiltlm.estimates import Estimate
from tiltlm.evidence.gold import as_gold, gold_values
from tiltlm.inference.watch import Watch, batch_stderr
from tiltlm.lm.load import load
from tiltlm.posterior import exact as ex
from tiltlm.testing import language
from tiltlm.testing.fixtures import sine_logit
from tiltlm.workflow.samples import parts_moved

KL = np.linspace(0.05, 6.0, 40)
NOTHING = Estimate(0.0, 0.0, 1)


def points(a, b, form, noise=0.0, rng=None, origin=0.0):
    gold = np.array([origin + curve(math.sqrt(k), a, b, form) for k in KL])
    return gold if rng is None else gold + noise * rng.normal(size=len(KL))


class TestCurve:
    @pytest.mark.parametrize(("form", "a", "b"), [("rl", 0.8, 0.6), ("bon", 0.9, 0.3)])
    def test_exact_points_give_the_coefficients_and_the_peak_back(self, form, a, b):
        found = fit_overoptimisation(KL, points(a, b, form), np.full(40, 0.01), prior=NOTHING, form=form)
        assert (found.a.value, found.b.value) == pytest.approx((a, b), abs=1e-10)
        grid = np.linspace(1e-3, 6, 60001)
        top = grid[np.argmax([curve(math.sqrt(k), a, b, form) for k in grid])]
        assert found.peak.value == pytest.approx(top, abs=2e-4)
        assert found.gain == pytest.approx(curve(math.sqrt(top), a, b, form), abs=1e-8)
        assert found.verdict == "peak"
        assert found.at(2.0) == pytest.approx(curve(math.sqrt(2.0), a, b, form))

    def test_the_other_law_does_not_give_them_back(self):
        found = fit_overoptimisation(KL, points(0.9, 0.3, "bon"), np.full(40, 0.01), prior=NOTHING, form="rl")
        assert abs(found.a.value - 0.9) > 0.1

    @pytest.mark.parametrize("prior", [NOTHING, Estimate(0.4, 0.05, 9), None], ids=["fixed", "a point", "free"])
    @pytest.mark.parametrize("form", ["rl", "bon"])
    def test_the_peaks_interval_covers(self, form, prior, record_property):
        rng = np.random.default_rng(3)
        a, b, noise, runs = 0.8, 0.4, 0.08, 400
        origin = prior.value if prior else 0.4
        truth = math.exp(2 * (a / b - 1)) if form == "rl" else (a / (2 * b)) ** 2
        hits = inside = 0
        for _ in range(runs):
            seen = prior
            if prior and prior.stderr:
                seen = Estimate(origin + prior.stderr * rng.normal(), prior.stderr, 9)
            gold = points(a, b, form, noise, rng, origin)
            found = fit_overoptimisation(KL, gold, np.full(40, noise), prior=seen, form=form)
            hits += truth in found.peak
            inside += abs(found.a.value - a) < 1.96 * found.a.stderr
        record_property("coverage_peak", hits / runs)
        assert hits / runs >= 0.92
        assert 0.91 <= inside / runs <= 0.99

    def test_errors_are_widened_where_points_scatter_more_than_they_say(self):
        gold = points(0.8, 0.4, "rl", 0.1, np.random.default_rng(0))
        honest = fit_overoptimisation(KL, gold, np.full(40, 0.1), prior=NOTHING)
        boasting = fit_overoptimisation(KL, gold, np.full(40, 0.01), prior=NOTHING)
        assert boasting.a.stderr == pytest.approx(honest.a.stderr, rel=0.3)

    def test_no_peak_is_said_to_be_none(self):
        rng = np.random.default_rng(1)
        gold = 0.5 * np.sqrt(KL) + 0.05 * rng.normal(size=40)
        found = fit_overoptimisation(KL, gold, np.full(40, 0.05), prior=NOTHING)
        assert found.verdict == "none"
        assert found.peak.high == math.inf
        assert "no peak within the range seen (up to 6.00 nats)" in str(found)

    def test_a_peak_beyond_what_was_seen_is_an_extrapolation(self):
        near = KL < 1
        found = fit_overoptimisation(KL[near], points(0.8, 0.4, "rl")[near], np.full(near.sum(), 1e-3), prior=NOTHING)
        assert found.verdict == "beyond"
        assert "extrapolated" in found.sentence

    def test_gold_that_falls_from_the_start(self):
        found = fit_overoptimisation(KL, points(-1.0, 0.3, "rl"), np.full(40, 0.01), prior=NOTHING)
        assert found.verdict == "falling"
        concave_up = -np.sqrt(KL) + 0.02 * np.random.default_rng(0).normal(size=40)
        found = fit_overoptimisation(KL, concave_up, np.full(40, 0.02), prior=NOTHING)
        assert found.verdict == "falling"
        assert "gold falls from the start: at 6.00 nats it is 2.4" in str(found)

    def test_false_peaks_are_rare_where_gold_only_rises(self):
        rng, claims = np.random.default_rng(4), 0
        for _ in range(300):
            gold = points(0.5, 0.0, "rl", 0.1, rng)
            claims += fit_overoptimisation(KL, gold, np.full(40, 0.1), prior=NOTHING).verdict in ("peak", "falling")
        assert claims / 300 <= 0.05

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"form": "ppo"}, "form is 'ppo'; choose rl, bon"),
            ({"stderr": [0.1]}, "kl, gold and stderr have 40, 40 and 1 values"),
            ({"stderr": np.zeros(40)}, "stderr positive at every point"),
            ({"kl": np.full(40, -1.0)}, "gold was seen at 0 points with positive KL; a curve needs 5"),
            ({"kl": np.full(40, 1.0)}, "all points have the same KL"),
        ],
    )
    def test_bad_points(self, changes, message):
        given = {"kl": KL, "gold": points(1, 1, "rl"), "stderr": np.ones(40), "form": "rl", "prior": NOTHING} | changes
        kl, gold, stderr = (given.pop(name) for name in ("kl", "gold", "stderr"))
        with pytest.raises(tl.InputError, match=message):
            fit_overoptimisation(kl, gold, stderr, **given)


class TestAlarm:
    def run(self, proxy, gold):
        for n in range(1, len(gold) + 1):
            found = look(list(range(1, n + 1)), proxy[:n], gold[:n], len(gold))
            if found is not None:
                return found
        return None

    def test_the_tests_that_are_planned_are_the_tests_that_are_made(self):
        for total in (3, 8, 31, 40, 100, 128):
            assert planned_tests(total) == sum(len(list(window_lengths(n, total))) for n in range(1, total + 1))

    @pytest.mark.parametrize("case", ["gold is flat", "gold rises and stays", "gold is skewed", "the proxy is flat"])
    def test_false_alarms_are_as_rare_as_stated(self, case, record_property):
        rng, steps, runs, alarms = np.random.default_rng(5), 48, 300, 0
        time = np.arange(steps)
        for _ in range(runs):
            noise = rng.normal(size=steps) if case != "gold is skewed" else rng.exponential(size=steps)
            mean = np.minimum(time / 12, 2.0) if case == "gold rises and stays" else np.zeros(steps)
            proxy = 0.5 * time + rng.normal(size=steps)
            if case == "the proxy is flat":
                mean, proxy = -0.3 * time, rng.normal(size=steps)
            alarms += self.run(list(proxy), list(mean + noise)) is not None
        record_property("coverage_no_alarm", 1 - alarms / runs)
        assert alarms / runs <= LEVEL + 2 * math.sqrt(LEVEL * (1 - LEVEL) / runs)

    def test_a_looser_threshold_would_not_keep_the_rate(self):
        """The union bound is needed: at 5% a window, far more than 5% of runs give an alarm."""
        rng, alarms = np.random.default_rng(6), 0
        for _ in range(100):
            proxy, gold = list(np.arange(48.0)), list(rng.normal(size=48))
            level = LEVEL * planned_tests(48)
            alarms += any(look(range(n), proxy[:n], gold[:n], 48, level) for n in range(8, 49))
        assert alarms > 20

    def test_hacking_is_found_and_where(self):
        rng = np.random.default_rng(7)
        time = np.arange(64)
        gold = np.where(time < 24, 0.05 * time, 1.2 - 0.06 * (time - 24)) + 0.2 * rng.normal(size=64)
        found = self.run(list(0.05 * time + 0.2 * rng.normal(size=64)), list(gold))
        assert found is not None
        assert found.gold_slope < 0 < found.proxy_slope
        assert 24 < found.last <= 64

    def test_constants_raise_none(self):
        assert self.run([0.1] * 40, [0.3] * 40) is None
        assert self.run(list(np.arange(40.0)), [0.1] * 40) is None


BETAS = (0.3, 0.5, 1.0, 3.0)


@pytest.fixture(scope="module")
def world():
    """27 prompts with their own languages, whose reward is hacked: gold goes with it at first, and then against it."""
    digits = range(3)
    return language(
        lambda p, h: [sine_logit(h, a, shift=p[0] + 3 * p[1] + 7 * p[2]) for a in range(3)],
        proxy_of,
        beta=0.5,
        bounds=(0.0, 4.5),
        prompts=[f"{a} {b} {c}" for a in digits for b in digits for c in digits],
        prompt_length=3,
    )


def proxy_of(ids):
    return float(sum(t == 2 for t in ids)) + 0.1 * (ids[0] == 1)


def gold_of(completion_ids):
    """Twos are good, and too many of them are not."""
    counts = [sum(t == 2 for t in ids) for ids in completion_ids]
    return [(0.0, 0.7, 1.0, 0.3, -1.2)[n] for n in counts]


def gold_at(exact, gold, beta):
    p = (exact.log_prior + exact.reward / beta).softmax(-1)
    return float((p * gold).sum())


@pytest.fixture(scope="module")
def exacts(world):
    found = [ex.posterior(world.target, world.prompts, p) for p in range(len(world.prompts))]
    return [(e, gold_values(as_gold(gold_of), e.scored.draws)[0]) for e in found]


class TestPrediction:
    def test_without_a_tilt_it_is_the_sample_mean_and_the_unbiased_covariance(self):
        reward, gold = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = tilt_mean(reward, gold, torch.tensor([1e12], dtype=torch.float64))
        assert float(found.mean) == pytest.approx(float(gold.mean()), abs=1e-9)
        assert float(found.mean_stderr) == pytest.approx(float(gold.std()) / 20**0.5, abs=1e-9)
        assert float(found.slope) == pytest.approx(float(torch.cov(torch.stack([reward, gold]))[0, 1]), abs=1e-9)

    def test_of_the_reward_itself_it_is_the_frontiers_and_its_slope_the_variance(self):
        reward = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        betas = torch.tensor([0.8, 2.0], dtype=torch.float64)
        found, known = tilt_mean(reward, reward, betas), tilt_jackknife(reward, betas)
        assert torch.allclose(found.mean, known.reward, atol=1e-12)
        assert torch.allclose(found.mean_stderr, known.reward_stderr, atol=1e-12)
        assert (found.slope > 0).all()

    @pytest.mark.parametrize("beta", [1.0, 0.01, 1e-4])
    def test_leaving_out_the_draw_that_has_all_the_weight_leaves_the_others(self, beta):
        """At 1e-4 the next best has e^-5000 of the best one's weight; the others still have a mean among themselves."""
        reward = torch.tensor([0.0, 0.1, 1.0, 0.5, 0.4], dtype=torch.float64)
        gold = torch.tensor([3.0, 1.0, -2.0, 4.0, 0.0], dtype=torch.float64)
        found = tilt_mean(reward, gold, torch.tensor([beta], dtype=torch.float64))
        kept = [torch.arange(5) != left_out for left_out in range(5)]
        without = torch.stack([(reward[k] / beta).softmax(0) @ gold[k] for k in kept])
        full = (reward / beta).softmax(0) @ gold
        assert float(found.mean) == pytest.approx(float(5 * full - 4 * without.mean()), abs=1e-9)
        assert float(found.mean_stderr) == pytest.approx(
            math.sqrt(4 / 5 * float((without - without.mean()).square().sum()))
        )

    def test_intervals_cover_the_exact_gold_and_the_peak(self, world, exacts, record_property):
        truth = {b: sum(gold_at(e, g, b) for e, g in exacts) / len(exacts) for b in BETAS}
        grid = np.geomspace(0.2, 10, 400)
        best = grid[np.argmax([sum(gold_at(e, g, b) for e, g in exacts) for b in grid])]
        assert 0.3 < best < 3  # the language was made so that it peaks within reach
        betas = torch.tensor(sorted({*np.geomspace(0.15, 10, 14).tolist(), *BETAS}, reverse=True), dtype=torch.float64)
        rng, runs, peaks, told = torch.Generator().manual_seed(1), 32, 0, 0
        hits = []
        for _ in range(runs):
            prompts = world.prompts.select(torch.randint(27, (12,), generator=rng).tolist())
            scored = world.target.score(world.prior.draw(prompts, 96, rng))
            gold, _ = gold_values(as_gold(gold_of), scored.draws)
            frontier = PriorSample.of(scored, 0.5).points(betas)
            found = gold_frontier(scored, 0.5, gold, frontier, "gold")
            for beta in BETAS[1:]:  # at 0.3 few samples are reliable, and those that look so are not like the others
                point = next(p for p in found.points if math.isclose(p.beta, beta))
                hits += [truth[beta] in point.gold] * point.reliable
            told += found.peak is not None
            peaks += found.peak is not None and best in found.peak
        record_property("coverage_predicted_gold", sum(hits) / len(hits))
        record_property("coverage_predicted_peak", peaks / max(1, told))
        assert truth[0.3] < truth[1.0]
        assert (
            sum(hits) / len(hits) >= 0.87
        )  # 0.93 in 150 runs, as the plan's own intervals with so few prompts and draws
        assert told >= 0.5 * runs
        assert peaks / told >= 0.9

    @pytest.mark.parametrize("n", [2, 3])
    def test_best_of_n_by_listing_every_choice(self, n):
        reward = torch.tensor(
            [0.3, -1.0, 0.3, 2.0, -torch.inf], dtype=torch.float64
        )  # with a tie and an impossible draw
        shares = torch.zeros(5, dtype=torch.float64)
        for chosen in itertools.combinations(range(5), n):
            best = max(float(reward[i]) for i in chosen)
            at_top = [i for i in range(5) if float(reward[i]) == best]
            shares[at_top] += 1 / math.comb(5, n) / len(at_top)
        assert torch.allclose(best_of_n_shares(reward, n), shares, atol=1e-15)

    @pytest.mark.parametrize("n", [2, 3])
    def test_the_kl_of_best_of_n_by_listing_every_choice(self, n):
        reward = torch.tensor([0.3, -1.0, 0.3, 2.0, -torch.inf], dtype=torch.float64)
        chance = torch.zeros(5, dtype=torch.float64)
        for chosen in itertools.product(range(5), repeat=n):
            best = max(float(reward[i]) for i in chosen)
            at_top = [i for i in range(5) if float(reward[i]) == best]
            chance[at_top] += 1 / 5**n / len(at_top)
        assert best_of_n_kl(reward, n) == pytest.approx(float((chance * (5 * chance).log()).sum()))

    def test_best_of_n_needs_n_draws(self):
        reward = torch.arange(4.0, dtype=torch.float64)
        assert best_of_n_shares(reward, 4).tolist() == [0, 0, 0, 1]
        with pytest.raises(tl.InputError, match="n is 5, but the best of n is taken of 4 draws; draw at least n"):
            best_of_n_shares(reward, 5)

    @pytest.mark.parametrize("reward", ["different", "tied", "constant", "constrained"])
    @pytest.mark.parametrize("n", [1, 2, 6, 11])
    def test_the_error_of_best_of_n_by_leaving_out_each_draw(self, reward, n):
        rng = torch.Generator().manual_seed(3)
        values = torch.randn(12, dtype=torch.float64, generator=rng)
        reward = {
            "different": torch.randn(12, dtype=torch.float64, generator=rng),
            "tied": torch.randint(3, (12,), generator=rng).double(),
            "constant": torch.ones(12, dtype=torch.float64),
            "constrained": torch.tensor([-torch.inf] * 4 + [0.0] * 5 + [1.0] * 2 + [2.0], dtype=torch.float64),
        }[reward]
        mean, stderr = best_of_n_mean(reward, values, n)
        kept = [torch.arange(12) != left_out for left_out in range(12)]
        without = torch.stack([best_of_n_shares(reward[k], n) @ values[k] for k in kept])
        assert mean == pytest.approx(float(best_of_n_shares(reward, n) @ values), abs=1e-12)
        assert mean == pytest.approx(float(without.mean()), abs=1e-12)  # unbiased at any number of draws
        assert stderr == pytest.approx(math.sqrt(11 / 12 * float((without - without.mean()).square().sum())), abs=1e-12)

    def test_the_interval_of_best_of_n_covers_however_many_prompts(self, record_property):
        """Exponential rewards, whose best of n has the mean 1 + 1/2 + ... + 1/n; drawn with replacement it had 33% to 56%."""
        rng, runs = torch.Generator().manual_seed(4), 60
        for n in (16, 32):
            truth, hits = sum(1 / i for i in range(1, n + 1)), 0
            for _ in range(runs):
                rows = -torch.rand(64, 64, dtype=torch.float64, generator=rng).log()
                hits += truth in _best_of_n([(row, row) for row in rows], n).gold
            record_property(f"coverage_gold of best of {n} by 64 draws of 64 prompts", hits / runs)
            assert hits / runs >= 0.88

    def test_the_interval_of_one_prompts_best_of_n_covers(self, record_property):
        """Its degrees of freedom are those of the few draws that can be the best; with 63 it covers 79%."""
        rng, runs, truth = torch.Generator().manual_seed(5), 400, sum(1 / i for i in range(1, 33))
        rows = -torch.rand(runs, 64, dtype=torch.float64, generator=rng).log()
        hits = sum(truth in _best_of_n([(row, row)], 32).gold for row in rows)
        record_property("coverage_gold of best of 32 by 64 draws of a single prompt", hits / runs)
        assert hits / runs >= 0.88

    def test_best_of_ns_gold_and_its_error(self):
        """Of uniform draws whose gold is the reward: n / (n + 1), and the scatter over samples is the standard error."""
        rng = torch.Generator().manual_seed(2)
        found = [best_of_n_mean(r, r, 4) for r in torch.rand(300, 200, dtype=torch.float64, generator=rng)]
        means, errors = torch.tensor(found, dtype=torch.float64).T
        assert float(means.mean()) == pytest.approx(0.8, abs=0.005)
        assert float(errors.mean()) == pytest.approx(float(means.std()), rel=0.15)
        few = torch.rand(8, dtype=torch.float64, generator=rng)
        assert best_of_n_mean(few, few, 2)[1] > 0
        assert math.isnan(best_of_n_mean(few, few, 8)[1])

    def test_best_of_n_stands_beside_the_optimum(self, world, exacts):
        found = tl.plan(world.target, world.prompts, samples=256, gold=gold_of)
        point = found.gold.best_of_n[1]
        laws = [(ex.best_of_n_law(e, 4), e, g) for e, g in exacts]
        assert point.n == 4
        assert point.proxy == pytest.approx(found.best_of_n[1].reward, abs=1e-12)
        assert point.kl == pytest.approx(sum(ex.kl(q.log(), e.log_prior) for q, e, _ in laws) / len(laws), abs=0.02)
        assert point.gold.value == pytest.approx(sum(float(q @ g) for q, _, g in laws) / len(laws), abs=0.03)

    def test_gold_that_is_the_proxy_has_no_peak(self, world):
        found = tl.plan(world.target, world.prompts, samples=64, gold=world.target.evidence)
        assert found.gold.peak is None
        assert "no peak within the range seen" in found.gold.sentence
        for point in found.gold.points:
            assert point.gold.value == pytest.approx(point.proxy.value, abs=1e-9)

    def test_gold_that_is_minus_the_proxy_falls_from_the_start(self, world):
        found = tl.plan(world.target, world.prompts, samples=64, gold=-world.target.evidence)
        assert "best under the prior itself" in str(found)

    def test_noise_tells_nothing(self, world):
        rng = np.random.default_rng(0)
        found = tl.plan(
            world.target, world.prompts, samples=32, gold=lambda completions: rng.normal(size=len(completions))
        )
        assert found.gold.peak is None

    def test_infinite_gold_is_refused(self, world):
        with pytest.raises(tl.InputError, match="a held-out reward must be finite"):
            tl.plan(
                world.target, world.prompts, samples=4, gold=tl.Constraint(lambda completions: [0] * len(completions))
            )
        with pytest.raises(tl.InputError, match="gold is 3; give evidence, or a function"):
            tl.plan(world.target, world.prompts, samples=4, gold=3)


# --- training ---

PROMPTS = ["the film", "a quiet story of two friends", "good and bad"]


def spaces(completions):
    return [min(1.0, sum(c.count(x) for x in "aeiou ") / 4) for c in completions]


def few(completions):
    return [-1.5 * max(0, sum(c.count(x) for x in "aeiou ") - 1) for c in completions]


def train(out, gold=few, **changes):
    prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=6)
    target = prior * tl.Reward(spaces, beta=0.1, bounds=(0, 1))
    common = {"lora": tl.LoRA(r=2), "steps": 6, "lr": 1e-2, "checkpoint_every": 2, "batch": 3}
    return tl.fit(target, PROMPTS, tl.RLOO(group=3), out=out, gold=gold, **(common | changes))


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per"))} for row in rows]


class TestParts:
    def scored(self, world, rows, values):
        draws = world.prior.draw(world.prompts.select([0, 1, 2]), 40, torch.Generator().manual_seed(0))
        found = world.target.score(draws).select(torch.as_tensor(rows))
        return replace(found, rewards={"part": torch.as_tensor(values, dtype=torch.float64)})

    def test_the_change_is_taken_prompt_by_prompt(self, world):
        """Prompts differ by far more than the policy changed; the interval is that of the changes, Student's t with 2 degrees."""
        level = torch.tensor([0.0, 10.0, 20.0]).repeat_interleave(40)
        change = torch.tensor([1.0, 1.1, 1.2]).repeat_interleave(40)
        prior, policy = self.scored(world, range(120), level), self.scored(world, range(120), level + change)
        found = parts_moved(prior, policy)["part"]
        assert (found["prior"], found["policy"]) == (pytest.approx(10.0), pytest.approx(11.1))
        half = 4.302653 * 0.1 / math.sqrt(3)
        assert found["change"]["value"] == pytest.approx(1.1)
        assert (found["change"]["low"], found["change"]["high"]) == pytest.approx((1.1 - half, 1.1 + half), abs=1e-5)

    def test_prompts_without_draws_of_both_are_left_out(self, world):
        prior, policy = self.scored(world, range(80), [1.0] * 80), self.scored(world, range(40, 120), [2.0] * 80)
        found = parts_moved(prior, policy)["part"]
        assert (found["prior"], found["policy"], found["change"]["value"]) == (1.0, 2.0, 1.0)
        assert parts_moved(self.scored(world, range(40), [1.0] * 40), policy) == {}


class Interrupted(Exception):
    pass


class TestTraining:
    def test_gold_is_logged_and_changes_nothing_else(self, tmp_path):
        train(tmp_path / "with", gold_every=2)
        train(tmp_path / "without", gold=None)
        rows, bare = rows_of(tmp_path / "with"), rows_of(tmp_path / "without")
        assert ["gold" in row for row in rows] == [False, True] * 3
        for row in rows[1::2]:
            assert row["gold"] <= 0 < row["gold_stderr"]
            assert row["reward_stderr"] >= 0
            assert row["kl_prior_stderr"] >= 0
        own = {"gold", "gold_stderr", "reward_stderr", "kl_prior_stderr", "gold_dropped"}
        assert untimed(bare) == [{k: v for k, v in row.items() if k not in own} for row in untimed(rows)]

    def test_a_resumed_run_keeps_golds_history(self, tmp_path):
        seen, state = [], Watch.state

        def stopping(watch):
            seen.append(len(state(watch)["gold"]))
            return state(watch)

        train(tmp_path / "whole")
        calls = [0]

        def dies(completions):
            calls[0] += 1
            if calls[0] == 5:  # in the middle of step 5; the checkpoint is of step 4
                raise Interrupted
            return few(completions)

        dies.__name__ = "few"
        with pytest.raises(tl.InputError, match="raised Interrupted"):
            train(tmp_path / "cut", gold=dies)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Watch, "state", stopping)
            train(tmp_path / "cut", resume=True)
        assert seen == [6]
        assert untimed(rows_of(tmp_path / "cut")) == untimed(rows_of(tmp_path / "whole"))

    def test_another_gold_is_another_run(self, tmp_path):
        train(tmp_path, steps=6)
        with pytest.raises(tl.InputError, match="its gold is 'few', now it is 'spaces'"):
            train(tmp_path, gold=spaces, resume=True)

    def test_the_alarm_warns_once_and_stops_if_asked(self, tmp_path):
        falling = iter(range(1000))

        def worse(completions):
            at = next(falling)
            return [-0.2 * at + 0.01 * i for i in range(len(completions))]

        rising = iter(range(1000))

        def better(completions):
            at = next(rising)
            return [0.02 * at + 0.001 * i for i in range(len(completions))]

        prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=4)
        target = prior * tl.Reward(better, beta=1.0)
        common = {"gold": worse, "steps": 24, "batch": 3, "lora": tl.LoRA(r=2), "out": tmp_path}
        with pytest.warns(
            tl.TiltWarning, match="reward hacking: from step 1 to 8 the trained reward rose by"
        ) as caught:
            tl.fit(target, PROMPTS, tl.RLOO(group=2), stop_on_hacking=True, **common)
        assert sum(issubclass(w.category, tl.TiltWarning) for w in caught) == 1
        rows = rows_of(tmp_path)
        assert len(rows) == 8
        assert rows[-1]["alarm"]["last"] == 8
        assert "false alarms: at most 5% of runs" in rows[-1]["alarm"]["sentence"]
        tl.fit(target, PROMPTS, tl.RLOO(group=2), stop_on_hacking=True, resume=True, **common)  # it had stopped
        assert len(rows_of(tmp_path)) == 8
        with warnings.catch_warnings():
            warnings.simplefilter("error", tl.TiltWarning)  # said once, and not again
            tl.fit(target, PROMPTS, tl.RLOO(group=2), resume=True, **common)
        assert len(rows_of(tmp_path)) == 24

    def test_draws_that_are_not_the_policys_are_not_judged(self, tmp_path):
        prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=4)
        target = prior * tl.Reward(spaces, beta=0.5)
        with pytest.warns(tl.TiltWarning, match="gold 'few' is not seen during training"):
            tl.fit(
                target, PROMPTS, tl.VarGrad(), source=tl.FromPrior(), gold=few, steps=2, lora=tl.LoRA(r=2), out=tmp_path
            )
        assert all("gold" not in row for row in rows_of(tmp_path))

    def test_certify_measures_it(self):
        prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=4)
        target = prior * tl.Reward(spaces, beta=0.5, bounds=(0, 1))
        drawn = tl.plan(target, PROMPTS, samples=16).scored
        found = tl.certify(prior, target, PROMPTS, samples=16, prior_draws=drawn, gold=few)
        values = torch.tensor(few(drawn.draws.texts))
        assert found.gold_prior.value == pytest.approx(float(values.mean()))
        assert "(held out)" in str(found)
        assert found.as_dict()["gold"]["value"] == found.gold.value

    def test_standard_errors_know_whether_prompts_are_a_sample(self):
        values = torch.tensor([1.0, 3.0, 11.0, 13.0], dtype=torch.float64)
        index = torch.tensor([0, 0, 1, 1])
        assert batch_stderr(values, index, whole=True) == pytest.approx(math.sqrt(2 * 2 + 2 * 2) / 4)
        assert batch_stderr(values, index, whole=False) == pytest.approx(10 / math.sqrt(2) / math.sqrt(2))
        assert math.isnan(batch_stderr(values[:1], index[:1], whole=True))

    def test_compare_judges_everybody_by_it(self, world):
        contenders = {"prior": tl.Contender(), "best": tl.Contender(tl.BestOfN(n=8))}
        found = tl.compare(
            world.target, world.prompts.select([0, 5]), contenders, samples=64, evaluation=256, gold=gold_of
        )
        laws = [ex.posterior(world.target, world.prompts, p) for p in (0, 5)]
        golds = [gold_values(as_gold(gold_of), e.scored.draws)[0] for e in laws]
        exact = sum(float((e.log_prior.exp() * g).sum()) for e, g in zip(laws, golds, strict=True)) / 2
        prior = found.results[0].gold
        assert abs(prior.value - exact) < 4 * prior.stderr
        assert all(result.gold is not None for result in found.results)
        assert str(found).splitlines()[1].split()[:3] == ["E", "r", "gold"]
