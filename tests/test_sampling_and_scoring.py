"""The law that draws is the law that scores."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiltlm as tl
from tiltlm.lm.given import demonstrations
from tiltlm.lm.head import Head, apply_law
from tiltlm.lm.load import load
from tiltlm.lm.sample import next_token, pick
from tiltlm.protocols import Law
from tiltlm.testing import fixture_b
from tiltlm.workflow.recipe import Recipe

PROMPTS = ["the film", "a quiet story of two friends who", "good"]


def rescored(view, draws):
    return view.log_prob(replace(draws, sampler=""))


def whole_logits(model, prompt, completion):
    """Reference: one row at a time, no cache, no padding, transformers' own logits."""
    ids = torch.cat([prompt, completion])[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def reference_log_prob(model, draws, law):
    rows = torch.zeros(draws.log_q.shape)
    for row in range(len(draws)):
        p = draws.prompt_index[row]
        prompt = draws.prompts.tokens[p][draws.prompts.mask[p]]
        completion = draws.tokens[row][draws.mask[row]]
        logits = apply_law(whole_logits(model, prompt, completion), law)
        rows[row, : len(completion)] = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    return rows


def with_a_clear_cut(model, draws, law):
    """The tokens whose law's last logit that stays in is no tie with the first that does not, up to rounding."""
    clear = draws.mask.clone()
    for row in range(len(draws) if law.top_k else 0):
        p = draws.prompt_index[row]
        completion = draws.tokens[row][draws.mask[row]]
        logits = whole_logits(model, draws.prompts.tokens[p][draws.prompts.mask[p]], completion)
        top = logits.topk(law.top_k + 1).values
        clear[row, : len(completion)] = top[:, -2] - top[:, -1] > 1e-5
    return clear


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("law", [{}, {"temperature": 0.7}, {"top_k": 50}])
def test_sampled_rescored_and_reference_log_probs_agree(any_model, tokenizer, rng, lora, law):
    if lora:
        transposed = any_model.config.model_type == "gpt2"
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed)
        peft = get_peft_model(any_model, config)
        for name, value in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.2)
        lm = load(peft, tokenizer)
    else:
        lm = load(any_model, tokenizer)
    prior = lm.prior(max_new_tokens=24, **law)
    draws = prior.draw(prior.encode(PROMPTS), 40, rng)
    assert len({int(n) for n in draws.lengths}) > 1, "the test needs ragged completions"
    clear = with_a_clear_cut(any_model, draws, prior.law)
    assert clear.sum() >= 0.99 * draws.mask.sum()
    for again in (rescored(prior, draws), reference_log_prob(any_model, draws, prior.law)):
        torch.testing.assert_close(again[clear], draws.log_q[clear], atol=1e-4, rtol=0)
        assert not again[~draws.mask].any()


def test_bfloat16_difference_is_reported_and_small(llama, tokenizer, rng, record_property):
    prior = load(llama.to(torch.bfloat16), tokenizer).prior(max_new_tokens=12)
    draws = prior.draw(prior.encode(PROMPTS), 16, rng)
    gap = (rescored(prior, draws) - draws.log_q).abs()[draws.mask]
    record_property("bf16_mean_gap", float(gap.mean()))
    print(f"bf16: mean difference a token {gap.mean():.4f}, largest {gap.max():.4f}")
    assert gap.mean() < 0.05


def test_padding_side_does_not_matter(any_model, tokenizer, rng):
    prior = load(any_model, tokenizer).prior(max_new_tokens=8)
    left = prior.encode(PROMPTS)
    order = (~left.mask).long().argsort(dim=-1, stable=True)
    right = replace(left, tokens=left.tokens.gather(-1, order), mask=left.mask.gather(-1, order))
    assert not torch.equal(left.mask, right.mask)
    a = prior.draw(left, 5, torch.Generator().manual_seed(3))
    b = prior.draw(right, 5, torch.Generator().manual_seed(3))
    assert a.texts == b.texts
    torch.testing.assert_close(a.log_q, b.log_q)


