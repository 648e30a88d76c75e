"""What the pages show runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiltlm as tl

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def tiny_embedded_model(monkeypatch):
    """`tl.load` of the embedded model gives a random one, so that a page runs in seconds; the real one has its own test."""
    from conftest import make_model, make_tokenizer
    from tiltlm.lm.load import load
    from tiltlm.lm.trunk import load_trunk

    def tiny(name):
        assert name == "smollm2-135m-instruct"
        return load(make_model("llama"), make_tokenizer())

    def tiny_trunk(name):
        assert name == "all-minilm-l6-v2"
        return load_trunk(make_model("llama"), make_tokenizer())

    monkeypatch.setattr(tl, "load", tiny, raising=False)
    monkeypatch.setattr(tl, "load_trunk", tiny_trunk, raising=False)


@pytest.mark.filterwarnings("ignore:in 5 steps all completions")  # what random weights write has no sentiment
def test_the_readme_example(tiny_embedded_model, capsys):
    (code,) = blocks("README.md")
    assert len(code.strip().splitlines()) <= 18
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "KL(q||p*)" in out
    assert "draws a prompt" in out


def test_the_example_of_models(capsys):
    (code,) = blocks("docs/models.md")
    exec(compile(code, "models.md", "exec"), {})
    assert "KL(q||p*)" in capsys.readouterr().out


def test_the_engine_of_contributing(capsys):
    (code,) = blocks("CONTRIBUTING.md")
    space = {"__name__": "contributing"}
    sys.modules["contributing"] = type(sys)("contributing")  # dataclasses look their module up
    exec(compile(code, "CONTRIBUTING.md", "exec"), space)
    assert "every draw's signal vanishes at p*" in capsys.readouterr().out
    del sys.modules["contributing"]


def test_the_tutorials_target(tiny_embedded_model):
    code = blocks("docs/tutorial.md")[1]
    space = {"sentiment": lambda completions: [0.0] * len(completions)}
    exec(compile(code, "tutorial.md", "exec"), space)
    assert space["target"].beta == 0.25


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_recipes_are_valid_and_what_they_point_at_is_there(recipe):
    from tiltlm.workflow.inputs import read_prompts, reward_of
    from tiltlm.workflow.recipe_files import read_recipe

    read = read_recipe(recipe, {})
    assert len(read_prompts(read.prompts, read.column)) >= 1
    for function in [*filter(None, [read.gold]), *(moment.source for moment in read.moments)]:
        reward, _ = reward_of(function, read.model, what="gold")
        assert len(reward(completions=["a good film", "a bad film"])) == 2
    if read.reward is None:
        return
    reward, _ = reward_of(read.reward, read.model)
    if isinstance(read.reward, list):  # its parts have models, which are loaded when they are called
        assert len(reward.parts()) == len(read.reward)
        return
    assert len(reward(completions=["a good film", "a bad film"])) == 2


PAGES = [
    "ways",
    "explain",
    "reward-models",
    "labels",
    "rewards",
    "hacking",
    "rewards-running",
    "masked-edits",
    "evaluation",
    "data",
    "start",
    "devices",
    "vllm",
]


@pytest.mark.parametrize("page", [f"docs/{page}.md" for page in PAGES])
def test_the_examples_of_a_page(tiny_embedded_model, capsys, page):
    for code in blocks(page):
        exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out


def test_the_page_of_claims_is_the_engines_own():
    """Written by `tiltlm engines --prove --markdown docs/claims.md`; here without the proofs, which have their own tests."""
    from tiltlm.workflow.claims import claims, claims_markdown

    def without_proof(text):
        return [line.rsplit("|", 2)[0] if line.startswith("|") else line for line in text.splitlines()]

    page = (ROOT / "docs/claims.md").read_text()
    assert without_proof(page) == without_proof(claims_markdown(claims()))
    assert "REFUTED" not in page
    assert "not asked" not in page


def test_the_page_of_rewards_names_every_part():
    from tiltlm.rewards.catalogue import part_kinds

    page = (ROOT / "docs/rewards.md").read_text()
    assert not [name for name in part_kinds() if f"`{name}`" not in page]


def test_the_pages_build(tmp_path):
    mkdocs = Path(sys.executable).with_name("mkdocs")
    command = [mkdocs, "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "tutorial" / "index.html").is_file()


def test_no_path_of_a_machine_and_no_registry_in_the_tree():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    pattern = re.compile(r"(^|[^\w.])/(work|opt|farm|root)/")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        assert not (path.is_symlink() and path.readlink().is_absolute()), f"{name} links to a place of one machine"
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".j2", ""} and path.is_file():
            assert not pattern.search(path.read_text(errors="ignore").replace(r"/(work|opt|farm|root)/", "")), name
