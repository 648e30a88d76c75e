"""Our own recipes and engines, explained: what is said agrees with what the engines claim and the suite proves.

The mapping of behaviours onto `Objective` is held from three sides: the engines' claims (proved in tests/test_engines.py), the
laws that `settles_at` computes from the engines' own advantages and aggregations, and the updates that `implied_law` follows.
"""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tiltlm.errors import InputError
from tiltlm.explanation import detect, explain, implied_law, law_of, laws
from tiltlm.explanation.implied import drift
from tiltlm.explanation.readers import ours, policy_gradients
from tiltlm.explanation.tree import tree
from tiltlm.inference.catalogue import decoding_engines, make_engine, training_engines
from tiltlm.inference.lagging import Lagging
from tiltlm.inference.source import Decoded, Given, Replay, require_sound
from tiltlm.inference.training.policy_gradients import advantages, aggregate, baselines, credit, kl_terms, ppo
from tiltlm.inference.training.policy_gradients.grpo import GRPO
from tiltlm.inference.training.policy_gradients.ppo import PPO
from tiltlm.inference.training.policy_gradients.reinforce import Reinforce
from tiltlm.inference.training.policy_gradients.rloo import RLOO
from tiltlm.posterior import exact as ex
from tiltlm.testing import small_language
from tiltlm.workflow.recipe import Recipe

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "explain"
ENGINES = training_engines()
BETA = 0.3


def changed(found):
    return {finding.field for finding in found.findings if finding.severity == "changes the target"}


def gap(law, other):
    return float((law.exp() - other.exp()).abs().max())


@pytest.fixture(scope="module")
def small():
    world = small_language()
    return ex.posterior(world.target, world.prompts)


# --- the verdict and the claim ---


@pytest.mark.parametrize("name", ENGINES)
def test_the_verdict_agrees_with_the_claim(name):
    claim = make_engine(ENGINES, name, {"group": 4}).claim
    found = explain({"engine": name, "beta": BETA, "group": 4})
    at_beta = found.fixed_point == "p*" and found.beta == BETA
    assert at_beta == (claim.fixed_point == "p*"), (found.fixed_point, found.beta, claim)
    if claim.fixed_point == "p* at another beta":
        assert found.fixed_point.startswith("p*")
        assert found.beta != BETA
    if not isinstance(ENGINES[name], GRPO | PPO | RLOO | Reinforce):
        assert found.fixed_point == claim.fixed_point.replace("pi0", "π0")
    about = next(finding for finding in found.findings if finding.field == "engine")
    for part in (claim.fixed_point, claim.objective, f"bias {claim.bias}", f"data {claim.data}"):
        assert part.replace("pi0", "π0") in about.says
    assert claim.source in about.formula
    assert found.source == f"TiltLM {name}"
    assert len(str(found).splitlines()) <= 40
    json.dumps(found.as_dict())


def policy_gradient_engines():
    kls = (kl_terms.k1, kl_terms.k2, kl_terms.k3, kl_terms.k3_corrected, kl_terms.exact, kl_terms.no_kl)
    for advantage, lengths, kl, place, level, part, c in itertools.product(
        policy_gradients._ADVANTAGES,
        policy_gradients._LENGTHS,
        kls,
        (kl_terms.in_reward, kl_terms.in_loss, kl_terms.in_both),
        (kl_terms.by_token, kl_terms.by_sequence),
        (credit.whole, credit.to_go),
        (1.0, 0.5),
    ):
        yield GRPO(3, advantage, lengths, kl, place, level, part, kl_coefficient=c)
    terms = (kl_terms.sampled, kl_terms.rao_blackwell)
    for part, kl in itertools.product((credit.whole, credit.to_go), terms):
        yield RLOO(3, part, kl)
        yield from (Reinforce(3, baseline, part, kl) for baseline in policy_gradients._BASELINES)
    for kl, scale, lengths, gamma, lam, control in itertools.product(
        terms,
        (ppo.as_they_are, ppo.whitened),
        policy_gradients._LENGTHS,
        (1.0, 0.9),
        (1.0, 0.9),
        (ppo.fixed, ppo.proportional),
    ):
        yield PPO(3, gamma=gamma, lam=lam, scale=scale, aggregate=lengths, kl=kl, controller=control)