def test_batching_does_not_change_a_draw(llama, tokenizer):
    prior = load(llama, tokenizer).prior(max_new_tokens=10)
    prompts = prior.encode(PROMPTS)
    whole = prior.draw(prompts, 7, torch.Generator().manual_seed(5))
    for rows in (1, 4, 9):
        parts = replace(prior, rows=rows).draw(prompts, 7, torch.Generator().manual_seed(5))
        assert parts.texts == whole.texts
        torch.testing.assert_close(parts.log_q, whole.log_q, atol=1e-5, rtol=0)


def test_eos_counts_and_truncation_is_an_outcome(llama, tokenizer, rng):
    prior = load(llama, tokenizer).prior(max_new_tokens=30)
    draws = prior.draw(prior.encode(PROMPTS), 60, rng)
    assert draws.ended.any()
    assert (~draws.ended).any()
    for row in range(len(draws)):
        ids = draws.tokens[row][draws.mask[row]]
        assert (ids[:-1] != 1).all()
        assert bool(ids[-1] == 1) == bool(draws.ended[row])
        assert draws.ended[row] or len(ids) == 30
    last = (draws.lengths - 1)[draws.ended]
    assert (draws.log_q[draws.ended].gather(-1, last[:, None]) < 0).all()


def test_stop_strings_end_a_completion(llama, tokenizer, rng):
    prior = load(llama, tokenizer).prior(max_new_tokens=30, stop=("o",))
    draws = prior.draw(prior.encode(PROMPTS), 20, rng)
    assert any("o" in text for text in draws.texts)
    for text, ended in zip(draws.texts, draws.ended.tolist(), strict=True):
        assert "o" not in text[:-2]
        assert ended or "o" not in text


class TestStops:
    """A stop is a text, or a special token, which decoding leaves out of every text."""

    def test_a_text_alone_is_one_stop(self, llama, tokenizer):
        one = load(llama, tokenizer).prior(stop="END")
        assert one.law == Law(stop="END") == Law(stop=["END"]) == Law(stop=("END",))
        assert one.law.stop == ("END",)
        assert hash(Law(stop=["a", "b"])) == hash(Law(stop=("a", "b")))
        with pytest.raises(ValueError, match="an empty text is in every completion"):
            Law(stop="")

    def test_a_recipe_says_the_same(self):
        known = {"model": "m", "prompts": "p.txt", "reward": "r.py:f", "beta": 1.0}
        assert Recipe.model_validate({**known, "stop": "END"}).stop == ["END"]
        assert Recipe.model_validate({**known, "stop": ["a", "b"]}).stop == ["a", "b"]
        with pytest.raises(ValueError, match="an empty text is in every completion"):
            Recipe.model_validate({**known, "stop": ["a", ""]})

    @pytest.mark.parametrize("stop", ["<s>", ("<s>", "zq")])  # the tokenizer's BOS; </s> is what ends
    def test_a_special_token_ends_what_is_drawn_scored_and_walked(self, llama, tokenizer, rng, stop):
        lm = load(llama, tokenizer)
        prior, free = lm.prior(max_new_tokens=30, stop=stop), lm.prior(max_new_tokens=30)
        assert (prior.eos, free.eos, lm.body.eos) == ((1, 0), (1,), (1,))
        prompts = prior.encode(PROMPTS)
        drawn = [prior.draw(prompts, 60, rng), prior.policy().draw(prompts, 60, rng)]
        drawn.append(prior.redraw(drawn[0], torch.ones(180, dtype=torch.long).where(drawn[0].lengths > 1, 0), rng))
        for draws in drawn:
            last = draws.tokens.gather(-1, draws.lengths[:, None] - 1).flatten()
            assert {0, 1} <= set(last[draws.ended].tolist())
            assert torch.isin(last, torch.tensor([0, 1])).equal(draws.ended)
            before = draws.mask & (torch.arange(draws.tokens.shape[1]) < draws.lengths[:, None] - 1)
            assert (draws.tokens[before] > 1).all()
            assert not any("<s>" in text for text in draws.texts)
        torch.testing.assert_close(rescored(prior, drawn[0]), drawn[0].log_q, atol=1e-5, rtol=1e-4)
        ids = [row[keep].tolist() for row, keep in zip(drawn[0].tokens, drawn[0].mask, strict=True)]
        assert prior.complete(prompts, drawn[0].prompt_index, ids).ended.equal(drawn[0].ended)
        assert prior.ends([40, 0])
        assert not free.ends([40, 0])
        assert not prior.ends([40])

    def test_added_tokens_and_given_completions(self):
        from conftest import make_model, make_tokenizer

        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
        tokenizer.add_tokens(["<plain>"])
        number, plain = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<plain>"])
        prior = load(make_model("llama", vocab=len(tokenizer)), tokenizer).prior(max_new_tokens=30, stop=["<|im_end|>"])
        assert prior.eos == (1, number)
        rows = [{"prompt": "the film", "completion": text} for text in ("good", "good<|im_end|> and more")]
        given = demonstrations(prior, rows).draws
        assert given.ended.all()
        assert given.texts == ("good", "good")
        assert [int(ids[keep][-1]) for ids, keep in zip(given.tokens, given.mask, strict=True)] == [number] * 2
        told = replace(prior, law=replace(prior.law, stop=("<plain>",)))
        assert told.eos == (1,)
        assert told.ends([40, plain])  # decoding shows it, so that it is a text

    def test_a_special_token_within_a_text_could_end_nothing(self, llama, tokenizer):
        with pytest.raises(
            tl.InputError, match=r"stop is '</s>\\n', in which '</s>' is a special token.*; give '</s>' alone"
        ):
            load(llama, tokenizer).prior(stop="</s>\n")


