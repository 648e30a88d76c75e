"""The named parts: each against a closed form, another library or a hand-made loop; plain texts and conversations alike."""

import inspect
import json
import math
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import tiltlm as tl
from conftest import make_model, make_tokenizer
from test_reward import CHAT, draws
from tiltlm import rewards
from tiltlm.rewards.answers import normalised, numbers, token_f1
from tiltlm.rewards.catalogue import part_kinds

SAID = ["a good film", "the quiet story of two friends"]


def chat(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.fixture(scope="module")
def lm():
    return tl.load(make_model("llama"), make_tokenizer())


def bert_tokenizer():
    tokenizer = make_tokenizer(chat=False)
    inner = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, cls_token="<s>", sep_token="</s>")
    inner.add_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>"})
    return inner


def bert(kind, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return kind(
        BertConfig(vocab_size=302, max_position_embeddings=64, initializer_range=0.5, **sizes, **settings)
    ).eval()


class TestEveryPart:
    def test_the_catalogue_finds_them_with_what_a_user_needs_to_know(self):
        kinds = part_kinds()
        assert {
            "fluency",
            "topic-similarity",
            "json-schema",
            "token-f1",
            "bleu",
            "chrf",
            "rouge-l",
            "runs-code",
        } <= set(kinds)
        assert len(kinds) >= 21
        for kind in kinds.values():
            assert kind.__dataclass_params__.frozen
            assert inspect.cleandoc(kind.__doc__)
            settings = set(inspect.signature(kind).parameters) - {"name"}
            described = set(re.findall(r"\w+", kind.__doc__.partition("Attributes:")[2]))
            inherited = {"column"}
            assert settings - inherited <= described, (kind, settings - described)

    @pytest.mark.parametrize(
        "part",
        [
            rewards.Length(),
            rewards.Length("characters", 3, 9),
            rewards.Pattern("good"),
            rewards.JSONSchema({}),
            rewards.Repetition(1),
            rewards.Language("en"),
            rewards.Profanity(),
            rewards.Sentiment(),
            rewards.ExactMatch(),
            rewards.CalibratedAnswer(confidence=0.8),
            rewards.Answered(),
            rewards.SelectiveAccuracy(),
            rewards.TokenF1(),
            rewards.LabelMatch("answer", ("good", "bad")),
            rewards.NumericEquality(),
            rewards.BLEU(),
            rewards.CHRF(),
            rewards.RougeL(),
        ],
        ids=lambda part: part.label,
    )
    def test_conversations_are_texts_and_values_are_within_the_bounds(self, part):
        texts = ["good", "", "good good good", "3 bad films, 7!", "Le film est très bon."]
        answers = ["good 3", "good 3", "bad 7", "7", "7"]
        plain = part(completions=texts, answer=answers)
        assert part(completions=chat(texts), answer=answers) == plain
        assert len(plain) == len(texts)
        low, high = part.bounds
        assert all(isinstance(value, float) and low <= value <= high for value in plain)
        assert part(completions=[], answer=[]) == []


class TestTexts:
    def test_length(self):
        assert rewards.Length()(["a b  c", ""]) == [3, 0]
        assert rewards.Length("characters")(["a b"]) == [3]
        assert rewards.Length("tokens")(["x"], completion_ids=[[5, 6, 7]]) == [3]
        found = tl.Reward(rewards.Length("tokens")).log_likelihood(draws()).log
        assert found.tolist() == draws().lengths.tolist()
        assert rewards.Length(least=2, most=3)(["a", "a b", "a b c", "a b c d e"]) == [-1, 0, 0, -2]
        assert rewards.Length(least=4).bounds == (-4.0, 0.0)
        assert rewards.Length(most=4).bounds == (-math.inf, 0.0)

    def test_pattern_and_repetition(self):
        assert rewards.Pattern(r"\d+")(["a 12", "a"]) == [1, 0]
        assert rewards.Pattern(r"\d+", whole=True)([" 12\n", "a 12"]) == [1, 0]
        assert rewards.Repetition(2)(["a b a b a b", "a b c", "a"]) == [pytest.approx(3 / 5), 0, 0]

    def test_json_schema(self, tmp_path):
        schema = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
        texts = [
            '{"age": 3}',
            '```json\n{"age": 3}\n```',
            '{"age": "3"}',
            "{}",
            "age: 3",
            '{"age": NaN}',
            "[" * 100_000,
        ]
        expected = [1, 1, 0, 0, 0, 0, 0]
        assert rewards.JSONSchema(schema)(texts) == expected
        (tmp_path / "s.json").write_text(json.dumps(schema))
        assert rewards.JSONSchema(str(tmp_path / "s.json"))(texts) == expected

    def test_lexicons_know_the_difference(self):
        english, german = "This is a quiet story of two friends.", "Das ist eine stille Geschichte zweier Freunde."
        assert rewards.Language("en")([english])[0] > 0.9 > 0.1 > rewards.Language("de")([english])[0]
        assert rewards.Language("de")([german])[0] > 0.9
        clean, foul = rewards.Profanity()(["what a nice day", "you fucking idiot"])
        assert clean < 0.2 < 0.8 < foul
        bad, good = rewards.Sentiment()(["a terrible, boring film", "a wonderful film"])
        assert bad < -0.3 < 0.3 < good

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: rewards.Length("pages"), "unit is 'pages'; choose words"),
            (lambda: rewards.Length(least=5, most=2), "length is from 5 to 2"),
            (lambda: rewards.Pattern("("), r"pattern is '\('"),
            (lambda: rewards.JSONSchema({"type": 3})(["{}"]), "is not a JSON schema"),
            (lambda: rewards.JSONSchema("nowhere.json")(["{}"]), "nowhere.json"),
            (lambda: rewards.Repetition(0), "n is 0"),
            (lambda: rewards.Language("xx")(["a"]), "language is 'xx'; py3langid knows ace, af"),
            (lambda: rewards.NumericEquality(which="best"), "which is 'best'"),
            (lambda: rewards.NumericEquality()(["3"], answer=["three"]), "without a number"),
            (lambda: rewards.ExactMatch()(["3"], answer=[None]), "give at least one reference"),
            (lambda: rewards.BLEU(tokenize="x")(["a"], answer=["a"]), "tokenize is 'x'"),
            (rewards.TopicSimilarity, "give one of them"),
            (lambda: rewards.Judge("m", scale=(3, 1)), "scale is"),
            (lambda: rewards.Judge("m", template="{{ x "), "no Jinja2 template"),
            (lambda: rewards.Judge("m", url="localhost:8000"), "url is 'localhost:8000'; give the endpoint's address"),
            (lambda: rewards.RunsCode(timeout=0), "must be positive"),
            (lambda: rewards.RunsCode()(["x = 1"], tests=[""]), "give code that tests"),
        ],
    )
    def test_bad_settings_are_one_sentence(self, make, message):
        with pytest.raises(tl.InputError, match=message):
            make()


