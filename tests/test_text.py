"""Prompts as the model sees them."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

import tiltlm as tl
from conftest import make_model, make_tokenizer
from kinds import text_model, words
from tiltlm.lm.given import demonstrations
from tiltlm.lm.load import load
from tiltlm.lm.scratch.vocabulary import train_tokenizer
from tiltlm.lm.text import decode, tokens_of
from tiltlm.rewards import AnswerLikelihood, Fluency


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


# --- tokenizers that put a space in front of a text ---

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def sentence_piece(legacy=False):
    """Llama's tokenizer with few words; of old, special tokens have a space behind them."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for character in "▁abcdefghijklmnopqrstuvwxyz.:[]\n":
        vocab.setdefault(character, len(vocab))
    merges = []
    for word in ("▁yes", "yes", "▁no", "no"):
        for end in range(1, len(word)):
            if word[: end + 1] not in vocab:
                merges.append((word[:end], word[end]))
                vocab[word[: end + 1]] = len(vocab)
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges)
    if legacy:
        inner = tokenizer.backend_tokenizer
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.pre_tokenizer = None
    tokenizer.chat_template = TURNS
    return tokenizer


@pytest.fixture(params=[False, True], ids=["metaspace", "legacy"])
def spaced(request):
    return sentence_piece(request.param)


@pytest.fixture
def spaced_lm(spaced):
    return load(make_model("llama", vocab=len(spaced)).double(), spaced)


def completed(draws, row=0):
    return draws.tokens[row][draws.mask[row]].tolist()


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("a:\n", "yes"), ("a:", " yes"), ("a:", "yes"), ("a ", "yes"), ("no", "\nno"), ("a", "yes")],
)
def test_a_completion_has_the_spaces_that_are_written(spaced, spaced_lm, prompt, completion):
    draws = demonstrations(spaced_lm.prior(), [{"prompt": prompt, "completion": completion}]).draws
    *learned, end = completed(draws)
    assert end == 2
    assert spaced.decode([*ids(draws.prompts), *learned], skip_special_tokens=True) == prompt + completion
    assert draws.texts == (completion,)


def test_an_answer_is_tokenised_as_in_the_whole_conversation(spaced, spaced_lm):
    messages = [{"role": "user", "content": "ok"}, {"role": "assistant", "content": "yes"}]
    draws = demonstrations(spaced_lm.prior(), [{"messages": messages}]).draws
    whole = spaced(spaced.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    learned = [*ids(draws.prompts), *completed(draws)]
    assert learned == whole[: len(learned)]
    assert learned[-2:] == [spaced.convert_tokens_to_ids("yes"), 2]


def test_what_follows_a_special_token_is_as_it_was_trained():
    messages = [{"role": "user", "content": "ok"}, {"role": "assistant", "content": "yes"}]
    for legacy, token in ((False, "yes"), (True, "▁yes")):
        tokenizer = sentence_piece(legacy)
        tokenizer.chat_template = TURNS.replace("[assistant]\n", "<s>").replace("[{{ m['role'] }}]\n", "<s>")
        lm = load(make_model("llama", vocab=len(tokenizer)), tokenizer)
        begun, *_ = completed(demonstrations(lm.prior(), [{"messages": messages}]).draws)
        assert tokenizer.convert_ids_to_tokens(begun) == token


def test_stop_strings_end_completions_without_a_space_of_their_own(spaced, spaced_lm):
    draws = demonstrations(spaced_lm.prior(stop=("\n",)), [{"prompt": "a:\n", "completion": "yes\nno"}]).draws
    assert spaced.convert_ids_to_tokens(completed(draws)) == ["yes", "\n"]


def test_a_stop_string_may_begin_with_a_space_that_the_completion_begins_with(spaced, spaced_lm):
    yes, spaced_yes = (spaced.convert_tokens_to_ids(token) for token in ("yes", "▁yes"))
    prior = spaced_lm.prior(stop=(" yes",), max_new_tokens=4)
    assert prior.ends([spaced_yes])
    assert not prior.ends([yes, yes])


def test_an_encoder_decoders_completion_begins_with_no_space_for_stop_strings_either(spaced):
    lm = load(text_model("t5", vocab=len(spaced)), spaced)
    begun = spaced.convert_tokens_to_ids("▁yes")
    assert not lm.prior(stop=(" yes",), max_new_tokens=4).ends([begun])
    assert lm.prior(stop=("yes",), max_new_tokens=4).ends([begun])


def test_a_space_that_a_completion_begins_with_is_in_its_text(spaced, spaced_lm):
    yes, spaced_yes, no = (spaced.convert_tokens_to_ids(token) for token in ("yes", "▁yes", "▁no"))
    prior = spaced_lm.prior(max_new_tokens=4)
    rows = [[spaced_yes, 2], [yes, 2], [yes, no], [2], [3, spaced_yes]]
    draws = prior.complete(prior.encode(["a:"]), torch.zeros(len(rows), dtype=torch.long), rows)
    assert draws.texts == (" yes", "yes", "yes no", "", "  yes")
    for text, row in zip(draws.texts, rows, strict=True):
        assert spaced.decode([*ids(draws.prompts), *row], skip_special_tokens=True) == "a:" + text


def test_broken_characters_are_decoded_as_by_themselves():
    tokenizer = sentence_piece()
    vocab = {
        **{f"<0x{byte:02X}>": byte for byte in range(256)},
        "<unk>": 256,
        "<s>": 257,
        "</s>": 258,
        "▁": 259,
        "▁a": 260,
        "a": 261,
    }
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[("▁", "a")])
    rows = [[0xC3, 261], [0xC3, 0xA4], [260, 0xC3]]
    assert decode(rows, tokenizer, on_its_own=False) == ("\ufffda", "ä", " a\ufffd")


