"""Task metrics, tables and minimum Bayes risk: by hand, by enumeration, and against sacrebleu and rouge-score."""

import io
import itertools
import json
import math

import pytest
import sacrebleu
import torch
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer

import tiltlm as tl
from tiltlm import evaluation as ev
from tiltlm import rewards
from tiltlm.evaluation.uncertainty import mean_of
from tiltlm.posterior import exact as ex
from tiltlm.records import Weighted
from tiltlm.report.canvas import write_figure
from tiltlm.report.tasks import task_figure
from tiltlm.rewards.scenes import Scene, Thing, read_scene, singular
from tiltlm.testing import small_language
from tiltlm.workflow import sampling

REFERENCES = ["the cat sat on the mat", "a quiet story of two friends", "the film was good", "two dogs run in the park"]
GOOD = ["the cat sat on a mat", "a quiet story of two old friends", "the film was very good", "two dogs run in a park"]
BAD = ["a dog stood there", "story", "bad film", "park of the dogs"]


def table(systems, metrics, references=REFERENCES, **settings):
    return ev.evaluate_systems("some task", {"answer": references}, systems, metrics, **settings)


# --- values ---


def test_corpus_metrics_are_sacrebleus_and_rouge_that_of_rouge_score():
    two = [[a, b] for a, b in zip(REFERENCES, GOOD[1:] + GOOD[:1], strict=True)]
    for references in (REFERENCES, two):
        found = table(
            [ev.System.of("bad", BAD), ev.System.of("good", GOOD)], ev.task_metrics("translation"), references
        )
        streams = [REFERENCES] if references is REFERENCES else [list(s) for s in zip(*two, strict=True)]
        for name, texts in (("good", GOOD), ("bad", BAD)):
            cells = found.rows[name]
            assert cells["chrf"].estimate.value == pytest.approx(sacrebleu.corpus_chrf(texts, streams).score / 100)
            assert cells["bleu"].estimate.value == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score / 100)
            assert cells["chrf"].estimate.stderr > 0
    found = table([ev.System.of("good", GOOD)], ev.task_metrics("summary"))
    scorer = RougeScorer(["rougeL"])
    by_hand = [scorer.score(r, t)["rougeL"].fmeasure for r, t in zip(REFERENCES, GOOD, strict=True)]
    assert found.rows["good"]["rouge-l"].estimate.value == pytest.approx(sum(by_hand) / 4)
    assert found.rows["good"]["length"].estimate.value == pytest.approx((6 + 7 + 5 + 6) / 4)


def test_sums_of_a_corpus_are_the_corpus():
    """The bootstrap adds up what every text counts for: the same number as sacrebleu's own on each resample."""
    for part in (rewards.BLEU(), rewards.CHRF(), rewards.SceneF1()):
        columns = {
            "answer": REFERENCES * 2,
            "scene": [json.dumps({"objects": [{"name": w}]}) for w in ("cat", "story", "film", "dog") * 2],
        }
        read = {name: columns[name] for name in part.reads}
        counts, meaning = part.summable(GOOD + BAD, **read)
        for rows in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 5, 3, 3, 3], [6]):
            some = {name: [values[i] for i in rows] for name, values in read.items()}
            assert meaning(counts[rows].sum(0)) == pytest.approx(part.corpus([(GOOD + BAD)[i] for i in rows], **some))


def test_answers_by_hand():
    answers = ["Paris", "Rome", "the blue whale"]
    said = [
        ["paris.", "Lyon", "Paris", "Nice"],
        ["Milan", "Turin", "Milan", "Bari"],
        ["blue whale", "a whale", "the whale shark", "fish"],
    ]
    found = ev.evaluate_systems("qa", {"answer": answers}, [ev.System.of("policy", said)], ev.task_metrics("qa", k=2))
    cells = {name: cell.estimate.value for name, cell in found.rows["policy"].items()}
    assert cells["exact-match"] == pytest.approx((2 / 4 + 0 + 1 / 4) / 3)
    # of four answers two are right: 1 - C(2,2)/C(4,2) = 5/6; one: 1 - C(3,2)/C(4,2) = 1/2
    assert cells["pass@2"] == pytest.approx((5 / 6 + 0 + 1 / 2) / 3)
    whale = [(1, 1, 1), (1, 1 / 2, 2 / 3), (1 / 2, 1 / 2, 1 / 2), (0, 0, 0)]
    for name, place in (("token-precision", 0), ("token-recall", 1), ("token-f1", 2)):
        assert cells[name] == pytest.approx((0.5 + 0 + sum(row[place] for row in whale) / 4) / 3), name
    assert cells["unique"] == pytest.approx((1 + 3 / 4 + 1) / 3)


