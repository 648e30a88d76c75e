"""Watching a held-out reward during training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiltlm.diagnostics.alarm import Alarm, look
from tiltlm.errors import TiltWarning
from tiltlm.evidence.gold import Gold, as_gold, gold_name, gold_values
from tiltlm.inference.monitor import Metrics
from tiltlm.records import Scored

SAME = 5
"""Steps from where training begins after which equal rewards are worth a word."""


class EqualRewardsWatch:
    """Says once, early in a run, that no completion was better than another: then there is nothing to learn but to stay near the prior."""

    def __init__(self) -> None:
        self._seen, self._differed = 0, False

    def look(self, scored: Scored | None) -> None:
        """Look at the policy's own completions in a step; of those of one prompt, since others do not compete.

        Nothing is said of completions that somebody has chosen (None), nor where rewards are not known.
        """
        if scored is None or self._differed or self._seen >= SAME:
            return
        index, values = scored.draws.prompt_index, scored.log_evidence.double()
        groups = [values[index == prompt] for prompt in index.unique()]
        compared = [group for group in groups if len(group) > 1]
        self._differed = not compared or any(not bool((group == group[0]).all()) for group in compared)
        self._seen += 1
        if self._seen == SAME and not self._differed:
            warnings.warn(
                f"in {SAME} steps all completions of a prompt got the same reward, so that there was nothing to learn but to stay near "
                f"the prior; look at the reward, or draw more of a prompt (group)",
                TiltWarning,
                stacklevel=2,
            )


class Watch:
    """Judges a step's fresh draws by a reward that is never trained on, and raises the alarm for reward hacking.

    Args:
        gold: the held-out reward.
        every: steps between two measurements.
        steps: of the whole run; the alarm's false-alarm rate is for all of them.

    Attributes:
        alarm: the first window in which the trained reward rose and gold fell, None so far.
    """

    def __init__(self, gold: Gold, every: int, steps: int) -> None:
        self._gold, self._every, self._planned = as_gold(gold), every, steps // every
        self._steps: list[int] = []
        self._proxy: list[float] = []
        self._values: list[float] = []
        self._warned = False
        self.alarm: Alarm | None = None

    @property
    def name(self) -> str:
        return gold_name(self._gold)

    def measure(self, step: int, beta: float, fresh: Scored | None, whole: bool) -> Metrics:
        """Gold of the policy's fresh draws, with standard errors; nothing where the draws are not the policy's.

        Args:
            beta: the target's temperature, which makes rewards of the evidence.
            whole: the step holds all prompts, so that only the draws are random and not the choice of prompts.
        """
        if step % self._every:
            return {}
        if fresh is None:
            self._say_unseen()
            return {}
        gold, judged = gold_values(self._gold, fresh.draws)
        if int(judged.sum()) < 1:
            return {"gold": None, "gold_dropped": len(judged)}
        index = fresh.draws.prompt_index
        reward = beta * fresh.log_evidence.double()
        kl = (fresh.draws.log_q.double() - fresh.log_prior.double()).sum(-1)
        self._steps.append(step)
        self._proxy.append(float(reward.mean()))
        self._values.append(float(gold[judged].mean()))
        return {
            "gold": self._values[-1],
            "gold_stderr": batch_stderr(gold[judged], index[judged], whole),
            "reward_stderr": batch_stderr(reward, index, whole),
            "kl_prior_stderr": batch_stderr(kl, index, whole),
            "gold_dropped": int((~judged).sum()),
        }

    def alarm_at(self, step: int, metrics: Metrics) -> Metrics:
        """The alarm, if this step's measurement raises it; warns once in a run."""
        if self.alarm is not None or metrics.get("gold") is None:
            return {}
        self.alarm = look(self._steps, self._proxy, self._values, self._planned)
        if self.alarm is None:
            return {}
        warnings.warn(
            f"{self.alarm}; stop here or earlier, raise beta, or mend the reward (stop_on_hacking stops by itself)",
            TiltWarning,
            stacklevel=2,
        )
        return {"alarm": {"step": step, **self.alarm.as_dict(), "sentence": str(self.alarm)}}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        alarm = self.alarm.as_dict() if self.alarm else None
        return {"steps": self._steps, "proxy": self._proxy, "gold": self._values, "alarm": alarm}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._steps, self._proxy, self._values = (list(state[name]) for name in ("steps", "proxy", "gold"))
        self.alarm = Alarm(**state["alarm"]) if state["alarm"] else None

    def _say_unseen(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"gold {self.name!r} is not seen during training: this engine's completions are not the policy's own; certify "
                f"measures it afterwards",
                TiltWarning,
                stacklevel=2,
            )


def batch_stderr(values: Float[Tensor, " B"], index: Int[Tensor, " B"], whole: bool) -> float:
    """Standard error of a step's mean; NaN where it cannot be told.

    With all prompts in the step the prompts are strata: errors within each add up. Otherwise the prompts are a sample as well,
    and their means' spread holds both sources of error.
    """
    groups = [values[index == p] for p in index.unique().tolist()]
    if not whole and len(groups) > 1:
        means = torch.stack([group.mean() for group in groups])
        return float(means.std()) / math.sqrt(len(groups))
    if any(len(group) < 2 for group in groups):
        return math.nan
    return math.sqrt(sum(len(group) * float(group.var()) for group in groups)) / len(values)
