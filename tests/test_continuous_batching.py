"""Completions that begin while others are under way: the same draws, fewer passes, no more memory than one wave."""

from dataclasses import replace

import pytest
import torch

from test_light import model_of, policy_of, without_light
from tiltlm.lm import shared_cache
from tiltlm.lm.shared_cache import SharedCache

PROMPTS = [text[:length] for text in ("the film was good", "a quiet story of two friends") for length in range(3, 16)]
LIMIT = 14


class Watched:
    """A view whose passes are counted.

    Attributes:
        rows: in the model at each token after the first.
        used: positions that the cache had for each of them.
    """

    def __init__(self, view):
        self.rows, self.used, self.prompts = [], [], []
        backbone = view.body.backbone
        features, prefill = type(backbone).features, type(backbone).prefill

        def counted(ids, mask, memory=None, **inputs):
            found = features(backbone, ids, mask, memory, **inputs)
            if memory is not None and ids.shape[1] == 1:
                self.rows.append(len(ids))
                self.used.append(memory.cache.used if isinstance(memory.cache, SharedCache) else mask.shape[1])
            return found

        def read(prompts):
            self.prompts.append(len(prompts))
            return prefill(backbone, prompts)

        backbone.features, backbone.prefill = counted, read


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_a_draw_is_the_same_however_many_rows_there_are(kind, rows):
    _, policy = policy_of(model_of(kind), stop=("o", "re"))
    prompts = policy.encode(PROMPTS)
    whole = replace(policy, rows=1000).draw(prompts, 2, seeded())
    assert len(set(whole.lengths.tolist())) > 5, "the test needs ragged completions"
    parts = replace(policy, rows=rows).draw(prompts, 2, seeded())
    assert parts.tokens.equal(whole.tokens)
    assert parts.mask.equal(whole.mask)
    assert parts.ended.equal(whole.ended)
    torch.testing.assert_close(parts.log_q, whole.log_q, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(policy.log_prob(parts), parts.log_q, rtol=1e-9, atol=1e-11)


def test_more_completions_of_a_prompt_than_rows():
    _, policy = policy_of(model_of("llama"))
    prompts = policy.encode(PROMPTS[:2])
    whole = policy.draw(prompts, 50, seeded())
    few = replace(policy, rows=16)
    watched = Watched(few)
    assert few.draw(prompts, 50, seeded()).tokens.equal(whole.tokens)
    assert sum(watched.prompts) <= 4  # each is read once, and once more where the two meet


def test_what_waits_takes_the_place_of_what_has_ended():
    _, policy = policy_of(model_of("llama"), stop=("o", "re", "a"))
    prompts, rows = policy.encode(PROMPTS), 16
    policy = replace(policy, rows=rows, law=replace(policy.law, max_new_tokens=60))
    draws = policy.draw(prompts, 8, seeded())
    watched = Watched(policy)
    policy.draw(prompts, 8, seeded())
    slow = without_light(policy)
    waves = Watched(slow)
    slow.draw(prompts, 8, seeded())
    needed = int((draws.lengths - 1).sum())  # tokens after the first, each of which takes one row of one pass
    assert needed <= sum(watched.rows) < 1.2 * needed
    assert len(watched.rows) < 0.8 * len(waves.rows)
    assert max(watched.rows) <= rows


def test_positions_that_nobody_looks_at_any_more_are_forgotten(monkeypatch):
    """A row is at most `LIMIT` tokens long, and so is the cache beyond the prompts, however long the whole goes on."""
    monkeypatch.setattr(shared_cache, "APART_BYTES", 0)
    _, policy = policy_of(model_of("llama"))
    policy = replace(policy, rows=8)
    watched = Watched(policy)
    draws = policy.draw(policy.encode(PROMPTS), 6, seeded())
    assert len(watched.used) > 5 * LIMIT
    assert max(watched.used) <= LIMIT
    assert int(draws.lengths.max()) == LIMIT


def test_a_prompt_that_each_row_has_to_itself_is_all_that_its_cache_holds_besides():
    """When the last rows have come, a row's own cache may have a gap before them; nobody makes it longer."""
    _, policy = policy_of(model_of("llama"))
    prompts, policy = policy.encode(PROMPTS), replace(policy, rows=8)
    watched = Watched(policy)
    policy.draw(prompts, 6, seeded())
    assert LIMIT < max(watched.used) <= prompts.mask.shape[1] + 2 * LIMIT


def test_progress_counts_every_completion_once():
    _, policy = policy_of(model_of("llama"), stop=("o",))
    told = []
    replace(policy, rows=8, progress=told.append).draw(policy.encode(PROMPTS), 4, seeded())
    assert sum(told) == 4 * len(PROMPTS)
    assert len(told) > 4