class TestAnswers:
    def test_squad_normalisation_and_f1(self):
        assert normalised("The  Cat, a hat!") == "cat hat"
        assert token_f1("the cat sat on", "a cat sat") == pytest.approx(2 * 2 / (3 + 2))
        assert token_f1("cat cat", "cat") == pytest.approx(2 / 3)  # words count as often as they are there
        assert (token_f1("", "the"), token_f1("x", "the")) == (1, 0)
        assert rewards.ExactMatch()(["The Paris.", "London"], answer=["paris", ["Rome", "london"]]) == [1, 1]
        assert rewards.TokenF1()(["in Paris"], answer=[["Rome", "Paris"]]) == [pytest.approx(2 / 3)]

    def test_numbers(self):
        text = "It's $1,250.50, then -3, 2-1, .5 and 1e3 in v2; 1,2500 e5"
        assert numbers(text) == [1250.5, -3, 2, 1, 0.5, 1000, 2, 1, 2500, 5]
        part = rewards.NumericEquality()
        assert part(["so 3 + 4 = 7", "7 or 8", "none", "42.0"], answer=["7", 7, "7", "6 * 7 #### 42"]) == [1, 0, 0, 1]
        assert rewards.NumericEquality(which="any")(["7 or 8"], answer=[7]) == [1]
        assert rewards.NumericEquality(absolute=0.1)(["3.14"], answer=["3.1"]) == [1]

    def test_labels(self):
        part = rewards.LabelMatch(labels=("good", "bad", "not good"))
        assert [part.predicted(t) for t in ("It is Not Good, bad", "goodness", "bad!", "good")] == [
            "not good",
            "",
            "bad",
            "good",
        ]
        assert part(["bad", "so good", "?"], label=["bad", "bad", "good"]) == [1, 0, 0]
        truth = ["good", "good", "bad", "bad", "bad"]
        found = rewards.evaluate(
            rewards.LabelMatch(labels=("good", "bad")), ["good", "bad", "bad", "?", "bad"], label=truth
        )
        # good: 1 of 1 right, 1 of 2 found; bad: 2 of 3 right, 2 of 3 found
        assert found["label-match/accuracy"].value == pytest.approx(3 / 5)
        assert found["label-match/precision"].value == pytest.approx((1 + 2 / 3) / 2)
        assert found["label-match/recall"].value == pytest.approx((1 / 2 + 2 / 3) / 2)
        assert found["label-match/f1"].value == pytest.approx((2 / 3 + 2 / 3) / 2)
        assert found["label-match/f1"].stderr > 0

    def test_overlap_metrics_are_the_libraries_own_and_bleu_of_a_corpus_is_no_mean(self):
        import sacrebleu

        texts = ["the cat sat on the mat", "a dog"]
        answers = ["the cat sat on a mat", ["a dog barks", "a dog ran off"]]
        streams = [[answers[0], answers[1][0]], [None, answers[1][1]]]
        for part, metric in ((rewards.BLEU(), sacrebleu.BLEU()), (rewards.CHRF(), sacrebleu.CHRF())):
            found = rewards.evaluate(part, texts, answer=answers, resamples=20)[part.label]
            assert found.value == pytest.approx(metric.corpus_score(texts, streams).score / 100)
            assert found.stderr > 0
            assert abs(found.value - sum(part(texts, answer=answers)) / 2) > 1e-3
            assert part(["the cat"], answer=["the cat"]) == [1.0]
        assert rewards.RougeL()(["a b c"], answer=[["x", "a c"]]) == [pytest.approx(0.8)]

    def test_a_mean_has_its_standard_error_and_draws_bring_their_columns(self):
        found = rewards.evaluate([rewards.ExactMatch(), rewards.Length()], draws(columns={"answer": ("good", "fine")}))
        assert found["exact-match"].value == 0.5
        assert found["exact-match"].stderr == pytest.approx(math.sqrt(1 / 3) / 2)
        assert found["length"].value == 0.75
        with pytest.raises(tl.InputError, match="answer has 1 values for 2"):
            rewards.evaluate(rewards.ExactMatch(), ["a", "b"], answer=["a"])


