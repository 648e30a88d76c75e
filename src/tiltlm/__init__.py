"""TiltLM: steering and fine-tuning language models as Bayesian inference.

lm     = tl.load("smollm2-135m-instruct")
target = lm.prior(max_new_tokens=24) * tl.Reward(sentiment, beta=0.25, bounds=(-1, 1))
print(tl.plan(target, prompts))
policy = tl.fit(target, prompts, engine=tl.RLOO(group=8), steps=40)
print(tl.certify(policy, target, prompts))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tiltlm import rewards
    from tiltlm.diagnostics.certificate import Certificate, certify
    from tiltlm.diagnostics.evidence_bounds import log_z_bounds
    from tiltlm.diagnostics.frontier import Plan, plan
    from tiltlm.diagnostics.overoptimisation import fit_overoptimisation
    from tiltlm.errors import InputError, TiltWarning
    from tiltlm.estimates import Estimate, Interval
    from tiltlm.evidence.constraint import Constraint
    from tiltlm.evidence.members import Members, PriorRewards, prior_rewards
    from tiltlm.evidence.moments import Moment, match_moments
    from tiltlm.evidence.power import Power
    from tiltlm.evidence.preferences import Preferences
    from tiltlm.evidence.reward import Reward
    from tiltlm.evidence.reward_law import RewardLaw, reward_law
    from tiltlm.evidence.running import Batched, Cached, Isolated, Retried, concurrently, counting, safely
    from tiltlm.evidence.uncertain import (
        EvidenceAverage,
        LogPool,
        LowerConfidenceBound,
        MixtureOfPosteriors,
        VariancePenalised,
        WorstOfEnsemble,
    )
    from tiltlm.evidence.win_rate import BestOfNReward, WinRate
    from tiltlm.explanation import explain
    from tiltlm.explanation.verdict import Explanation
    from tiltlm.inference.ahead import Ahead
    from tiltlm.inference.compare import Comparison, Contender, compare
    from tiltlm.inference.decoding.best_of_n import BestOfN
    from tiltlm.inference.decoding.importance import Importance
    from tiltlm.inference.decoding.kernels import MaskedEdits, Mixture, SuffixResampling, masked_edits
    from tiltlm.inference.decoding.mcmc import MCMC
    from tiltlm.inference.decoding.quasi_rejection import QuasiRejection
    from tiltlm.inference.decoding.rejection import Rejection
    from tiltlm.inference.decoding.smc import SMC, prefix_evidence
    from tiltlm.inference.decoding.soft_best_of_n import SoftBestOfN
    from tiltlm.inference.decoding.value_guided import ValueGuided
    from tiltlm.inference.fit import Training, fit
    from tiltlm.inference.lagging import Lagging
    from tiltlm.inference.source import Decoded, FromPrior, Given, OnPolicy, Pool, Replay
    from tiltlm.inference.training.filtered.bond import BOND
    from tiltlm.inference.training.filtered.em import EM
    from tiltlm.inference.training.filtered.raft import RAFT, IteratedRAFT
    from tiltlm.inference.training.filtered.sft import SFT
    from tiltlm.inference.training.matching.f_divergence import FDivergence
    from tiltlm.inference.training.paths.path_consistency import PathConsistency
    from tiltlm.inference.training.paths.sub_trajectory_balance import SubTrajectoryBalance
    from tiltlm.inference.training.paths.trajectory_balance import TrajectoryBalance
    from tiltlm.inference.training.paths.var_grad import VarGrad
    from tiltlm.inference.training.policy_gradients.grpo import GRPO
    from tiltlm.inference.training.policy_gradients.minimum_risk import MinimumRisk
    from tiltlm.inference.training.policy_gradients.ppo import PPO
    from tiltlm.inference.training.policy_gradients.reinforce import Reinforce
    from tiltlm.inference.training.policy_gradients.rloo import RLOO
    from tiltlm.inference.training.preferences.dpo import DPO
    from tiltlm.inference.training.preferences.ipo import IPO
    from tiltlm.inference.training.values.contrastive_twist import ContrastiveTwist
    from tiltlm.inference.training.values.controlled_decoding import ControlledDecoding
    from tiltlm.inference.training.values.dqn import DQN
    from tiltlm.inference.training.values.fudge import Fudge
    from tiltlm.inference.training.values.q_learning import QLearning
    from tiltlm.inference.training.values.sarsa import SARSA
    from tiltlm.inference.training.values.soft_q_learning import SoftQLearning
    from tiltlm.inference.training.values.soft_sarsa import SoftSARSA
    from tiltlm.inference.training.values.soft_value_regression import SoftValueRegression
    from tiltlm.lm.adapters import LoRA
    from tiltlm.lm.classifier import load_classifier
    from tiltlm.lm.encoder import load_encoder
    from tiltlm.lm.generators.in_process import VLLM
    from tiltlm.lm.generators.server import VLLMServer
    from tiltlm.lm.given import demonstrations, preferences
    from tiltlm.lm.layers import TopLayers
    from tiltlm.lm.load import LanguageModel, load
    from tiltlm.lm.masked import load_masked_lm
    from tiltlm.lm.trunk import load_trunk
    from tiltlm.mismatch import Mismatch, Tolerance
    from tiltlm.records import Draws, Prompts, Scored, Weighted
    from tiltlm.reward_models.calibration import Calibration, check_reward_model
    from tiltlm.reward_models.model import RewardModel
    from tiltlm.reward_models.train import train_reward_model
    from tiltlm.reward_models.tune import Tuning
    from tiltlm.start.supervised import train_start
    from tiltlm.target import Target

_HOME = {
    "Ahead": "inference.ahead",
    "BOND": "inference.training.filtered.bond",
    "Batched": "evidence.running",
    "BestOfN": "inference.decoding.best_of_n",
    "BestOfNReward": "evidence.win_rate",
    "Cached": "evidence.running",
    "Calibration": "reward_models.calibration",
    "Certificate": "diagnostics.certificate",
    "Comparison": "inference.compare",
    "Constraint": "evidence.constraint",
    "Contender": "inference.compare",
    "ContrastiveTwist": "inference.training.values.contrastive_twist",
    "ControlledDecoding": "inference.training.values.controlled_decoding",
    "DPO": "inference.training.preferences.dpo",
    "DQN": "inference.training.values.dqn",
    "Decoded": "inference.source",
    "Draws": "records",
    "EM": "inference.training.filtered.em",
    "Estimate": "estimates",
    "EvidenceAverage": "evidence.uncertain",
    "Explanation": "explanation.verdict",
    "FDivergence": "inference.training.matching.f_divergence",
    "FromPrior": "inference.source",
    "Fudge": "inference.training.values.fudge",
    "GRPO": "inference.training.policy_gradients.grpo",
    "Given": "inference.source",
    "IPO": "inference.training.preferences.ipo",
    "Importance": "inference.decoding.importance",
    "InputError": "errors",
    "Interval": "estimates",
    "Isolated": "evidence.running",
    "IteratedRAFT": "inference.training.filtered.raft",
    "Lagging": "inference.lagging",
    "LanguageModel": "lm.load",
    "LoRA": "lm.adapters",
    "LogPool": "evidence.uncertain",
    "LowerConfidenceBound": "evidence.uncertain",
    "MCMC": "inference.decoding.mcmc",
    "MaskedEdits": "inference.decoding.kernels",
    "Members": "evidence.members",
    "MinimumRisk": "inference.training.policy_gradients.minimum_risk",
    "Mismatch": "mismatch",
    "Mixture": "inference.decoding.kernels",
    "MixtureOfPosteriors": "evidence.uncertain",
    "Moment": "evidence.moments",
    "OnPolicy": "inference.source",
    "PPO": "inference.training.policy_gradients.ppo",
    "PathConsistency": "inference.training.paths.path_consistency",
    "Plan": "diagnostics.frontier",
    "Pool": "inference.source",
    "Power": "evidence.power",
    "Preferences": "evidence.preferences",
    "PriorRewards": "evidence.members",
    "Prompts": "records",
    "QLearning": "inference.training.values.q_learning",
    "QuasiRejection": "inference.decoding.quasi_rejection",
    "RAFT": "inference.training.filtered.raft",
    "RLOO": "inference.training.policy_gradients.rloo",
    "Reinforce": "inference.training.policy_gradients.reinforce",
    "Rejection": "inference.decoding.rejection",
    "Replay": "inference.source",
    "Retried": "evidence.running",
    "Reward": "evidence.reward",
    "RewardLaw": "evidence.reward_law",
    "RewardModel": "reward_models.model",
    "SARSA": "inference.training.values.sarsa",
    "SFT": "inference.training.filtered.sft",
    "SMC": "inference.decoding.smc",
    "Scored": "records",
    "SoftBestOfN": "inference.decoding.soft_best_of_n",
    "SoftQLearning": "inference.training.values.soft_q_learning",
    "SoftSARSA": "inference.training.values.soft_sarsa",
    "SoftValueRegression": "inference.training.values.soft_value_regression",
    "SubTrajectoryBalance": "inference.training.paths.sub_trajectory_balance",
    "SuffixResampling": "inference.decoding.kernels",
    "Target": "target",
    "TiltWarning": "errors",
    "Tolerance": "mismatch",
    "TopLayers": "lm.layers",
    "Training": "inference.fit",
    "TrajectoryBalance": "inference.training.paths.trajectory_balance",
    "Tuning": "reward_models.tune",
    "VLLM": "lm.generators.in_process",
    "VLLMServer": "lm.generators.server",
    "ValueGuided": "inference.decoding.value_guided",
    "VarGrad": "inference.training.paths.var_grad",
    "VariancePenalised": "evidence.uncertain",
    "Weighted": "records",
    "WinRate": "evidence.win_rate",
    "WorstOfEnsemble": "evidence.uncertain",
    "certify": "diagnostics.certificate",
    "check_reward_model": "reward_models.calibration",
    "compare": "inference.compare",
    "concurrently": "evidence.running",
    "counting": "evidence.running",
    "demonstrations": "lm.given",
    "explain": "explanation",
    "fit": "inference.fit",
    "fit_overoptimisation": "diagnostics.overoptimisation",
    "load": "lm.load",
    "load_classifier": "lm.classifier",
    "load_encoder": "lm.encoder",
    "load_masked_lm": "lm.masked",
    "load_trunk": "lm.trunk",
    "log_z_bounds": "diagnostics.evidence_bounds",
    "masked_edits": "inference.decoding.kernels",
    "match_moments": "evidence.moments",
    "plan": "diagnostics.frontier",
    "preferences": "lm.given",
    "prefix_evidence": "inference.decoding.smc",
    "prior_rewards": "evidence.members",
    "reward_law": "evidence.reward_law",
    "safely": "evidence.running",
    "train_reward_model": "reward_models.train",
    "train_start": "start.supervised",
}

__all__ = [
    "BOND",
    "DPO",
    "DQN",
    "EM",
    "GRPO",
    "IPO",
    "MCMC",
    "PPO",
    "RAFT",
    "RLOO",
    "SARSA",
    "SFT",
    "SMC",
    "VLLM",
    "Ahead",
    "Batched",
    "BestOfN",
    "BestOfNReward",
    "Cached",
    "Calibration",
    "Certificate",
    "Comparison",
    "Constraint",
    "Contender",
    "ContrastiveTwist",
    "ControlledDecoding",
    "Decoded",
    "Draws",
    "Estimate",
    "EvidenceAverage",
    "Explanation",
    "FDivergence",
    "FromPrior",
    "Fudge",
    "Given",
    "Importance",
    "InputError",
    "Interval",
    "Isolated",
    "IteratedRAFT",
    "Lagging",
    "LanguageModel",
    "LoRA",
    "LogPool",
    "LowerConfidenceBound",
    "MaskedEdits",
    "Members",
    "MinimumRisk",
    "Mismatch",
    "Mixture",
    "MixtureOfPosteriors",
    "Moment",
    "OnPolicy",
    "PathConsistency",
    "Plan",
    "Pool",
    "Power",
    "Preferences",
    "PriorRewards",
    "Prompts",
    "QLearning",
    "QuasiRejection",
    "Reinforce",
    "Rejection",
    "Replay",
    "Retried",
    "Reward",
    "RewardLaw",
    "RewardModel",
    "Scored",
    "SoftBestOfN",
    "SoftQLearning",
    "SoftSARSA",
    "SoftValueRegression",
    "SubTrajectoryBalance",
    "SuffixResampling",
    "Target",
    "TiltWarning",
    "Tolerance",
    "TopLayers",
    "Training",
    "TrajectoryBalance",
    "Tuning",
    "VLLMServer",
    "ValueGuided",
    "VarGrad",
    "VariancePenalised",
    "Weighted",
    "WinRate",
    "WorstOfEnsemble",
    "certify",
    "check_reward_model",
    "compare",
    "concurrently",
    "counting",
    "demonstrations",
    "explain",
    "fit",
    "fit_overoptimisation",
    "load",
    "load_classifier",
    "load_encoder",
    "load_masked_lm",
    "load_trunk",
    "log_z_bounds",
    "masked_edits",
    "match_moments",
    "plan",
    "preferences",
    "prefix_evidence",
    "prior_rewards",
    "reward_law",
    "rewards",
    "safely",
    "train_reward_model",
    "train_start",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `tiltlm --help` should not wait for torch."""
    if name == "rewards":
        return importlib.import_module("tiltlm.rewards")
    if name not in _HOME:
        raise AttributeError(f"module 'tiltlm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tiltlm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