def test_every_combination_of_behaviours_agrees_with_its_claim(small):
    """p* where the claim says so, at the claim's beta, and from the behaviours alone; never where it does not."""
    posterior, agreed, withheld = small.log_posterior, 0, 0
    for engine in policy_gradient_engines():
        claim = engine.claim
        objective = policy_gradients.objective_of(engine, small.beta)
        law = law_of(objective)
        says = law.name == "p*" and law.beta == small.beta
        if claim.bias == "1/n" and not says:  # p* for large groups only; explain speaks of the group that is given
            mean = engine.advantage if isinstance(engine, GRPO) else engine.baseline
            assert mean in (advantages.centred, baselines.of_the_group), engine
            assert kl_terms.in_both in vars(engine).values() or engine.kl is kl_terms.rao_blackwell, engine
            continue
        assert says == (claim.fixed_point == "p*"), (engine, law)
        if claim.fixed_point == "p*":
            assert objective.unmodelled == ()
            assert float(drift(objective, small, tree(small), posterior).abs().max()) < 1e-9, engine
            agreed += 1
        elif claim.fixed_point == "p* at another beta":
            assert law.name.startswith("p*"), (engine, law)
            assert law.beta != small.beta
        else:
            assert not re.fullmatch(r"p\*( at [\d.]+·β)?", law.name), (engine, law)
            if any("the engine claims" in reason for reason in objective.unmodelled):
                in_batches = isinstance(engine, GRPO) and engine.aggregate is aggregate.token_mean
                assert in_batches or claim.objective.startswith("not known"), engine
                withheld += 1
    assert agreed > 100
    assert withheld > 0, "where explain's law is one of large batches, the claim has the last word"


@pytest.mark.parametrize(
    ("engine", "where"),
    [
        (GRPO(advantage=advantages.centred, aggregate=aggregate.total, kl=kl_terms.k3), "own-token forward-KL law"),
        (GRPO(advantage=advantages.centred, aggregate=aggregate.total, kl=kl_terms.k3_corrected), "own-token-KL law"),
        (GRPO(advantage=advantages.leave_one_out, aggregate=aggregate.total, kl=kl_terms.exact), "own-token-KL law"),
        (GRPO(advantage=advantages.leave_one_out, kl=kl_terms.exact), "length-weighted own-token-KL law"),
        (GRPO(advantage=advantages.leave_one_out, kl=kl_terms.k2), "length-weighted own-token-KL law"),
        (GRPO(advantage=advantages.leave_one_out, kl=kl_terms.k2, level=kl_terms.by_sequence), "length-tilted p*"),
        (GRPO(kl=kl_terms.k2, level=kl_terms.by_sequence, aggregate=aggregate.total), "p* at a β"),
        (
            GRPO(advantage=advantages.standardised_population, kl=kl_terms.k3, aggregate=aggregate.constant_length),
            "own",
        ),
        (GRPO(kl=kl_terms.k3, level=kl_terms.by_sequence, aggregate=aggregate.total), "forward-KL law at a β"),
        (GRPO(), "unknown"),
    ],
)
def test_the_engine_and_its_words_settle_at_the_same_law(small, engine, where):
    """The engine's own advantages over listed groups, against the updates of the objective that it was read as."""
    engine = replace(engine, group=3, kl_coefficient=0.7)
    objective = policy_gradients.objective_of(engine, small.beta)
    settled = engine.settles_at(small)
    assert settled is not None
    assert where in law_of(objective).name
    assert gap(implied_law(objective, small), settled) < 1e-7
    assert gap(settled, small.log_posterior) > 1e-4
    if objective.scale == "group std":
        assert gap(implied_law(replace(objective, group=2), small), settled) > 1e-4, "another group settles elsewhere"
    elif law_of(objective).name.startswith("length"):
        assert gap(implied_law(replace(objective, length="sum"), small), settled) > 1e-4, "so does another length"


@pytest.mark.parametrize("name", [name for name, engine in ENGINES.items() if isinstance(engine, GRPO | PPO)])
def test_presets_settle_where_their_words_do(small, name):
    """Presets that average over the tokens of a batch are left out: explain's batches are large, theirs are of one prompt."""
    engine = replace(ENGINES[name], group=3)
    objective = policy_gradients.objective_of(engine, small.beta)
    coarse = objective.length == "batch mean" or objective.kl_target is not None
    settled = None if coarse else engine.settles_at(small)
    if settled is None:
        assert coarse or engine.claim.fixed_point == "none"
        return
    assert gap(implied_law(objective, small), settled) < 1e-7


