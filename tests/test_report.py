"""The report: one file that needs nothing else, shows what is there, and trusts no text."""

import ast
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from plotly.offline import get_plotlyjs
from rich.console import Console

from tiltlm.errors import InputError
from tiltlm.report.betas import LABEL, _beside
from tiltlm.report.card import model_card
from tiltlm.report.folder import read_run
from tiltlm.report.frontier import frontier_figure
from tiltlm.report.hacking import length_figure
from tiltlm.report.html import write_report
from tiltlm.report.landing import shortfall
from tiltlm.report.legend import legend
from tiltlm.report.palette import DARK, LIGHT
from tiltlm.report.panels import smooth, training_panels
from tiltlm.report.prompts import prompts_figure
from tiltlm.report.summary import summary_table
from tiltlm.report.words import headline, notes, show

NASTY = "<script>alert(1)</script>"
PROMPTS = ("The film was", f"Nasty {NASTY} & </script><!-- {{{{ 7*7 }}}}", "Prompt 'three' \"quoted\"\nin two lines")


def interval(value, low, high):
    return {"value": value, "low": low, "high": high, "level": 0.95}


def estimate(value, stderr, kind="point"):
    return {"value": value, "stderr": stderr, "n": 192, "kind": kind}


def point(beta, reward, kl, reliable=True):
    return {
        "beta": beta,
        "reward": interval(reward, reward - 0.05, reward + 0.05),
        "kl": interval(kl, 0.9 * kl, 1.1 * kl),
        "log_z": estimate(reward / beta - kl, 0.1, "lower"),
        "ess": 20.0,
        "pareto_k": 0.3,
        "needed_samples": 12,
        "reliable": reliable,
    }


def a_plan():
    rows = [(4.0, 0.20, 0.01), (1.0, 0.30, 0.1), (0.5, 0.50, 0.3), (0.25, 0.70, 0.9), (0.1, 0.80, 2.0)]
    frontier = [point(*row) for row in rows]
    per_prompt = [
        {"prompt": p, "n": 64, "prior_reward": 0.1, "reward": interval(0.6, 0.5, 0.7), "kl": interval(0.9, 0.8, 1.0)}
        | {"log_z": estimate(1.0, 0.1, "lower"), "ess": 20.0, "pareto_k": None, "reliable": True}
        for p in PROMPTS
    ]
    return {
        "prior_reward": interval(0.15, 0.1, 0.2),
        "samples_per_prompt": 64,
        "frontier": [*frontier, point(0.05, 0.85, 9.0, reliable=False)],
        "best_of_n": [{"n": n, "reward": 0.2 * math.log2(n), "kl": math.log(n) - (n - 1) / n} for n in (2, 4, 8)],
        "chosen": frontier[3],
        "per_prompt": per_prompt,
        "notes": [f"a note of the plan {NASTY}"],
    }


def a_certificate():
    per_prompt = [
        {"prompt": p, "reward": 0.5, "kl_prior": 0.6, "elbo": estimate(1.4, 0.1), "ess": 30.0, "exact_samples": 2}
        | {"kl_posterior": interval(0.3, 0.2, 0.4 + i)}
        for i, p in enumerate(PROMPTS)
    ]
    return {
        "beta": 0.25,
        "samples_per_prompt": 64,
        "reward": estimate(0.5, 0.01),
        "kl_prior": estimate(0.6, 0.02),
        "elbo": estimate(1.4, 0.05),
        "log_z_lower": estimate(1.7, 0.05, "lower"),
        "log_z_upper": estimate(1.75, 0.06, "upper"),
        "kl_posterior": interval(0.27, 0.21, 0.34),
        "kl_posterior_mean_prompt_width": 0.5,
        "ess": 30.0,
        "pareto_k": 0.4,
        "exact_samples": 6,
        "diversity": {"entropy": 40.0, "distinct_1": 0.5, "distinct_2": 0.9, "unique": 0.98, "length": 23.0}
        | {"truncated": 0.25},
        "per_prompt": per_prompt,
        "notes": [],
    }


