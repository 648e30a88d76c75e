"""Active learning of rewards: which pairs to ask about, and a session that keeps questions and answers."""

from tiltlm.labels.acquisition import BALD, Acquisition, DoubleThompson, Margin, RandomPairs
from tiltlm.labels.candidates import Candidates
from tiltlm.labels.labellers import AnswerFile, Oracle
from tiltlm.labels.loop import Learner, RewardPosterior, active_learning
from tiltlm.labels.session import Question, Session

__all__ = [
    "BALD",
    "Acquisition",
    "AnswerFile",
    "Candidates",
    "DoubleThompson",
    "Learner",
    "Margin",
    "Oracle",
    "Question",
    "RandomPairs",
    "RewardPosterior",
    "Session",
    "active_learning",
]
