"""Encoder–decoders, vision encoder–decoders and chat models that read images are priors like any other."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from scipy.stats import chi2
from torch.testing import assert_close
from transformers import BertConfig, BertLMHeadModel

import tiltlm as tl
from conftest import make_tokenizer
from kinds import KINDS, every, idefics, image_model, llava, picture, small, text_model, vit_processor, words
from tiltlm.inference.decoding.mcmc import MCMC
from tiltlm.inference.decoding.smc import prefix_evidence
from tiltlm.lm.causal import CausalBackbone
from tiltlm.lm.given import demonstrations, preferences
from tiltlm.lm.kinds import backbone_of
from tiltlm.lm.sample import sample
from tiltlm.posterior.exact import posterior
from tiltlm.store import load_scored, save_scored

ENCODERS = [kind for kind in KINDS if kind != "llava"]


def ids(draws):
    return [tuple(t[m].tolist()) for t, m in zip(draws.tokens, draws.mask, strict=True)]


def logits_of(model, prompts, row, completion):
    """Reference: transformers' own forward on one prompt and completion; no cache, no padding."""
    tokens = prompts.tokens[row][prompts.mask[row]][None]
    pixels = {name: parts[row].double() for name, parts in prompts.inputs.items()}
    if not model.config.is_encoder_decoder:
        whole = torch.cat([tokens, torch.tensor([completion])], dim=-1)
        return model(input_ids=whole, **pixels).logits[0, tokens.shape[1] - 1 : -1]
    settings = model.generation_config
    start = [settings.decoder_start_token_id, settings.forced_bos_token_id]
    begun = [token for token in start if token is not None]
    target = torch.tensor([[*begun, *completion[:-1]]])
    source = pixels or {"input_ids": tokens}
    logits = model(**source, decoder_input_ids=target).logits[0, len(begun) - 1 :]
    for word in settings.bad_words_ids or []:
        logits[:, word[0]] = -torch.inf
    return logits


def reference(model, prompts, row, completion, temperature=1.0):
    """log-probability of each token by transformers' own logits."""
    logits = logits_of(model, prompts, row, completion) / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def good(completion_ids, **_):
    """In [0, 1], and different for most completions of the small vocabularies."""
    return [sum((t + 1) * i for i, t in enumerate(x, 2)) % 7 / 6 for x in completion_ids]


def tilted(prior, beta=0.4):
    return prior * tl.Reward(good, beta=beta, bounds=(0, 1))