def metrics():
    rows = [{"step": i, "reward": 0.02 * i, "kl_prior": 0.03 * i, "elbo": 0.05 * i} for i in range(1, 21)]
    rows[9]["certificate"] = a_certificate()
    rows[4]["reward"] = math.nan
    return rows


def samples():
    draws = [{"text": f" good {NASTY}", "reward": 0.9}, {"text": "bad", "reward": -0.4}]
    return {"prompts": [{"prompt": p, "prior": draws, "posterior": [], "policy": draws} for p in (*PROMPTS, "d", "e")]}


RECIPE = {
    "model": "acme/small-lm",
    "prompts": "films.txt",
    "reward": f"reward.py:{NASTY}",
    "beta": 0.25,
    "bounds": [-1, 1],
    "max_new_tokens": 24,
    "engine": "rloo",
    "steps": 20,
    "lr": 3e-4,
    "lora_r": 16,
    "seed": 0,
    "versions": {"tiltlm": "0.1.0"},
}


def write(run, **changes):
    """A run folder; a change of None leaves the file out."""
    found = {"recipe": RECIPE, "plan": a_plan(), "certificate": a_certificate(), "samples": samples()}
    lines = changes.pop("metrics", metrics())
    for name, values in (found | changes).items():
        if values is not None:
            (run / f"{name}.json").write_text(json.dumps(values))
    if lines is not None:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return run


