"""Active learning: acquisition against enumeration and closed forms, sessions that survive a kill, and who answers."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

import tiltlm as tl
from conftest import make_model, make_tokenizer, write
from tiltlm.errors import InputError
from tiltlm.labels import (
    BALD,
    AnswerFile,
    Candidates,
    DoubleThompson,
    Margin,
    Oracle,
    RandomPairs,
    Session,
    active_learning,
)
from tiltlm.labels.acquisition import conditioned, double_thompson_law, information, preference_probability
from tiltlm.labels.terminal import answer_at_terminal
from tiltlm.lm.given import preferences
from tiltlm.lm.load import load
from tiltlm.workflow.labels import members_of

RULES = [BALD(), DoubleThompson(), Margin(), Margin(of="probability"), RandomPairs()]


def name_of(rule):
    return f"{rule.name}-{getattr(rule, 'of', '')}"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def world(prompts=4, completions=3):
    texts = [[f"text {p} {c}" for c in range(completions)] for p in range(prompts)]
    return Candidates.of_groups([f"prompt {p}" for p in range(prompts)], texts)


def draws(candidates, k=24, seed=1, scale=1.5):
    return scale * torch.randn(k, len(candidates.completions), generator=rng(seed), dtype=torch.float64)


def everything(candidates):
    return torch.ones(len(candidates), dtype=torch.bool)


class TestScores:
    def test_information_is_the_mutual_information_of_the_joint_table(self):
        d = 3 * torch.randn(7, 5, generator=rng(), dtype=torch.float64)
        for m in range(5):
            joint = {(k, y): d[k, m].mul(1 if y else -1).sigmoid().item() / 7 for k in range(7) for y in (0, 1)}
            answer = {y: sum(joint[k, y] for k in range(7)) for y in (0, 1)}
            truth = sum(p * math.log(p / (answer[y] / 7)) for (_, y), p in joint.items())
            assert information(d)[m].item() == pytest.approx(truth, abs=1e-13)

    def test_information_of_two_certain_members_who_disagree_is_log_2(self):
        assert information(torch.tensor([[800.0], [-800.0]], dtype=torch.float64)).item() == pytest.approx(math.log(2))

    def test_two_opposite_members_in_closed_form(self):
        a = 1.3
        p = 1 / (1 + math.exp(-a))
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        found = information(torch.tensor([[a], [-a]], dtype=torch.float64)).item()
        assert found == pytest.approx(math.log(2) - entropy, abs=1e-14)

    def test_doubt_that_no_answer_cures_is_worth_nothing(self):
        """Members who agree on 1/2 leave nothing to learn; predictive entropy, the usual wrong formula, is at its largest."""
        d = torch.zeros(9, 1, dtype=torch.float64)
        p = preference_probability(d)
        assert information(d).item() == 0
        assert (-p * p.log() - (1 - p) * (1 - p).log()).item() == pytest.approx(math.log(2))

    def test_the_probability_is_the_mean_of_sigma_and_not_sigma_of_the_mean(self):
        d = torch.tensor([[8.0], [-1.0]], dtype=torch.float64)
        assert preference_probability(d).item() == pytest.approx((1 / (1 + math.exp(-8)) + 1 / (1 + math.e)) / 2)
        assert abs(preference_probability(d).item() - d.mean().sigmoid().item()) > 0.2

    def test_double_thompson_law_is_that_of_two_members_drawn_at_random(self):
        candidates, k = world(2, 4), 6
        members = draws(candidates, k)
        members[0, 1] = members[0, 0] = members[0].max() + 1  # a tie shares its vote
        law = double_thompson_law(candidates, members)
        truth = torch.zeros(len(candidates), dtype=torch.float64)
        for a, b in itertools.product(range(k), repeat=2):
            for p in range(2):
                rows = (candidates.prompt_index == p).nonzero().flatten()
                best = [rows[members[m, rows] == members[m, rows].max()].tolist() for m in (a, b)]
                for i, j in itertools.product(*best):
                    hit = (candidates.pairs == torch.tensor(sorted((i, j)))).all(-1)
                    truth[hit] += 1 / (k * k * len(best[0]) * len(best[1]))
        assert_close(law, truth, rtol=0, atol=1e-14)

    def test_double_thompson_draws_from_its_law(self):
        candidates = world(1, 4)
        members = draws(candidates, 5)
        law = double_thompson_law(candidates, members)
        chance, hits, n = rng(), torch.zeros(len(law)), 1500
        for _ in range(n):
            ((pair, score),) = DoubleThompson().choose(candidates, members, everything(candidates), 1, chance)
            assert score == pytest.approx(float(law[pair]))
            hits[pair] += 1
        p = law / law.sum()
        assert ((hits / n - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-12).all()
        assert (p == 0).any()  # a pair that no two members fight over, so that uniform draws would show

    @pytest.mark.parametrize("of", ["reward", "probability"])
    def test_margin(self, of):
        candidates, members = world(3, 4), None
        members = draws(candidates)
        d = candidates.differences(members)
        margin = d.mean(0).abs() if of == "reward" else (d.sigmoid().mean(0) - 0.5).abs()
        ((pair, score),) = Margin(of=of).choose(candidates, members, everything(candidates), 1, rng())
        assert pair == int(margin.argmin())
        assert score == pytest.approx(-float(margin.min()))


@pytest.mark.parametrize("rule", RULES, ids=name_of)
class TestEveryRule:
    def test_offsets_of_a_member_and_prompt_do_not_matter(self, rule):
        candidates = world()
        members = draws(candidates)
        offsets = 50 * torch.randn(len(members), len(candidates.prompts), generator=rng(7), dtype=torch.float64)
        moved = members + offsets[:, candidates.prompt_index]
        plain, other = (rule.choose(candidates, m, everything(candidates), 6, rng()) for m in (members, moved))
        assert [pair for pair, _ in plain] == [pair for pair, _ in other]
        for (_, a), (_, b) in zip(plain, other, strict=True):
            assert a == pytest.approx(b, abs=1e-9)

    def test_a_batch_has_different_free_pairs_until_none_is_left(self, rule):
        candidates = world()
        free = everything(candidates)
        free[::2] = False
        chosen = [pair for pair, _ in rule.choose(candidates, draws(candidates), free, 99, rng())]
        assert sorted(chosen) == free.nonzero().flatten().tolist()

    def test_the_same_seed_chooses_the_same(self, rule):
        candidates = world()
        first, again = (rule.choose(candidates, draws(candidates), everything(candidates), 5, rng(3)) for _ in "ab")
        assert first == again


class TestBatches:
    def test_conditioning_is_gaussian_conditioning(self):
        candidates = world()
        members = draws(candidates, 40)
        i, j = candidates.pairs[2].tolist()
        contrast = torch.zeros(members.shape[1], dtype=torch.float64)
        contrast[i], contrast[j] = 1, -1
        c = torch.cov(members.T, correction=0)
        d = members @ contrast
        noise = 1 / (d.sigmoid() * (1 - d.sigmoid())).mean()
        truth = c - torch.outer(c @ contrast, c @ contrast) / (contrast @ c @ contrast + noise)
        after = conditioned(members, candidates.pairs[2])
        assert_close(torch.cov(after.T, correction=0), truth, rtol=0, atol=1e-12)
        assert_close(after.mean(0), members.mean(0), rtol=0, atol=1e-12)

    def test_an_answer_that_is_certain_changes_nothing(self):
        candidates = world(1, 2)
        members = torch.tensor([[2000.0, 0.0], [1000.0, 0.0]], dtype=torch.float64)
        assert_close(conditioned(members, candidates.pairs[0]), members)

    @pytest.mark.parametrize("rule", [BALD(), Margin()], ids=name_of)
    def test_the_same_question_in_other_words_waits(self, rule):
        """Prompts 0 and 1 have the same rewards under every member; prompt 2 is independent and a little less worth asking."""
        candidates = world(3, 2)
        u = torch.randn(64, 2, generator=rng(), dtype=torch.float64) * 6
        u -= u.mean(0)
        zero = torch.zeros(64, dtype=torch.float64)
        columns = [u[:, 0], zero, u[:, 0], zero, 0.9 * u[:, 1] + 0.01, zero]
        chosen = [p for p, _ in rule.choose(candidates, torch.stack(columns, -1), everything(candidates), 3, rng())]
        assert chosen[0] in (0, 1)
        assert chosen[1] == 2

    def test_taking_the_best_scores_at_once_would_ask_twice(self):
        """The negative control of the test above."""
        candidates = world(3, 2)
        u = torch.randn(64, 2, generator=rng(), dtype=torch.float64) * 3
        u -= u.mean(0)
        zero = torch.zeros(64, dtype=torch.float64)
        members = torch.stack([u[:, 0], zero, u[:, 0], zero, 0.9 * u[:, 1], zero], -1)
        assert set(information(candidates.differences(members)).topk(2).indices.tolist()) == {0, 1}

    def test_the_batch_knows_nearly_as_much_as_the_best_batch_of_two(self):
        """Joint information by enumeration of answers (Kirsch et al. 2019), over all pairs of questions."""
        candidates = world(3, 3)
        members = draws(candidates, 200)
        members[:, 0:3] *= 3
        members[:, 3:6] = members[:, 0:3] + 0.1 * members[:, 3:6]  # prompt 1 is nearly prompt 0
        d = candidates.differences(members)

        def joint(a, b):
            total, noise = 0.0, 0.0
            for s, t in itertools.product((1, -1), repeat=2):
                p = (s * d[:, a]).sigmoid() * (t * d[:, b]).sigmoid()
                total -= float(p.mean() * p.mean().log())
                noise -= float((p * p.log()).mean())
            return total - noise

        every = {(a, b): joint(a, b) for a, b in itertools.combinations(range(len(candidates)), 2)}
        chosen = BALD().choose(candidates, members, everything(candidates), 2, rng())
        found = every[tuple(sorted(pair for pair, _ in chosen))]
        blind = every[tuple(sorted(information(d).topk(2).indices.tolist()))]
        assert found >= 0.97 * max(every.values())
        assert blind < found

    def test_with_a_single_member_margin_does_not_repeat_a_completion(self):
        candidates = world(3, 4)
        chosen = Margin().choose(candidates, draws(candidates, 1), everything(candidates), 6, rng())
        used = candidates.pairs[[pair for pair, _ in chosen]].flatten().tolist()
        assert len(set(used)) == len(used)

    def test_double_thompson_asks_every_prompt_first(self):
        candidates = world(5, 3)
        chosen = DoubleThompson().choose(candidates, draws(candidates), everything(candidates), 10, rng())
        owners = candidates.owner[[pair for pair, _ in chosen]].tolist()
        assert sorted(owners[:5]) == sorted(owners[5:]) == list(range(5))


class TestCandidates:
    def test_all_pairs_of_different_texts_within_a_prompt(self):
        found = Candidates.of_groups(["p", "q", "r"], [["a", "b", "a", "c"], ["a", "a"], ["x", "y"]])
        texts = [tuple(found.completions[i] for i in pair) for pair in found.pairs.tolist()]
        assert texts == [("a", "b"), ("a", "c"), ("b", "c"), ("x", "y")]
        assert found.prompts == ("p", "r")

    def test_of_a_models_draws(self):
        prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=5)
        prompts = prior.encode([{"prompt": "the film", "topic": "film"}, {"prompt": "two friends", "topic": "friends"}])
        found = Candidates.of_draws(prior.draw(prompts, 4, rng()))
        assert len(found) == 12
        assert found.columns == {"topic": ("film", "friends")}

    def test_a_pair_across_prompts_is_refused(self):
        with pytest.raises(InputError, match="pair 0 compares completions of the prompts"):
            Candidates(("p", "q"), ("a", "b"), torch.tensor([0, 1]), torch.tensor([[0, 1]]))

    def test_nothing_to_ask(self):
        with pytest.raises(InputError, match="no pairs to ask about"):
            Candidates.of_groups(["p"], [["a", "a"]])

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"completions": ["a", "b"]}, "row 1 has prompt None"),
            ({"prompt": "p", "completions": "ab"}, "row 1 has completions 'ab'; give a list"),
            ({"prompt": "p", "completions": ["a", 3]}, "row 1 has completions"),
        ],
    )
    def test_rows(self, row, message):
        with pytest.raises(InputError, match=message):
            Candidates.of_rows([row])

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            (torch.zeros(3, 5), r"members have the shape \(3, 5\); give rewards of shape \(members, 4\)"),
            (torch.full((2, 4), math.nan), "not finite"),
        ],
    )
    def test_members(self, members, message):
        with pytest.raises(InputError, match=message):
            world(2, 2).differences(members)


class TestSession:
    def test_answers_become_trl_rows(self, tmp_path):
        session = Session.create(tmp_path / "s", world(2, 3), seed=3)
        asked = session.ask(6, RandomPairs())
        assert {q.swapped for q in asked} == {True, False}
        for question, answer in zip(asked, ["first", "2", "=", "s", "1", "second"], strict=True):
            session.answer(question, answer)
        rows = session.rows()
        wanted = [
            (asked[0].first, asked[0].second),
            (asked[1].second, asked[1].first),
            (asked[4].first, asked[4].second),
        ]
        wanted.append((asked[5].second, asked[5].first))
        assert [(row["chosen"], row["rejected"]) for row in rows] == wanted
        assert all(row["prompt"][-1] == row["chosen"][5] == row["rejected"][5] for row in rows)
        texts = session.candidates.completions
        assert [(texts[i], texts[j]) for i, j in session.comparisons.tolist()] == wanted
        assert session.status() == {
            "pairs": 6, "asked": {"random": 6}, "open": 0, "first": 2, "second": 2, "tie": 1, "skip": 1, "first_won": 0.5,
        }  # fmt: skip

    def test_conversations_become_conversations_that_the_trainers_read(self, tmp_path):
        prompts = [({"role": "user", "content": "the film"},), ({"role": "user", "content": "two friends"},)]
        session = Session.create(tmp_path / "s", Candidates.of_groups(prompts, [["good", "bad"], ["meet", "again"]]))
        for question in session.ask(2, RandomPairs()):
            session.answer(question, "first")
        prior = load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=8)
        scored = preferences(prior, Session.open(tmp_path / "s").rows())
        assert scored.pairs.tolist() == [[0, 1], [2, 3]]

    def test_what_was_asked_is_not_asked_again(self, tmp_path):
        session = Session.create(tmp_path / "s", world(2, 3))
        pairs = [q.pair for _ in range(4) for q in session.ask(2, RandomPairs())]
        assert sorted(pairs) == list(range(6))
        assert session.ask(2, RandomPairs()) == []

    def test_undo_takes_back_the_latest(self, tmp_path):
        session = Session.create(tmp_path / "s", world())
        first, second = session.ask(2, RandomPairs())
        session.answer(first, "first")
        session.answer(second, "tie")
        assert session.undo() == second
        assert session.undo() == first
        assert session.undo() is None
        session.answer(first, "second")
        assert dict(Session.open(tmp_path / "s").answers) == {first.number: "second"}

    @pytest.mark.parametrize("cut", [1, 7, 30])
    def test_a_torn_last_line_did_not_happen(self, tmp_path, cut):
        session = Session.create(tmp_path / "s", world())
        asked = session.ask(3, RandomPairs())
        session.answer(asked[0], "first")
        session.answer(asked[1], "tie")
        log = tmp_path / "s" / "log.jsonl"
        log.write_bytes(log.read_bytes()[:-cut])
        again = Session.open(tmp_path / "s")
        assert dict(again.answers) == {0: "first"}
        again.answer(1, "second")
        again.answer(2, "second")
        assert dict(Session.open(tmp_path / "s").answers) == {0: "first", 1: "second", 2: "second"}

    def test_a_line_in_the_middle_that_is_no_event_is_refused(self, tmp_path):
        session = Session.create(tmp_path / "s", world())
        session.ask(1, RandomPairs())
        log = tmp_path / "s" / "log.jsonl"
        log.write_bytes(b"nonsense\n" + log.read_bytes())
        with pytest.raises(InputError, match="log.jsonl line 1 is no event"):
            Session.open(tmp_path / "s")

    def test_an_answer_to_nothing_in_the_log_is_refused(self, tmp_path):
        Session.create(tmp_path / "s", world())
        (tmp_path / "s" / "log.jsonl").write_text('{"event": "answered", "question": 4, "answer": "first"}\n')
        with pytest.raises(InputError, match="which cannot be; take it out"):
            Session.open(tmp_path / "s")

    @pytest.mark.parametrize(
        "event",
        [
            {"event": "asked", "by": "random", "questions": [{"pair": 99, "swapped": False, "score": None}]},
            {"event": "asked", "by": "random", "questions": [{"pair": 0.5, "swapped": False, "score": None}]},
            {"event": "asked", "by": "random", "questions": [{}]},
            {"event": "asked", "by": "random", "questions": "two"},
            {"event": "asked", "questions": []},
            {"event": "undone", "question": 7},
            {"event": "forgotten"},
            {},
        ],
    )
    def test_an_event_that_cannot_be_is_refused(self, tmp_path, event):
        Session.create(tmp_path / "s", world())
        (tmp_path / "s" / "log.jsonl").write_text(json.dumps(event) + "\n")
        with pytest.raises(InputError, match="which cannot be; take it out"):
            Session.open(tmp_path / "s")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"pairs": [[0, 99]]}, "pairs goes from 0 to 99, and there are"),
            ({"pairs": [[-1, 1]]}, "pairs goes from -1 to 1"),
            ({"prompt_index": [99]}, "prompt_index goes from 99 to 99"),
            ({"prompt_index": [0]}, "prompt_index has 1 values for"),
            ({"completions": ["a"]}, "and there are 1 completions"),
            ({"prompts": None}, "not iterable"),
        ],
    )
    def test_candidates_that_cannot_be_are_refused(self, tmp_path, changes, message):
        Session.create(tmp_path / "s", world())
        file = tmp_path / "s" / "session.json"
        values = json.loads(file.read_text())
        values["candidates"] |= changes
        file.write_text(json.dumps(values))
        with pytest.raises(InputError, match=f"session.json is no session's .*{message}"):
            Session.open(tmp_path / "s")

    def test_two_processes_do_not_overwrite_each_other(self, tmp_path):
        session = Session.create(tmp_path / "s", world())
        session.ask(2, RandomPairs())
        other = Session.open(tmp_path / "s")
        other.answer(0, "first")
        with pytest.raises(InputError, match="added to by another process"):
            session.answer(1, "first")
        assert dict(Session.open(tmp_path / "s").answers) == {0: "first"}

    def test_refusals(self, tmp_path):
        session = Session.create(tmp_path / "s", world())
        session.ask(1, RandomPairs())
        with pytest.raises(InputError, match="holds a session already"):
            Session.create(tmp_path / "s", world())
        with pytest.raises(
            InputError, match="answer to question 0 is 'third'; use first, second, tie, skip or 1 2 = s"
        ):
            session.answer(0, "third")
        with pytest.raises(InputError, match="question 5 was never asked; this session has 1"):
            session.answer(5, "first")
        session.answer(0, "first")
        with pytest.raises(InputError, match="question 0 has the answer 'first'; undo it"):
            session.answer(0, "second")
        with pytest.raises(InputError, match="by is 'bald', which compares at least 2 members .* there are 1"):
            session.ask(1, BALD(), torch.zeros(1, 12))
        with pytest.raises(InputError, match="holds no session"):
            Session.open(tmp_path / "none")
        assert len(Session.open(tmp_path / "s").answers) == 1


def by_length(completions):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def learner(candidates, comparisons, rng):
    """Members that depend on the answers: a posterior by importance of random directions would be the same to the loop."""
    members = torch.randn(8, len(candidates.completions), generator=rng, dtype=torch.float64)
    return members.index_add(1, comparisons[:, 0], torch.ones(8, len(comparisons), dtype=torch.float64))


class TestLoop:
    @pytest.mark.parametrize("rule", RULES, ids=name_of)
    def test_stopped_anywhere_and_gone_on_with_it_asks_the_same(self, tmp_path, rule):
        def run(folder, stops):
            session = Session.create(folder, world(), seed=5)
            for stop in [*stops, None]:
                session = Session.open(folder)
                loop = active_learning(session, learner, by=rule, questions=8, batch=3)
                oracle = Oracle(session, by_length, temperature=1.0, seed=2)
                for question in itertools.islice(loop, stop):
                    session.answer(question, oracle(question))
            return (folder / "log.jsonl").read_bytes()

        whole = run(tmp_path / "a", [])
        assert run(tmp_path / "b", [1, 2, 4]) == whole
        assert len(Session.open(tmp_path / "a").answers) == 8

    def test_a_killed_process_loses_nothing(self, tmp_path):
        code = f"""