def agrees(count, expected):
    """Pearson's chi-square at 1e-5, cells with little mass together."""
    rare = expected < 5
    observed = torch.cat([count[~rare], count[rare].sum()[None]]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if wanted[-1] < 1:
        assert observed[-1] <= 8
        observed, wanted = observed[:-1], wanted[:-1]
    return float(((observed - wanted).square() / wanted).sum()) < chi2.isf(1e-5, max(1, len(wanted) - 1))


# --- the law ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_prob_is_that_of_the_models_own_forward(kind, temperature):
    prior, prompts = small(kind, temperature=temperature)
    model, vocabulary = prior.body.model, prior.body.vocabulary
    rows = torch.Generator().manual_seed(3)
    some = [x for x in every(vocabulary, 3) if torch.rand((), generator=rows) < 40 / vocabulary**3]
    if (
        kind == "llava"
    ):  # in a completion <image> is a token like any other, which transformers' forward takes for an image
        some = [x for x in some if 5 not in x]
    index = torch.arange(3).repeat_interleave(len(some))
    draws = prior.complete(prompts, index, some * 3)
    with torch.no_grad():
        expected = [reference(model, prompts, row, x, temperature) for row in range(3) for x in some]
    for got, wanted in zip(draws.log_q, expected, strict=True):
        torch.testing.assert_close(got[: len(wanted)], wanted, atol=1e-9, rtol=0)
        assert not got[len(wanted) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_all_completions_have_probability_one_and_are_drawn_as_often_as_they_are_likely(kind, rng):
    prior, prompts = small(kind)
    listed = every(prior.body.vocabulary, 3)
    count = 1000
    draws = prior.draw(prompts, count, rng)
    torch.testing.assert_close(prior.log_prob(replace(draws, sampler="")), draws.log_q, atol=1e-9, rtol=0)
    place = {x: i for i, x in enumerate(listed)}
    for row in range(3):
        probability = prior.complete(prompts, torch.full((len(listed),), row), listed).log_prob.exp()
        assert abs(float(probability.sum()) - 1) < 1e-9
        found = torch.tensor([place[x] for x in ids(draws.of([row]))])
        assert agrees(torch.bincount(found, minlength=len(listed)), probability * count)


@pytest.mark.parametrize("kind", ["t5", "bart", "vit-gpt2", "llava"])
def test_a_draw_depends_on_the_seed_and_not_on_the_batches(kind):
    prior, prompts = small(kind)
    whole = prior.draw(prompts, 12, torch.Generator().manual_seed(5))
    for rows in (1, 5, 24):
        again = replace(prior, rows=rows).draw(prompts, 12, torch.Generator().manual_seed(5))
        assert ids(again) == ids(whole)
        torch.testing.assert_close(again.log_q, whole.log_q, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_matter(kind):
    """A negative control: with another prompt the law is another."""
    prior, prompts = small(kind)
    first = prior.walk(prompts, 1).log_probs().exp()
    assert (first[0] - first[1]).abs().max() > 1e-3
    assert (first[1] - first[2]).abs().max() > 1e-3


def test_what_marian_never_generates_has_probability_zero(rng):
    prior, prompts = small("marian")
    assert not (prior.draw(prompts, 200, rng).tokens[:, 0] == 0).any()
    assert prior.complete(prompts, torch.tensor([0]), [[0, 1]]).log_prob == -torch.inf
    model = text_model("marian")
    model.generation_config.bad_words_ids = None
    free = tl.load(model, words("a", "b")).prior(max_new_tokens=3)
    assert free.complete(prompts, torch.tensor([0]), [[0, 1]]).log_prob > -20


# --- what it costs ---


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_encoder_reads_every_prompt_once(kind, rng):
    prior, prompts = small(kind)
    read = []
    encoder = prior.body.model.get_encoder()
    encoder.register_forward_hook(lambda module, args, kwargs, out: read.append(len(out[0])), with_kwargs=True)
    draws = prior.draw(prompts, 8, rng)
    assert read == [3]
    read.clear()
    prior.log_prob(replace(draws, sampler=""))
    assert read == [3]
    read.clear()
    walk = prior.walk(prompts, 8)
    for _ in range(3):
        walk.extend(walk.log_probs().argmax(-1), walk.live)
    assert read == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_selecting_rows_leaves_what_they_were_taken_from(kind):
    prior, prompts = small(kind)
    backbone = prior.body.backbone
    with torch.no_grad():
        prefix = backbone.prefill(prompts)
        some = prefix.rows(torch.tensor([2, 0]))
        for step in range(2):
            token = torch.tensor([[2], [1 + step]])
            seen = torch.cat([some.mask, torch.ones(2, step + 1, dtype=torch.bool)], dim=-1)
            got = backbone.features(token, seen, some.memory)
        again = prefix.rows(torch.tensor([0]))
        seen = torch.cat([again.mask, torch.ones(1, 2, dtype=torch.bool)], dim=-1)
        alone = backbone.features(torch.tensor([[1, 2]]), seen, again.memory)
    torch.testing.assert_close(got[1, -1], alone[0, -1]) if step == 0 else None
    assert alone.shape[1] == 2
    expected = reference(prior.body.model, prompts, 0, [1, 2, 2]).detach()[-1]
    found = backbone.head.logits(alone[0, -1:].detach()).log_softmax(-1)[0, 2]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


# --- engines ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_and_a_redraw_follow_the_law(kind, rng):
    prior, prompts = small(kind)
    count = 600
    draws = prior.draw(prompts, count, rng)
    keep = torch.randint(0, 3, (len(draws),), generator=rng).clamp(max=draws.lengths - 1)
    found = prior.redraw(draws, keep, rng)
    torch.testing.assert_close(prior.log_prob(replace(found, sampler="")), found.log_q, atol=1e-9, rtol=0)
    assert torch.equal(found.prompt_index, draws.prompt_index)
    for old, new, kept in zip(draws.tokens, found.tokens, keep.tolist(), strict=True):
        assert torch.equal(old[:kept], new[:kept])
    listed = every(prior.body.vocabulary, 3)
    place = {x: i for i, x in enumerate(listed)}
    fresh = prior.redraw(draws, torch.zeros(len(draws), dtype=torch.long), rng)  # all anew: the law itself
    for row in range(3):
        law = prior.complete(prompts, torch.full((len(listed),), row), listed).log_prob.exp()
        counted = torch.bincount(torch.tensor([place[x] for x in ids(fresh.of([row]))]), minlength=len(listed))
        assert agrees(counted, law * count)


@pytest.mark.parametrize("kind", ["t5", "bart", "vit-gpt2", "llava"])
def test_smc_meets_the_exact_evidence(kind, rng):
    prior, prompts = small(kind)
    target = tilted(prior)
    exact = [posterior(target, prompts, row) for row in range(3)]
    weighted = tl.SMC(particles=256, twist=prefix_evidence).sample(target, prompts, rng=rng)
    assert weighted.log_z is not None
    for estimate, truth in zip(weighted.log_z, exact, strict=True):
        assert abs(estimate.value - truth.log_z) < 0.25


def test_mcmc_meets_the_exact_posterior(rng):
    prior, prompts = small("marian")
    target = tilted(prior, beta=1.0)
    chains = MCMC(chains=6, steps=160, warmup=20).sample(target, prompts, rng=rng)
    for row in range(3):
        truth = posterior(target, prompts, row)
        mean = chains.scored.of([row]).log_evidence.mean()
        assert abs(float(mean) - float((truth.log_posterior.exp() * truth.scored.log_evidence).sum())) < 0.25


@pytest.mark.parametrize("kind", ["t5", "vit-gpt2", "llava"])
def test_the_certificate_brackets_the_truth(kind):
    prior, prompts = small(kind)
    target = tilted(prior)
    exact = [posterior(target, prompts, row) for row in range(3)]
    certificate = tl.certify(prior, target, prompts, samples=200, exact_budget=256)
    truth = sum(float((e.log_prior.exp() * (e.log_prior - e.log_posterior)).sum()) for e in exact) / 3
    assert truth in certificate.kl_posterior
    assert certificate.kl_posterior.high < math.inf
    log_z = sum(e.log_z for e in exact) / 3
    upper = certificate.log_z_upper
    assert upper is not None
    assert certificate.log_z_lower.value - 4 * certificate.log_z_lower.stderr < log_z < upper.value + 4 * upper.stderr


# --- training ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_models_own_forward(kind, rng):
    """All weights, the encoder's among them, by autograd through transformers' forward."""
    prior, prompts = small(kind)
    policy = prior.policy(lora=None)
    draws = prior.draw(prompts, 6, rng)
    draws = draws.select(~(draws.tokens == 5).any(-1))  # LLaVA's <image>
    policy.forward(draws, frozenset({"log_q"})).log_q.sum().backward()
    got = {name: p.grad for name, p in policy.named_parameters().items()}
    model = policy.body.model
    model.zero_grad()
    got = {name: None if g is None else g.clone() for name, g in got.items()}
    rows = zip(draws.prompt_index.tolist(), ids(draws), strict=True)
    sum(reference(model, prompts, row, x).sum() for row, x in rows).backward()
    reached = 0
    for name, weight in policy.named_parameters().items():
        if weight.grad is None:
            assert got[name] is None or not got[name].any()
            continue
        near = (
            1e-8 if kind in ("bart", "marian", "vit-gpt2", "vit-bert") else 1e-4
        )  # T5's and Llama's softmax is in float32
        torch.testing.assert_close(got[name], weight.grad, atol=near, rtol=near)
        reached += ("encoder" in name or "vision" in name) and bool(weight.grad.abs().max() > 1e-6)
    assert reached > 4, "the encoder's weights have a gradient"
    assert not any(p.requires_grad for p in prior.body.model.parameters())


@pytest.mark.parametrize(("kind", "full"), [*((kind, False) for kind in KINDS), ("t5", True), ("vit-gpt2", True)])
def test_a_step_moves_the_policy_and_not_the_prior(kind, full):
    prior, prompts = small(kind)
    draws = prior.draw(prompts, 8, torch.Generator().manual_seed(1))
    policy = tl.fit(
        tilted(prior),
        prompts,
        engine=tl.RLOO(group=4),
        lora=None if full else tl.LoRA(r=2),
        settings=tl.Training(steps=3, batch=3, lr=1e-2, warmup=0),
    )
    again = replace(draws, sampler="")
    torch.testing.assert_close(prior.log_prob(again), draws.log_q, atol=1e-12, rtol=0)
    assert (policy.log_prob(draws) - draws.log_q).abs().max() > 1e-3
    if not full:
        adapted = policy.named_parameters()
        assert any("encoder" in name or "vision" in name for name in adapted)
        assert not any("lm_head" in name or "predictions.decoder" in name for name in adapted)
        assert all(p.abs().max() > 0 for name, p in adapted.items() if "lora_B" in name and "pooler" not in name) or (
            kind == "llava"  # of its vision tower the last layer's output is not read past the projector's
        )
    kl = policy.token_kl(draws)
    assert (kl >= -1e-12).all()
    assert kl.sum() > 0


@pytest.mark.parametrize("kind", ["marian"])
def test_training_comes_nearer_to_the_posterior(kind):
    prior, prompts = small(kind)
    target = tilted(prior, beta=0.5)
    policy = tl.fit(
        target, prompts, engine=tl.RLOO(group=16), lora=tl.LoRA(r=4), settings=tl.Training(steps=25, batch=3, lr=1e-2)
    )
    before = after = 0.0
    for row in range(3):
        exact = posterior(target, prompts, row)
        for sampler in (prior, policy):
            log_q = exact.log_prob(sampler)
            gap = float((log_q.exp() * (log_q - exact.log_posterior)).sum())
            before, after = (before + gap, after) if sampler is prior else (before, after + gap)
    assert after < 0.7 * before


@pytest.mark.parametrize("kind", ["t5", "llava"])
def test_a_critic_is_a_sampler_and_a_twist(kind, rng):
    prior, prompts = small(kind)
    critic = prior.critic(lora=tl.LoRA(r=2))
    with torch.no_grad():
        for parameter in critic.named_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype))
    draws = critic.draw(prompts, 6, rng)
    forward = critic.forward(draws, frozenset({"log_q", "q", "values"}))
    torch.testing.assert_close(forward.log_q.detach(), draws.log_q, atol=1e-7, rtol=0)
    weighted = tl.SMC(particles=256, twist=critic).sample(tilted(prior), prompts, rng=rng)
    assert weighted.log_z is not None
    exact = [posterior(tilted(prior), prompts, row).log_z for row in range(3)]
    for estimate, truth in zip(weighted.log_z, exact, strict=True):
        assert abs(estimate.value - truth) < 0.8
    policy = prior.policy(values=True)
    assert policy.forward(draws, frozenset({"log_q", "values"})).values.shape == draws.tokens.shape


# --- saving ---


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_and_models_come_back(kind, tmp_path, rng):
    prior, prompts = small(kind)
    prior.policy(lora=None).save(tmp_path / "base")  # the prior itself, with tokenizer and processor
    prior = tl.load(tmp_path / "base", dtype="float64").prior(max_new_tokens=3)
    assert type(prior.body.backbone) is type(small(kind)[0].body.backbone)
    assert (prior.body.processor is None) == (kind in ("t5", "t5-untied", "bart", "marian"))
    assert prior.fingerprint() == small(kind)[0].fingerprint()
    policy = prior.policy(lora=tl.LoRA(r=2))
    with torch.no_grad():
        for weight in policy.named_parameters().values():
            weight.add_(0.3)
    draws = policy.draw(prompts, 4, rng)
    policy.save(tmp_path / "adapter")
    again = prior.policy(start=tmp_path / "adapter")
    torch.testing.assert_close(again.log_prob(draws), draws.log_q, atol=1e-9, rtol=0)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tasks = {"llava": "CAUSAL_LM", "vit-gpt2": None, "vit-bert": None}
    assert config["task_type"] == tasks.get(kind, "SEQ_2_SEQ_LM")
    fresh = tl.load(tmp_path / "base", dtype="float64").body.model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # ViT's layers and GPT-2's lie differently
        theirs = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        for row, x, log_q in list(zip(draws.prompt_index.tolist(), ids(draws), draws.log_q, strict=True))[::3]:
            expected = reference(theirs.get_base_model(), prompts, row, x)
            torch.testing.assert_close(log_q[: len(x)], expected, atol=1e-9, rtol=0)


def test_scored_draws_of_images_come_back_and_are_known_by_their_pixels(tmp_path, rng):
    prior, prompts = small("llava")
    scored = tilted(prior).score(prior.draw(prompts, 2, rng))
    save_scored(scored, tmp_path, "key")
    again = load_scored(tmp_path, "key", prompts)
    assert again is not None
    assert again.draws.prompts is prompts
    torch.testing.assert_close(prior.log_prob(replace(again.draws, sampler="")), scored.log_prior)
    other = replace(prompts, inputs={"pixel_values": (*prompts.inputs["pixel_values"][:2], torch.zeros(1, 3, 8, 8))})
    assert other.fingerprint() != prompts.fingerprint()
    assert prompts.select([2, 1]).select([1, 0]).fingerprint() == prompts.select([1, 2]).fingerprint()


# --- prompts ---


def test_sources_keep_their_end_and_decoders_begin_on_their_own():
    _, prompts = small("t5")
    assert ids(prompts) == [(2, 1), (3, 2, 3, 2, 1), (3, 3, 1)]
    causal, _ = small("llava")
    assert causal.encode(["a b"]).tokens.tolist() == [[2, 3]]


def test_images_come_in_many_forms(tmp_path):
    prior, _ = small("vit-gpt2")
    pixels = picture(7)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    raw = (tmp_path / "a.png").read_bytes()
    forms = [str(tmp_path / "a.png"), tmp_path / "a.bmp", raw, image, pixels, {"bytes": raw, "path": None}]
    forms += [torch.from_numpy(pixels), image.convert("RGBA")]
    prompts = prior.encode([{"image": form, "answer": "x"} for form in forms])
    first, *others = prompts.inputs["pixel_values"]
    assert all(torch.equal(first, other) for other in others)
    assert prompts.texts[:3] == (str(tmp_path / "a.png"), str(tmp_path / "a.bmp"), "image 3")
    assert prompts.columns["answer"] == ("x",) * len(forms)
    assert torch.equal(prior.encode([str(tmp_path / "a.png")]).inputs["pixel_values"][0], first)
    image.convert("L").save(tmp_path / "grey.jpg")
    assert prior.encode([tmp_path / "grey.jpg"]).inputs["pixel_values"][0].shape == first.shape


def test_several_images_and_conversations_with_and_without():
    prior, _ = small("llava")
    image = picture(1)
    within = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a"}]}]
    beside = {"prompt": [{"role": "user", "content": "a"}], "image": image}
    two = {"prompt": "<image> a <image> b", "image": [image, picture(2)]}
    prompts = prior.encode([{"prompt": within}, beside, two, {"prompt": "b"}])
    counts = [(row == 5).sum().item() for row in prompts.tokens]
    assert counts == [4, 4, 8, 0]
    assert [len(part) for part in prompts.inputs["pixel_values"]] == [1, 1, 2, 0]
    assert torch.equal(prompts.tokens[0], prompts.tokens[1])
    assert prompts.texts[0] == prompts.texts[1]
    with torch.no_grad():  # a prompt without image beside ones with, and each alone: the same law
        together = prior.walk(prompts, 1).log_probs()
        alone = torch.cat([prior.walk(prompts.select([row]), 1).log_probs() for row in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)


def test_prompts_with_different_numbers_of_images_go_together(rng):
    model, processor = idefics()
    prior = tl.load(model, processor.tokenizer, processor=processor).prior(max_new_tokens=3)
    images = [picture(seed, 16) for seed in range(3)]
    data = [{"prompt": "<image> a", "image": images[0]}, {"prompt": "<image> b <image> a", "image": images[1:]}]
    prompts = prior.encode([*data, {"prompt": "b"}])
    draws = prior.draw(prompts, 8, rng)
    torch.testing.assert_close(prior.log_prob(replace(draws, sampler="")), draws.log_q, atol=1e-9, rtol=0)
    together = prior.walk(prompts, 1).log_probs()
    for row in range(3):
        read = {name: parts[row] for name, parts in prompts.inputs.items() if len(parts[row])}
        read = {name: part.double() if part.is_floating_point() else part for name, part in read.items()}
        with torch.no_grad():
            expected = model(input_ids=prompts.tokens[row][prompts.mask[row]][None], **read).logits[0, -1]
        torch.testing.assert_close(together[row], expected.log_softmax(-1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["t5", "marian", "vit-gpt2", "llava"])
def test_demonstrations_and_preferences(kind):
    prior, _ = small(kind)
    if kind == "llava":
        ask = {"prompt": [{"role": "user", "content": "a"}], "image": picture(1)}
        other = {**ask, "image": picture(2)}
    elif kind == "vit-gpt2":
        ask, other = {"image": picture(1)}, {"image": picture(2)}
    else:
        ask, other = {"prompt": "a b"}, {"prompt": "b"}
    given = demonstrations(prior, [{**row, "completion": "a b"} for row in (ask, other, ask)])
    assert ids(given.draws) == [(2, 3, 1)] * 3
    assert given.draws.prompt_index.tolist() == [0, 1, 0]
    assert (given.draws.log_prob > -torch.inf).all()
    pairs = preferences(prior, [{**ask, "chosen": "a", "rejected": "b"}])
    assert ids(pairs.draws) == [(2, 1), (3, 1)]


def test_targets_are_written_in_the_targets_own_vocabulary():
    asked = []

    class Two:
        """A tokenizer with a vocabulary for each side, as Marian's."""

        chat_template = None

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text=None, text_target=None, **settings):
            asked.append(("source", text) if text is not None else ("target", text_target))
            return self.inner(text if text is not None else text_target, **settings)

    prior = tl.load(text_model("marian"), Two(words("a", "b"))).prior(max_new_tokens=3)
    demonstrations(prior, [{"prompt": "a b", "completion": "a b"}])
    assert [one for one in asked if one[1] == "a b"] == [("source", "a b"), ("target", "a b")]


# --- bad input ---


@pytest.mark.parametrize("kind", ["bart", "marian"])
def test_a_source_longer_than_the_encoder_takes_is_said_and_not_cut(kind):
    prior, _ = small(kind)
    prior.encode(["a " * 15])
    with pytest.raises(
        tl.InputError, match="prompt 2 has 17 tokens, and the encoder takes 16; shorten the source, or split it"
    ):
        prior.encode(["a", "a " * 16])
    with pytest.raises(
        tl.InputError, match=r"max_new_tokens is 18, but the model's decoder writes at most 1[56]; lower"
    ):
        replace(prior, law=replace(prior.law, max_new_tokens=18)).encode(["a"])


def test_t5_has_no_limit():
    prior, _ = small("t5", max_new_tokens=40)
    assert prior.encode(["a " * 700]).tokens.shape[1] == 701


def test_bad_prompts_are_one_sentence(tmp_path):
    text, sees, chats = small("t5")[0], small("vit-gpt2")[0], small("llava")[0]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    whole = tmp_path / "whole.png"
    Image.fromarray(picture(1, 64)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:900])
    ok = picture(1)
    cases = [
        (text, ["a", "  "], "prompt 2 is empty"),
        (text, [{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "the model reads texts alone"),
        (
            sees,
            [{"image": ok}, {"image": str(tmp_path / "none.png")}],
            "prompt 2: there is no image '.*none.png'; check",
        ),
        (sees, [str(tmp_path / "broken.png")], "prompt 1: image '.*broken.png' cannot be read"),
        (sees, [str(tmp_path / "cut.png")], "prompt 1: image '.*cut.png' cannot be read .*truncated"),
        (sees, [b"no image"], r"prompt 1: an image \(bytes\) cannot be read"),
        (sees, [np.zeros((8, 8, 3))], r"prompt 1: an image \(ndarray\) cannot be read"),
        (sees, [7], r"prompt 1: an image \(int\) cannot be read"),
        (sees, [{"photo": ok}], "prompt 1 has no image in column 'image'; it has 'photo'"),
        (sees, [{"image": None}], "prompt 1 has no image"),
        (sees, [{"image": [ok, ok]}], "prompt 1 has 2 images; the model reads one"),
        (
            sees,
            [{"image": ok, "prompt": "a"}],
            "prompt 1 has a text in column 'prompt', but the model reads its image alone",
        ),
        (chats, [{"prompt": "<image> <image> a", "image": ok}], "prompt 1 is refused by the model's processor"),
        (chats, ["<image> a"], "prompt 1 has a place for an image and no image"),
        (
            chats,
            [{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}],
            "prompt 1 has a place for an image and no image",
        ),
    ]
    for prior, data, message in cases:
        with pytest.raises(tl.InputError, match=message):
            prior.encode(data)


def test_models_that_are_not_provided_for_are_refused(rng):
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = BlipTextConfig(vocab_size=300, encoder_hidden_size=16, bos_token_id=2, sep_token_id=3, **tiny)
    vision = BlipVisionConfig(image_size=8, patch_size=4, **tiny)
    blip = BlipForConditionalGeneration(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    with pytest.raises(tl.InputError, match="BlipForConditionalGeneration reads images by cross-attention"):
        backbone_of(blip)
    model = text_model("t5")
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    with pytest.raises(tl.InputError, match="does not say what its decoder begins with"):
        tl.load(model, words("a", "b"))
    with pytest.raises(tl.InputError, match="comes without an image processor"):
        tl.load(image_model("vit-gpt2"), words("a", "b")).prior(max_new_tokens=3).encode([picture(1)])
    model, processor = llava()
    blind = tl.load(model, processor.tokenizer).prior(max_new_tokens=2)
    with pytest.raises(tl.InputError, match="comes without an image processor"):
        blind.encode([{"prompt": "a", "image": picture(1)}])
    prior, prompts = small("t5")
    fluent = prior * tl.Reward(tl.rewards.Fluency(lm=tl.load(text_model("t5"), words("a", "b"))), beta=1.0)
    draws = prior.draw(prompts, 2, rng)
    with pytest.raises(tl.InputError, match="an encoder–decoder, which does not go on with a text"):
        fluent.score(draws)


# --- the models' own law ---

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPREAD = {"vocab_size": 300, "initializer_range": 0.3, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}


def decoder(kind, **settings):
    """A causal model of a class that few take for one, with logits far from uniform."""
    torch.manual_seed(0)
    bart = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "init_std": 0.3}
    of_bart, of_bert = {**SPREAD, **bart, **settings}, {**SPREAD, **SIZES, "is_decoder": True, **settings}
    made = {
        "bart": lambda: transformers.BartForCausalLM(transformers.BartConfig(**of_bart)),
        "marian": lambda: transformers.MarianForCausalLM(transformers.MarianConfig(**of_bart)),
        "roberta": lambda: transformers.RobertaForCausalLM(transformers.RobertaConfig(**of_bert)),
        "electra": lambda: transformers.ElectraForCausalLM(transformers.ElectraConfig(**of_bert)),
        "bert": lambda: BertLMHeadModel(BertConfig(**of_bert)),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(ffn_dim=48, init_std=0.3, word_embed_proj_dim=32, **SPREAD, **SIZES)
        ),
        "openai": lambda: transformers.OpenAIGPTLMHeadModel(
            transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, **SPREAD)
        ),
        "mamba": lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, **SPREAD)
        ),
    }
    return made[kind]().eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bart", "marian", "roberta"])
