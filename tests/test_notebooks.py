"""The notebooks run from the first cell to the last: with a small random model, and (slow) as a person has them, on SmolLM2."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
SMALL = {
    "text-generation": "PROMPTS, TEST, DRAWS, STEPS = 3, 2, 4, 2",
    "your-own-task": "STEPS, SAMPLES = 2, 4",
}
"""What the cell of the parameters says in a test."""


@pytest.fixture(autouse=True)
def command_on_the_path(monkeypatch):
    """As in an activated environment."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def run(name, **texts):
    """The notebook after its execution, with the parameters of a test and other texts replaced; an error of a cell is raised."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = {line.split("=")[0].strip() for line in parameters.source.splitlines()}
    assert {part.strip() for part in ",".join(names).split(",")} == {
        part.strip() for part in SMALL[name].split("=")[0].split(",")
    }
    parameters.source = SMALL[name]
    for cell in notebook.cells:
        for old, new in texts.items():
            cell.source = cell.source.replace(old, new)
    return NotebookClient(notebook, timeout=600).execute()


def printed(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_every_notebook_is_tested():
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(SMALL)


def test_text_generation(models):
    notebook = run("text-generation", **{"smollm2-135m-instruct": str(models / "base")})
    out = printed(notebook)
    assert "KL(q||p*)" in out
    assert "policy:" in out
    kinds = {
        kind for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs for kind in o.get("data", {})
    }
    assert "application/vnd.plotly.v1+json" in kinds


def test_your_own_task(models):
    small = {"smollm2-135m-instruct": str(models / "base"), "kl_budget: 1.5": "beta: 0.3"}
    out = printed(run("your-own-task", **small))
    assert "certificates on the test prompts" in out
    assert "pet shop: " in out


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_on_the_real_model(name):
    assert "KL(q||p*)" in printed(run(name))