class TestLikelihoods:
    def by_hand(self, lm, context, ids):
        tokens = torch.tensor([[*context, *ids]])
        log_p = lm.body.model(tokens).logits[0].double().log_softmax(-1)
        return float(sum(log_p[len(context) - 1 + t, token] for t, token in enumerate(ids)))

    def test_fluency_is_the_log_probability_of_the_text(self, lm):
        tokenizer = lm.body.tokenizer
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAID]
        prompts = ["the film was", "the film was"]
        begun = tokenizer(prompts[0])["input_ids"]
        expected = [self.by_hand(lm, begun, some) for some in ids]
        total = rewards.Fluency(lm, normalise=False)(SAID, prompts=prompts)
        assert_close(total, expected, rtol=1e-4, atol=1e-4)
        mean = rewards.Fluency(lm)(SAID, prompts=prompts)
        assert_close(mean, [v / len(some) for v, some in zip(expected, ids, strict=True)], rtol=1e-4, atol=1e-4)
        alone = rewards.Fluency(lm, given="nothing", normalise=False)(SAID)
        assert_close(alone, [self.by_hand(lm, [0], some) for some in ids], rtol=1e-4, atol=1e-4)
        ended = rewards.Fluency(lm, normalise=False, end=True)(SAID, prompts=prompts)
        assert_close(ended, [self.by_hand(lm, begun, [*some, 1]) for some in ids], rtol=1e-4, atol=1e-4)
        assert rewards.Fluency(lm).bounds == (-math.inf, 0)

    def test_silence_is_not_the_most_fluent(self, lm):
        begun = lm.body.tokenizer("the film was")["input_ids"]
        (silent,) = rewards.Fluency(lm)([""], prompts=["the film was"])
        assert silent == pytest.approx(self.by_hand(lm, begun, [1]), rel=1e-4)
        assert silent < -1

    def test_under_the_prior_itself_it_is_log_pi0_without_the_end(self, lm):
        prior = lm.prior(max_new_tokens=40)
        ids = [lm.body.tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAID]
        for data in (["the film"], [[{"role": "user", "content": "how was it?"}]]):
            sample = prior.complete(prior.encode(data), torch.tensor([0, 0]), [[*some, 1] for some in ids])
            without_end = (sample.log_q * (sample.tokens != 1)).sum(-1).double()
            for end, expected in ((False, without_end), (True, sample.log_prob.double())):
                reward = tl.Reward(rewards.Fluency(lm, normalise=False, end=end)).log_likelihood(sample).log
                assert_close(reward, expected, rtol=1e-4, atol=1e-4)

    def test_an_answers_likelihood_is_its_log_probability_after_the_completion(self, lm):
        tokenizer = lm.body.tokenizer
        part = rewards.AnswerLikelihood(lm=lm, bridge=" so ")
        (found,) = part(["it was"], prompts=["the film"], answer=["good"])
        context = tokenizer("the filmit was so ")["input_ids"]
        ids = tokenizer("good", add_special_tokens=False)["input_ids"]
        assert found == pytest.approx(self.by_hand(lm, context, ids), rel=1e-4)
        turn = [{"role": "user", "content": "how was it?"}]
        (inside,) = part(chat(["it was"]), prompts=[turn], answer=[["good", "bad"]])
        context = tokenizer("<s><user>how was it?</s><assistant>it was so ", add_special_tokens=False)["input_ids"]
        both = [self.by_hand(lm, context, tokenizer(a, add_special_tokens=False)["input_ids"]) for a in ("good", "bad")]
        assert inside == pytest.approx(max(both), rel=1e-4)

    def test_pseudo_log_likelihood_masks_each_token_in_turn(self):
        model, tokenizer = bert(BertForMaskedLM), bert_tokenizer()
        mlm = tl.load_masked_lm(model, tokenizer)
        expected = []
        for text in SAID:
            ids = tokenizer(text)["input_ids"]
            total = 0.0
            for t in range(1, len(ids)):  # the tokenizer puts its first token before the text
                masked = torch.tensor([[*ids[:t], tokenizer.mask_token_id, *ids[t + 1 :]]])
                total += float(model(masked).logits[0, t].double().log_softmax(-1)[ids[t]])
            expected.append(total)
        assert_close(rewards.PseudoLogLikelihood(mlm, normalise=False)(SAID), expected, rtol=1e-4, atol=1e-4)
        for normalise in (True, False):  # silence is worth a blind guess, and neither the best nor impossible
            (said, *silent) = rewards.PseudoLogLikelihood(mlm, normalise=normalise)([SAID[0], ""])
            assert silent == [pytest.approx(-math.log(model.config.vocab_size))]
            assert said < 0
        assert rewards.PseudoLogLikelihood(mlm, empty=-3.0)([""]) == [-3.0]
        with pytest.raises(tl.InputError, match="empty is 1"):
            rewards.PseudoLogLikelihood(mlm, empty=1)


