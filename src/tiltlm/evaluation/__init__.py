"""Samplers on a task, measured fairly: `evaluate_systems(task, prompts, systems, task_metrics(task))`."""

from tiltlm.evaluation.mbr import agreement, expected_utilities, mbr_system, minimum_bayes_risk
from tiltlm.evaluation.metrics import DistinctN, PassAtK, SelfBLEU, Unique, pass_at_k
from tiltlm.evaluation.selective import RiskCoverage, Vote, risk_coverage, vote, voted
from tiltlm.evaluation.systems import System, copied, lead
from tiltlm.evaluation.table import TaskTable, evaluate_systems
from tiltlm.evaluation.tasks import TASKS, task_metrics
from tiltlm.evaluation.uncertainty import Cell

__all__ = [
    "TASKS",
    "Cell",
    "DistinctN",
    "PassAtK",
    "RiskCoverage",
    "SelfBLEU",
    "System",
    "TaskTable",
    "Unique",
    "Vote",
    "agreement",
    "copied",
    "evaluate_systems",
    "expected_utilities",
    "lead",
    "mbr_system",
    "minimum_bayes_risk",
    "pass_at_k",
    "risk_coverage",
    "task_metrics",
    "vote",
    "voted",
]
