"""Numbers and verdicts in plain words, the same in the report, the table and the card."""

from __future__ import annotations

import math
from typing import Any

from tiltlm.estimates import Z95
from tiltlm.report.folder import Json, Run, differing, finite
from tiltlm.report.landing import beta_of, predicted, shortfall


def show(value: Any, places: int = 2) -> str:
    """A number with about as many digits as one reads; a dash where there is none."""
    number = finite(value)
    if number is None:
        return "–"
    size = math.floor(math.log10(abs(number))) if number else 0
    text = f"{number:,.{max(0, places - max(0, size))}f}"
    if not text.strip("-0.,"):
        text = text.removeprefix("-")
    return text.replace("-", "−")


def show_beta(beta: float | None) -> str:
    """Three significant digits: betas span decades."""
    if beta is None:
        return "–"
    return f"{beta:.3g}" if math.isfinite(beta) else "∞"


def show_range(low: Any, high: Any, places: int = 2) -> str:
    """[low, high]; an upper end that is not there is infinity."""
    above = "∞" if finite(high) is None else show(high, places)
    return f"[{show(low, places)}, {above}]"


def show_interval(interval: Json, places: int = 2) -> str:
    """value [low, high]."""
    return f"{show(interval['value'], places)} {show_range(interval['low'], interval['high'], places)}"


def spread(estimate: Json) -> tuple[float | None, float | None, float | None]:
    """Value and 95% ends of an estimate."""
    value, stderr = finite(estimate["value"]), finite(estimate["stderr"])
    if value is None or stderr is None:
        return value, None, None
    return value, value - Z95 * stderr, value + Z95 * stderr


def show_estimate(estimate: Json, places: int = 2) -> str:
    """value [low, high] at 95%, or the value alone where its error is unknown."""
    value, low, high = spread(estimate)
    return show(value, places) if low is None else f"{show(value, places)} {show_range(low, high, places)}"


