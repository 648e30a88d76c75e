"""Configurations of four libraries, read and judged."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tiltlm.errors import InputError
from tiltlm.explanation import FORMATS, KLTerm, Objective, PairLoss, Sampling, explain, law_of, rest_points
from tiltlm.explanation.readers import trl

DATA = Path(__file__).parent / "data" / "explain"


def severities(found):
    return {finding.field: finding.severity for finding in found.findings}


def changed(found):
    return {finding.field for finding in found.findings if finding.severity == "changes the target"}


# --- whole configurations ---

VERDICTS = {
    "trl_grpo.yaml": ("unknown", None, {"loss_kl", "scale", "length"}),
    "trl_rloo.json": ("p* of the clipped reward", 0.05, {"reward_clip"}),
    "trl_ppo.yaml": ("p* of the reward with its penalties", 0.05, {"shaping"}),
    "openrlhf_reinforce.sh": (
        "own-token-KL law at β·σ_r·σ_batch",
        None,
        {"loss_kl", "scale", "baseline", "reward_clip", "reward_whitening"},
    ),
    "openrlhf_dotted.sh": ("p* of the clipped reward", 0.01, {"reward_clip"}),
    "verl_grpo.yaml": ("own-token-KL law", 0.125, {"loss_kl", "baseline"}),
    "verl_ppo.sh": ("p* at the controller's β", None, {"kl_target"}),
    "tiltlm.yaml": ("p*", 0.4, {"baseline"}),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_file_is_recognised_and_judged(name):
    fixed_point, beta, moves = VERDICTS[name]
    found = explain(DATA / name)
    assert found.fixed_point == fixed_point
    assert found.beta == (None if beta is None else pytest.approx(beta))
    assert changed(found) == moves
    assert len(str(found).splitlines()) <= 40
    assert json.loads(json.dumps(found.as_dict()))["fixed_point"] == fixed_point


def test_the_page_says_what_matters_first():
    page = str(explain(DATA / "trl_grpo.yaml")).splitlines()
    assert page[0] == "TRL GRPOConfig: converges to no law that is known in closed form"
    assert "! num_iteration is not a field; did you mean num_iterations?" in page
    body = "\n".join(page)
    assert body.index("✗ beta = 0.5, use_bias_correction_kl = false") < body.index("harmless:")
    assert "num_generations = 8" in body
    points = rest_points(0.5, group=8, ddof=1, eps=1e-4, forward=True)
    assert f"p = {points.stable[0]:.6f} stable" in body, "the rest point of eight draws is printed"


def test_the_page_names_effective_and_configured_beta():
    assert str(explain(DATA / "tiltlm.yaml")).splitlines()[0] == (
        "TiltLM dr-grpo: converges to p* at β = 0.4, not at the 0.3 that is configured"
    )
    assert str(explain({"trainer": "rloo"})).splitlines()[0] == "TRL RLOOConfig: converges to p* at β = 0.05"


def test_defaults_are_called_defaults_and_given_values_are_not():
    found = explain({"trainer": "grpo", "num_generations": 8})
    settings = {finding.field: finding.setting for finding in found.findings}
    assert settings["beta"] == "beta = 0 (default)"
    assert "loss_type = dapo (default)" in settings["length"]
    written = explain({"trainer": "grpo", "beta": 0.1, "num_generations": 8, "scale_rewards": "none"})
    baseline = next(finding for finding in written.findings if finding.field == "baseline")
    assert baseline.setting == "num_generations = 8"


@pytest.mark.parametrize(
    "config", [{"trainer": "grpo"}, {"algorithm": {"adv_estimator": "grpo"}}, {"trainer": "ppo", "kl_coef": 0}]
)
def test_beta_of_zero_is_no_posterior(config):
    found = explain(config)
    assert found.fixed_point == "none"
    assert found.beta is None
    assert "beta" in changed(found)


# --- the objective's own words, one change at a time ---

CLEAN = Objective(reward_kl=KLTerm(0.5, "k1", "sequence"))
LOSS = KLTerm(0.5, "k2", "sequence")

CHANGES = {
    "clean": (CLEAN, "p*", 0.5),
    "k1 in the loss": (Objective(loss_kl=KLTerm(0.5, "k1")), "none", None),
    "k2 in the reward": (Objective(reward_kl=KLTerm(0.5, "k2")), "unknown", None),
    "k3 in the reward": (Objective(reward_kl=KLTerm(0.5, "k3")), "unknown", None),
    "abs in the loss": (Objective(loss_kl=KLTerm(0.5, "abs")), "unknown", None),
    "k1 in the reward and in the loss": (Objective(reward_kl=KLTerm(0.5), loss_kl=KLTerm(0.5, "k1")), "p*", 0.5),
    "k1 in the reward, k2 of the completion in the loss": (Objective(reward_kl=KLTerm(0.5), loss_kl=LOSS), "p*", 1.0),
    "k1 in the reward, token k3 in the loss": (
        Objective(reward_kl=KLTerm(0.5), loss_kl=KLTerm(0.5, "k3")),
        "unknown",
        None,
    ),
    "both halves of the exact KL": (Objective(reward_kl=KLTerm(0.5, "rao-blackwell")), "p*", 0.5),
    "one half of it in the loss": (Objective(loss_kl=KLTerm(0.5, "full")), "own-token-KL law", 0.5),
    "group mean, KL inside": (Objective(reward_kl=KLTerm(0.5), baseline="group mean", group=4), "p*", 0.5),
    "group mean, KL outside": (Objective(loss_kl=LOSS, baseline="group mean", group=4), "p*", 0.5 / 0.75),
    "one draw a group": (Objective(loss_kl=LOSS, baseline="group mean", group=1), "the prior", None),
    "group deviation, KL inside": (
        Objective(reward_kl=KLTerm(0.5), baseline="group mean", scale="group std"),
        "p*",
        0.5,
    ),
    "group deviation, KL outside": (
        Objective(loss_kl=LOSS, baseline="group mean", scale="group std"),
        "p* at a β of each prompt's own",
        0.5,
    ),
    "batch deviation, KL outside": (Objective(loss_kl=LOSS, scale="batch std"), "p* at β·σ_batch", None),
    "batch deviation, KL inside": (Objective(reward_kl=KLTerm(0.5), scale="batch std"), "p*", 0.5),
    "1/|x|, KL inside": (Objective(reward_kl=KLTerm(0.5), length="sequence mean"), "p*", 0.5),
    "1/|x|, KL inside, no baseline": (
        Objective(reward_kl=KLTerm(0.5), length="sequence mean", baseline="none"),
        "length-tilted p*",
        0.5,
    ),
    "1/|x|, KL outside": (Objective(loss_kl=LOSS, length="sequence mean"), "length-tilted p*", 0.5),
    "tokens of the batch": (Objective(loss_kl=LOSS, length="batch mean"), "p*", 0.5),
    "KL averaged in another way": (Objective(loss_kl=LOSS, loss_kl_length="batch mean"), "unknown", None),
    "discount": (Objective(reward_kl=KLTerm(0.5), baseline="critic", gamma=0.99), "discounted soft law", 0.5),
    "lambda": (Objective(reward_kl=KLTerm(0.5), baseline="critic", lam=0.95), "p*", 0.5),
    "CISPO": (Objective(loss_kl=LOSS, policy_scale=0.2), "p*", 2.5),
    "temperature of both": (
        Objective(reward_kl=KLTerm(0.5), sampling=Sampling(0.7), scoring_temperature=0.7),
        "p* of the prior at temperature 0.7",
        0.5,
    ),
    "temperature of one": (Objective(reward_kl=KLTerm(0.5), sampling=Sampling(0.7)), "unknown", None),
    "top-p": (Objective(reward_kl=KLTerm(0.5), sampling=Sampling(top_p=0.95)), "unknown", None),
    "top-k": (Objective(reward_kl=KLTerm(0.5), sampling=Sampling(top_k=50)), "unknown", None),
    "clip, one update": (Objective(reward_kl=KLTerm(0.5), clip=(0.2, 0.2)), "p*", 0.5),
    "clip, four updates": (Objective(reward_kl=KLTerm(0.5), clip=(0.2, 0.28), updates=4), "p*", 0.5),
    "score whitened": (Objective(reward_kl=KLTerm(0.5), reward_whitening="score"), "p* at β·σ_r", None),
    "tokens whitened": (Objective(reward_kl=KLTerm(0.5), reward_whitening="tokens"), "length-tilted p*", 0.5),
    "reference reset": (Objective(reward_kl=KLTerm(0.5), sync_every=100), "none", None),
    "reference mixed": (Objective(reward_kl=KLTerm(0.5), sync_every=100, sync_mix=0.6), "none", None),
    "adaptive": (Objective(reward_kl=KLTerm(0.5), kl_target=6.0), "p* at the controller's β", None),
    "truncated masked": (Objective(reward_kl=KLTerm(0.5), mask_truncated=True), "unknown", None),
    "entropy": (Objective(reward_kl=KLTerm(0.5), entropy=0.01), "unknown", None),
    "dynamic sampling": (Objective(loss_kl=LOSS, drops_uniform_groups=True), "unknown", None),
    "ratio of the completion before token KLs": (
        Objective(loss_kl=KLTerm(0.5, "k3", corrected=True), importance="sequence"),
        "unknown",
        None,
    ),
    "something else": (Objective(reward_kl=KLTerm(0.5), unmodelled=("a trick",)), "unknown", None),
    "DPO": (PairLoss(0.1), "p*", 0.1),
    "IPO": (PairLoss(0.1, "ipo"), "win-rate tilt", 0.1),
    "online DPO with a judge of rewards": (PairLoss(0.1, labels="reward", online=True), "none", None),
    "another pair loss": (PairLoss(0.1, "hinge"), "unknown", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_at_a_time(name):
    objective, fixed_point, beta = CHANGES[name]
    found = explain(objective)
    assert found.fixed_point == fixed_point == law_of(objective).name
    assert found.beta == (None if beta is None else pytest.approx(beta))
    plain = fixed_point == "p*" and found.beta is not None and abs(found.beta - found.configured_beta) < 1e-12
    noisy = isinstance(objective, PairLoss) or name == "k1 in the reward and in the loss"
    if not noisy and name != "k1 in the reward, k2 of the completion in the loss":
        assert plain == (not changed(found)), "a target that moved has a finding that says so, and the other way round"
    assert len(str(found).splitlines()) <= 40


def test_numbers_that_are_known_are_in_the_verdict():
    published = Objective(loss_kl=LOSS, baseline="group mean", scale="group std", ddof=0, group=8)
    found = next(finding for finding in explain(published).findings if finding.field == "scale")
    assert found.numbers["rest points"]["stable"] == [pytest.approx(0.976735, abs=5e-7)]
    assert found.numbers["rest points, many draws"]["stable"] == []
    assert "0.976735" in found.formula
    assert "runs to p = 1" in found.says
    two = next(
        f for f in explain(replace(published, loss_kl=KLTerm(1.0, "k2", "sequence"))).findings if f.field == "scale"
    )
    assert "two regimes" in two.says, "bistability is announced although eight draws alone do not have it"
    many = Objective(loss_kl=KLTerm(1.0, "k2", "sequence"), baseline="group mean", scale="group std", group=None)
    text = next(finding for finding in explain(many).findings if finding.field == "scale").formula
    assert "0.681301 stable" in text
    assert "0.934687 UNSTABLE" in text
    other = next(finding for finding in explain(published, p0=0.5).findings if finding.field == "scale")
    assert other.numbers["rest points"] != found.numbers["rest points"]
    forward = next(
        finding for finding in explain(Objective(loss_kl=KLTerm(0.5, "k3"))).findings if finding.field == "loss_kl"
    )
    assert "0.653113" in forward.says


def test_iterated_references_add_up():
    assert "temperature 0.5/k" in explain(Objective(reward_kl=KLTerm(0.5), sync_every=10)).formula
    assert "(1 + 0.6·k)" in explain(Objective(reward_kl=KLTerm(0.5), sync_every=10, sync_mix=0.6)).formula


# --- readers ---


@dataclass
class GRPOConfig:
    """Shaped like TRL's, with only some of its fields."""

    beta: float = 0.0
    num_generations: int = 8
    loss_type: str = "dapo"
    scale_rewards: str = "group"
    learning_rate: float = 1e-6
    reward_weights: list = field(default_factory=list)