def test_likelihoods_judge_the_completion_that_was_drawn(spaced, spaced_lm):
    yes, spaced_yes = (spaced.convert_tokens_to_ids(token) for token in ("yes", "▁yes"))
    prior = spaced_lm.prior(max_new_tokens=4)
    data = ["a:", "a:\n", [{"role": "user", "content": "ok"}]]
    draws = prior.complete(prior.encode(data), torch.arange(3), [[spaced_yes], [yes], [yes]])
    found = Fluency(spaced_lm, normalise=False).score(list(draws.texts), prompts=list(draws.prompts.texts))
    assert found == pytest.approx(draws.log_prob.tolist(), rel=1e-6)
    (answer,) = AnswerLikelihood(lm=spaced_lm, bridge=":\n").score(["a"], prompts=["no"], answer=["yes"])
    whole = prior.encode(["noa:\n"])
    assert answer == pytest.approx(float(prior.complete(whole, torch.tensor([0]), [[yes]]).log_prob), rel=1e-6)


def test_an_encoder_decoders_completion_is_a_text_of_its_own():
    tokenizer = train_tokenizer(["yes no yes no"] * 4, 300)
    ours = tokens_of("yes", tokenizer)
    lm = load(text_model("t5", vocab=len(tokenizer)), tokenizer)
    draws = demonstrations(lm.prior(), [{"prompt": "no", "completion": "yes"}]).draws
    assert completed(draws)[:-1] == ours
    assert draws.texts == ("yes",)


def word_pieces():
    vocab = {token: n for n, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "yes", "no", "##s", ":", ".", "a"])}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.mark.parametrize(
    "make", [make_tokenizer, word_pieces, lambda: words("a", "b")], ids=["bytes", "pieces", "words"]
)
def test_other_tokenizers_read_and_write_as_they_did(make):
    tokenizer = make()
    for text in ("a", " a", "yes no", "nos", "a:", "\nyes", " ", ""):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        for before in ("a", "a ", "no:\n", "ye"):
            assert tokens_of(text, tokenizer, after=before) == expected
        said = tokenizer.decode(expected, skip_special_tokens=True)
        assert decode([expected], tokenizer, on_its_own=False) == (said,)


def test_decoding_takes_one_pass(spaced):
    """A completion's text costs a token more, and no call of its own."""
    counted = copy.copy(spaced)
    calls = []
    rows = [[spaced.convert_tokens_to_ids("yes")] * 4] * 8
    decode(rows, counted, on_its_own=False)
    counted.batch_decode = lambda ids, **settings: calls.append(len(ids)) or spaced.batch_decode(ids, **settings)
    counted.decode = lambda *args, **settings: pytest.fail("a call for a row")
    assert decode(rows, counted, on_its_own=False) == ("yesyesyesyes",) * 8
    assert calls == [8]