def test_a_model_whose_law_depends_on_padding_is_refused(kind, dtype):
    model = decoder(kind).to(dtype)
    with pytest.raises(
        tl.InputError, match=rf"{type(model).__name__} gives a text other .* nats a token.*docs/models\.md"
    ):
        tl.load(model, make_tokenizer())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("openai", r"OpenAIGPTLMHeadModel cannot be run on padded prompts with a cache.*docs/models\.md"),
        ("mamba", "whose rows cannot be selected; use a model with ordinary attention caches"),
    ],
)
def test_a_model_that_stumbles_over_cache_or_padding_is_refused(kind, message):
    with pytest.raises(tl.InputError, match=message):
        tl.load(decoder(kind), make_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["electra", "bert", "opt"])
def test_models_with_a_law_of_their_own_load_in_every_precision(kind, dtype):
    tl.load(decoder(kind).to(dtype), make_tokenizer())


def test_a_model_that_gives_no_numbers_is_refused_with_the_precision_that_helps():
    """transformers masks with the least number of double precision, and takes the softmax in single."""
    config = transformers.Gemma2Config(**SPREAD, **SIZES, num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    tl.load(model, make_tokenizer())
    with pytest.raises(
        tl.InputError, match="Gemma2ForCausalLM gives no finite probabilities in float64 .* load it in float32"
    ):
        tl.load(transformers.Gemma2ForCausalLM(config).double().eval(), make_tokenizer())


def test_a_head_with_layers_before_it_is_run_with_them(rng):
    """Electra's features are wider or narrower than what its unembedding reads."""
    model = decoder("electra", embedding_size=16).double()
    prior = tl.load(model, make_tokenizer()).prior(max_new_tokens=4)
    prompts = prior.encode(["the film was", "a quiet story of two friends who meet again"])
    draws = prior.draw(prompts, 4, rng)
    for row, completion in enumerate(ids(draws)):
        expected = reference(model, prompts, int(draws.prompt_index[row]), list(completion))
        assert_close(draws.log_q[row][draws.mask[row]], expected, rtol=1e-6, atol=1e-6)
    assert prior.body.backbone.width == prior.body.vocabulary


def test_only_loading_looks_at_a_models_law(monkeypatch):
    looked = []

    def look(self):
        looked.append(self)

    monkeypatch.setattr(CausalBackbone, "require_own_law", look)
    tl.load(decoder("opt"), make_tokenizer()).prior().policy(lora=None)
    assert len(looked) == 1


def test_positions_and_vocabularies_may_be_small():
    for sizes in ({"vocab_size": 3}, {"max_position_embeddings": 8}):
        config = {**SPREAD, **SIZES, "pad_token_id": None, "is_decoder": True, **sizes}
        tl.load(BertLMHeadModel(BertConfig(**config)).eval(), make_tokenizer())


# --- longrope ---


def phi(**settings):
    """Phi-3 with other factors for texts of more than 16 tokens."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
    }
    sizes = {**SPREAD, **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = transformers.Phi3Config(**sizes, original_max_position_embeddings=16, rope_parameters=rope, **settings)
    return transformers.Phi3ForCausalLM(config).double().eval()


def test_longrope_keeps_to_the_texts_whose_law_is_their_own():
    lm = tl.load(phi(), make_tokenizer())
    prior = lm.prior(max_new_tokens=4)
    assert lm.body.backbone.room(4) == 12
    with pytest.raises(tl.InputError, match="prompt 2 has .* leaves room for 12"):
        prior.encode(["good film", "a quiet story of two friends who meet again and the film was good"])
    with pytest.raises(tl.InputError, match="max_new_tokens is 16, but beyond 16 tokens .*longrope"):
        lm.prior(max_new_tokens=16).encode(["good film"])
    one = prior.encode(["good film"])
    two = prior.encode(["good film", "a quiet story"])
    alone = prior.complete(one, torch.tensor([0]), [[40, 41, 42, 43]]).log_q
    beside = prior.complete(two, torch.tensor([0, 1]), [[40, 41, 42, 43]] * 2).log_q
    assert_close(beside[0], alone[0], rtol=1e-6, atol=1e-6)


# --- the command line ---


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder of each kind, prompts for it, and a reward."""
    monkeypatch.chdir(tmp_path)
    for kind in ("t5", "vit-gpt2", "llava"):
        prior, _ = small(kind)
        policy = prior.policy(lora=None)
        policy.save(tmp_path / kind)
    (tmp_path / "data").mkdir()
    for number in range(3):
        Image.fromarray(picture(number)).save(tmp_path / "data" / f"{number}.png")
    rows = {
        "t5": [{"prompt": text} for text in ("a", "b a", "b b")],
        "vit-gpt2": [{"image": f"{n}.png"} for n in range(3)],
        "llava": [{"prompt": [{"role": "user", "content": "a b"}], "image": f"{n}.png"} for n in range(3)],
    }
    for kind, some in rows.items():
        (tmp_path / "data" / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, some)) + "\n")
    Path("rewards.py").write_text("def good(completions):\n    return [len(c) % 4 / 3 for c in completions]\n")
    return tmp_path


