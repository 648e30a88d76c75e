"""Out of memory: a step is tried again with less at a time, and learns the same."""

import pytest
import torch

import tiltlm as tl
from tiltlm.inference import fit as module
from tiltlm.inference.accumulate import accumulate
from tiltlm.inference.fitting import MicroBatches
from tiltlm.testing import fixture_b

FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")


def test_what_does_not_fit_is_undone_and_halved_and_the_next_begins_there():
    tried, undone = [], []

    def work(tokens):
        tried.append(tokens)
        if tokens > 30:
            raise torch.OutOfMemoryError("CUDA out of memory") if len(tried) == 1 else FULL
        return tokens

    micro = MicroBatches(100)
    with pytest.warns(tl.TiltWarning, match="micro_tokens is"):
        assert micro.run(work, lambda: undone.append(1), least=3) == 25
    assert (tried, len(undone)) == ([100, 50, 25], 2)
    assert micro.run(work, lambda: undone.append(1), least=3) == 25
    assert tried[3:] == [25]


def test_a_completion_that_does_not_fit_is_one_sentence_and_other_errors_pass():
    def full(tokens):
        raise FULL

    def broken(tokens):
        raise RuntimeError("shapes differ")

    with pytest.warns(tl.TiltWarning), pytest.raises(tl.InputError, match="one completion of 8 tokens does not fit"):
        MicroBatches(10).run(full, lambda: None, least=8)
    with pytest.raises(RuntimeError, match="shapes differ"):
        MicroBatches(10).run(broken, lambda: None, least=8)


def test_a_run_that_ran_out_of_memory_in_the_middle_of_a_step_learns_the_same(monkeypatch):
    def trained(failing):
        world, calls = fixture_b(), []

        def flaky(policy, engine, scored, state, micro_tokens, optimiser, *, fresh):
            out = accumulate(policy, engine, scored, state, micro_tokens, optimiser, fresh=fresh)
            calls.append(micro_tokens)
            if failing and len(calls) == 2:
                raise FULL  # with the whole gradient gathered already
            return out

        monkeypatch.setattr(module, "accumulate", flaky)
        policy = tl.fit(world.target, world.prompts, tl.RLOO(group=4), lora=None, steps=4, micro_tokens=64, lr=0.05)
        return calls, {name: value.detach() for name, value in policy.named_parameters().items()}

    _, whole = trained(failing=False)
    with pytest.warns(tl.TiltWarning, match="micro_tokens is 32"):
        calls, again = trained(failing=True)
    assert calls == [64, 64, 32, 32, 32]
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=1e-10, atol=1e-12)