class TestModels:
    def test_cosines_do_not_depend_on_the_batch_and_are_means_over_real_tokens(self):
        model, tokenizer = bert(BertModel), bert_tokenizer()
        encoder = tl.load_encoder(model, tokenizer)
        single = torch.cat([encoder.embed([text]) for text in SAID])
        assert_close(encoder.embed(SAID), single, rtol=1e-4, atol=1e-5)
        states = model(torch.tensor([tokenizer(SAID[0])["input_ids"]])).last_hidden_state[0].mean(0)
        assert_close(encoder.embed(SAID)[0], states / states.norm(), rtol=1e-4, atol=1e-5)
        cosine = float(single[0] @ single[1])
        assert rewards.TopicSimilarity(encoder, SAID[1])(SAID) == [
            pytest.approx(cosine, abs=1e-5),
            pytest.approx(1, abs=1e-5),
        ]
        by_column = rewards.TopicSimilarity(encoder, column="gold")(SAID, gold=[SAID[1], SAID[1]])
        assert by_column == pytest.approx([cosine, 1], abs=1e-5)
        prompts = [[{"role": "user", "content": SAID[1]}]] * 2
        assert rewards.TopicSimilarity(encoder, column="prompt")(chat(SAID), prompts=prompts) == pytest.approx(
            [cosine, 1], abs=1e-5
        )

    def test_what_is_too_long_for_the_encoder_is_said(self):
        encoder = tl.load_encoder(bert(BertModel), bert_tokenizer())
        with pytest.warns(tl.TiltWarning, match="longer than the 64 tokens"):
            encoder.embed(["xyz " * 100])

    def test_a_classifiers_probability_and_logit(self):
        labels = {"id2label": {0: "calm", 1: "toxic", 2: "odd"}, "label2id": {"calm": 0, "toxic": 1, "odd": 2}}
        model, tokenizer = bert(BertForSequenceClassification, **labels), bert_tokenizer()
        classifier = tl.load_classifier(model, tokenizer)
        logits = torch.cat([model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in SAID]).double()
        found = rewards.Classifier(classifier, "toxic")(chat(SAID))
        assert found == pytest.approx(logits.softmax(-1)[:, 1].tolist(), rel=1e-4)
        assert rewards.Classifier(classifier, 2, "logit")(SAID) == pytest.approx(
            logits[:, 2].tolist(), rel=1e-4, abs=1e-5
        )
        with pytest.raises(tl.InputError, match="label is None; the classifier has 'calm', 'toxic', 'odd'"):
            rewards.Classifier(classifier)(SAID)

    def test_a_causal_reward_model_reads_each_texts_own_last_token(self):
        """A batch is padded although the tokenizer has no padding, and a text may end with the end token itself."""
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=300, num_labels=1, initializer_range=0.5, pad_token_id=1, **sizes)
        model, tokenizer = LlamaForSequenceClassification(config).eval(), make_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        part = rewards.Classifier(tl.load_classifier(model, tokenizer), output="logit", given="prompt")
        prompts = [[{"role": "user", "content": "how was it?"}]] * 2
        texts = [
            tokenizer.apply_chat_template([*prompts[0], {"role": "assistant", "content": t}], tokenize=False)
            for t in SAID
        ]
        expected = []
        for text in texts:
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            expected.append(float(model.score(model.model(ids).last_hidden_state[0, -1])))
        assert part(chat(SAID), prompts=prompts) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert config.pad_token_id == 1