def test_a_trl_object_is_read_by_its_class():
    found = explain(GRPOConfig(beta=0.2, scale_rewards="none", loss_type="dr_grpo"))
    assert found.source == "TRL GRPOConfig"
    assert found.beta == pytest.approx(0.2 / (1 - 1 / 8))
    assert "beta = 0.2" in found.findings[0].setting
    assert "(default)" not in found.findings[0].setting.split(",")[0]


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({"normalize_advantages": True}, "TRL RLOOConfig"),
        ({"scale_rewards": "none", "beta": 0.1}, "TRL GRPOConfig"),
        ({"kl_coef": 0.1}, "TRL PPOConfig"),
        ({"trainer": "OnlineDPOTrainer"}, "TRL OnlineDPOConfig"),
        ({"_target_": "trl.DPOConfig"}, "TRL DPOConfig"),
        ({"actor_rollout_ref.actor.use_kl_loss": True}, "verl gae"),
        ({"engine": "rloo", "beta": 0.1}, "TiltLM rloo"),
        (["--advantage_estimator", "rloo", "--init_kl_coef=0.1"], "OpenRLHF rloo"),
        ("python -m verl.trainer.main_ppo algorithm.adv_estimator=rloo", "verl rloo"),
    ],
)
def test_the_format_is_found_out(config, source):
    assert explain(config).source == source


