"""What `tiltlm certify` keeps of the draws, for the report: texts side by side, and what gives reward hacking away."""

from __future__ import annotations

import math
from typing import Any

import torch

from tiltlm.diagnostics.certificate import Certificate
from tiltlm.diagnostics.degeneracy import length_correlation
from tiltlm.diagnostics.predictions import over_prompts
from tiltlm.evidence.gold import gold_name, gold_values
from tiltlm.protocols import Evidence
from tiltlm.records import Prompts, Scored, shown
from tiltlm.target import Target
from tiltlm.weights import group_count, group_logsumexp

SHOWN = 4
"""Completions of each kind that the report shows for a prompt."""
DOTS = 400
"""Most draws of each kind in the picture of reward against length."""
HEAVIEST = 8


def side_by_side(
    target: Target, prompts: Prompts, prior: Scored, exact: Scored | None, policy: Scored
) -> list[dict[str, Any]]:
    """A few completions of each prompt under the prior, the exact posterior and the policy."""
    kinds = {"prior": prior, "posterior": exact, "policy": policy}
    rows = []
    for number, text in enumerate(prompts.texts):
        row: dict[str, Any] = {"prompt": shown(text)}
        row |= {kind: _shown(scored, number, target.beta) for kind, scored in kinds.items()}
        rows.append(row)
    return rows


def _shown(scored: Scored | None, prompt: int, beta: float) -> list[dict[str, Any]]:
    if scored is None:
        return []
    rows = (scored.draws.prompt_index == prompt).nonzero().flatten()[:SHOWN].tolist()
    return [{"text": scored.draws.texts[i], "reward": float(beta * scored.log_evidence[i])} for i in rows]


def signs_of_hacking(target: Target, certificate: Certificate, prior: Scored, gold: Evidence | None) -> dict[str, Any]:
    """Reward and length of the draws, the draws that the posterior would multiply most, and the held-out reward."""
    policy = certificate.scored
    found: dict[str, Any] = {
        "length": {
            kind: length_correlation(
                scored.draws.lengths, target.beta * scored.log_evidence, scored.draws.prompt_index
            ).as_dict()
            for kind, scored in (("prior", prior), ("policy", policy))
        },
        "draws": {kind: _dots(scored, target.beta) for kind, scored in (("prior", prior), ("policy", policy))},
        "heaviest": _heaviest(policy, target.beta, gold),
        "parts": parts_moved(prior, policy),
    }
    if gold is not None and certificate.gold is not None:
        estimates = {"policy": certificate.gold, "prior": certificate.gold_prior}
        plain = {name: value.as_dict() for name, value in estimates.items() if value is not None}
        found["gold"] = {"name": gold_name(gold), **plain}
    return found


def parts_moved(prior: Scored, policy: Scored) -> dict[str, dict[str, Any]]:
    """What became of every part of the evidence, in its own units: its mean over prompts under prior and policy, and the change.

    The change is taken prompt by prompt; its interval is for prompts like these. Prompts without draws of both are left out.
    """
    found = {}
    shared = set(prior.draws.prompt_index.tolist()) & set(policy.draws.prompt_index.tolist())
    for name in sorted(prior.rewards.keys() & policy.rewards.keys()):
        values = [[_own(scored, name, prompt) for prompt in sorted(shared)] for scored in (prior, policy)]
        changes = [(b - a, math.hypot(se_a, se_b)) for (a, se_a), (b, se_b) in zip(*values, strict=True)]
        if not changes:
            continue
        fewest = min(int((scored.draws.prompt_index == p).sum()) for scored in (prior, policy) for p in shared)
        before, after = (math.fsum(mean for mean, _ in side) / len(side) for side in values)
        found[name] = {"prior": before, "policy": after, "change": over_prompts(changes, fewest).as_dict()}
    return found


def _own(scored: Scored, name: str, prompt: int) -> tuple[float, float]:
    """One prompt's mean of a part, and its standard error."""
    values = scored.rewards[name][scored.draws.prompt_index == prompt].double()
    return float(values.mean()), float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _dots(scored: Scored, beta: float) -> list[dict[str, float]]:
    reward = beta * scored.log_evidence
    keep = torch.linspace(0, len(scored) - 1, min(DOTS, len(scored))).long().tolist()
    return [{"length": int(scored.draws.lengths[i]), "reward": float(reward[i])} for i in keep]


def _heaviest(scored: Scored, beta: float, gold: Evidence | None) -> list[dict[str, Any]]:
    """Different texts by log p*(x|c) / q(x|c), largest first; log Z from the same draws."""
    index, log_w = scored.draws.prompt_index, scored.log_weight.double()
    prompts = scored.draws.prompts
    log_mean = group_logsumexp(log_w, index, len(prompts)) - group_count(index, len(prompts)).clamp(min=1).log()
    relative = log_w - log_mean[index]
    rows, seen = [], set()
    for i in relative.argsort(descending=True).tolist():
        key = (int(index[i]), scored.draws.texts[i])
        if key not in seen and relative[i].isfinite():
            seen.add(key)
            rows.append(i)
        if len(rows) == HEAVIEST:
            break
    chosen = scored.select(torch.tensor(rows, dtype=torch.long))
    judged = gold_values(gold, chosen.draws)[0].tolist() if gold is not None and rows else [None] * len(rows)
    found = []
    for row, (i, held_out) in enumerate(zip(rows, judged, strict=True)):
        text = prompts.texts[int(index[i])]
        found.append(
            {
                "prompt": shown(text),
                "text": scored.draws.texts[i],
                "log_weight": float(relative[i]),
                "reward": float(beta * scored.log_evidence[i]),
                "parts": {name: float(values[row]) for name, values in chosen.rewards.items()},
                "gold": held_out,
                "length": int(scored.draws.lengths[i]),
            }
        )
    return found
