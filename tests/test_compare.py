"""Engines by name, and engines side by side."""

import json
import math
import re
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

import tiltlm as tl
from tiltlm.inference.catalogue import decoding_engines, make_engine, name_of, summary_of, training_engines
from tiltlm.inference.compare import RANKING, Contender, compare
from tiltlm.inference.decoding.best_of_n import BestOfN
from tiltlm.inference.decoding.budget import cost, within
from tiltlm.inference.decoding.importance import Importance
from tiltlm.inference.decoding.mcmc import MCMC
from tiltlm.inference.source import Decoded, Pool, Replay
from tiltlm.inference.training.paths.var_grad import VarGrad
from tiltlm.inference.training.policy_gradients.rloo import RLOO
from tiltlm.posterior import exact as ex
from tiltlm.report.comparison import distance_figure, write_comparison
from tiltlm.testing import fixture_b, language, small_language
from tiltlm.testing.fixtures import sine_logit
from tiltlm.workflow.contest import contenders_of

SETTINGS = tl.Training(lr=0.05, batch=1, seed=3)


class TestCatalogue:
    def test_every_engine_works_as_it_is_and_says_what_it_is(self):
        for name, engine in {**training_engines(), **decoding_engines()}.items():
            assert name == name.lower(), name
            assert engine.claim.source, f"{name} cites no source"
            assert engine.claim.objective, name
            assert len(summary_of(engine)) > 20, f"{name} has no first sentence"

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("VarGrad", "var-grad"),
            ("BestOfN", "best-of-n"),
            ("SoftSARSA", "soft-sarsa"),
            ("RLOO", "rloo"),
            ("DQN", "dqn"),
        ],
    )
    def test_names(self, name, expected):
        assert name_of(type(name, (), {})) == expected

    def test_options_and_behaviours_by_name(self):
        @dataclass(frozen=True)
        class Engine:
            size: int = 3
            how: object = name_of

        made = make_engine({"e": Engine()}, "e", {"size": 5})
        assert made.size == 5
        with pytest.raises(tl.InputError, match="option how of e is 'nothing'; it must name one of"):
            make_engine({"e": Engine()}, "e", {"how": "nothing"})

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("rlo", {}, "engine is 'rlo'; did you mean 'rloo'"),
            ("zzz", {}, "engine is 'zzz'; choose .*rloo"),
            ("rloo", {"grup": 3}, "option 'grup' is none of rloo's; it has group"),
            ("rloo", {"group": "many"}, "option group of rloo is 'many'; it must be a number"),
            ("rloo", {"group": 1}, "group is 1"),
            (
                "rloo",
                {"kl": "Literal"},
                r"option kl of rloo is 'Literal'; it must name one of (?!.*(Literal|dataclass))",
            ),
            ("rloo", {"kl": "dataclass"}, "option kl of rloo is 'dataclass'; it must name one of"),
        ],
    )
    def test_bad(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            make_engine(training_engines(), name, options)


@pytest.fixture(scope="module")
def race():
    world = fixture_b()
    contenders = {
        "prior": Contender(),
        "rloo": Contender(RLOO()),
        "replay": Contender(VarGrad(group=4), Replay(old=4)),
        "taught": Contender(VarGrad(group=4), Decoded(tl.Rejection(n=16))),
        "rejection": Contender(tl.Rejection()),
        "importance": Contender(tl.Importance()),
        "best-of-n": Contender(tl.BestOfN()),
        "rloo, then importance": Contender(RLOO(), then=tl.Importance(n=16)),
    }
    found = compare(world.target, world.prompts, contenders, samples=800, settings=SETTINGS, lora=None)
    return world, found, {result.name: result for result in found.results}


class TestCompare:
    def test_everybody_spends_the_same(self, race):
        _, _, of = race
        assert of["prior"].samples == 0
        for name in ("rloo", "replay", "rejection", "importance", "best-of-n"):
            assert of[name].samples == pytest.approx(800, rel=0.01), name
        assert of["rloo"].steps == 100
        assert of["replay"].steps == 200
        assert of["taught"].steps == 50
        assert 800 <= of["taught"].samples < 1200  # a step that was accepted nothing for asks again
        assert of["rloo, then importance"].samples == 816

    def test_the_truth_is_listed_where_it_can_be(self, race):
        world, found, of = race
        exact = ex.posterior(world.target, world.prompts)
        assert found.exact
        assert of["prior"].to_posterior.value == pytest.approx(ex.kl(exact.log_prior, exact.log_posterior), rel=1e-6)
        assert of["prior"].from_posterior.value == pytest.approx(ex.kl(exact.log_posterior, exact.log_prior), rel=1e-6)
        assert of["rloo"].to_posterior.value < 0.3 * of["prior"].to_posterior.value
        assert of["rejection"].to_posterior.high == 0.0
        assert of["rejection"].reward.value == pytest.approx(exact.mean_reward(exact.log_posterior), abs=0.15)
        assert of["best-of-n"].to_posterior is None
        assert of["rloo, then importance"].to_posterior.high < of["rloo"].to_posterior.value + 0.05
        for result in (of["prior"], of["rloo"]):
            assert result.elbo.value == pytest.approx(exact.log_z - result.to_posterior.value, rel=1e-6)
        assert of["rejection"].elbo is None

    def test_table_json_and_picture(self, race, tmp_path):
        _, found, of = race
        text = str(found)
        assert all(name in text for name in of)
        assert "equal budget of 800 samples" in text
        plain = json.loads(json.dumps(found.as_dict()))
        assert {r["name"] for r in plain["results"]} == set(of)
        figure = distance_figure(plain)
        shown = [trace.y[0] for trace in figure.data]
        assert "best-of-n" not in shown
        nearest = min((r for r in plain["results"] if r["to_posterior"]), key=lambda r: r["to_posterior"]["high"])
        assert shown[-1] == nearest["name"]
        page = write_comparison([plain], tmp_path / "compare.html").read_text()
        assert "rloo, then importance" in page
        assert "Equal budget of 800 samples" in page
        assert "E gold" not in page
        plain["results"][0]["gold"] = {"value": 0.25, "stderr": 0.01, "n": 9, "kind": "mc"}
        judged = write_comparison([plain], tmp_path / "gold.html").read_text()
        head, *cells = re.findall(r"<tr>(.*?)</tr>", judged)
        assert head.startswith("<td></td><td>E r</td><td>E gold</td>")
        assert [row.split("</td>")[2] for row in cells] == ["<td>0.25 ± 0.01", *["<td>–"] * (len(of) - 1)]

    def test_with_draws_instead_of_the_truth(self, monkeypatch):
        """The same numbers, estimated: the certificate's interval and the forward KL's hold the listed ones."""
        world = fixture_b()
        monkeypatch.setattr("tiltlm.inference.compare.LISTED", 3)
        found = compare(
            world.target, world.prompts, {"prior": Contender()}, samples=1, evaluation=2000, exact_budget=2000
        )
        exact = ex.posterior(world.target, world.prompts)
        (prior,) = found.results
        assert not found.exact
        assert prior.elbo.value == pytest.approx(exact.elbo(exact.log_prior), abs=5 * prior.elbo.stderr)
        assert str(found).endswith(RANKING)
        assert ex.kl(exact.log_prior, exact.log_posterior) in prior.to_posterior
        assert ex.kl(exact.log_posterior, exact.log_prior) in prior.from_posterior
        assert prior.from_posterior.width < 0.3
        assert prior.reward.value == pytest.approx(exact.mean_reward(exact.log_prior), abs=5 * prior.reward.stderr)

    def test_the_picture_ranks_by_the_elbo(self, race, tmp_path):
        """Of two samplers the farther one may have the lower interval: its draws bound log Z the looser."""
        _, found, _ = race
        plain = json.loads(json.dumps(found.as_dict()))
        kept = {r["name"]: r for r in plain["results"] if r["name"] in ("prior", "rloo", "rejection")}
        kept["prior"]["to_posterior"] = {"value": 0.01, "low": 0.0, "high": None, "level": 0.95}
        figure = distance_figure({**plain, "results": list(kept.values())})
        assert [trace.y[0] for trace in figure.data] == ["prior", "rloo", "rejection"]
        page = write_comparison([{**plain, "exact": False}], tmp_path / "compare.html").read_text()
        assert "is the difference of their ELBOs" in page

    def test_the_forward_kls_interval_covers(self, monkeypatch):
        """A few exact samples a prompt, unequally many: the errors of both means are in it."""
        monkeypatch.setattr("tiltlm.inference.compare.LISTED", 1)
        world = language(
            lambda p, h: [sine_logit(h, a, shift=p[0]) for a in range(3)],
            lambda x: math.cos(sum(i * t for i, t in enumerate(x, 1))) + 0.5 * (x[-1] == 2),
            beta=0.3,
            bounds=(-1.0, 1.5),
            prompts=["0", "1", "2"],
        )
        exacts = [ex.posterior(world.target, world.prompts, p) for p in range(3)]
        truth, inside, repetitions = sum(ex.kl(e.log_posterior, e.log_prior) for e in exacts) / 3, 0, 60
        for seed in range(repetitions):
            found = compare(
                world.target,
                world.prompts,
                {"prior": Contender()},
                samples=1,
                evaluation=16,
                settings=tl.Training(seed=seed),
            )
            assert found.results[0].from_posterior is not None
            inside += truth in found.results[0].from_posterior
        assert inside >= 0.95 * repetitions - 3 * math.sqrt(repetitions * 0.05 * 0.95)

    def test_one_pick_has_no_error_and_chains_have_theirs(self):
        """Of a prompt from which one completion was picked nothing tells the error; states of a chain are not independent."""
        world = fixture_b()
        contenders = {
            "best": Contender(BestOfN(8)),
            "chains": Contender(MCMC(chains=8, steps=8, warmup=4)),
            "importance": Contender(Importance(32)),
        }
        errors = dict.fromkeys(contenders, 0.0)
        values: dict[str, list[float]] = {name: [] for name in contenders}
        repetitions = 30
        for seed in range(repetitions):
            settings = tl.Training(seed=seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="the chains of")
                found = compare(
                    world.target, world.prompts, contenders, samples=None, seconds=1.0, evaluation=2, settings=settings
                )
            for result in found.results:
                values[result.name].append(result.reward.value)
                errors[result.name] += result.reward.stderr / repetitions
        assert math.isnan(errors["best"])
        for name in ("chains", "importance"):
            assert errors[name] == pytest.approx(float(torch.tensor(values[name]).std()), rel=0.35)

    def test_by_seconds(self):
        world = small_language()
        contenders = {"rloo": Contender(RLOO()), "importance": Contender(tl.Importance(n=32))}
        found = compare(
            world.target, world.prompts, contenders, samples=None, seconds=0.4, settings=SETTINGS, lora=None
        )
        trained, decoded = found.results
        assert trained.seconds < 5
        assert trained.steps > 1
        assert decoded.samples == 32

    def test_bad_budgets(self):
        world = small_language()
        with pytest.raises(tl.InputError, match="a budget of 3 samples does not pay for one step of rloo"):
            compare(world.target, world.prompts, {"rloo": Contender(RLOO())}, samples=3, lora=None)
        with pytest.raises(tl.InputError, match="either as samples or as seconds"):
            compare(world.target, world.prompts, {}, samples=3, seconds=3)

    def test_a_pool_costs_nothing(self, rng):
        world = fixture_b()
        scored = world.target.score(world.prior.draw(world.prompts, 64, rng))
        found = compare(
            world.target,
            world.prompts,
            {"pool": Contender(VarGrad(group=16), Pool(scored), {"steps": 30})},
            samples=10,
            settings=SETTINGS,
            lora=None,
        )
        assert found.results[0].samples == 0
        assert found.results[0].steps == 30

    def test_policies_do_not_pile_up(self, rng):
        from conftest import make_model, make_tokenizer

        prior = tl.load(make_model("llama"), make_tokenizer()).prior(max_new_tokens=3)
        target = prior * tl.Reward(
            lambda completions: [float(len(c) % 3) for c in completions], beta=1.0, bounds=(0, 2)
        )
        before = [p.clone() for p in prior.body.model.parameters()]
        compare(target, ["the film"], {"a": Contender(RLOO()), "b": Contender(RLOO())}, samples=16, exact_budget=8)
        assert prior.body.adapters.names == ()
        assert all(torch.equal(a, b) for a, b in zip(before, prior.body.model.parameters(), strict=True))


class TestBudget:
    @pytest.mark.parametrize("draws", [2, 7, 50])
    @pytest.mark.parametrize("name", decoding_engines())
    def test_an_engine_draws_no_more_than_it_may(self, name, draws, rng):
        """Counted where they are drawn, and not where they are returned: redrawn ends and a warm-up cost as well."""
        world = small_language()
        engine, drawn = within(decoding_engines()[name], draws), []

        class Counting(type(world.prior)):
            def draw(self, prompts, n, rng):
                drawn.append(n * len(prompts))
                return super().draw(prompts, n, rng)

            def redraw(self, draws, keep, rng):
                drawn.append(len(draws))
                return super().redraw(draws, keep, rng)

            def walk(self, prompts, n):
                drawn.append(n * len(prompts))
                return super().walk(prompts, n)

        prior = Counting(**vars(world.prior))
        if name == "value-guided":
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.sample(replace(world.target, prior=prior), world.prompts, rng=rng)
        assert sum(drawn) <= draws
        assert sum(drawn) == cost(engine)
        assert sum(drawn) > 0.7 * draws

    def test_prompts_without_a_sample_are_told(self):
        world = fixture_b(beta=0.05)
        found = compare(
            world.target,
            world.prompts.select([0] * 30),
            {"rejection": Contender(tl.Rejection())},
            samples=90,
            lora=None,
        )
        (result,) = found.results
        assert 0 < result.served < 1
        assert f"({result.served:.0%} of the prompts)" in str(found)


class TestNames:
    def test_contenders(self):
        assert contenders_of("ppo", 4, 16)["ppo"].engine.max_length == 16
        found = contenders_of("prior, rloo,var-grad+replay,rloo/importance,sft,best-of-n", 4, 16)
        assert found["prior"].engine is None
        assert found["rloo"].engine.group == 4
        assert found["var-grad+replay"].source.old == 4
        assert within(tl.Importance(), 4) == found["rloo/importance"].then
        assert found["sft"].source.engine == tl.BestOfN(n=4)
        assert isinstance(found["best-of-n"].engine, tl.BestOfN)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ("", "engines is empty"),
            ("rloo+reply", "only 'replay' is known"),
            ("rlooo", "did you mean 'rloo'"),
            ("rloo/nothing", "engine is 'nothing'; choose"),
        ],
    )
    def test_bad(self, names, message):
        with pytest.raises(tl.InputError, match=message):
            contenders_of(names, 4, 16)
