"""Preferences: rows of text to records, DPO and IPO by enumeration, false claims refuted, and training on pairs."""

import itertools
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.testing import assert_close

import tiltlm as tl
from conftest import engine_id, make_model, make_tokenizer
from tiltlm.errors import TiltWarning
from tiltlm.evidence import RewardLaw, WinRate
from tiltlm.evidence.preferences import Preferences
from tiltlm.inference.source import Decoded, Given, Pool
from tiltlm.inference.training.filtered.sft import SFT
from tiltlm.inference.training.policy_gradients.rloo import RLOO
from tiltlm.inference.training.preferences.dpo import DPO
from tiltlm.inference.training.preferences.ipo import IPO
from tiltlm.inference.training.preferences.pairs import bradley_terry, pairs_within, winner
from tiltlm.lm.given import demonstrations, preferences
from tiltlm.lm.load import load
from tiltlm.posterior import exact as ex
from tiltlm.protocols import Claim
from tiltlm.records import Forward
from tiltlm.target import Target
from tiltlm.testing import ClaimRefuted, check_engine, fixture_a, fixture_b, small_language

QUICK = {"lora": None, "batch": 1, "lr": 0.1, "micro_tokens": 10**6}
P_STAR = Claim("p*", "preference cross-entropy", "none", data="any")


@pytest.fixture(scope="module")
def b():
    world = fixture_b()
    return world, ex.posterior(world.target, world.prompts)


def kl_to_posterior(policy, exact):
    return ex.kl(exact.log_prob(policy), exact.log_posterior)


# --- the claims ---


@pytest.mark.parametrize("engine", [DPO(), DPO(label=winner), IPO(), IPO(label=winner)], ids=engine_id)
def test_claim_is_proved(engine):
    for check in check_engine(engine):
        print(check)


def population(engine, scored, log_q, law):
    """The expected loss over pairs of independent draws of a law, and its derivative with respect to log q."""
    leaf = log_q.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.product(range(len(scored)), repeat=2):
        pair = torch.tensor([i, j])
        loss, _ = engine.loss(Forward(leaf[pair]), scored.select(pair), None)
        total = total + law[i] * law[j] * loss
    (gradient,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), gradient