@pytest.mark.parametrize("beta", [0.2, "0.2", [0.2], "[0.2, 0.1]"])
def test_a_beta_an_epoch_may_be_a_single_one(beta):
    assert "labels that only compare" in str(explain({"trainer": "OnlineDPOTrainer", "beta": beta}))


def test_every_trl_field_that_several_trainers_have_needs_a_name():
    with pytest.raises(InputError, match="trl-grpo"):
        explain({"beta": 0.1, "num_generations": 4})
    assert explain({"beta": 0.1, "num_generations": 4}, format="trl-rloo").fixed_point == "p*"
    assert {f"trl-{kind}" for kind in trl.TABLES} <= set(FORMATS)


def test_a_shell_script_fills_its_own_variables():
    found = explain(DATA / "openrlhf_reinforce.sh")
    settings = {finding.field: finding.setting for finding in found.findings}
    assert found.configured_beta == 0.001
    assert "n_samples_per_prompt = 8" in settings["baseline"]
    assert settings["clip"] == "eps_clip = 0.2 (default), eps_clip_low_high = 0.2 0.28"
    assert severities(found)["clip"] == "harmless", "128 prompts of 8 draws in batches of 1024 are one update"
    assert "pretrain" in found.ignored


def test_dotted_flags_are_shown_as_they_were_written():
    found = explain(DATA / "openrlhf_dotted.sh")
    assert ("algo.kl.estimater", "algo.kl.estimator") in found.suggestions
    settings = {finding.field: finding.setting for finding in found.findings}
    assert settings["reward_clip"] == "reward.clip_range = -1 1"


