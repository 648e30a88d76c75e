"""What is known about a text, as log-likelihoods r / beta."""

from tiltlm.evidence.constraint import Constraint
from tiltlm.evidence.members import Members, PriorRewards, prior_rewards
from tiltlm.evidence.moments import Moment, Moments, match_moments
from tiltlm.evidence.power import Power
from tiltlm.evidence.reward import Reward
from tiltlm.evidence.reward_law import RewardLaw, reward_law
from tiltlm.evidence.uncertain import (
    EvidenceAverage,
    LogPool,
    LowerConfidenceBound,
    MixtureOfPosteriors,
    VariancePenalised,
    WorstOfEnsemble,
)
from tiltlm.evidence.win_rate import BestOfNReward, WinRate

__all__ = [
    "BestOfNReward",
    "Constraint",
    "EvidenceAverage",
    "LogPool",
    "LowerConfidenceBound",
    "Members",
    "MixtureOfPosteriors",
    "Moment",
    "Moments",
    "Power",
    "PriorRewards",
    "Reward",
    "RewardLaw",
    "VariancePenalised",
    "WinRate",
    "WorstOfEnsemble",
    "match_moments",
    "prior_rewards",
    "reward_law",
]