class Page(HTMLParser):
    """Elements, their attributes, and the text that a reader sees."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.specs, self._in = [], "", [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        kind = dict(attrs).get("class") or dict(attrs).get("id") or "code"
        self._in = {"script": kind, "style": "style"}.get(tag, "")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "spec":
            self.specs.append(json.loads(data))
        elif not self._in:
            self.text += data


def page_of(run):
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_report_is_self_contained_and_holds_all(tmp_path):
    html = page_of(write(tmp_path))
    assert html.count(get_plotlyjs()) == 1
    page = Page(html.replace(get_plotlyjs(), ""))
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe"}
        assert not {"src", "href"} & attributes.keys()
        assert not any("url(" in (value or "") for value in attributes.values())
    assert not re.search(r"https?://|@import|url\(", html.replace(get_plotlyjs(), ""))
    assert len(page.specs) == 5  # frontier, three panels, prompts
    assert "The policy is within [0.21,\u00a00.34] nats of the posterior" in page.text
    for prompt in PROMPTS:
        assert prompt in page.text
    folds = [attributes for _, attributes in page.elements if attributes.get("class") == "prompt"]
    assert ["open" in fold for fold in folds] == [True] * 4 + [False]


def test_texts_cannot_break_out(tmp_path):
    html = page_of(write(tmp_path)).replace(get_plotlyjs(), "")
    assert NASTY not in html
    assert "alert(1)</script" not in html
    assert "&lt;script&gt;alert(1)" in html
    page = Page(html)
    assert "{{ 7*7 }}" in page.text
    assert sum(tag == "script" for tag, _ in page.elements) == 5 + 3  # figures; colours, Plotly, and the page's own
    spec = json.dumps(page.specs[-1])
    assert "&lt;script&gt;" in spec  # Plotly reads a little HTML in its labels
    assert "<script" not in spec


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("certificate", "tiltlm certify"),
        ("metrics", "tiltlm train"),
        ("samples", "tiltlm certify"),
        ("recipe", "tiltlm"),
    ],
)
def test_what_is_missing_is_left_out_and_said(tmp_path, missing, command):
    page = Page(page_of(write(tmp_path, **{missing: None})).replace(get_plotlyjs(), ""))
    assert command in page.text
    assert ("There is no" in page.text) or ("There are no" in page.text)
    summary_table(tmp_path)
    model_card(tmp_path)


def test_a_plan_alone_is_enough(tmp_path):
    run = write(tmp_path, recipe=None, certificate=None, samples=None, metrics=None)
    page = Page(page_of(run).replace(get_plotlyjs(), ""))
    assert len(page.specs) == 2
    assert "Training at β = 0.25 can lift the mean reward from 0.15 to 0.70" in page.text


def test_no_beta_one_prompt_and_numbers_that_are_none(tmp_path):
    plan = a_plan() | {"chosen": None}
    plan["per_prompt"] = plan["per_prompt"][:1]
    plan["prior_reward"] = interval(0.15, None, None)
    plan["frontier"][0]["reward"] = interval(0.2, math.nan, None)
    run = write(tmp_path, plan=plan, recipe=None, certificate=None, metrics=metrics()[:1])
    page_of(run)
    assert headline(read_run(run)) == "Trained for 1 step, and not certified yet"
    flat = plan | {"frontier": [], "best_of_n": [], "per_prompt": []}
    write(tmp_path, plan=flat)
    page_of(tmp_path)
    summary_table(tmp_path)


def test_no_upper_bound_is_an_arrow(tmp_path):
    certificate = a_certificate() | {"kl_posterior": interval(0.2, 0.15, None), "log_z_upper": None}
    certificate |= {"kl_posterior_mean_prompt_width": None}
    certificate["per_prompt"][1]["kl_posterior"] = interval(0.3, 0.2, None)
    run = read_run(write(tmp_path, certificate=certificate))
    assert headline(run) == "The policy is at least 0.15 nats from the posterior"
    assert "no upper bound" in [key.name for key in legend(prompts_figure(run))]
    assert "∞" in rendered(summary_table(tmp_path))
    page_of(tmp_path)


def test_the_frontier_has_its_parts_and_is_not_squeezed(tmp_path):
    figure = frontier_figure(read_run(write(tmp_path)))
    assert [key.name for key in legend(figure)] == [
        "prior",
        "predicted frontier, 95%",
        "posterior at β = 0.25, predicted",
        "best of n",
        "training, smoothed",
        "policy, certified",
        "too few draws to tell",
    ]
    assert figure.layout.xaxis.range[1] < 2.5  # the unreliable point is at 9 nats
    policy = next(trace for trace in figure.data if trace.name == "policy, certified")
    assert policy.error_y.array[0] == pytest.approx(1.96 * 0.01, rel=1e-3)
    assert policy.error_x.arrayminus[0] == pytest.approx(1.96 * 0.02, rel=1e-3)
    assert [panel.title for panel in training_panels(read_run(tmp_path))] == ["Mean reward", "KL to the prior", "ELBO"]


def test_the_shortfall_is_measured_at_the_policys_own_kl(tmp_path):
    found = shortfall(read_run(write(tmp_path)))
    # Halfway between (0.3, 0.5) and (0.9, 0.7), the policy being at (0.6, 0.5).
    assert found.expected == pytest.approx(0.6)
    assert found.gap == pytest.approx(0.1)
    slope = 0.2 / 0.6
    assert found.error == pytest.approx(math.hypot(0.05, 1.959964 * 0.01, slope * 1.959964 * 0.02))
    assert (found.place, found.reliable) == ("below", True)
    for kl, place in ((0.0, "above"), (2.5, "above"), (0.35, "on")):
        write(tmp_path, certificate=a_certificate() | {"kl_prior": estimate(kl, 0.0), "reward": estimate(0.95, 0.0)})
        if place == "on":
            write(tmp_path, certificate=a_certificate() | {"kl_prior": estimate(kl, 0.0)})
        assert shortfall(read_run(tmp_path)).place == place
    write(tmp_path, certificate=a_certificate() | {"kl_prior": estimate(20.0, 0.0)})
    assert shortfall(read_run(tmp_path)) is None


def rendered(table):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_table_fits_and_says_where_the_policy_is(tmp_path):
    text = rendered(summary_table(write(tmp_path)))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for cell in ("0.15 [0.10, 0.20]", "0.70 [0.65, 0.75]", "0.50 [0.48, 0.52]", "[0.21, 0.34]", "ESS 30 of 64"):
        assert cell in text
    assert "0.100 ± 0.055 below the predicted frontier" in " ".join(text.split())
    assert "not certified" in rendered(summary_table(write_uncertified(tmp_path)))


def test_what_plan_and_certificate_both_say_is_said_once(tmp_path):
    plan, certificate = a_plan() | {"notes": ["both", "one"]}, a_certificate() | {"notes": ["both", "other"]}
    found = notes(read_run(write(tmp_path, plan=plan, certificate=certificate)))
    assert [(note["sentence"], note["source"]) for note in found] == [
        ("both", "plan, certificate"),
        ("one", "plan"),
        ("other", "certificate"),
    ]


@pytest.mark.parametrize("other", [8, 7])
def test_reward_against_length_is_drawn_where_lengths_differ(tmp_path, other):
    draws = {kind: [{"length": n, "reward": 0.1 * n} for n in (8, other)] for kind in ("prior", "policy")}
    figure = length_figure(read_run(write(tmp_path, hacking={"length": {}, "draws": draws, "heaviest": []})))
    assert (figure is None) == (other == 8)


def test_a_label_stands_on_no_other_mark():
    """Two dots close to each other, a ring above them and the prior below: in each of them one corner is taken."""
    dots, others, right, tall = [(0.05, 0.243), (0.087, 0.258)], [(0.024, 0.263), (0.0, 0.215), (1.5, 0.57)], 1.68, 0.46
    signs = {"left": -1, "right": 1, "bottom": -1, "top": 1}
    spots = [
        (x / right + LABEL[0] * signs[across], y / tall + LABEL[1] * signs[up])
        for (x, y), (up, across) in zip(dots, map(str.split, _beside(dots, others, right)), strict=True)
    ]
    marks = [(x / right, y / tall) for x, y in (*dots, *others)]
    gaps = [math.dist(a, b) for a in spots for b in (*marks, *spots) if a is not b]
    assert min(gaps) > 0.045


def write_uncertified(run):
    (run / "certificate.json").unlink()
    return run


@pytest.mark.parametrize("certified", [True, False])
def test_the_card_is_yaml_markdown_and_python(tmp_path, certified):
    write(tmp_path, certificate=a_certificate() if certified else None)
    card = model_card(tmp_path)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "peft"
    assert header["base_model"] == "acme/small-lm"
    assert {"tiltlm", "rlhf", "lora"} <= set(header["tags"])
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    ast.parse(code)
    assert "PeftModel.from_pretrained(base, folder)" in code
    assert ("[0.21, 0.34] nats" in card) == certified


def test_the_card_needs_no_plan_and_knows_other_models(tmp_path):
    run = write(tmp_path, plan=None, certificate=None, recipe=RECIPE | {"model": "/models/x.gguf", "chat": True})
    card = model_card(run)
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    ast.parse(code)
    assert 'gguf_file="x.gguf"' in code
    write(tmp_path, recipe=RECIPE | {"lora_r": 0})
    assert "PeftModel" not in model_card(run)


def test_errors_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(InputError, match="no run folder .*tiltlm plan"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"plan\.json is missing; run tiltlm plan first"):
        write_report(tmp_path)
    write(tmp_path)
    (tmp_path / "certificate.json").write_text("{")
    with pytest.raises(InputError, match=r"certificate\.json is not JSON .*tiltlm certify"):
        summary_table(tmp_path)
    (tmp_path / "certificate.json").write_text('{"beta": 1}')
    with pytest.raises(InputError, match=r"certificate\.json lacks reward.*tiltlm certify"):
        write_report(tmp_path)


def test_half_a_last_line_of_metrics_is_forgiven_and_others_are_not(tmp_path):
    path = write(tmp_path) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 21, "rew')
    assert len(read_run(tmp_path).metrics) == 20
    path.write_text("half\n" + whole)
    with pytest.raises(InputError, match=r"metrics\.jsonl is not JSON in line 1"):
        read_run(tmp_path)


def test_every_light_colour_has_one_dark_one():
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_numbers_are_short():
    assert [show(x) for x in (0.1234, -12.345, 1234.5, -0.001, None, math.inf)] == [
        "0.12",
        "−12.3",
        "1,234",
        "0.00",
        "–",
        "–",
    ]
    assert smooth([1.0, 2.0, 3.0]) == [1.5, 2.0, 2.5]


def test_the_report_needs_no_torch():
    code = "import sys, tiltlm.report.html, tiltlm.report.summary, tiltlm.report.card; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
