"""Which beta? The recipe trained at several, beside what the prior's draws predict of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from tiltlm.diagnostics.frontier import Plan, plan
from tiltlm.errors import InputError
from tiltlm.estimates import Estimate
from tiltlm.evaluation.uncertainty import mean_of
from tiltlm.workflow.methods import Outcome
from tiltlm.workflow.task import TaskRun

PLAN_DRAWS = 32
"""Prior draws of each test prompt for the prediction; the recipe's `samples` if those are more."""


@dataclass(frozen=True)
class Reached:
    """Where training at one beta came to on the test prompts, and where the prediction puts its optimum.

    Attributes:
        kl: KL(q || pi0), nats a completion, with its standard error over prompts.
        reward: the mean reward, with its standard error.
        predicted: KL and reward of p* at this beta, as the prior's draws have it.
        reliable: whether there were enough draws to tell.
    """

    beta: float
    seed: int
    kl: Estimate
    reward: Estimate
    predicted: tuple[float, float]
    reliable: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "beta": self.beta,
            "seed": self.seed,
            "kl": {"value": self.kl.value, "stderr": self.kl.stderr},
            "reward": {"value": self.reward.value, "stderr": self.reward.stderr},
            "predicted": {"kl": self.predicted[0], "reward": self.predicted[1], "reliable": self.reliable},
        }


@dataclass(frozen=True)
class Sweep:
    """A recipe at several betas: the frontier that is predicted on the test prompts, and the points reached."""

    name: str
    plan: Plan
    points: tuple[Reached, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the plan what the picture needs."""
        plan = {name: value for name, value in self.plan.as_dict().items() if name != "per_prompt"}
        return {"task": self.name, "plan": plan, "points": [point.as_dict() for point in self.points]}

    def __rich__(self) -> Table:
        title = (
            f"{self.name}: the optimum at each beta as predicted from the prior's draws, and the policy trained at it"
        )
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for head in ("beta", "seed", "KL of p*", "KL reached", "E r of p*", "E r reached"):
            table.add_column(head, justify="right")
        for p in self.points:
            sure = "" if p.reliable else " ?"
            table.add_row(
                f"{p.beta:g}",
                str(p.seed),
                f"{p.predicted[0]:.2f}{sure}",
                f"{p.kl.value:.2f} ±{p.kl.stderr:.2f}",
                f"{p.predicted[1]:.3f}{sure}",
                f"{p.reward.value:.3f} ±{p.reward.stderr:.3f}",
            )
        if not all(point.reliable for point in self.points):
            table.caption = "? too few draws to tell"
        return table


def sweep(task: TaskRun, betas: Sequence[float], seeds: int = 1) -> Sweep:
    """Train the recipe at every beta, each in a folder of its own inside the task's; what is there already is not done again.

    Raises:
        InputError: if a beta is not positive.
    """
    wrong = next((beta for beta in betas if not 0 < beta < float("inf")), None)
    if wrong is not None or not betas:
        raise InputError(f"betas has {wrong}; each is a temperature and must be positive, for example 0.05,0.2,1")
    task.check()
    samples = max(PLAN_DRAWS, task.recipe.samples)
    found = plan(task.target(1.0), task.test_prompts, samples=samples, seed=task.recipe.seed)
    points = []
    for beta in betas:
        changes = {"beta": beta, "kl_budget": None, "reward_goal": None, "out": str(task.folder / f"beta-{beta:g}")}
        at = replace(task, recipe=task.recipe.model_copy(update=changes), _runs={})
        try:
            outcomes = [at.outcome("policy", task.recipe.seed + seed) for seed in range(seeds)]
        finally:
            at.close()
        points += [_reached(found, beta, outcome) for outcome in outcomes]
    return Sweep(task.name, found, tuple(points))


def _reached(found: Plan, beta: float, outcome: Outcome) -> Reached:
    assert outcome.log_ratios is not None
    assert outcome.reward is not None
    assert outcome.reward_stderr is not None
    by_prompt = [sum(ratios) / len(ratios) for ratios in outcome.log_ratios]
    kl, _ = mean_of(torch.tensor([by_prompt], dtype=torch.float64))
    reward = Estimate(outcome.reward, outcome.reward_stderr, kl.n)
    point = found.at(beta)
    return Reached(beta, outcome.seed, kl, reward, (point.kl.value, point.reward.value), point.reliable)
