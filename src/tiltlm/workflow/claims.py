"""`tiltlm engines`: the claims of all engines, and their proofs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tiltlm.inference.catalogue import decoding_engines, make_engine, summary_of, training_engines
from tiltlm.protocols import Claim
from tiltlm.testing import Check, examine


@dataclass(frozen=True)
class Row:
    """One engine.

    Attributes:
        checks: what the conformance suite found; None where it was not asked.
    """

    name: str
    kind: str
    engine: Any
    checks: tuple[Check, ...] | None = None

    @property
    def claim(self) -> Claim:
        return self.engine.claim

    @property
    def refuted(self) -> bool:
        return self.checks is not None and not all(check.passed for check in self.checks)

    @property
    def proof(self) -> str:
        """The suite's verdict in a word or two."""
        if self.checks is None:
            return "not asked"
        if self.refuted:
            return "REFUTED"
        return f"{len(self.checks)} checks"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        claim = self.claim
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": summary_of(self.engine),
            "fixed_point": claim.fixed_point,
            "objective": claim.objective,
            "bias": claim.bias,
            "data": claim.data,
            "source": claim.source,
            "checks": None
            if self.checks is None
            else [
                {"name": c.name, "error": c.error, "tolerance": c.tolerance, "passed": c.passed} for c in self.checks
            ],
        }


def claims(name: str | None = None) -> tuple[Row, ...]:
    """Every engine, or the one of that name.

    Raises:
        InputError: if there is none.
    """
    rows = [Row(n, "training", e) for n, e in training_engines().items()]
    rows += [Row(n, "decoding", e) for n, e in decoding_engines().items()]
    if name is None:
        return tuple(rows)
    make_engine({row.name: row.engine for row in rows}, name, {})  # says what there is
    return tuple(row for row in rows if row.name == name)


def proofs(rows: Sequence[Row], say: Callable[[str], None]) -> tuple[Row, ...]:
    """The same rows with the conformance suite's findings."""
    found = []
    for row in rows:
        began = time.perf_counter()
        proved = replace(row, checks=examine(row.engine))
        found.append(proved)
        say(f"{proved.name}: {proved.proof}, {time.perf_counter() - began:.1f} s")
    return tuple(found)


HEAD = ("engine", "kind", "fixed point", "objective", "bias", "data", "proof")


def claims_table(rows: Sequence[Row]) -> Table:
    """A table for the terminal; what is long, the fixed point and the objective, stand below each other.

    Without a column for proofs if none was asked for.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    asked = any(row.checks is not None for row in rows)
    for head in ("engine", "fixed point, objective", "bias", "data", *(["proof"] if asked else [])):
        table.add_column(head, no_wrap=head in {"bias", "data"}, overflow="fold")
    for row in rows:
        c = row.claim
        engine = Group(row.name, Text(row.kind, style="dim"))
        fixed = Group(c.fixed_point, Text(c.objective, style="dim"))
        table.add_row(engine, fixed, c.bias, c.data, *([row.proof] if asked else []))
    return table


def details(row: Row) -> str:
    """One engine: what it is, where it comes from, its settings, and every check."""
    settings = [f"{f.name}={_shown(getattr(row.engine, f.name))}" for f in fields(row.engine) if f.init]
    lines = [summary_of(row.engine), f"source: {row.claim.source}", f"settings: {', '.join(settings) or 'none'}"]
    return "\n".join([*lines, *map(str, row.checks or ())])


def claims_markdown(rows: Sequence[Row]) -> str:
    """The table as a page of the documentation."""
    cells = [HEAD, ("---",) * len(HEAD), *[_cells(row) for row in rows]]
    table = "\n".join(
        "| " + " | ".join(cell.replace("*", "\\*").replace("|", "\\|") for cell in row) + " |" for row in cells
    )
    about = "\n".join(f"- `{row.name}`: {summary_of(row.engine)} {row.claim.source}." for row in rows)
    return f"{INTRODUCTION}\n\n{table}\n\n## What they are\n\n{about}\n"


INTRODUCTION = r"""# Every engine's claim

This page is written by `tiltlm engines --prove --markdown docs/claims.md`, which asks the conformance suite about every engine and
every preset. "Fixed point" is the law at which the engine settles, or which it returns; "data" says whose completions it may learn
from; "proof" is how many checks by enumeration in float64 stand behind the row. An engine whose fixed point is not p\* says so, and the
suite has checked that p\* is indeed not its fixed point."""


def _cells(row: Row) -> tuple[str, ...]:
    c = row.claim
    return row.name, row.kind, c.fixed_point, c.objective, c.bias, c.data, row.proof


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