@pytest.mark.parametrize(("drawn", "right", "k"), [(5, 2, 3), (6, 0, 2), (4, 4, 1), (5, 4, 2), (8, 3, 8)])
def test_pass_at_k_is_the_chance_over_all_subsets(drawn, right, k):
    marks = [True] * right + [False] * (drawn - right)
    subsets = [any(some) for some in itertools.combinations(marks, k)]
    assert ev.pass_at_k(drawn, right, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_is_unbiased_and_the_naive_one_is_not():
    chance, k, n = 0.3, 2, 5
    weight = [math.comb(n, c) * chance**c * (1 - chance) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - chance) ** k
    assert sum(w * ev.pass_at_k(n, c, k) for c, w in enumerate(weight)) == pytest.approx(truth, abs=1e-12)
    assert abs(sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weight)) - truth) > 0.03
    assert math.isnan(ev.pass_at_k(3, 1, 4))


def test_diversity_by_hand():
    texts, row = ["a b c", "a b d", "a b c"], {}
    assert ev.DistinctN(1).of_prompt(texts, row) == pytest.approx(4 / 9)
    assert ev.DistinctN(2).of_prompt(texts, row) == pytest.approx(3 / 6)
    assert ev.Unique().of_prompt(texts, row) == pytest.approx(2 / 3)
    bleu = sacrebleu.BLEU(effective_order=True)
    by_hand = [bleu.sentence_score(texts[i], [t for j, t in enumerate(texts) if j != i]).score for i in range(3)]
    assert ev.SelfBLEU().of_prompt(texts, row) == pytest.approx(sum(by_hand) / 300)
    assert ev.SelfBLEU().of_prompt(["a b c d e"] * 3, row) == pytest.approx(1)
    assert math.isnan(ev.SelfBLEU().of_prompt(["one"], row))


# --- captions ---


def test_a_caption_is_read():
    found = read_scene("Two red hearts and a rooster above an umbrella, three fishes.")
    assert found.things == (Thing("heart", 2, "red"), Thing("rooster"), Thing("umbrella"), Thing("fish", 3))
    assert found.relations == (("rooster", "above", "umbrella"),)
    assert read_scene("there are 3 cherries to the left of a hot air balloon").relations == (
        ("cherry", "to the left of", "hot air balloon"),
    )
    assert read_scene("salt and pepper on a plate", names=("salt and pepper",)).things == (
        Thing("salt and pepper"),
        Thing("plate"),
    )
    assert read_scene("a salt and pepper").things == (Thing("salt"), Thing("pepper"))
    assert read_scene("").things == read_scene("no cats").things == ()
    assert [singular(w) for w in ("Glasses", "glass", "boxes", "cherries", "Suns", "bus")] == [
        "glass",
        "glass",
        "box",
        "cherry",
        "sun",
        "bu",
    ]


def test_scene_f1_by_hand():
    truth = {
        "objects": [{"name": "heart", "count": 2, "colour": "red"}, {"name": "rooster"}],
        "relations": [["hearts", "above", "rooster"]],
    }
    part = rewards.SceneF1()
    # true: 2 objects, 2 counts, 1 colour, 1 relation = 6 facts
    said = ["two red hearts above a rooster", "a red heart", "", "two blue hearts below a rooster and a cat"]
    # right, told: 6, 6 | 2 (heart, red), 3 | 0, 0 | 4 (2 objects, 2 counts), 8 (3, 3, 1, 1)
    assert part(said, scene=[json.dumps(truth)] * 4) == pytest.approx([1, 4 / 9, 0, 8 / 14])
    found = part.corpus(said, scene=[truth] * 4)
    assert found["scene-f1"] == pytest.approx(2 * (6 + 2 + 0 + 4) / ((6 + 3 + 0 + 8) + 4 * 6))
    assert found["objects/precision"] == pytest.approx(5 / 6)
    assert found["objects/recall"] == pytest.approx(5 / 8)
    assert found["counts/f1"] == pytest.approx(2 * 4 / (6 + 8))
    assert found["colours/f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert found["relations/precision"] == pytest.approx(1 / 2)
    assert rewards.SceneF1(aspects=("relations",))(["a cat"], scene=[{"objects": [{"name": "cat"}]}]) == [1.0]
    assert tl.Reward(rewards.SceneF1(), beta=0.5).log_bounds == (0.0, 2.0)
    cells = ev.evaluate_systems(
        "captions", {"scene": [truth] * 4}, [ev.System.of("x", said)], ev.task_metrics("captions")
    ).rows["x"]
    assert cells["scene-f1"].estimate.value == pytest.approx(24 / 41)
    assert cells["scene-f1/objects/f1"].estimate.value == pytest.approx(2 * 5 / (6 + 8))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("a tree above a cat", 1.0),
        ("a cat below a tree", 1.0),
        ("a cat under a tree", 1.0),
        ("a tree below a cat", 0.0),
        ("a cat above a tree", 0.0),
        ("a tree next to a cat", 0.0),
    ],
)
def test_a_relation_may_be_told_from_either_side(said, right):
    part = rewards.SceneF1(aspects=("relations",))
    scene = {"objects": [{"name": "tree"}, {"name": "cat"}], "relation": "above"}
    assert part([said], scene=[scene]) == [right]
    beside = {"objects": [{"name": "tree"}, {"name": "cat"}], "relation": "next to"}
    assert part(["a cat beside a tree"], scene=[beside]) == [1.0]


