"""Our log-probabilities beside those of transformers (and peft) on the same tokens.

transformers runs the saved weights whole, each text by itself without padding or cache: in the same precision, and in
float32 for the truth. In half precision both sides round, so what is asked is that ours are no farther from the truth than twice
what transformers' own are; in float32 they must agree to `EXACT`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import prompts
from torch import Tensor
from transformers import AutoModelForCausalLM

EXACT = 1e-3
"""Nats a token, float32."""
TIMES = 2.0
"""Of transformers' own root mean square error in half precision."""


def with_transformers(view: Any, arguments: argparse.Namespace, rows: int = 2) -> dict[str, float]:
    """Draw `rows` completions of two prompts and compare both of our log-probabilities of them, drawn and scored.

    Raises:
        SystemExit: if they are not as close as this module says.
    """
    encoded = view.encode(prompts(arguments.model, 2, getattr(arguments, "examples", 0)))
    draws = view.draw(encoded, rows, torch.Generator().manual_seed(0))
    texts = []
    for row in range(len(draws)):
        prompt = int(draws.prompt_index[row])
        read = encoded.tokens[prompt][encoded.mask[prompt]]
        texts.append((read, draws.tokens[row][draws.mask[row]]))
    drawn, scored = draws.log_q[draws.mask], _rescored(view, draws)[draws.mask]
    with tempfile.TemporaryDirectory() as folder:
        model = _saved(view, arguments.model, Path(folder)).to(arguments.device)
        same = torch.cat([_log_probs(model, *text) for text in texts])
        truth = torch.cat([_log_probs(model.float(), *text) for text in texts])
    found = {
        "tokens": len(truth),
        "drawn": _rms(drawn - truth),
        "scored": _rms(scored - truth),
        "transformers": _rms(same - truth),
        "furthest": float((torch.stack([drawn, scored]) - truth).abs().max()),
    }
    _require(found, arguments.dtype)
    return found


def _require(found: dict[str, float], dtype: str) -> None:
    worst = max(found["drawn"], found["scored"])
    allowed = EXACT if dtype == "float32" else TIMES * found["transformers"]
    if not worst <= allowed:
        raise SystemExit(
            f"our log-probabilities are {worst:.2g} nats a token from transformers' in float32, where {allowed:.2g} is allowed: {found}"
        )


def _rescored(view: Any, draws: Any) -> Tensor:
    """Scored again from the tokens alone: draws that do not know whose they are cannot be recognised."""
    return view.log_prob(replace(draws, sampler=""))


def _saved(view: Any, base: Path, folder: Path) -> Any:
    """What the view is, as transformers and peft load it."""
    dtype = view.body.model.dtype
    prior = getattr(view, "prior", None)
    if prior is None:
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    view.save(folder)
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(folder)).eval()


@torch.no_grad()
def _log_probs(model: Any, prompt: Tensor, completion: Tensor) -> Tensor:
    ids = torch.cat([prompt, completion]).to(model.device)
    logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, ids[len(prompt) :, None]).squeeze(-1).cpu()


def _rms(gap: Tensor) -> float:
    return float(gap.double().pow(2).mean().sqrt())
