"""`bench/RESULTS.md` and its pictures, from the JSON files that the speed benchmarks wrote.

python bench/results_page.py
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from harness import HERE, RESULTS
from tables import Table

PARTS = {
    "step": "A training step",
    "generation": "Generation",
    "smc": "Sequential Monte Carlo",
    "roofline": "How near to the hardware",
    "curves": "How cost grows",
}
ABSENT = (
    "disco (DPG) is not compared: disco-generation's last version, 1.1.1, asks for Python below 3.11, and TiltLM for 3.11 or newer; "
    "it would need a Python of its own, not only an environment."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args()
    found = {
        name: json.loads(file.read_text()) for name in PARTS if (file := options.results / f"{name}.json").is_file()
    }
    if "curves" in found:
        from curves_picture import draw

        draw(found["curves"], options.results / "curves.html")
    options.out.write_text(page(found, options.results))
    print(f"wrote {options.out}")


def page(found: dict[str, dict[str, Any]], results: Path) -> str:
    """The whole page."""
    picture = "![Seconds and bytes of a step over its size](results/curves.png)\n"
    parts = [
        "# Results of the speed benchmarks",
        "",
        "Written by `make bench`; `README.md` says what is measured and how.",
        "",
    ]
    for name, result in found.items():
        parts += [f"## {PARTS[name]}", "", machine(result), ""]
        parts += [table.markdown() for table in tables_of(name, result)]
        if name == "curves":
            parts += [picture] if (results / "curves.png").is_file() else []
            parts += ["[The same as a picture to point at](results/curves.html)", ""]
    versions = versions_of(found)
    parts += ["## Versions", "", *(f"- {side}: {text}" for side, text in versions.items()), "", ABSENT, ""]
    return "\n".join(parts)


def tables_of(name: str, result: dict[str, Any]) -> list[Table]:
    """The tables as the benchmark itself prints them."""
    return importlib.import_module(name).tables(result)


def machine(result: dict[str, Any]) -> str:
    """What it was measured on, in words."""
    facts = result["hardware"]
    memory = f", {facts['memory_bytes'] / 2**30:.0f} GiB" if facts["memory_bytes"] else ""
    cpu = f"{facts['cpu']}, {facts['cores']} cores{memory}, {facts['system']}"
    return f"Device: {facts['gpu']} ({cpu})." if facts["gpu"] and result["device"] != "cpu" else f"Device: {cpu}."


def versions_of(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The libraries of every side."""
    out = {}
    for result in found.values():
        for case in result.get("cases", {}).values():
            for done in case["rounds"]:
                for side, run in done.items():
                    out[side] = ", ".join(f"{package} {number}" for package, number in run["versions"].items())
    return out


if __name__ == "__main__":
    main()