def test_pick_inverts_the_distribution_function():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0] * 200]).double()
    p = logits.softmax(-1)[0]
    edges = torch.cat([torch.zeros(1).double(), p.cumsum(0)])
    middles = (edges[1:] + edges[:-1])[p > 0] / 2
    token, log_q = pick(logits.expand(len(middles), -1), middles)
    assert token.tolist() == (p > 0).nonzero().flatten().tolist()
    torch.testing.assert_close(log_q, p[p > 0].log())


def test_pick_never_takes_an_impossible_token():
    logits = torch.full((3, 700), -torch.inf)
    logits[:, 300] = 0.0
    token, log_q = pick(logits, torch.tensor([0.0, 0.5, 1 - 1e-12], dtype=torch.float64))
    assert token.tolist() == [300] * 3
    assert log_q.tolist() == [0.0] * 3


def test_logits_are_destroyed_only_where_they_are_ours(rng):
    features, weight = torch.randn(5, 8, generator=rng), torch.randn(700, 8, generator=rng)
    logits, uniform, law = features @ weight.T, torch.rand(5, generator=rng, dtype=torch.float64), Law(4)
    kept = logits.clone()
    found = [
        pick(logits, uniform),
        pick(logits.clone(), uniform, overwrite=True),
        next_token(logits, Head(), law, uniform),
        next_token(features, Head(weight), law, uniform),
    ]
    assert torch.equal(logits, kept)
    for token, log_q in found:
        assert torch.equal(token, found[0][0])
        torch.testing.assert_close(log_q, kept.log_softmax(-1).gather(-1, token[:, None])[:, 0])


def test_draws_of_a_tabular_model_follow_its_law(rng):
    from scipy.stats import chisquare

    from tiltlm.posterior.exact import posterior

    world = fixture_b()
    exact = posterior(world.target, world.prompts)
    draws = world.prior.draw(world.prompts, 20_000, rng)
    rows = {c: k for k, c in enumerate(exact.completions)}
    counts = torch.zeros(len(rows))
    for ids, mask in zip(draws.tokens, draws.mask, strict=True):
        counts[rows[tuple(ids[mask].tolist())]] += 1
    assert chisquare(counts, exact.log_prior.exp() * len(draws)).pvalue > 1e-3


def test_the_law_is_validated():
    with pytest.raises(ValueError, match="temperature is 0"):
        Law(temperature=0)
    with pytest.raises(tl.InputError, match="chat template"):
        load_without_template().prior(chat=True)


def load_without_template():
    from conftest import make_model, make_tokenizer

    return load(make_model("llama"), make_tokenizer(chat=False))