def test_a_discount_is_where_ppo_settles(small):
    engine = PPO(gamma=0.9)
    objective = policy_gradients.objective_of(engine, small.beta)
    settled = engine.settles_at(small)
    assert law_of(objective).name == "discounted soft law" == engine.claim.fixed_point
    assert settled is not None
    assert gap(implied_law(objective, small), settled) < 1e-9
    assert gap(settled, small.log_posterior) > 1e-3


def test_k3_in_reward_and_loss_is_the_product_rule(small):
    """Token by token as well: the reward takes off the estimates, the loss adds their slopes."""
    engine = GRPO(3, advantages.leave_one_out, aggregate.total, kl_terms.k3, kl_terms.in_both, kl_coefficient=1.0)
    objective = policy_gradients.objective_of(engine, small.beta)
    assert law_of(objective).name == "p*"
    assert gap(implied_law(objective, small), laws.tilted(small, small.beta)) < 1e-9
    for half in (replace(objective, loss_kl=None), replace(objective, reward_kl=None)):
        assert float(drift(half, small, tree(small), small.log_posterior).abs().max()) > 1e-3


# --- recipes ---


def test_the_film_recipe_is_explained():
    found = explain(ROOT / "recipes" / "film.yaml")
    page = str(found).splitlines()
    assert page[0] == "TiltLM rloo: converges to p* of the prior at temperature 0.7; β follows from the plan"
    assert found.beta is None
    assert found.configured_beta is None
    assert page[1].strip() == "π(x|c) ∝ π0^[T=0.7](x|c)·exp(r/β)"
    assert "kl_budget = 0.5 (β follows from the plan" in " ".join(" ".join(page).split())
    assert changed(found) == set()
    assert json.loads(json.dumps(found.as_dict()))["beta"] is None


def test_every_recipe_of_the_repository_is_a_recipe_of_ours():
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        assert detect(yaml.safe_load(file.read_text())) == "tiltlm"
        assert explain(file).source.startswith("TiltLM ")


@pytest.mark.parametrize("choice", [{"kl_budget": 0.5}, {"reward_goal": 0.25}])
@pytest.mark.parametrize("name", ENGINES)
def test_a_beta_of_the_plan_has_no_number(name, choice):
    found = explain({"engine": name, "group": 4, **choice})
    given = explain({"engine": name, "group": 4, "beta": 1.0})
    assert found.configured_beta is None
    assert found.beta is None or "each prompt's own" in found.fixed_point
    assert "β follows from the plan" in " ".join(str(found).split())
    if given.fixed_point == "p*" and given.beta == 1:
        assert found.fixed_point == "p*"
        assert "exp(r/β)" in found.formula
    else:
        assert found.fixed_point != "p*"
        assert given.fixed_point in {"p*", found.fixed_point}


def test_a_shrunken_reward_is_a_multiple_of_the_plan_s_beta():
    found = explain({"engine": "dr-grpo-kl", "kl_budget": 0.5, "group": 4})
    assert found.fixed_point == "p* at 1.33333·β"
    assert "exp(r/1.33333·β)" not in found.formula, "the product is in brackets"
    assert "exp(r/(1.33333·β))" in found.formula
    with pytest.raises(InputError, match="left to the plan"):
        explain(
            {"engine": "rloo", "kl_budget": 0.5}, exact=ex.posterior(small_language().target, small_language().prompts)
        )


def test_figures_are_compared_with_p_star_at_the_recipe_s_beta(small):
    recipe = {"engine": "grpo", "beta": small.beta, "group": 3, "options": {"kl": "k2", "kl_coefficient": 0.9}}
    numbers = explain(recipe, exact=small).numbers
    assert numbers["E r at p*"] == pytest.approx(small.mean_reward(small.log_posterior), abs=1e-12)
    assert numbers["KL(π‖p*)"] > 1e-3


def test_a_deviation_takes_beta_out():
    one, two = (explain({"engine": "grpo", "beta": beta}) for beta in (0.1, 0.4))
    assert {"coefficient", "scale", "loss_kl"} <= changed(one)
    says = next(finding for finding in one.findings if finding.field == "coefficient")
    assert "0.04" in says.says
    assert "kl_coefficient = 0.04 (default)" in says.setting
    points = [next(f for f in found.findings if f.field == "scale").numbers for found in (one, two)]
    assert points[0]["rest points, many draws"] == points[1]["rest points, many draws"]


