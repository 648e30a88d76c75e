"""`report.html`: one file that needs nothing else, to look at, to mail, to keep beside the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tiltlm.errors import InputError
from tiltlm.report import words
from tiltlm.report.folder import Json, Run, finite, read_run
from tiltlm.report.frontier import frontier_figure
from tiltlm.report.legend import legend
from tiltlm.report.palette import DARK, FONT, LIGHT, to_dark
from tiltlm.report.panels import training_panels
from tiltlm.report.prompts import MOST, prompts_figure

OPEN = 4
"""Prompts whose samples are unfolded."""
SHOWN = 6
"""Most samples of one kind for one prompt."""
COLUMNS = (
    ("prior", "Prior", "no prior draws kept"),
    ("posterior", "Exact posterior", "no draw was accepted by rejection"),
    ("policy", "Policy", "run tiltlm train, then tiltlm certify"),
)


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run: a folder with plan.json and, as far as they exist yet, recipe.json, metrics.jsonl, certificate.json, samples.json.

    Returns:
        The path of the report.

    Raises:
        InputError: if the folder cannot be read or written, or holds no plan.
    """
    page = render(read_run(Path(run)))
    path = Path(run) / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); check its permissions") from error
    return path


def render(run: Run) -> str:
    """The report as HTML."""
    frontier, prompts = frontier_figure(run), prompts_figure(run)
    return page(
        "report.html.j2",
        title=run.recipe.get("name") or run.folder.resolve().name,
        model=run.recipe.get("model"),
        headline=words.headline(run),
        lede=words.lede(run),
        cards=words.cards(run),
        frontier=embed(frontier),
        frontier_legend=legend(frontier),
        training=[(panel, embed(panel.figure)) for panel in training_panels(run)],
        steps=len(run.metrics),
        hacking=_hacking(run),
        prompts=embed(prompts) if prompts is not None else None,
        prompts_legend=legend(prompts),
        prompt_count=_prompt_count(run),
        most=MOST,
        certified=run.certificate is not None,
        samples=_samples(run),
        open=OPEN,
        notes=words.notes(run),
        recipe=_recipe(run.recipe),
    )


def _hacking(run: Run) -> dict[str, Any] | None:
    """The section on reward hacking; None where nothing is known."""
    from tiltlm.report import hacking  # it fits a curve to records, and those are torch's

    over, length = hacking.overoptimisation_figure(run), hacking.length_figure(run)
    parts = [(panel, embed(panel.figure)) for panel in hacking.part_panels(run)]
    if over is None and length is None and not parts:
        return None
    return {
        "lines": hacking.hacking_lines(run),
        "figure": embed(over) if over is not None else None,
        "legend": legend(over),
        "parts": parts,
        "part_lines": hacking.part_lines(run),
        "length": embed(length) if length is not None else None,
        "length_legend": legend(length),
        "heaviest": hacking.heaviest(run),
    }


def page(template: str, **values: Any) -> str:
    """A page that needs nothing else, from one of the templates beside this file."""
    environment = Environment(
        loader=PackageLoader("tiltlm", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = words.show
    script, swap = Markup(get_plotlyjs()), embed(to_dark())
    return environment.get_template(template).render(
        **values, plotly=script, light=LIGHT, dark=DARK, font=Markup(FONT), swap=swap
    )


def embed(value: go.Figure | dict[str, str]) -> Markup:
    """JSON for a <script type="application/json">: no character in it can end the element."""
    text = value.to_json() if isinstance(value, go.Figure) else json.dumps(value)
    assert text is not None
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _prompt_count(run: Run) -> int:
    return len((run.certificate or run.plan)["per_prompt"])


def _recipe(recipe: Json) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in recipe.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{name}", str(inner)) for name, inner in value.items()]
        elif value is not None and value != []:
            rows.append((key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _samples(run: Run) -> list[dict[str, Any]]:
    """Each prompt with its columns; the policy's is left out before there is one."""
    low, high = _reward_range(run)
    trained = bool(run.metrics) or run.certificate is not None
    rows = []
    for entry in run.samples:
        kinds = [kind for kind in COLUMNS if kind[0] != "policy" or trained or entry.get("policy")]
        columns = [
            _column(entry.get(name) or [], name, low, high) | {"title": title, "empty": empty}
            for name, title, empty in kinds
        ]
        rows.append({"prompt": str(entry.get("prompt", "")), "columns": columns})
    return rows


def _reward_range(run: Run) -> tuple[float, float]:
    """Between which rewards the badges go from grey to green: the reward's bounds, or what the samples show."""
    shown = [sample for entry in run.samples for name, _, _ in COLUMNS for sample in entry.get(name) or []]
    rewards = [reward for sample in shown if (reward := finite(sample.get("reward"))) is not None]
    bounds = run.recipe.get("bounds")
    if isinstance(bounds, list) and len(bounds) == 2:
        rewards += [bound for value in bounds if (bound := finite(value)) is not None]
    return (min(rewards), max(rewards)) if rewards else (0.0, 1.0)


def _column(samples: list[Json], name: str, low: float, high: float) -> dict[str, Any]:
    """Samples with their reward's place between `low` and `high`, 0 to 100."""
    shown = []
    for sample in samples[:SHOWN]:
        reward = finite(sample.get("reward"))
        share = None if reward is None else round(100 * (reward - low) / ((high - low) or 1.0))
        shown.append({"text": str(sample.get("text", "")).strip(), "reward": words.show(reward), "share": share})
    return {"name": name, "samples": shown, "more": max(0, len(samples) - SHOWN)}