class Answers(BaseHTTPRequestHandler):
    """A server with OpenAI's chat completions: fails once, and rates an answer by its number of words."""

    asked: list
    failures = 1
    reply: bytes = b""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        kind.asked.append((self.path, self.headers["Authorization"], body))
        if kind.failures:
            kind.failures -= 1
            self.send_response(503)
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            return
        question = body["messages"][0]["content"]
        answer = re.search(r"<<(.*)>>", question, re.DOTALL)[1]
        said = "I cannot say." if not answer else f"Score: {len(answer.split())}/10, I think"
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [message]}
        data = self.reply or json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Answers,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", handler
        http.shutdown()
        thread.join()


class TestJudge:
    TEMPLATE = "For {{ level }}, after {{ prompt }}, {{ low }} to {{ high }}: <<{{ completion }}>>"

    def test_it_asks_a_real_server_retries_and_reads_the_number(self, server):
        url, handler = server
        judge = rewards.Judge("m", url, self.TEMPLATE, concurrency=2)
        reward = tl.Reward(judge, on_error="drop")
        assert (reward.bounds, judge.reads) == ((0.0, 10.0), ("prompts", "level"))
        texts = ("so good", "bad", "", "one of three words here")
        found = reward.log_likelihood(draws(texts, columns={"level": ("children", "adults")}))
        assert found.kept.tolist() == [True, True, False, True]
        assert found.log[found.kept].tolist() == [2, 1, 5]
        asked = [body["messages"][0]["content"] for _, _, body in handler.asked]
        assert "For children, after the film, 0 to 10: <<so good>>" in asked
        assert len(asked) == 5  # one was tried again
        assert handler.asked[0][0] == "/v1/chat/completions"
        judge._client.close()

    def test_conversations_and_what_is_off_the_scale(self, server):
        url, _ = server
        judge = rewards.Judge("m", url, "{{ prompt }} <<{{ completion }}>>", scale=(0, 3))
        assert judge(chat(["so good", "a b c d"]), prompts=[list(CHAT)] * 2) == [2, None]
        assert judge.question("x", {"prompts": list(CHAT)}) == "user: how was it? <<x>>"
        judge._client.close()

    def test_a_server_that_is_not_there_is_an_error_that_names_the_judge(self):
        judge = rewards.Judge("m", "http://127.0.0.1:9/v1", retries=0)
        says = r"reward 'judge' raised ConnectionError \(http://127.0.0.1:9/v1 did not answer: .*url.*\) for completion 'good'"
        with pytest.raises(tl.InputError, match=says):
            tl.Reward(judge).log_likelihood(draws())
        judge._client.close()

    @pytest.mark.parametrize("reply", [b"null", b'{"id": "1"}', b'{"choices": []}', b'{"choices": [{"message": 3}]}'])
    def test_an_answer_that_is_no_chat_completion_is_said_to_be_none(self, server, reply):
        url, handler = server
        handler.failures, handler.reply = 0, reply
        judge = rewards.Judge("m", url, "<<{{ completion }}>>", retries=0)
        with pytest.raises(tl.InputError, match=rf"ValueError \({url} answered, but with no chat completion"):
            tl.Reward(judge).log_likelihood(draws())
        assert not tl.Reward(judge, on_error="drop").log_likelihood(draws()).kept.any()
        judge._client.close()

    def test_a_template_is_sandboxed(self, server):
        judge = rewards.Judge("m", server[0], "{{ ''.__class__.__mro__ }} <<{{ completion }}>>")
        with pytest.raises(Exception, match="unsafe"):
            judge(["a"], prompts=["b"])