def test_options_are_called_as_they_were_given():
    found = explain({"engine": "dr-grpo-kl", "beta": 0.1, "options": {"aggregate": "sequence_mean"}})
    settings = {finding.field: finding.setting for finding in found.findings}
    assert settings["length"] == "aggregate = sequence_mean"
    assert settings["baseline"] == "advantage = centred (default), group = 8 (default)"
    assert found.fixed_point == "length-tilted p*"


# --- where the completions come from ---


@pytest.mark.parametrize("key", ours.SOURCES)
def test_a_source_is_refused_exactly_where_training_refuses_it(key):
    sources: dict[str, Any] = {
        "replay": Replay(),
        "lag": Lagging(),
        "teacher": Decoded(decoding_engines()["rejection"]),
        "data": Given(SimpleNamespace(pairs=None)),  # pyright: ignore[reportArgumentType]
    }
    values = {"replay": 8, "lag": 8, "teacher": "rejection", "data": "rows.jsonl"}
    verdicts = set()
    for name, engine in ENGINES.items():
        try:
            require_sound(engine, sources[key])
            sound = True
        except InputError:
            sound = False
        found = explain({"engine": name, "beta": BETA, key: values[key]})
        assert ("refuses" in found.formula) == (not sound), name
        if not sound:
            assert found.fixed_point == "none"
            assert "source" in changed(found)
            assert next(f for f in found.findings if f.field == "source").setting == f"{key} = {values[key]}"
        verdicts.add(sound)
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("teacher", "law", "severity"),
    [
        ("rejection", "p*", "harmless"),
        ("importance", "p*", "adds bias or variance"),
        ("best-of-n", "best-of-n", "changes the target"),
    ],
)
def test_supervised_fine_tuning_settles_at_its_teacher_s_law(teacher, law, severity):
    found = explain({"engine": "sft", "beta": BETA, "teacher": teacher})
    assert found.fixed_point == law
    assert found.beta == (BETA if law == "p*" else None)
    assert next(f for f in found.findings if f.field == "source").severity == severity


def test_supervised_fine_tuning_without_completions_is_told_so():
    found = explain({"engine": "sft", "beta": BETA})
    assert found.fixed_point == "data"
    assert "refuses" in next(f for f in found.findings if f.field == "source").says
    assert explain({"engine": "sft", "beta": BETA, "data": "rows.jsonl"}).fixed_point == "data"


def test_what_a_recipe_adds_to_a_claim():
    found = explain({"engine": "var-grad", "beta": BETA, "temperature": 0.7, "replay": 8, "on_error": "drop"})
    assert found.fixed_point == "p* of the prior at temperature 0.7"
    assert found.beta == BETA
    severities = {finding.field: finding.severity for finding in found.findings}
    assert severities["source"] == "harmless"
    assert severities["on_error"] == "adds bias or variance"
    assert severities["sampling"] == "harmless"
    assert "temperature beta/k" in explain({"engine": "iterated-raft", "beta": BETA}).formula


# --- keys and bad input ---


def test_no_key_of_a_recipe_is_called_a_misspelling():
    defaults = {name: field.default for name, field in Recipe.model_fields.items()}
    everything = defaults | {"model": "a", "engine": "rloo", "options": {}, "beta": BETA}
    assert explain(everything).suggestions == ()
    assert set(ours.OPTIONS) <= set(Recipe.model_fields)
    assert all(option.default == defaults[name] for name, option in ours.OPTIONS.items() if name not in {"options"}), (
        "the recipe's defaults are explain's"
    )
    assert explain({"engine": "rloo", "beta": BETA, "temprature": 0.7}).suggestions == (("temprature", "temperature"),)


