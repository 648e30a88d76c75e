"""Prompts as the model sees them."""

import pytest

import tiltlm as tl
from conftest import make_model, make_tokenizer
from tiltlm.lm.load import load


@pytest.fixture
def prior(llama, tokenizer):
    return load(llama, tokenizer).prior(max_new_tokens=8)


def ids(prompts, row=0):
    return prompts.tokens[row][prompts.mask[row]].tolist()


def test_raw_text_gets_one_bos(prior, tokenizer):
    assert ids(prior.encode(["the film"])) == tokenizer("the film")["input_ids"]
    assert ids(prior.encode(["<s>the film"])).count(0) == 1


def test_the_template_is_applied_whole_and_once(prior, tokenizer):
    messages = [{"role": "user", "content": "the film"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = ids(prior.encode([messages]))
    assert tokenizer.decode(encoded) == text
    assert encoded.count(0) == 1
    assert prior.encode([messages]).texts[0] == ({"role": "user", "content": "the film"},)


def test_a_begun_answer_is_continued(prior, tokenizer):
    messages = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was"}]
    assert tokenizer.decode(ids(prior.encode([messages]))).endswith("was")


def test_plain_strings_take_the_template_only_when_asked(llama, tokenizer):
    chat = load(llama, tokenizer).prior(chat=True)
    raw = load(llama, tokenizer).prior()
    assert ids(chat.encode(["the film"])) == ids(raw.encode([[{"role": "user", "content": "the film"}]]))
    assert ids(raw.encode(["the film"])) == tokenizer("the film")["input_ids"]


def test_rows_keep_their_columns(prior):
    prompts = prior.encode([{"prompt": "the film", "answer": 1}, {"prompt": "a story", "answer": 2}])
    assert prompts.columns == {"answer": (1, 2)}
    assert prompts.select([1, 1]).columns == {"answer": (2, 2)}


def test_datasets_are_rows(prior):
    import datasets

    data = datasets.Dataset.from_dict({"prompt": ["the film", "a story"], "label": [0, 1]})
    assert prior.encode(data).columns == {"label": (0, 1)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "there are no prompts"),
        (["the film", "  "], "prompt 2 is empty"),
        ([""], "prompt 1 is empty"),
        ([{"text": "the film"}], "prompt 1 has no column 'prompt'; it has 'text'"),
        ([3], "prompt 1 is int 3"),
        (["the film " * 60], "room for 120; shorten"),
    ],
)
def test_bad_prompts(prior, data, message):
    with pytest.raises(tl.InputError, match=message):
        prior.encode(data)


def test_messages_need_a_template():
    prior = load(make_model("llama"), make_tokenizer(chat=False)).prior(max_new_tokens=8)
    with pytest.raises(tl.InputError, match="has no chat template"):
        prior.encode([[{"role": "user", "content": "hi"}]])


def test_no_pad_and_pad_equal_to_eos_make_no_difference(llama, rng):
    import torch

    plain, same = make_tokenizer(), make_tokenizer()
    assert plain.pad_token is None
    same.pad_token = same.eos_token
    draws = []
    for tokenizer in (plain, same):
        prior = load(llama, tokenizer).prior(max_new_tokens=20)
        draws.append(prior.draw(prior.encode(["the film", "a quiet story"]), 30, torch.Generator().manual_seed(1)))
    assert draws[0].texts == draws[1].texts
    assert draws[0].ended.any()


def test_context_smaller_than_the_completion(llama, tokenizer):
    with pytest.raises(tl.InputError, match="max_new_tokens is 128, but .* has a context of 128"):
        load(llama, tokenizer).prior(max_new_tokens=128).encode(["the film"])