def test_verl_reads_nested_and_dotted_alike():
    dotted = {
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": False,
        "actor_rollout_ref.actor.use_kl_loss": "True",
        "actor_rollout_ref.actor.kl_loss_coef": "0.1",
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl+",
        "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-sum-norm",
        "actor_rollout_ref.rollout.n": 5,
        "data.train_batch_size": 256,
    }
    one, two = explain(dotted), explain(DATA / "verl_grpo.yaml")
    assert (one.fixed_point, one.beta, changed(one)) == (two.fixed_point, two.beta, changed(two))
    assert explain({"algorithm": {"adv_estimater": "grpo"}}).suggestions == (
        ("algorithm.adv_estimater", "algorithm.adv_estimator"),
    )


def test_openrlhf_group_norm_scales_the_reward_and_not_the_kl():
    found = explain("openrlhf --advantage_estimator group_norm --init_kl_coef 0.5 --n_samples_per_prompt 4")
    assert found.fixed_point == "p* of the clipped reward at a β of each prompt's own"
    assert "scale" in changed(found)


def test_trl_cispo_at_its_defaults_multiplies_beta_by_five():
    config = {"trainer": "grpo", "beta": 0.1, "loss_type": "cispo", "scale_rewards": "none", "num_generations": 2}
    assert explain(config).beta == pytest.approx(0.1 / 0.5 / 0.2)
    assert explain(config | {"epsilon_high": 5.0}).beta == pytest.approx(0.1 / 0.5)