@pytest.mark.parametrize("kind", ["t5", "vit-gpt2", "llava"])
def test_a_recipe_trains_certifies_and_resumes(kind, folders, cli):
    recipe = {
        "model": kind,
        "dtype": "float64",
        "prompts": f"data/{kind}.jsonl",
        "reward": "rewards.py:good",
        "bounds": [0, 1],
        "beta": 0.25,
        "max_new_tokens": 3,
        "samples": 16,
        "exact_budget": 32,
        "steps": 4,
        "group": 3,
        "batch": 2,
        "lora_r": 2,
        "checkpoint_every": 2,
        "out": "run",
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    ended = cli("train", "recipe.yaml")
    assert ended.code == 0, ended.err
    whole = Path("run/policy/adapter_model.safetensors").read_bytes()
    assert Path("run/policy/README.md").exists()
    last = sorted(Path("run/checkpoints").iterdir())[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    ended = cli("train", "recipe.yaml", "--resume")
    assert ended.code == 0, ended.err
    assert Path("run/policy/adapter_model.safetensors").read_bytes() == whole
    ended = cli("certify", "recipe.yaml")
    assert ended.code == 0, ended.err
    samples = json.loads(Path("run/samples.json").read_text())["prompts"]
    named = {"t5": "a", "vit-gpt2": "image 1", "llava": "<image> a b"}
    assert samples[0]["prompt"] == named[kind]


def test_a_run_is_of_its_images(folders, cli):
    """Resuming with other pixels under the same names is another run."""
    arguments = ["vit-gpt2", "--prompts", "data/vit-gpt2.jsonl", "--reward", "rewards.py:good", "--beta", "0.25"]
    arguments = ["train", "--model", *arguments, "--max-new-tokens", 3, "--steps", 2, "--group", 2, "--lora-r", 2]
    assert cli(*arguments, "--out", "run").code == 0
    Image.fromarray(picture(9)).save("data/1.png")
    ended = cli(*arguments, "--out", "run", "--resume")
    assert ended.code == 2
    assert "prompts" in ended.errors[0]


def test_an_unseen_image_is_named_with_its_row(folders, refused):
    Path("data/1.png").unlink()
    message = refused(
        *("plan", "--model", "vit-gpt2", "--prompts", "data/vit-gpt2.jsonl", "--reward", "rewards.py:good"),
        *("--max-new-tokens", 3, "--out", "run"),
    )
    assert "row 2 of data/vit-gpt2.jsonl has the image '1.png', and there is no file" in message


def test_the_sampler_takes_prompts(rng):
    """The loop itself, as other code may call it."""
    prior, prompts = small("t5")
    found = sample(prior.body.backbone, prompts, 2, prior.law, prior.body.eos, rng)
    assert found.tokens.shape[0] == 6
    assert vit_processor() is not None
