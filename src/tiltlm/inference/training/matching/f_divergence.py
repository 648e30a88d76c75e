"""f-DPG: any f-divergence between the policy and the posterior, by weighted draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from tiltlm.errors import InputError
from tiltlm.inference.training.log_z import RunningLogZ, others
from tiltlm.posterior.exact import Exact
from tiltlm.protocols import Claim
from tiltlm.records import Forward, Info, Prompts, Scored
from tiltlm.weights import group_count, group_logsumexp

# --- divergences: f'(t) as a function of log t, t = q(x) / p*(x), for D = E_p*[f(t)] ---

Divergence = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]


def forward_kl(log_t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """KL(p* || q): f = -log t. Covers every mode; the pseudo-reward p* / q is unbounded."""
    return -(-log_t).exp()


def reverse_kl(log_t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """KL(q || p*): f = t log t. What RLOO minimises; Z is only a baseline."""
    return log_t + 1


def jensen_shannon(log_t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """JS(q, p*), the mean KL of both to their average: f = (t log t - (1 + t) log((1 + t) / 2)) / 2. (Go et al. take twice that.)"""
    return (math.log(2) - softplus(-log_t)) / 2


def total_variation(log_t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """TV(q, p*) = sum |q - p*| / 2: f = |t - 1| / 2. At t = 1, up to rounding, the subgradient 0."""
    return torch.where(log_t.abs() > ROUNDING, log_t.sign(), 0.0) / 2


def chi_squared(log_t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """chi2(p* || q) = sum p*^2 / q - 1: f = 1 / t - 1. The variance of importance sampling from q."""
    return -(-2 * log_t).exp()


ROUNDING = 1e-6
"""Log-ratios that count as zero where the derivative jumps."""

OBJECTIVES: Mapping[Divergence, str] = {
    forward_kl: "KL(p*||q)",
    reverse_kl: "KL(q||p*)",
    jensen_shannon: "JS(q,p*)",
    total_variation: "TV(q,p*)",
    chi_squared: "chi2(p*||q)",
}

# --- log Z of each completion's prompt ---

LogZ = Callable[[Scored, RunningLogZ], Float[Tensor, " B"]]
"""(draws, what is known of the prompts) -> log Z of each draw's prompt; a draw whose log Z is -inf is left out."""


def running(scored: Scored, state: RunningLogZ) -> Float[Tensor, " B"]:
    """The mean weight of all draws of the prompt so far (Korbak et al. 2022a: conditional DPG), but for the draw itself.

    Whatever the draw is, it is divided by the same Z-hat, so that of E_q[f'(t) grad log q] only t is off, by the factor
    Z-hat / Z for all draws alike. The reverse KL does not feel it; the forward KL's gradient and chi2's keep their direction, and
    grow by E[Z / Z-hat] and E[(Z / Z-hat)^2]; JS and TV turn into a neighbour. All that falls like 1 / draws so far.
    """
    return state(scored)


def within_group(scored: Scored, state: RunningLogZ) -> Float[Tensor, " B"]:
    """The mean weight of the prompt's draws in this step alone: self-normalised, with a bias of order 1 / n.

    No draw's weight can exceed the group's size, which helps where prompts are seen once and few draws are any good.
    """
    index = scored.draws.prompt_index
    groups = int(index.max()) + 1
    total = group_logsumexp(scored.log_weight.double(), index, groups) - group_count(index, groups).log()
    return total[index]


# --- baselines: what is taken off f'(t) before it is weighted by `ratio`, q / behaviour ---

