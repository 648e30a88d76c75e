"""`tiltlm reward`: rewards from named parts, rewards learned from judgements, and the judgements themselves."""

from __future__ import annotations

import typer

from tiltlm.cli.reward.labels import answer, ask, status
from tiltlm.cli.reward.models import fit, report
from tiltlm.cli.reward.parts import list_parts

PARTS, LEARNED, LABELS = "Named parts", "Learned rewards", "Preferences to learn from"

reward = typer.Typer(
    no_args_is_help=True,
    help="Rewards: named parts to build one from, models that learn one, and the preferences they learn from.",
    epilog="Example: tiltlm reward ask recipe.yaml --session labels · tiltlm reward answer labels --terminal · "
    "tiltlm reward fit --data labels/preferences.jsonl",
)
reward.command(
    "list",
    rich_help_panel=PARTS,
    epilog="Examples: tiltlm reward list · tiltlm reward list topic-similarity",
)(list_parts)
reward.command(
    rich_help_panel=LEARNED,
    epilog="Examples: tiltlm reward fit --data preferences.jsonl --out runs/reward · … --model all-minilm-l6-v2 --members 8 "
    "· … --lora-r 8 --steps 300 --resume",
)(fit)
reward.command(
    rich_help_panel=LEARNED,
    epilog="Example: tiltlm reward report runs/reward --data held-out.jsonl --shifted other.jsonl --html calibration.html",
)(report)
reward.command(
    rich_help_panel=LABELS,
    epilog="Examples: tiltlm reward ask recipe.yaml --session labels --by random · … --by bald --members runs/reward "
    "· … --by margin --members reward.py:members --timeout 60",
)(ask)
reward.command(
    rich_help_panel=LABELS,
    epilog="Examples: tiltlm reward answer labels --terminal · tiltlm reward answer labels answers.jsonl",
)(answer)
reward.command(rich_help_panel=LABELS, epilog="Example: tiltlm reward status labels")(status)
