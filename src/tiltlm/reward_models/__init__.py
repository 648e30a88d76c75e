"""Rewards learned from comparisons, scores and labels, with what is uncertain about them."""

from tiltlm.reward_models.calibration import Calibration, check_reward_model
from tiltlm.reward_models.data import Task, task_of
from tiltlm.reward_models.model import Head, RewardModel
from tiltlm.reward_models.posterior import (
    Ensemble,
    LinearPosterior,
    RewardPosterior,
    SoftmaxPosterior,
    laplace,
    preference_probability,
)
from tiltlm.reward_models.train import train_reward_model
from tiltlm.reward_models.tune import Tuning

__all__ = [
    "Calibration",
    "Ensemble",
    "Head",
    "LinearPosterior",
    "RewardModel",
    "RewardPosterior",
    "SoftmaxPosterior",
    "Task",
    "Tuning",
    "check_reward_model",
    "laplace",
    "preference_probability",
    "task_of",
    "train_reward_model",
]