def test_a_behaviour_of_ones_own_has_no_law():
    found = explain({"engine": "reinforce", "beta": BETA, "options": {"baseline": "weighted_score"}})
    assert found.fixed_point == "unknown"
    assert "weighted_score" in str(found)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"engine": "rlo", "beta": 1}, ("engine is 'rlo'", "did you mean 'rloo'")),
        ({"engine": "rloo", "beta": 0}, ("beta is 0", "positive")),
        ({"engine": "rloo", "beta": "hot"}, ("beta is 'hot'", "a number")),
        ({"engine": "rloo", "kl_budget": -1}, ("kl_budget is -1", "positive")),
        ({"engine": "rloo"}, ("beta is missing", "kl_budget")),
        ({"engine": "rloo", "beta": 1, "kl_budget": 1}, ("beta and kl_budget", "give one")),
        ({"engine": "sft", "beta": 1, "teacher": "rejection", "replay": 2}, ("replay and teacher", "give one")),
        ({"engine": "sft", "beta": 1, "teacher": "rejecton"}, ("'rejecton'", "did you mean 'rejection'")),
        ({"engine": "rloo", "beta": 1, "options": {"clip": 2}}, ("option 'clip'", "credit")),
        ({"engine": "grpo", "beta": 1, "options": {"kl": "k4"}}, ("option kl of grpo is 'k4'", "k3")),
        ({"engine": "grpo", "beta": 1, "group": 1}, ("group is 1", "at least 2")),
        ({"engine": "var-grad", "beta": 1, "temperature": 0}, ("temperature is 0",)),
        ({"engine": "rloo", "beta": 1, "on_error": "ignore"}, ("on_error is 'ignore'", "drop")),
    ],
)
def test_a_bad_recipe_is_one_sentence(recipe, words):
    with pytest.raises(InputError) as refused_:
        explain(recipe)
    assert all(word in str(refused_.value) for word in words), str(refused_.value)
    assert "\n" not in str(refused_.value)


# --- the command ---


@pytest.mark.parametrize(
    ("file", "headline"),
    [
        (DATA / "trl_grpo.yaml", "TRL GRPOConfig: converges to no law"),
        (DATA / "verl_grpo.yaml", "verl grpo: converges to own-token-KL law at β = 0.125"),
        (DATA / "openrlhf_dotted.sh", "OpenRLHF"),
        (ROOT / "recipes" / "film.yaml", "TiltLM rloo: converges to p* of the prior at temperature 0.7"),
    ],
)
def test_the_command_explains_a_file(cli, tmp_path, file, headline):
    ended = cli("explain", file, "--json", tmp_path / "found.json")
    assert ended.code == 0, ended
    assert ended.out.startswith(headline)
    assert ended.out.strip() == str(explain(file))
    assert json.loads((tmp_path / "found.json").read_text())["fixed_point"] == explain(file).fixed_point


def test_the_command_takes_the_prior_s_rate_of_success(cli):
    low, high = (cli("explain", DATA / "trl_grpo.yaml", "--p0", p0).out for p0 in (0.2, 0.5))
    assert low != high
    assert "π0 = 0.5" in high


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: rlo\nbeta: 0.1\n", "engine is 'rlo'; did you mean 'rloo'?"),
        ("colour: blue\n", "not a configuration of TiltLM, TRL, OpenRLHF or verl"),
        ("engine: [\n", "'bad.yaml' is not YAML"),
    ],
)
def test_the_command_refuses_a_bad_file_in_one_sentence(refused, tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert message in refused("explain", tmp_path / "bad.yaml")


def test_the_command_refuses_what_is_not_there(refused, tmp_path):
    assert "cannot be read" in refused("explain", tmp_path / "none.yaml")
    assert "p0 is 2;" in refused("explain", DATA / "trl_grpo.yaml", "--p0", 2)


class TestMoments:
    """Their evidence stands beside the reward's in the target, whatever the engine."""

    MOMENTS = ({"function": "f.py:women", "mean": 0.5}, "f.py:kind=1", {"part": "length", "mean": 9})

    def test_beside_a_reward(self):
        recipe = {"engine": "rloo", "reward": "f.py:good", "beta": BETA, "moments": list(self.MOMENTS)}
        found = explain(recipe)
        assert found.beta == BETA
        (moments,) = [one for one in found.findings if one.field == "moments"]
        assert moments.severity == "changes the target"
        assert "the reward's posterior with E women = 0.5, E kind = 1, E length = 9" in moments.says
        assert "exp(r/β + Σ λᵢφᵢ)" in moments.formula
        assert "E women = 0.5" in str(found)

    def test_alone_there_is_no_reward(self):
        found = explain({"engine": "rloo", "prompts": "p.txt", "moments": list(self.MOMENTS)})
        (moments,) = [one for one in found.findings if one.field == "moments"]
        assert found.beta == 1
        assert "nearest to π0 with" in moments.says
        assert "r/β" not in moments.formula

    def test_without_them_nothing_is_said(self):
        assert not [one for one in explain({"engine": "rloo", "beta": BETA}).findings if one.field == "moments"]

    def test_a_moment_without_a_mean(self):
        with pytest.raises(InputError, match="give it a function or a part, and a mean"):
            explain({"engine": "rloo", "beta": BETA, "reward": "f.py:good", "moments": [{"function": "f.py:women"}]})
