"""log Z of every prompt of a data set, learned by the optimiser or averaged over importance weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tiltlm.records import Prompts, Scored
from tiltlm.weights import group_count, group_logsumexp, group_mean


def data_rows(scored: Scored) -> Int[Tensor, " B"]:
    """The data-set row of each completion's prompt."""
    return scored.draws.prompts.rows[scored.draws.prompt_index]


def data_size(prompts: Prompts) -> int:
    """Rows that a table over a data set needs; `prompts` may be some of a larger one."""
    return int(prompts.rows.max()) + 1


def others(index: Int[Tensor, " B"]) -> Bool[Tensor, "B B"]:
    """For each row, the other rows of its prompt."""
    return (index[:, None] == index) & ~torch.eye(len(index), dtype=torch.bool)


class LearnedLogZ(nn.Module):
    """log Z as a parameter for each prompt, in nats.

    A prompt that is met for the first time starts at the mean log-weight of its draws, which for draws of the policy is the
    ELBO, log Z - KL(q || p*): from zero the residuals would all have one sign for as long as log Z takes to arrive.

    Attributes:
        log_z: one entry a row of the data set.
        met: which of them have been seen.
    """

    log_z: Tensor
    met: Tensor

    def __init__(self, prompts: Prompts) -> None:
        super().__init__()
        rows = data_size(prompts)
        self.log_z = nn.Parameter(torch.zeros(rows))
        self.register_buffer("met", torch.zeros(rows, dtype=torch.bool))

    def forward(self, scored: Scored) -> Float[Tensor, " B"]:
        return self.log_z[data_rows(scored)]

    @torch.no_grad()
    def observe(self, scored: Scored) -> None:
        """Start the prompts that are new at the mean log-weight of these draws."""
        rows = data_rows(scored)
        new = (group_count(rows, len(self.met)) > 0) & ~self.met
        mean = group_mean(scored.log_weight, rows, len(self.met)).to(self.log_z.dtype)
        self.log_z.copy_(torch.where(new, mean, self.log_z))
        self.met |= new


class RunningLogZ(nn.Module):
    """log of the mean importance weight P / q of each prompt's draws so far; no gradient.

    Z-hat is unbiased for Z whatever laws drew, because every weight is (Parshakova et al. 2019; Go et al. 2023, algorithm 1). A
    draw's own weight must stay out of what it is divided by: with it a first group is self-normalised, and a draw that is alone
    always of weight 1. So a draw is given the mean over all earlier batches and the other draws of its own.

    Attributes:
        log_z: one entry a row of the data set, with all draws observed; 0 before the first.
        count: draws behind it.
    """

    log_z: Tensor
    count: Tensor

    def __init__(self, prompts: Prompts) -> None:
        super().__init__()
        rows = data_size(prompts)
        self.register_buffer("log_z", torch.zeros(rows, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(rows, dtype=torch.float64))
        # the two as they were before the batch in work; not saved, as whatever goes on begins with a new batch
        self._earlier: tuple[Tensor, Tensor] | None = None

    def forward(self, scored: Scored) -> Float[Tensor, " B"]:
        """log Z-hat of each draw's prompt without the draw itself; -inf where nothing is known, or all weights are 0."""
        rows = data_rows(scored)
        log_z, count = (value[rows] for value in self._earlier or (self.log_z, self.count))
        beside = others(rows)
        log_sum = torch.where(beside, scored.log_weight.double(), -torch.inf).logsumexp(-1)
        total = (count + beside.sum(-1)).clamp(min=1)
        return torch.logaddexp(log_z + (count / total).log(), log_sum - total.log())

    @torch.no_grad()
    def observe(self, scored: Scored) -> None:
        """Begin a batch: take its weights into the means, and remember what they were without."""
        self._earlier = self.log_z.clone(), self.count.clone()
        rows = data_rows(scored)
        total = torch.logaddexp(
            self.log_z + self.count.log(), group_logsumexp(scored.log_weight.double(), rows, len(self.count))
        )
        self.count += group_count(rows, len(self.count))
        self.log_z.copy_(torch.where(self.count > 0, total - self.count.log(), self.log_z))