# --- errors ---


def test_the_standard_error_over_prompts_and_seeds_is_that_of_repeated_experiments(rng):
    """Two-way random effects: the mean of the estimated variances, against the true variance of the mean."""
    seeds, prompts, experiments = 4, 30, 1500

    def noise(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    spread = {"seeds": 0.3, "prompts": 1.0, "rest": 0.8}
    found = []
    for _ in range(experiments):
        values = 0.3 * noise(seeds, 1) + noise(1, prompts) + 0.8 * noise(seeds, prompts)
        found.append(mean_of(values)[0])
    truth = spread["seeds"] ** 2 / seeds + spread["prompts"] ** 2 / prompts + spread["rest"] ** 2 / (seeds * prompts)
    assert sum(e.stderr**2 for e in found) / experiments == pytest.approx(truth, rel=0.05)
    means = torch.tensor([e.value for e in found])
    assert float(means.var()) == pytest.approx(truth, rel=0.12)
    one = mean_of(torch.tensor([[1.0, 2.0, math.nan, 6.0]], dtype=torch.float64))
    assert one[0].value == 3
    assert one[0].n == 3
    assert one[0].stderr == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(one[1])


def test_differences_are_paired():
    """Prompts differ far more than the systems do: the difference is sure although the means are not."""
    easy = [" ".join(["x"] * 10 * n) for n in range(1, 9)]
    longer = [text + " x" if n % 2 else text + " x x" for n, text in enumerate(easy)]
    systems = [ev.System.of("prior", easy), ev.System.of("policy", longer, longer)]
    found = table(systems, [rewards.Length()], references=["y"] * 8)
    cell = found.rows["policy"]["length"]
    assert cell.difference.value == pytest.approx(1.5)
    assert cell.difference.stderr == pytest.approx(math.sqrt(2 / 7 / 8))
    assert cell.estimate.stderr > 5
    assert found.rows["prior"]["length"].difference is None
    corpus = table([ev.System.of("a", GOOD), ev.System.of("b", GOOD)], [rewards.CHRF()]).rows["b"]["chrf"]
    assert corpus.difference.value == corpus.difference.stderr == 0
    apart = table([ev.System.of("a", BAD), ev.System.of("b", GOOD)], [rewards.CHRF()]).rows["b"]["chrf"]
    assert apart.difference.value > 2 * apart.difference.stderr > 0


def test_the_bootstraps_error_is_sacrebleus():
    """Its own bootstrap, on the same corpus, gives 95% intervals of about the same width."""
    texts, references = GOOD * 4 + BAD * 4, REFERENCES * 8
    metric = sacrebleu.CHRF(references=[references])
    score = metric.corpus_score(texts, None, n_bootstrap=1000)
    cell = table([ev.System.of("x", texts)], [rewards.CHRF()], references=references, resamples=1000).rows["x"]["chrf"]
    assert 1.96 * cell.estimate.stderr == pytest.approx(score._ci / 100, rel=0.15)


def test_kl_of_draws(rng):
    world = small_language()
    policy = world.prior.policy(lora=None)
    with torch.no_grad():
        for weight in policy.named_parameters().values():
            weight.add_(torch.arange(weight.numel(), dtype=weight.dtype).view_as(weight).sin())
    prompts = world.prompts.select([0] * 400)
    runs = [policy.draw(prompts, 8, rng) for _ in range(2)]
    system = ev.System.drawn("policy", *runs, prior=world.prior)
    prior = ev.System.drawn("prior", world.prior.draw(prompts, 8, rng), prior=world.prior, seconds=1.5)
    found = ev.evaluate_systems("toy", prompts, [prior, system], [rewards.Length()])
    exact = ex.posterior(world.target, world.prompts)
    law = policy.log_prob(exact.scored.draws).double().sum(-1)
    truth = float((law.exp() * (law - exact.log_prior)).sum())
    cell = found.rows["policy"]["KL to prior"]
    assert truth > 0.05
    assert abs(cell.estimate.value - truth) < 4 * cell.estimate.stderr
    assert found.rows["prior"]["KL to prior"].estimate.value == 0
    assert found.seconds == {"prior": 1.5}


def test_samples_are_as_they_are_and_weighted_draws_in_proportion(rng):
    """`tiltlm sample`: what counts alike is given once; else a draw comes as often as its weight says."""
    world = small_language()
    scored = world.target.score(world.prior.draw(world.prompts, 4, rng))
    log_w = torch.tensor([0.0, math.log(3), -math.inf, -math.inf], dtype=torch.float64)
    (row,) = sampling.resampled(Weighted(scored, log_w), world.target.beta, 4000, rng)
    texts = [completion["text"] for completion in row["completions"]]
    assert len(texts) == 4000
    if scored.draws.texts[0] != scored.draws.texts[1]:
        assert texts.count(scored.draws.texts[1]) / 4000 == pytest.approx(0.75, abs=0.03)
    (row,) = sampling.resampled(Weighted(scored, torch.zeros(4, dtype=torch.float64)), 1.0, 40, rng)
    assert sorted(completion["text"] for completion in row["completions"]) == sorted(scored.draws.texts)


def test_weighted_draws_are_resampled(rng):
    world = small_language()
    scored = world.target.score(world.prior.draw(world.prompts, 5, rng))
    only = torch.tensor([-math.inf, -math.inf, 0.0, -math.inf, -math.inf])
    system = ev.System.resampled("smc", 3, rng, Weighted(scored, only))
    assert system.runs == (((scored.draws.texts[2],) * 3,),)
    with pytest.raises(tl.InputError, match="kept no completion of prompt 1"):
        ev.System.resampled("smc", 3, rng, Weighted(scored, only - math.inf))


# --- minimum Bayes risk ---


def test_minimum_bayes_risk_by_enumeration():
    """With all completions and their exact probabilities it is the decision that no other beats."""
    world = small_language()
    exact = ex.posterior(world.target, world.prompts)
    texts, law = [f"{x[0]} {' '.join(map(str, x))}" for x in exact.completions], exact.log_posterior.exp().tolist()
    for part in (rewards.TokenF1(), rewards.CHRF(), rewards.RougeL()):
        utility = ev.agreement(part)
        risks = {h: sum(p * utility([h], [y])[0] for y, p in zip(texts, law, strict=True)) for h in texts}
        found = ev.expected_utilities(texts, utility, law)
        assert found == pytest.approx(risks, abs=1e-12)
        assert risks[ev.minimum_bayes_risk(texts, utility, law)] == pytest.approx(max(risks.values()))
    mode = texts[int(exact.log_posterior.argmax())]
    assert ev.minimum_bayes_risk(texts, ev.agreement(rewards.ExactMatch()), law) == mode, (
        "exact match as utility: the mode"
    )


def test_minimum_bayes_risk_counts_repeats_and_can_leave_the_mode():
    texts = ["x y z", "x y z", "a b c d", "a b c e", "a b c f"]
    utility = ev.agreement(rewards.TokenF1())
    assert ev.minimum_bayes_risk(texts, utility) == "a b c d"  # "a" is an article; b and c are shared by three of five
    assert ev.minimum_bayes_risk(texts, utility, [5, 5, 1, 1, 1]) == "x y z"
    chosen = ev.mbr_system(ev.System.of("prior", [texts, ["one"]]), utility)
    assert chosen.name == "prior+mbr"
    assert chosen.runs == ((("a b c d",), ("one",)),)


def test_baselines_without_a_model():
    assert ev.lead(["one two three", "four"], 2).runs == ((("one two",), ("four",)),)
    assert ev.copied(REFERENCES).runs[0][1] == (REFERENCES[1],)
    found = table([ev.lead(REFERENCES, 100)], [rewards.CHRF(), rewards.RougeL()])
    assert found.rows["lead-100"]["chrf"].estimate.value == pytest.approx(1)


# --- what comes out ---


def test_the_table_as_text_json_and_picture(tmp_path):
    systems = [
        ev.System.of("prior", BAD, BAD[::-1], seconds=2.0),
        ev.System.of("policy", GOOD, GOOD),
        ev.copied(REFERENCES),
    ]
    found = table(systems, [rewards.CHRF(), rewards.TokenF1(), ev.SelfBLEU()])
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["metrics"] == ["chrf", "token-f1", "self-bleu"]
    assert plain["systems"][0]["metrics"]["self-bleu"]["value"] is None
    assert plain["systems"][1]["metrics"]["chrf"]["difference"]["value"] > 0
    assert plain["systems"][0]["metrics"]["chrf"]["seeds_stderr"] > 0
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    assert "policy (2 seeds)" in text
    assert "±" in text
    figure = task_figure(plain)
    dots = [trace for trace in figure.data if trace.y[0] == "policy"]
    assert [trace.x[0] for trace in dots] == [
        pytest.approx(c["value"]) for c in plain["systems"][1]["metrics"].values() if c["value"]
    ]
    assert dots[0].error_x.array[0] == pytest.approx(1.96 * plain["systems"][1]["metrics"]["chrf"]["stderr"])
    page = write_figure(figure, tmp_path / "table.html")
    assert "plotly" in page.read_text().lower()


def test_finer_metrics_are_in_the_numbers_and_not_in_table_and_picture():
    texts = ("a red heart", "a cat")
    scenes = [json.dumps({"objects": [{"name": "heart", "colour": "red"}]}), json.dumps({"objects": [{"name": "cat"}]})]
    systems = [ev.System.of("prior", [[text] for text in texts])]
    found = ev.evaluate_systems("captions", {"scene": scenes}, systems, [rewards.SceneF1()])
    assert "scene-f1/objects/recall" in found.as_dict()["metrics"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    assert "scene-f1" in text
    assert "objects/recall" not in text
    assert "12 finer metrics" in text
    assert [note.text for note in task_figure(found.as_dict()).layout.annotations] == ["scene-f1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ev.task_metrics("translatoin"), "task is 'translatoin'; did you mean 'translation'"),
        (lambda: table([], []), "there are no systems"),
        (lambda: table([ev.System.of("a", GOOD)] * 2, []), "two systems are called 'a'"),
        (lambda: table([ev.System.of("a", GOOD), ev.System.of("b", GOOD[:2])], []), "'b' has 2 prompts and 'a' has 4"),
        (lambda: table([ev.System.of("a", GOOD[:2])], []), "column 'answer' has 4 values for 2 prompts"),
        (lambda: table([ev.System.of("a", GOOD)], [], baseline="b"), "baseline is 'b'; choose one of a"),
        (lambda: table([ev.System.of("a", GOOD)], [rewards.CHRF("target")]), "metric 'chrf' reads 'target'"),
        (lambda: table([ev.System.of("a", GOOD)], [rewards.TokenF1("target")]), "'token-f1' reads 'target'"),
        (lambda: ev.System.of("a"), "has no completions"),
        (lambda: ev.System.of("a", GOOD, GOOD[:1]), "run 2 has 1 prompts"),
        (lambda: ev.System.of("a", [[]]), "prompt 1 of run 1 has no list"),
        (lambda: ev.PassAtK(0, rewards.ExactMatch()), "k is 0"),
        (lambda: ev.lead(GOOD, 0), "words is 0"),
        (lambda: ev.minimum_bayes_risk([], ev.agreement(rewards.CHRF())), "there are 0 candidates"),
        (lambda: ev.minimum_bayes_risk(["a"], ev.agreement(rewards.CHRF()), [-1]), "none negative"),
        (lambda: ev.agreement(rewards.Length()), "'length' compares with no reference"),
        (lambda: Scene.of("[1]", "row 3"), "row 3 holds .* which is no scene"),
        (lambda: rewards.SceneF1(aspects=("size",)), "choose some of objects"),
    ],
)
def test_senseless_questions(make, message):
    with pytest.raises(tl.InputError, match=message):
        make()