import sys, itertools, torch
sys.path.insert(0, {str(tmp_path.parent)!r})
from tiltlm.labels import Candidates, RandomPairs, Session, active_learning
texts = [[f"text {{p}} {{c}}" for c in range(20)] for p in range(20)]
session = Session.create({str(tmp_path / "s")!r}, Candidates.of_groups([f"p{{p}}" for p in range(20)], texts), seed=1)
for question in active_learning(session, None, by=RandomPairs(), questions=3800, batch=5):
    session.answer(question, "first")
    print(question.number, flush=True)
"""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(40)]
        os.kill(process.pid, signal.SIGKILL)
        seen += [int(line) for line in process.stdout.read().split()]
        process.wait()
        process.stdout.close()
        session = Session.open(tmp_path / "s")
        assert set(seen) <= set(session.answers)
        assert len(session.answers) <= len(seen) + 1
        for question in active_learning(session, None, by=RandomPairs(), questions=session.asked + 5, batch=5):
            session.answer(question, "second")
        assert session.answers[session.asked - 1] == "second"

    def test_by_send(self, tmp_path):
        session = Session.create(tmp_path / "s", world())
        loop = active_learning(session, None, by=RandomPairs(), questions=3, batch=2)
        question = next(loop)
        assert question.number == 0
        assert loop.send("first").number == 1
        assert loop.send("=").number == 2
        with pytest.raises(StopIteration):
            loop.send("s")
        assert list(session.answers.values()) == ["first", "tie", "skip"]

    def test_a_question_that_is_passed_is_not_passed_over(self, tmp_path):
        session = Session.create(tmp_path / "s", world())
        with pytest.raises(InputError, match="question 0 was passed without an answer"):
            list(active_learning(session, None, by=RandomPairs(), questions=3))

    def test_the_loop_finds_what_it_is_asked_to_find(self, tmp_path):
        """32 thresholds, of which each answer can rule out half: five questions do, and fewer cannot."""
        texts = [[f"{i:02d}" for i in range(33)]]
        thresholds = torch.arange(0.5, 32.5, dtype=torch.float64)
        value = torch.tensor([float(t) for t in texts[0]], dtype=torch.float64)
        members = torch.where(value[None, :] > thresholds[:, None], 20.0, -20.0)
        members[:, 0] = 0
        every = Candidates.of_groups(["p"], texts)
        with_zero = (every.pairs == 0).any(-1)
        candidates = Candidates(every.prompts, every.completions, every.prompt_index, every.pairs[with_zero])

        def exact(candidates, comparisons, rng):
            return members[(members[:, comparisons[:, 0]] > members[:, comparisons[:, 1]]).all(-1)]

        session = Session.create(tmp_path / "s", candidates)
        oracle = Oracle(
            session, lambda completions: [0.0 if t == "00" else 20.0 if int(t) > 11 else -20.0 for t in completions]
        )
        for question in active_learning(session, exact, by=BALD(), questions=5, batch=1):
            session.answer(question, oracle(question))
        assert len(exact(candidates, session.comparisons, None)) == 1


class TestOracle:
    def test_without_noise_it_is_the_reward(self, tmp_path):
        session = Session.create(tmp_path / "s", world(3, 4))
        oracle = Oracle(session, by_length)
        for question in session.ask(18, RandomPairs()):
            a, b = by_length([question.first, question.second])
            assert oracle(question) == ("tie" if a == b else "first" if a > b else "second")

    def test_noise_is_bradley_terry(self, tmp_path):
        candidates = Candidates.of_groups([f"p{p}" for p in range(1500)], [["good", "bad"]] * 1500)
        session = Session.create(tmp_path / "s", candidates)
        oracle = Oracle(session, lambda completions: [float(t == "good") for t in completions], temperature=0.7)
        said = [(q, oracle(q)) for q in session.ask(1500, RandomPairs())]
        right = sum((q.first if a == "first" else q.second) == "good" for q, a in said) / 1500
        p = 1 / (1 + math.exp(-1 / 0.7))
        assert abs(right - p) < 4.5 * (p * (1 - p) / 1500) ** 0.5
        assert [oracle(q) for q, _ in said] == [a for _, a in said]

    def test_a_reward_that_is_none_is_named(self, tmp_path):
        session = Session.create(tmp_path / "s", world())
        with pytest.raises(InputError, match="reward '<lambda>' is None for completion"):
            Oracle(session, lambda completions: [None] * len(completions))


class TestAnswerFile:
    @pytest.fixture
    def session(self, tmp_path):
        session = Session.create(tmp_path / "s", world())
        session.ask(4, RandomPairs())
        return session

    def test_all_or_none(self, session, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_text(
            '{"question": 0, "answer": "1"}\n\n{"question": 1, "answer": null}\n{"question": 9, "answer": "="}\n'
        )
        with pytest.raises(InputError, match="question 9 was never asked"):
            AnswerFile(file).into(session)
        assert not session.answers
        file.write_text('{"question": 0, "answer": "1"}\n{"question": 1}\n{"question": 3, "answer": "="}\n')
        assert AnswerFile(file).into(session) == 2
        assert AnswerFile(file).into(session) == 0
        assert dict(session.answers) == {0: "first", 3: "tie"}

    def test_a_line_ends_at_a_line_feed_alone(self, session, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_text('{"question": 0, "prompt": "a\u2028b\x85", "answer": "1"}\n', encoding="utf-8")
        assert AnswerFile(file).into(session) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("first", 'line 1 is \'first\'; write {"question": 0, "answer": "first"}'),
            ("[1]", "line 1 is"),
            ('{"answer": "first"}', "line 1 is"),
            ('{"question": "0", "answer": "first"}', "line 1 has question '0'; give its number"),
            (
                '{"question": 0, "answer": "first"}\n{"question": 0, "answer": "first"}',
                "line 2 answers question 0 again",
            ),
            ('{"question": 0, "answer": "best"}', "answer to question 0 is 'best'"),
        ],
    )
    def test_refusals(self, session, tmp_path, content, message):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(InputError, match=re.escape(message)):
            AnswerFile(tmp_path / "a.jsonl").into(session)
        assert not session.answers

    def test_a_contradiction_is_not_resolved_in_silence(self, session, tmp_path):
        session.answer(0, "first")
        (tmp_path / "a.jsonl").write_text('{"question": 0, "answer": "second"}')
        with pytest.raises(InputError, match="says 'second' to question 0, which has the answer 'first'"):
            AnswerFile(tmp_path / "a.jsonl").into(session)


class TestTerminal:
    def test_keys(self, tmp_path):
        session = Session.create(tmp_path / "s", world(2, 3))
        session.ask(6, RandomPairs())
        console = Console(width=100, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
        keys = iter(["1", "x", "2", "u", "=", "u", "u", "u", "s", "2", "q", "1"])
        assert answer_at_terminal(session, console, lambda: next(keys)) == 2
        console.file.close()
        assert dict(session.answers) == {0: "skip", 1: "second"}
        shown = console.export_text()
        assert "'x' means nothing" in shown
        assert "no answer to take back" in shown
        question = session.question(2)
        assert any(question.first in line and question.second in line for line in shown.splitlines())  # side by side

    @pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
    def test_an_interrupt_quits_and_keeps_what_was_said(self, tmp_path, end):
        session = Session.create(tmp_path / "s", world())
        session.ask(3, RandomPairs())
        keys = iter(["1"])

        def read():
            for key in keys:
                return key
            raise end

        with open(os.devnull, "w") as null:  # noqa: PTH123
            assert answer_at_terminal(session, Console(file=null), read) == 1
        assert dict(Session.open(tmp_path / "s").answers) == {0: "first"}

    def test_the_end_of_the_input_quits(self, tmp_path):
        session = Session.create(tmp_path / "s", world())
        session.ask(3, RandomPairs())
        with open(os.devnull, "w") as null:  # noqa: PTH123
            assert answer_at_terminal(session, Console(file=null), lambda: "") == 0


MEMBERS = """
def members(prompts, completions, answers):
    liked = {row["chosen"] for row in answers}
    return [[float(len(text)), float(-len(text)), float(text in liked)] for text in completions]