def plural(number: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def headline(run: Run) -> str:
    """The run in one sentence."""
    if run.certificate is not None:
        interval = run.certificate["kl_posterior"]
        low, high = finite(interval["low"]), finite(interval["high"])
        if high is None:
            return f"The policy is at least {show(low)} nats from the posterior"
        if not low or show(low) == show(0):
            return f"The policy is within {show(high)} nats of the posterior"
        return f"The policy is within {show_range(low, high)} nats of the posterior"
    if run.metrics:
        return f"Trained for {plural(len(run.metrics), 'step')}, and not certified yet"
    aim = predicted(run)
    if aim is None:
        return "What training can reach at every β, from the prior’s draws alone"
    start, goal = run.plan["prior_reward"]["value"], aim["reward"]["value"]
    return f"Training at β = {show_beta(aim['beta'])} can lift the mean reward from {show(start)} to {show(goal)}"


def lede(run: Run) -> list[str]:
    """What stands behind the headline."""
    aim, prior = predicted(run), run.plan["prior_reward"]
    sentences: list[str] = []
    if run.certificate is not None:
        sentences += _outcome(run, run.certificate, aim)
    elif aim is not None:
        sentences.append(
            f"The plan predicts a mean reward of {show_interval(aim['reward'])} at {show_interval(aim['kl'])} nats from the "
            f"prior, whose own mean reward is {show_interval(prior)}."
        )
    else:
        sentences.append(
            f"The prior’s mean reward is {show_interval(prior)}; no β was chosen, so the plan shows them all."
        )
    verdict = position(run)
    if verdict:
        sentences.append(verdict)
    return sentences


def _outcome(run: Run, certificate: Json, aim: Json | None) -> list[str]:
    reward, kl = certificate["reward"]["value"], certificate["kl_prior"]["value"]
    start = run.plan["prior_reward"]["value"]
    moved = "raised" if (finite(reward) or 0) >= (finite(start) or 0) else "lowered"
    goal = f"; the posterior’s is predicted at {show(aim['reward']['value'])}" if aim else ""
    sentences = [
        f"Training {moved} the mean reward from {show(start)} to {show(reward)}, at a cost of {show(kl)} nats from the "
        f"prior{goal}."
    ]
    if finite(certificate["kl_posterior"]["high"]) is None:
        sentences.append(
            "Nothing bounds the distance to the posterior from above: see the certificate’s notes for the remedy."
        )
    return sentences


def position(run: Run) -> str:
    """Where the policy's point lies, seen from the predicted frontier; empty without a certificate."""
    if run.certificate is None:
        return ""
    found = shortfall(run)
    if found is None:
        return "The policy’s point is beyond the end of the predicted frontier."
    trust = "" if found.reliable else " (a part of the frontier that the plan does not trust)"
    expected = f"at its KL the frontier predicts {show(found.expected, 3)}"
    gap = f"{show(abs(found.gap), 3)} ± {show(found.error, 3)}"
    if found.place == "on":
        got, off = show(found.expected - found.gap, 3), show(-found.gap, 3)
        return (
            f"The policy lies on the predicted frontier: its mean reward is {got}, and {show(found.expected, 3)} is predicted at "
            f"its KL{trust} (difference {off} ± {show(found.error, 3)})."
        )
    tail = "; more plan samples would tell why" if found.place == "above" else ""
    return f"The policy lies {gap} {found.place} the predicted frontier: {expected}{trust}{tail}."


def cards(run: Run) -> list[dict[str, str]]:
    """The key figures: label, value, and what to compare it with."""
    aim, certificate, prior = predicted(run), run.certificate, run.plan["prior_reward"]
    goal = show(aim["reward"]["value"]) if aim else "–"
    moved = show(aim["kl"]["value"]) if aim else "–"
    found = [_card("Temperature β", show_beta(beta_of(run)), "reward units per nat")]
    if certificate is None:
        found.append(_card("Expected reward", f"{show(prior['value'])} → {goal}", "prior → predicted"))
        found.append(_card("KL to the prior", moved, "nats, predicted"))
        if aim:
            per = run.plan.get("samples_per_prompt")
            found.append(
                _card(
                    "ESS of the plan",
                    show(aim["ess"], 1),
                    f"of {per} prior draws a prompt" if per else "draws a prompt",
                )
            )
        return found
    interval, diversity = certificate["kl_posterior"], certificate["diversity"]
    reward = f"{show(prior['value'])} → {show(certificate['reward']['value'])}"
    found += [
        _card("Expected reward", reward, f"prior → policy; predicted {goal}"),
        _card("KL to the prior", show(certificate["kl_prior"]["value"]), f"nats; predicted {moved}"),
        _card("KL to the posterior", show_range(interval["low"], interval["high"]), "nats, 95% certificate", "policy"),
        _card("ESS", show(certificate["ess"], 1), f"of {certificate.get('samples_per_prompt', '–')} draws a prompt"),
        _card("Different texts", f"{diversity['unique']:.0%}", f"{diversity['truncated']:.0%} cut at the token limit"),
    ]
    return found


def _card(label: str, value: str, detail: str, accent: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "detail": detail, "accent": accent}


def mixed(run: Run) -> list[str]:
    """Sentences on files in the folder that are not of one run, because their prior, prompts or reward are not the same."""
    certified, planned, run_of = (run.certificate or {}).get("about"), run.plan.get("about"), ("prior", "reward")
    later = "certificate" if certified else "training"
    sentences = []
    if off := differing(planned, certified or run.trained, run_of):
        sentences.append(
            f"The plan and the {later} are of different runs (not the same: {off}): what the plan predicts is not of this policy. "
            f"Plan anew, in a folder of its own."
        )
    elif differing(planned, certified or run.trained, ("prompts",)):
        sentences.append(f"The plan and the {later} are of different prompts, whose frontiers need not be the same.")
    if off := differing(run.trained, certified, run_of):
        sentences.append(
            f"Training and certificate are of different runs (not the same: {off}): the certificate says nothing of how training went."
        )
    return sentences


def notes(run: Run) -> list[dict[str, str]]:
    """What the plan and the certificate cannot say, each sentence once, after whatever sets them apart."""
    sources: dict[str, list[str]] = {sentence: ["run folder"] for sentence in mixed(run)}
    for source, record in (("plan", run.plan), ("certificate", run.certificate)):
        for sentence in record["notes"] if record is not None else ():
            sources.setdefault(sentence, []).append(source)
    return [{"sentence": sentence, "source": ", ".join(found)} for sentence, found in sources.items()]