# --- bad input: one sentence ---


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"trainer": "grpo", "beta": "big"}, {}, ("beta", "'big'", "a number")),
        ({"trainer": "grpo", "num_generations": 2.5}, {}, ("num_generations", "2.5", "whole number")),
        ({"trainer": "grpo", "loss_type": "ppo"}, {}, ("loss_type", "'ppo'", "dr_grpo")),
        ({"trainer": "grpo", "beta": None}, {}, ("beta", "empty")),
        ({"trainer": "grpo", "beta": True}, {}, ("beta", "True")),
        ({"trainer": "grpo", "beta": -0.1}, {}, ("beta", "-0.1")),
        ({"trainer": "grpo", "beta": float("nan")}, {}, ("beta", "nan")),
        ({"trainer": "rloo", "reward_clip_range": [1]}, {}, ("reward_clip_range", "two numbers")),
        ({"trainer": "rloo", "temperature": 0}, {}, ("temperature", "0")),
        ({"trainer": "rloo", "num_generations": 0}, {}, ("group", "0")),
        ({"color": "blue"}, {}, ("a dict", "format")),
        ({"engine": "sorcery", "beta": 1}, {}, ("engine", "'sorcery'", "rloo")),
        ({"engine": "rloo"}, {}, ("beta is missing",)),
        ({"engine": "rloo", "beta": 1, "options": 3}, {}, ("options", "3")),
        ({"trainer": "grpo"}, {"format": "nemo"}, ("format", "'nemo'", "openrlhf")),
        ({"trainer": "grpo"}, {"format": "openrlhf"}, ("format", "command line")),
        ("--init_kl_coef 0.1", {"format": "trl"}, ("format", "'trl'", "YAML")),
        ("echo hello world", {}, ("'echo hello world'", "format")),
        ("echo hello world", {"format": "openrlhf"}, ("no flags",)),
        ("echo hello world", {"format": "verl"}, ("no settings",)),
        ("python --init_kl_coef 'x", {"format": "openrlhf"}, ("quotes",)),
        ("openrlhf --init_kl_coef $KL", {}, ("init_kl_coef", "'$KL'", "a number")),
        ("no/such/file.yaml", {}, ("'no/such/file.yaml'", "cannot be read")),
        ({"algorithm": {"adv_estimator": "magic"}}, {}, ("algorithm.adv_estimator", "'magic'", "grpo")),
        (17, {}, ("a int", "format")),
        ({"trainer": "grpo", "beta": 0.1}, {"p0": 1.5}, ("p0", "1.5")),
    ],
)
def test_bad_input_is_one_sentence(config, options, words):
    with pytest.raises(InputError) as refused:
        explain(config, **options)
    message = str(refused.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "a: [1"), ("b.json", "{"), ("c.yaml", "just text"), ("d.yaml", "")]
)
def test_a_file_that_is_nothing(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as refused:
        explain(tmp_path / name)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bytes_are_not_a_configuration(tmp_path):
    (tmp_path / "weights.yaml").write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match="not text"):
        explain(tmp_path / "weights.yaml")
