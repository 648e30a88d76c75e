"""What is subtracted from a draw's credit: functions of the group's credits, column by column, and of earlier draws.

A baseline leaves the expected gradient alone if it does not depend on the draw it is subtracted from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tiltlm.inference.training.log_z import data_rows, data_size
from tiltlm.records import Prompts, Scored
from tiltlm.weights import group_count, group_mean

Baseline = Callable[[Float[Tensor, "B T"], Int[Tensor, " B"], Float[Tensor, " B"]], Float[Tensor, "B T"]]
"""(credit, prompt index, mean log-weight of the prompt's earlier draws, NaN where there are none) -> baseline."""


def no_baseline(credit: Tensor, index: Tensor, earlier: Tensor) -> Tensor:
    """None: unbiased, with the reward's offset as noise."""
    return torch.zeros_like(credit)


def of_the_others(credit: Tensor, index: Tensor, earlier: Tensor) -> Tensor:
    """The mean over the prompt's other draws (Kool et al. 2019): unbiased. A draw without others has none."""
    mean, count = _means(credit, index)
    return (mean * count - credit) / (count - 1).clamp(min=1)


def of_the_group(credit: Tensor, index: Tensor, earlier: Tensor) -> Tensor:
    """The mean over the prompt's draws, this one included.

    As 1/G of the credit is then its own baseline, the expected gradient shrinks by 1 - 1/G: a scale as long as all of the KL
    is in the credit, another temperature where it is not.
    """
    return _means(credit, index)[0]


def of_earlier_draws(credit: Tensor, index: Tensor, earlier: Tensor) -> Tensor:
    """The running mean of the prompt's log-weights in earlier steps; where there is none yet, that of the others."""
    known = earlier[:, None].to(credit.dtype).expand_as(credit)
    return torch.where(known.isnan(), of_the_others(credit, index, earlier), known)


def _means(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and number of the rows of each row's prompt."""
    groups = int(index.max()) + 1 if len(index) else 0
    total = torch.zeros((groups, *values.shape[1:]), dtype=values.dtype, device=values.device)
    count = group_count(index, groups).to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    return (total.index_add_(0, index, values) / count)[index], count[index]


class RunningMean(nn.Module):
    """The mean log-weight of each prompt's earlier draws, an exponential average because the policy moves.

    Its expectation is the ELBO log Z - KL(q || p*): at p* it is log Z. What a batch adds is used from the next batch on, because
    a baseline must not know the draws that it is subtracted from.

    Attributes:
        log_z: one entry a row of the data set; NaN before its first draws.
        next_log_z: what it will be at the next batch.
    """

    log_z: Tensor
    next_log_z: Tensor

    def __init__(self, prompts: Prompts, memory: float) -> None:
        super().__init__()
        self.memory = memory
        unknown = torch.full((data_size(prompts),), torch.nan, dtype=torch.float64)
        self.register_buffer("log_z", unknown)
        self.register_buffer("next_log_z", unknown.clone())

    def forward(self, scored: Scored) -> Float[Tensor, " B"]:
        return self.log_z[data_rows(scored)]

    @torch.no_grad()
    def observe(self, scored: Scored) -> None:
        """Begin a batch: forget nothing of it until the next."""
        self.log_z.copy_(self.next_log_z)
        mean = group_mean(scored.log_weight.double(), data_rows(scored), len(self.log_z))
        moved = self.memory * self.log_z + (1 - self.memory) * mean
        moved = torch.where(self.log_z.isnan(), mean, moved)
        self.next_log_z.copy_(torch.where(mean.isnan(), self.log_z, moved))