def test_the_population_minimum_is_the_posterior_and_its_value_the_entropy_of_the_labels():
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    scored, prior = exact.scored, exact.log_prior.exp()
    at_optimum = scored.log_prior.clone()
    at_optimum[:, 0] += exact.log_posterior - exact.log_prior  # any split over tokens will do
    value, gradient = population(DPO(), scored, at_optimum, prior)
    p = (exact.reward[:, None] - exact.reward[None, :]).sigmoid()
    entropy = float((prior[:, None] * prior[None, :] * -(p * p.log() + (1 - p) * (1 - p).log())).sum())
    print("gradient", float(gradient.abs().max()), "loss minus entropy", value - entropy)
    assert gradient.abs().max() < 1e-15
    assert value == pytest.approx(entropy, abs=1e-14)
    for seed in range(3):
        noise = torch.randn(len(scored), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        elsewhere = at_optimum.clone()
        elsewhere[:, 0] += 0.3 * noise
        further, slope = population(DPO(), scored, elsewhere, prior)
        assert further > value + 1e-4
        assert float((slope[:, 0] * noise).sum()) > 0


@pytest.mark.parametrize("engine", [DPO(), IPO()], ids=engine_id)
def test_drawn_labels_have_the_soft_label_for_their_mean(engine, b):
    """Pairs that Bradley and Terry's model labels give, on average, the gradient of the pairs labelled by the reward."""
    _, exact = b
    scored = exact.scored
    for i, j in [(0, 5), (7, 30), (12, 3)]:
        two = scored.select(torch.tensor([i, j]))
        preferred = float((exact.reward[i] - exact.reward[j]).sigmoid())
        grads = []
        for pairs in (None, [[0, 1]], [[1, 0]]):
            leaf = (two.log_prior + 0.1 * torch.arange(10.0).view(2, 5)).requires_grad_()
            given = None if pairs is None else torch.tensor(pairs)
            loss, _ = engine.loss(Forward(leaf), replace(two, pairs=given), None)
            grads += torch.autograd.grad(loss, leaf)
        soft, wins, loses = grads
        assert_close(preferred * wins + (1 - preferred) * loses, soft, rtol=1e-12, atol=1e-15)


def test_ipo_on_winners_settles_at_the_posterior_of_the_win_rate(b):
    world, exact = b
    rate = WinRate(RewardLaw.of(world.target.evidence, exact.listed, own=0.0), beta=exact.beta)
    tilted = ex.posterior(Target(world.prior, rate), world.prompts)
    assert_close(IPO(label=winner).settles_at(exact), tilted.log_posterior, rtol=0, atol=1e-12)
    assert ex.kl(IPO().settles_at(exact), exact.log_posterior) > 0.2


def test_every_pair_of_a_prompt_once():
    assert pairs_within(torch.tensor([0, 1, 0, 0])).tolist() == [[0, 2], [0, 3], [2, 3]]


def test_two_impossible_completions_are_equals(b):
    """-inf minus -inf is no number; the constraint says nothing of such a pair."""
    _, exact = b
    two = replace(exact.scored.select(torch.tensor([0, 1])), log_evidence=torch.tensor([-torch.inf, -torch.inf]))
    loss, _ = DPO().loss(Forward(two.log_prior), two)
    assert float(loss) == pytest.approx(math.log(2))


# --- false claims ---


class NatsMargin(DPO):
    """Forgets beta in the margin, as if the reward came in nats; the labels are in reward units."""

    claim = P_STAR

    def loss(self, forward, scored, state=None):
        return super().loss(forward, scored.at(1.0), state)


class EvidenceLabels(DPO):
    """Labels by the log-evidence r / beta, where the label model speaks of r."""

    claim = P_STAR

    def loss(self, forward, scored, state=None):
        return super().loss(forward, replace(scored, log_evidence=scored.log_evidence / scored.beta), state)


class PerToken(DPO):
    """Mean instead of sum over tokens: compares lengths as well."""

    claim = P_STAR

    def loss(self, forward, scored, state=None):
        length = scored.draws.lengths[:, None]
        shorter = replace(scored, log_prior=scored.log_prior / length)
        return super().loss(Forward(forward.log_q / length), shorter, state)


class NoReference(DPO):
    """Compares log q itself: the prior is uniform then."""

    claim = P_STAR

    def loss(self, forward, scored, state=None):
        return super().loss(forward, replace(scored, log_prior=torch.zeros_like(scored.log_prior)), state)


class Smoothed(DPO):
    """Label smoothing on labels that are right as they are."""

    claim = P_STAR
    label = staticmethod(lambda difference: 0.8 * bradley_terry(difference) + 0.1)


class SureOfTheWinner(DPO):
    claim = P_STAR


class PosteriorIPO(IPO):
    claim = P_STAR


class OmnivorousIPO(IPO):
    """Says that it does not matter whose pairs they are."""

    claim = replace(IPO.claim, data="any")


class HalfTau(IPO):
    """1 / tau where it should be 1 / (2 tau)."""

    def loss(self, forward, scored, state=None):
        return super().loss(Forward(scored.log_prior + (forward.log_q - scored.log_prior) / 2), scored, state)


@pytest.mark.parametrize(
    "engine",
    [
        NatsMargin(),
        EvidenceLabels(),
        PerToken(),
        NoReference(),
        Smoothed(label=Smoothed.label),
        SureOfTheWinner(label=winner),
        PosteriorIPO(),
        OmnivorousIPO(),
        HalfTau(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_false_claim_is_refuted(engine):
    with pytest.raises(ClaimRefuted):
        check_engine(engine)


# --- rows of text ---


def tabular_rows():
    return [
        {"prompt": "0", "chosen": "1 0", "rejected": "0", "task": "a", "score": 1},
        {"prompt": "0", "chosen": "", "rejected": "1 1 1 1", "task": "a", "score": 2},
    ]


def tokens(draws):
    return [ids[keep].tolist() for ids, keep in zip(draws.tokens, draws.mask, strict=True)]


def test_plain_rows_become_draws_with_pairs(b):
    world, exact = b
    scored = preferences(world.prior, tabular_rows())
    draws = scored.draws
    assert tokens(draws) == [[1, 0, 2], [0, 2], [2], [1, 1, 1, 1, 2]]
    assert draws.ended.all()
    assert scored.pairs.tolist() == [[0, 1], [2, 3]]
    assert draws.prompts.texts == ("0",)  # the rows share it
    assert draws.prompts.columns == {"task": ("a",)}  # the score is about the completions
    assert draws.prompt_index.tolist() == [0, 0, 0, 0]
    assert scored.log_evidence.isnan().all()
    by_tokens = dict(zip(exact.completions, exact.log_prior.tolist(), strict=True))
    expected = [by_tokens[tuple(ids)] for ids in tokens(draws)]
    assert_close(scored.log_prior.sum(-1).tolist(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(scored.log_prior, draws.log_q)
    assert scored.draws.texts == ("1 0", "0", "", "1 1 1 1")


def test_what_is_too_long_is_cut_and_counted():
    world = fixture_b()
    short = load(world.prior.body.model, world.prior.body.tokenizer).prior(max_new_tokens=2)
    with pytest.warns(TiltWarning, match="2 of 4 completions are longer than max_new_tokens = 2"):
        scored = preferences(short, tabular_rows())
    assert tokens(scored.draws) == [[1, 0], [0, 2], [2], [1, 1]]
    assert scored.draws.ended.tolist() == [False, True, True, False]


def test_without_an_end_token_only_whole_completions_are_outcomes():
    prior = fixture_a().prior
    assert tokens(demonstrations(prior, [{"prompt": "0", "completion": "0 1 2 0"}]).draws) == [[0, 1, 2, 0]]
    with pytest.raises(tl.InputError, match="row 1: completion '0 1' has 2 tokens and cannot end"):
        demonstrations(prior, [{"prompt": "0", "completion": "0 1"}])


@pytest.fixture(scope="module")
def chat():
    return load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=16)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = {
    "messages": {"prompt": [user("the film")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
    "answers as text": {"prompt": [user("the film")], "chosen": "good", "rejected": "bad"},
    "no prompt column": {
        "chosen": [user("the film"), assistant("good")],
        "rejected": [user("the film"), assistant("bad")],
    },
    "prompt as text beside conversations": {
        "prompt": "the film",
        "chosen": [user("the film"), assistant("good")],
        "rejected": [user("the film"), assistant("bad")],
    },
}


@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations_are_tokenised_as_the_template_writes_them(chat, row):
    scored = preferences(chat, [row])
    draws, tokenizer = scored.draws, chat.body.tokenizer
    (start,) = (ids[keep].tolist() for ids, keep in zip(draws.prompts.tokens, draws.prompts.mask, strict=True))
    for answer, ids in zip(("good", "bad"), tokens(draws), strict=True):
        whole = tokenizer.apply_chat_template([user("the film"), assistant(answer)], tokenize=False)
        assert tokenizer.decode(start + ids) == whole
        assert ids[-1] == tokenizer.eos_token_id
    assert draws.texts == ("good", "bad")
    assert draws.ended.all()
    assert torch.isfinite(scored.log_prior).all()


def test_a_prompt_that_begins_the_answer_is_continued(chat):
    row = {"prompt": [user("the film"), assistant("was ")], "completion": "good"}
    draws = demonstrations(chat, [row]).draws
    assert draws.texts == ("good",)
    assert chat.body.tokenizer.decode(draws.prompts.tokens[0]).endswith("was ")


def test_demonstrations_and_messages(chat):
    rows = [
        {"messages": [user("the film"), assistant("good")]},
        {"messages": [user("the film"), assistant("bad"), user("why"), assistant("and")]},
    ]
    draws = demonstrations(chat, rows).draws
    assert draws.texts == ("good", "and")
    assert len(draws.prompts.texts[1]) == 3
    assert demonstrations(chat, rows).pairs is None


def test_prompts_that_look_like_addresses_are_not_one(chat):
    rows = [{"prompt": f"what is at 0x{n}f", "completion": " a"} for n in (1, 2)]
    draws = demonstrations(chat, rows).draws
    assert draws.prompts.texts == ("what is at 0x1f", "what is at 0x2f")
    assert draws.prompt_index.tolist() == [0, 1]


def test_the_chosen_completions_are_demonstrations(chat):
    texts = [{"prompt": "the film", "chosen": " good", "rejected": " bad", "source": "mine"}]
    draws = demonstrations(chat, texts).draws
    assert draws.texts == (" good",)
    assert draws.prompts.columns == {"source": ("mine",)} or list(draws.prompts.columns["source"]) == ["mine"]
    talk = [{"chosen": [user("the film"), assistant("good")], "rejected": [user("the film"), assistant("bad")]}]
    assert demonstrations(chat, talk).draws.texts == ("good",)


BAD_ROWS = [
    ({"prompt": "0", "chosen": "1"}, "row 1 has no 'rejected'; it has 'prompt', 'chosen'"),
    ({"chosen": "1", "rejected": "0"}, "row 1 has no 'prompt'"),
    ({"prompt": "0", "chosen": 3, "rejected": "0"}, "row 1 has completion 3"),
    ({"prompt": "0", "chosen": [user("1")], "rejected": [assistant("0")]}, "list with one message of the assistant"),
    ({"chosen": [user("1"), assistant("0")], "rejected": [user("0"), assistant("0")]}, "row 1 has no 'prompt'"),
    ({"prompt": [user("0")], "chosen": "1", "rejected": "0"}, "no chat template"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows_are_named(b, row, says):
    world, _ = b
    with pytest.raises(tl.InputError, match=says):
        preferences(world.prior, [row])


def test_no_rows_and_impossible_completions(b):
    world, _ = b
    with pytest.raises(tl.InputError, match="there are no rows"):
        preferences(world.prior, [])
    model, tokenizer = world.prior.body.model, world.prior.body.tokenizer
    with pytest.raises(tl.InputError, match="probability zero under the prior"):
        preferences(load(model, tokenizer).prior(max_new_tokens=5, top_k=1), tabular_rows())


# --- what cannot be compared ---


def test_preferences_are_no_number(b, rng):
    world, _ = b
    target = world.prior * Preferences(beta=0.5)
    assert target.beta == 0.5
    assert target.at(0.2).beta == 0.2
    with pytest.raises(tl.InputError, match="preferences say which of two completions is better"):
        target.score(world.prior.draw(world.prompts, 2, rng))
    with pytest.raises(tl.InputError, match="prior \\* Reward"):
        tl.fit(target, world.prompts, engine=DPO(), steps=1, **QUICK)
    with pytest.raises(tl.InputError, match="beta is 0"):
        Preferences(beta=0)


def test_engines_say_what_they_need(b):
    world, _ = b
    with pytest.raises(tl.InputError, match="group is 1; DPO"):
        DPO(group=1)
    with pytest.raises(tl.InputError, match="group is 1; IPO"):
        IPO(group=1)
    target = world.prior * Preferences(beta=0.5)
    written = demonstrations(world.prior, [{"prompt": "0", "completion": "1 0"}])
    with pytest.raises(tl.InputError, match="neither pairs nor rewards"):
        tl.fit(target, written.draws.prompts, engine=DPO(), source=Given(written), steps=1, **QUICK)
    alone = world.target.score(written.draws)
    with pytest.raises(tl.InputError, match="no prompt of this step has two completions"):
        tl.fit(world.target, written.draws.prompts, engine=DPO(), source=Given(alone), steps=1, **QUICK)
    pairs = preferences(world.prior, tabular_rows())
    with pytest.raises(
        tl.InputError, match=r"SFT would learn the rejected ones as well; give demonstrations\(prior, rows\)"
    ):
        tl.fit(target, pairs.draws.prompts, engine=SFT(), source=Given(pairs), steps=1, **QUICK)
    with pytest.raises(tl.InputError, match="IPO cannot learn from"):
        tl.fit(target, pairs.draws.prompts, engine=IPO(), source=Given(pairs), steps=1, **QUICK)


@dataclass(frozen=True)
class Unweighted:
    """Takes anybody's draws, and needs their rewards."""

    group: int = 2
    updates = 1
    claim = Claim("p*", "log-variance", data="any")

    def init(self, prompts):
        return None

    def loss(self, forward, scored, state=None):
        return (scored.log_target - forward.log_q.sum(-1)).var(), {}


def test_an_engine_that_needs_rewards_says_that_given_completions_have_none(b):
    world, _ = b
    pairs = preferences(world.prior, tabular_rows())
    target = world.prior * Preferences(beta=0.5)
    with pytest.raises(tl.InputError, match=r"the given completions have no rewards.*target.score"):
        tl.fit(target, pairs.draws.prompts, engine=Unweighted(), source=Given(pairs), steps=1, **QUICK)
    known = world.target.score(pairs.draws)
    tl.fit(world.target, pairs.draws.prompts, engine=Unweighted(), source=Given(known), steps=1, **QUICK)
    with pytest.raises(tl.InputError, match="cannot learn from"):
        tl.fit(target, pairs.draws.prompts, engine=RLOO(), source=Given(pairs), steps=1, **QUICK)


# --- training ---


def test_online_dpo_reaches_the_posterior(b):
    world, exact = b
    before = ex.kl(exact.log_prior, exact.log_posterior)
    policy = tl.fit(world.target, world.prompts, engine=DPO(group=16), steps=80, **QUICK)
    print("KL(q||p*):", before, "->", kl_to_posterior(policy, exact))
    assert kl_to_posterior(policy, exact) < 0.1 * before


def test_dpo_on_exact_posterior_samples_is_rso(b):
    world, exact = b
    before = ex.kl(exact.log_prior, exact.log_posterior)
    source = Decoded(tl.Rejection(n=256))
    policy = tl.fit(world.target, world.prompts, engine=DPO(group=64), source=source, steps=40, **(QUICK | {"lr": 0.2}))
    print("KL(q||p*):", before, "->", kl_to_posterior(policy, exact))
    assert kl_to_posterior(policy, exact) < 0.2 * before


def labelled_rows(world, count, rng):
    """Pairs of prior draws as rows of text, the labels drawn from Bradley and Terry's model."""
    scored = world.target.score(world.prior.draw(world.prompts, 2 * count, rng))
    reward = scored.beta * scored.log_evidence
    first_wins = torch.rand(count, generator=rng) < (reward[:count] - reward[count:]).sigmoid()
    texts = scored.draws.texts
    pairs = [(i, i + count) if wins else (i + count, i) for i, wins in enumerate(first_wins.tolist())]
    return [{"prompt": "0", "chosen": texts[w], "rejected": texts[r]} for w, r in pairs]


def test_dpo_on_a_data_set_of_preferences(b, tmp_path, rng):
    """From text to tokens to a policy; the reward is not known to the training, only the labels that it made."""
    world, exact = b
    scored = preferences(world.prior, labelled_rows(world, 2000, rng))
    before = ex.kl(exact.log_prior, exact.log_posterior)
    target = world.prior * Preferences(beta=0.5)
    policy = tl.fit(target, scored.draws.prompts, engine=DPO(), source=Given(scored), steps=40, out=tmp_path, **QUICK)
    print("KL(q||p*):", before, "->", kl_to_posterior(policy, exact))
    assert kl_to_posterior(policy, exact) < 0.2 * before  # what is left is the labels' noise
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["reward"] is None
    assert last["elbo"] is None
    assert last["engine/accuracy"] > 0.55

    def reward(completion_ids):
        return [float(world.target.evidence.fn([ids])[0]) for ids in completion_ids]

    certificate = tl.certify(policy, world.prior * tl.Reward(reward, beta=0.5), world.prompts, samples=64)
    assert certificate.elbo.value > exact.log_z - 0.2  # trained on labels, certified against the reward


def test_the_beta_of_preferences_is_that_of_the_target(b, rng):
    """The same data at another temperature: the result is the posterior there."""
    world, exact = b
    scored = preferences(world.prior, labelled_rows(world, 1000, rng))
    warm = ex.Exact(exact.scored.at(1.5), 1.5)
    policy = tl.fit(
        world.prior * Preferences(beta=1.5), scored.draws.prompts, engine=DPO(), source=Given(scored), steps=30, **QUICK
    )
    q = exact.log_prob(policy)
    print("KL to p* at beta 1.5:", ex.kl(q, warm.log_posterior), "at 0.5:", ex.kl(q, exact.log_posterior))
    assert ex.kl(q, warm.log_posterior) < 0.3 * ex.kl(q, exact.log_posterior)


def test_ipo_from_the_prior_settles_at_the_win_rate_tilt(b, rng):
    world, exact = b
    law = IPO().settles_at(exact)
    policy = tl.fit(world.target, world.prompts, engine=IPO(group=16), steps=60, **(QUICK | {"lr": 0.03}))
    q = exact.log_prob(policy)
    print("KL to the win-rate tilt", ex.kl(q, law), "to p*", ex.kl(q, exact.log_posterior))
    assert ex.kl(q, law) < 0.1 * ex.kl(exact.log_prior, law)
    assert ex.kl(q, exact.log_posterior) > 0.2
    written = preferences(world.prior, labelled_rows(world, 1000, rng))
    target = world.prior * Preferences(beta=0.5)
    source = Given(written, origin="prior")
    policy = tl.fit(target, written.draws.prompts, engine=IPO(), source=source, steps=40, **(QUICK | {"lr": 0.03}))
    assert ex.kl(exact.log_prob(policy), law) < 0.3 * ex.kl(exact.log_prior, law)


def test_a_conversational_data_set_trains_a_transformer(chat):
    rows = [CONVERSATIONS["messages"], {"prompt": [user("a story")], "chosen": "quiet", "rejected": "bad"}]
    scored = preferences(chat, rows)
    settings = {"steps": 12, "batch": 2, "lr": 1e-2, "micro_tokens": 8}
    policy = tl.fit(chat * Preferences(), scored.draws.prompts, engine=DPO(), source=Given(scored), **settings)
    gained = (policy.log_prob(replace(scored.draws, sampler="")) - scored.log_prior).sum(-1)
    assert (gained[scored.pairs[:, 0]] > gained[scored.pairs[:, 1]] + 1).all()
    written = demonstrations(chat, [{"messages": [user("the film"), assistant("good")]}])
    policy = tl.fit(chat * Preferences(), written.draws.prompts, engine=SFT(), source=Given(written), **settings)
    assert policy.log_prob(replace(written.draws, sampler="")).sum() > written.log_prior.sum() + 1


def test_a_pool_of_scored_draws_is_compared_by_its_rewards(b, rng):
    world, exact = b
    pool = world.target.score(world.prior.draw(world.prompts, 200, rng))
    policy = tl.fit(world.target, world.prompts, engine=DPO(group=32), source=Pool(pool), steps=40, **QUICK)
    assert kl_to_posterior(policy, exact) < 0.3 * ex.kl(exact.log_prior, exact.log_posterior)


# --- completions under stop strings ---


def test_given_completions_end_where_a_draw_would():
    """A stop string ends a completion: one that has none gets it, and what comes after it is not read."""
    prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=12, stop=("z",))
    rows = [{"prompt": "ab", "completion": text} for text in ("b", "bz", "bza")]
    draws = demonstrations(prior, rows).draws
    assert draws.texts == ("bz", "bz", "bz")
    assert draws.ended.all()
    drawn = prior.draw(draws.prompts, 50, torch.Generator().manual_seed(0))
    again = prior.complete(
        drawn.prompts, drawn.prompt_index, [ids[m].tolist() for ids, m in zip(drawn.tokens, drawn.mask, strict=True)]
    )
    assert again.ended.equal(drawn.ended)
    assert_close(again.log_q, drawn.log_q, atol=1e-4, rtol=1e-4)