def single(completions):
    return [float(len(text)) for text in completions]


def few(completions):
    return [[1.0, 2.0]]


def ragged(completions):
    return [[1.0] * (place % 2 + 1) for place, _ in enumerate(completions)]


def odd(completions, weather):
    return []


def raises(completions):
    raise RuntimeError("no weights")


def leaves(completions):
    raise SystemExit(4)


def sleeps(completions):
    __import__("time").sleep(60)
"""


class TestCommands:
    @pytest.fixture
    def desk(self, here, models):
        (here / "m.py").write_text(MEMBERS)
        write(here / "recipe.yaml", {"model": str(models / "chat"), "prompts": "prompts.txt", "max_new_tokens": 5})
        return here

    def test_from_the_prior_to_rows_that_can_be_trained_on(self, cli, desk, monkeypatch):
        done = cli("reward", "ask", "recipe.yaml", "--session", "desk", "--n", 4, "--draws", 3)
        assert done.code == 0, done
        assert done.out.count("question ") == 4
        monkeypatch.setattr(sys, "stdin", __import__("io").StringIO("1\n2\n=\nq\n"))
        done = cli("reward", "answer", "desk", "--terminal")
        assert "3 new answers, 1 questions open, 2 preferences: desk/preferences.jsonl" in done.out
        done = cli("reward", "ask", "--model", "no", "--prompts", "no.txt", "--session", "desk", "--n", 2, "--by", "bald", "--members", "m.py:members", "--write", "q.jsonl")  # fmt: skip  # noqa: E501
        assert done.out == "3 open questions: q.jsonl\n"  # a session that is there needs no model
        rows = [json.loads(line) for line in (desk / "q.jsonl").read_text().splitlines()]
        assert [row["question"] for row in rows] == [3, 4, 5]
        (desk / "a.jsonl").write_text("".join(json.dumps({**row, "answer": "first"}) + "\n" for row in rows))
        assert cli("reward", "answer", "desk", "a.jsonl").out.startswith("3 new answers, 0 questions open, 5 pref")
        status = cli("reward", "status", "desk", "--json", "status.json")
        assert "asked: 4 by random, 2 by bald" in status.out
        assert json.loads((desk / "status.json").read_text())["tie"] == 1
        train = ["--data", "desk/preferences.jsonl", "--engine", "dpo", "--beta", 0.1, "--steps", 1, "--batch", 2]
        assert cli("train", "recipe.yaml", *train, "--lora-r", 2, "--out", "run").code == 0

    def test_a_recipe_without_a_reward_is_enough_here_and_only_here(self, cli, refused, desk):
        assert "reward is missing" in refused("plan", "recipe.yaml")
        assert cli("reward", "ask", "recipe.yaml", "--session", "desk", "--n", 1).code == 0

    def test_members_of_a_function_are_the_same_in_a_worker(self, desk):
        session = Session.create(desk / "s", world())
        here, there = (members_of("m.py:members", session, timeout=limit) for limit in (None, 60))
        assert torch.equal(here, there)
        assert here.shape == (3, len(session.candidates.completions))

    def test_members_of_a_reward_model_are_draws_of_its_posterior(self, cli, desk, models):
        lines = [{"prompt": "p", "chosen": "a " * (n + 2), "rejected": "a " * n} for n in range(1, 9)]
        (desk / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        assert cli("reward", "fit", "--data", "p.jsonl", "--model", models / "chat", "--out", "rm").code == 0
        rows = [{"prompt": "q", "completions": ["c", "d d", "e e e"]}]
        (desk / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ask = ("reward", "ask", "recipe.yaml", "--session", "desk", "--candidates", "c.jsonl", "--by", "bald")
        assert cli(*ask, "--members", "rm", "--n", 1).code == 0
        session, model = Session.open(desk / "desk"), tl.RewardModel.load(desk / "rm")
        drawn = members_of("rm", session, draws=4000)
        mean = model.mean(["q"] * 3, session.candidates.completions)
        spread = model.covariance(["q"] * 3, session.candidates.completions)
        assert (drawn.mean(0) - mean).abs().max() < 5 * (spread.diagonal().max() / 4000).sqrt()
        assert torch.allclose(torch.cov(drawn.T), spread.double(), rtol=0.2, atol=0.1 * float(spread.diagonal().max()))
        assert torch.equal(drawn, members_of("rm", session, draws=4000))

    def test_given_candidates(self, cli, desk):
        rows = [{"prompt": "p", "completions": ["a", "b"]}, {"prompt": "q", "completions": ["c", "d", "e"]}]
        (desk / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = cli("reward", "ask", "recipe.yaml", "--session", "desk", "--candidates", "c.jsonl", "--n", 9)
        assert done.out.count("question ") == 4
        assert "4 pairs were left to ask about" in done.err

    def test_from_a_trained_policy(self, cli, desk, models):
        lm = load(str(models / "chat"))
        policy = lm.prior(max_new_tokens=5).policy()
        policy.save(desk / "policy")
        assert cli("reward", "ask", "recipe.yaml", "--session", "desk", "--policy", "policy", "--n", 2).code == 0

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--by", "best"], "by is 'best'; use one of bald, double-thompson, margin, random"),
            (["--by", "bald"], "by is 'bald', which looks at a reward; give --members"),
            (
                ["--by", "bald", "--members", "m.py:single"],
                "compares at least 2 members of the reward's posterior, and there are 1",
            ),
            (["--by", "bald", "--members", "m.py:few"], r"m.py:few' returned the shape (1, 2) for"),
            (["--by", "bald", "--members", "m.py:ragged"], "m.py:ragged' returned [[1.0], [1.0, 1.0]"),
            (
                ["--by", "bald", "--members", "m.py:odd"],
                "asks for 'weather'; it may ask for prompts, completions, answers",
            ),
            (["--by", "bald", "--members", "m.py:raises"], "raised RuntimeError (no weights)"),
            (
                ["--by", "bald", "--members", "m.py:leaves"],
                "m.py:leaves' raised SystemExit (4) in m.py, line 28; mend it",
            ),
            (
                ["--by", "bald", "--members", "m.py:few", "--timeout", "20"],
                "m.py:few' returned 1 values for",
            ),
            (
                ["--by", "bald", "--members", "m.py:sleeps", "--timeout", "1"],
                "m.py:sleeps' took more than 1 s; mend it",
            ),
            (["--draws", "1"], "draws is 1; a question needs two"),
            (["--policy", "nowhere"], "policy 'nowhere' holds no adapter"),
            (["--candidates", "prompts.txt"], "candidates 'prompts.txt' is no table"),
        ],
    )
    def test_refusals(self, refused, desk, flags, message):
        assert message in refused("reward", "ask", "recipe.yaml", "--session", "desk", *flags)

    def test_answer_refusals(self, refused, desk):
        assert "nothing holds no session" in refused("reward", "answer", "nothing", "--terminal")
        assert "give a file, or --terminal" in refused("reward", "answer", "desk")
        assert "holds no session" in refused("reward", "status", "desk")


@pytest.mark.slow
def test_with_the_real_model(tmp_path):
    """SmolLM2 proposes, an oracle answers, and the answers are preferences that the same model scores."""
    prior = load("smollm2-135m-instruct").prior(max_new_tokens=12)
    prompts = prior.encode(["The film was", "My favourite dish is"])
    session = Session.create(tmp_path / "s", Candidates.of_draws(prior.draw(prompts, 4, rng())), seed=1)
    oracle = Oracle(session, lambda completions: [float(len(text)) for text in completions])
    for question in active_learning(session, None, by=RandomPairs(), questions=8, batch=4):
        session.answer(question, oracle(question))
    with pytest.warns(tl.TiltWarning, match="were cut there"):  # an end token more than the draws, which were cut, had
        scored = preferences(prior, session.rows())
    better, worse = (scored.pairs[:, side].tolist() for side in (0, 1))
    assert len(better) >= 6
    assert all(len(scored.draws.texts[i]) > len(scored.draws.texts[j]) for i, j in zip(better, worse, strict=True))