class TestRunsCode:
    TESTS = ("assert double(2) == 4", "assert double(0) == 0")

    def test_what_passes(self):
        part = rewards.RunsCode(timeout=20, workers=2)
        texts = [
            "def double(x):\n    return 2 * x",
            "Sure:\n```python\ndef double(x): return x + x\n```\nDone.",
            "def double(x): return x ** 2",
            "def double(x): return 4",
            "def double(x) return",
            "",
        ]
        assert part(texts, tests=[self.TESTS] * 6) == [1, 1, 1, 0, 0, 0]
        assert rewards.RunsCode(timeout=20, partial=True)([texts[3]], tests=[self.TESTS]) == [0.5]
        assert part(chat([texts[0]]), tests=["\n".join(self.TESTS)]) == [1]

    @pytest.mark.parametrize(
        "code",
        [
            "import sys; sys.exit(0)",
            "import os; os._exit(0)",
            "import os\nfor f in range(3, 20):\n    try: os.write(f, b'0 2\\n')\n    except OSError: pass",
            "import builtins\nbuiltins.AssertionError = None\nraise SystemExit",
        ],
        ids=["exit", "hard exit", "answers for itself", "raises"],
    )
    def test_leaving_early_is_no_pass(self, code):
        assert rewards.RunsCode(timeout=20)([code], tests=[self.TESTS]) == [0]

    def test_it_eats_neither_time_nor_memory(self):
        begun = time.monotonic()
        hungry = "x = 'a' * (2 << 30)\ndef double(x): return 2 * x"
        assert rewards.RunsCode(timeout=20, memory=256)([hungry], tests=[self.TESTS]) == [0]
        endless = "while True: pass"
        assert rewards.RunsCode(timeout=1)([endless], tests=[self.TESTS]) == [0]
        assert time.monotonic() - begun < 30

    def test_what_it_started_is_gone(self):
        """Grandchildren in the group, one that left it, one that is an orphan besides, and a bomb that is stopped early."""
        mark = f"tiltlm_stray_{os.getpid()}"
        sleeper = f"[sys.executable, '-c', 'import time; time.sleep(600) # {mark}']"
        stays = f"import subprocess, sys, time\nsubprocess.Popen({sleeper})\n"
        leaves = f"import subprocess, sys, time\nsubprocess.Popen({sleeper}, start_new_session=True)\ntime.sleep(1)\n"
        orphan = f"import subprocess, sys\nsubprocess.Popen({sleeper}, start_new_session=True)"
        flees = f"import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', {orphan!r}], check=True)\n"
        bomb = f"import subprocess, sys, time\nfor _ in range(40): subprocess.Popen({sleeper}); time.sleep(0.02)\n"
        part = rewards.RunsCode(timeout=20, processes=4)
        assert part([stays, leaves, flees, bomb], tests=["x = 1"] * 4) == [1, 1, 1, 0]
        found = [
            p.info["cmdline"]
            for p in psutil.process_iter(["cmdline"])
            if any(mark in a for a in p.info["cmdline"] or [])
        ]
        assert not [line for line in found if "-c" in line]


@pytest.mark.slow
class TestRealModels:
    def test_minilm_knows_what_is_about_space(self):
        part = rewards.TopicSimilarity(text="space travel")
        about, other = part(["The rocket carries the crew to Mars.", "She bakes bread every Sunday."])
        assert about > 0.3 > 0.15 > other

    def test_smollm2_prefers_english_to_noise(self):
        lm = tl.load("smollm2-135m-instruct")
        good, noise = rewards.Fluency(lm)(
            [" a quiet story of two friends.", " zxq plinth of of the of"], prompts=["The film is"] * 2
        )
        assert good > noise + 1