Baseline = Callable[
    [Divergence, Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"], Int[Tensor, " B"]], Float[Tensor, " B"]
]
"""(divergence, log q / P, log Z, ratio, prompt index) -> baseline; log t of a draw is log q / P plus log Z."""


def at_optimum(
    divergence: Divergence,
    log_ratio: Float[Tensor, " B"],
    log_z: Float[Tensor, " B"],
    ratio: Float[Tensor, " B"],
    index: Int[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """f'(1), what every draw has at p*.

    For the forward KL this is Korbak et al. 2022b's: P / q - Z on the policy's own draws, P / b - Z q / b on those of b.
    """
    return divergence(torch.zeros_like(log_z))


def of_the_others(
    divergence: Divergence,
    log_ratio: Float[Tensor, " B"],
    log_z: Float[Tensor, " B"],
    ratio: Float[Tensor, " B"],
    index: Int[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """The weighted mean of f'(t) over the prompt's other draws; with the reverse KL this is RLOO.

    Normalised by the others' weights, so that it is f'(1) at p* whoever drew; 0 for a draw that is alone. The others' t are
    taken at the draw's own log Z, which does not know the draw: theirs does.
    """
    beside = others(index)
    weight = torch.where(beside, ratio, 0.0)
    slope = torch.where(beside, ratio * divergence(log_ratio + log_z[:, None]), 0.0)
    total = weight.sum(-1)
    return torch.where(total > 0, slope.sum(-1) / total, 0.0)


@dataclass(frozen=True)
class FDivergence:
    """f-DPG (Go et al. 2023, theorem 1), towards a posterior that is normalised for each prompt (Korbak et al. 2022a).

    The gradient of D_f(q || p*) = E_p*[f(t)], t = q / p*, is E_q[f'(t) grad log q]; draws of another law b, such as an
    earlier self of the policy, are weighted by q / b. So one draw costs (q / b) (f'(t) - baseline) log q(x), detached but for
    the last factor. With the forward KL this is DPG (Parshakova et al. 2019; Khalifa et al. 2021), which needs q / b only for its
    baseline: the proposal may lag far behind. t needs log Z, except for the reverse KL; a wrong one leaves p*
    stationary, but the divergence is then another one. A draw of whose prompt no weight is known but its own, or none but 0, costs
    nothing: that is how a first group fares in which no completion is possible (`Constraint`).

    Attributes:
        divergence: f' as a function of log t: `forward_kl`, `reverse_kl`, `jensen_shannon`, `total_variation`, `chi_squared`, or
            your own.
        z: log Z of each prompt: `running` over all other draws so far, `within_group`, or your own.
        baseline: `at_optimum`, or `of_the_others`.
        truncate: the most that q / b may be (Ionides 2008). A finite one bounds the noise of old draws and leaves p* the fixed
            point, but the path there is no longer that of the divergence.
        group: completions of each prompt in a step; at least 2, unless Z is your own and the baseline `at_optimum`.
        updates: steps on each batch.
    """

    divergence: Divergence = forward_kl
    z: LogZ = running
    baseline: Baseline = at_optimum
    truncate: float = math.inf
    group: int = 8
    updates: int = 1

    def __post_init__(self) -> None:
        least = 2 if self.z in (running, within_group) or self.baseline is of_the_others else 1
        if self.group < least or self.updates < 1:
            raise InputError(
                f"group is {self.group} and updates is {self.updates}; this FDivergence needs at least {least} completions a "
                f"prompt and 1 update"
            )
        if not self.truncate >= 1:
            raise InputError(f"truncate is {self.truncate}; the policy's own draws have ratio 1, so take 1 or more")

    @property
    def claim(self) -> Claim:
        objective = OBJECTIVES.get(self.divergence, "D_f(q||p*)")
        if self.truncate < math.inf:
            objective = f"{objective} with truncated weights"
        return Claim(
            fixed_point="p*",
            objective=objective,
            bias=self._bias,
            data="weighted",
            source="Go et al. 2023, theorem 1",
        )

    @property
    def _bias(self) -> Literal["none", "1/n", "unknown"]:
        if self.truncate < math.inf or self.z not in (running, within_group):
            return "unknown"
        return "none" if self.divergence is reverse_kl and self.z is running else "1/n"

    def init(self, prompts: Prompts) -> RunningLogZ:
        return RunningLogZ(prompts)

    def observe(self, scored: Scored, state: RunningLogZ) -> None:
        state.observe(scored)

    def loss(self, forward: Forward, scored: Scored, state: RunningLogZ) -> tuple[Tensor, Info]:
        log_q = forward.log_q.sum(-1)
        current = log_q.detach().double()  # the weights are exponentials
        log_z = self.z(scored, state)
        known = log_z > -torch.inf
        log_z = torch.where(known, log_z, 0.0)
        log_ratio = current - scored.log_target
        ratio = (current - scored.draws.log_prob).exp().clamp(max=self.truncate)
        baseline = self.baseline(self.divergence, log_ratio, log_z, ratio, scored.draws.prompt_index)
        signal = torch.where(known, ratio * (self.divergence(log_ratio + log_z) - baseline), 0.0)
        return (signal * log_q).mean(), {"signal": signal.abs(), "ratio": ratio, "log_z": log_z[known]}

    def rest(self, exact: Exact, state: RunningLogZ) -> None:
        """Put log Z where it comes to rest, behind so many draws that no further one counts."""
        state.log_z.fill_(exact.log_z)
        state.count.fill_(1e300)


PRESETS: Mapping[str, FDivergence] = {
    "cdpg": FDivergence(forward_kl),
    "f-dpg-rkl": FDivergence(reverse_kl),
    "f-dpg-js": FDivergence(jensen_shannon),
    "f-dpg-tv": FDivergence(total_variation),
    "f-dpg-chi2": FDivergence(chi_squared),
}
"""Names from the literature: conditional DPG, and f-DPG with each divergence."""
