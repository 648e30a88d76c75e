"""One table that says how a run ended."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from tiltlm.report.folder import Json, Run, finite, read_run
from tiltlm.report.landing import predicted
from tiltlm.report.words import mixed, plural, position, show, show_beta, show_estimate, show_interval, show_range


def summary_table(run: Path) -> Table:
    """Prior, prediction and policy, one row each; fits 80 columns. Brackets are 95% intervals.

    Args:
        run: a folder with plan.json and, as far as it exists yet, certificate.json.

    Raises:
        InputError: if the folder cannot be read, or holds no plan.
    """
    found = read_run(Path(run))
    table = Table(box=box.SIMPLE_HEAD, caption=Text(_caption(found)), caption_justify="left", caption_style="dim")
    table.add_column("", no_wrap=True)
    for head in ("E r", "KL(q‖π₀)", "ELBO", "KL(q‖p*)"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_row("prior", show_interval(found.plan["prior_reward"]), "0", "–", "–")
    aim, certificate = predicted(found), found.certificate
    if aim is not None:
        name = f"plan, β {show_beta(aim['beta'])}"
        table.add_row(name, show_interval(aim["reward"]), show_interval(aim["kl"]), "–", "0")
    if certificate is not None:
        numbers = [show_estimate(certificate[key]) for key in ("reward", "kl_prior")]
        numbers.append(show(certificate["elbo"]["value"]))
        interval = certificate["kl_posterior"]
        table.add_row("policy", *numbers, show_range(interval["low"], interval["high"]), style="bold")
    return table


def _caption(run: Run) -> str:
    certificate = run.certificate
    if certificate is None:
        command = "tiltlm certify" if run.metrics else "tiltlm train, then tiltlm certify"
        return f"The policy is not certified yet; run {command}."
    return "\n".join([_draws(certificate), position(run), *mixed(run)])


def _draws(certificate: Json) -> str:
    per = certificate.get("samples_per_prompt")
    parts = [f"ESS {show(certificate['ess'], 1)}" + (f" of {per} draws a prompt" if per else "")]
    exact = certificate.get("exact_samples")
    if exact is not None:
        parts.append(plural(int(exact), "exact posterior sample"))
    width = finite(certificate.get("kl_posterior_mean_prompt_width"))
    if width is None:
        parts.append("some prompt’s interval has no upper end")
    else:
        parts.append(f"a prompt’s own interval is {show(width)} nats wide on average")
    return "; ".join(parts) + "."
