"""What is known about a text, as log-likelihoods r / beta."""

from tiltlm.evidence.constraint import Constraint
from tiltlm.evidence.moments import Moment, Moments, match_moments
from tiltlm.evidence.power import Power
from tiltlm.evidence.reward import Reward
from tiltlm.evidence.reward_law import RewardLaw, reward_law
from tiltlm.evidence.win_rate import BestOfNReward, WinRate

__all__ = [
    "BestOfNReward",
    "Constraint",
    "Moment",
    "Moments",
    "Power",
    "Reward",
    "RewardLaw",
    "WinRate",
    "match_moments",
    "reward_law",
]
