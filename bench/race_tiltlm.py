"""Our side of the race: one engine, one seed; or the exact gradient; or the judgement of a model that is there already.

Reads jobs from its input, one a line, written as command-line flags, and answers each with a line of JSON: the mean over
prompts of KL(q||p*) and KL(p*||q), by listing every completion.
"""

import argparse
import contextlib
import functools
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from race_task import BETA, LONGEST, PROMPTS, reward_function

import tiltlm as tl
from tiltlm.inference.catalogue import make_engine, training_engines
from tiltlm.inference.monitor import Monitor
from tiltlm.inference.source import Decoded, Replay, default_source
from tiltlm.posterior import exact as ex

REPEATS = 20


@functools.cache
def target_of(model: Path, reward: str) -> tuple[Any, Any, tuple[ex.Exact, ...]]:
    """The target, its prompts, and the truth about each."""
    prior = tl.load(model, dtype="float32").prior(max_new_tokens=LONGEST)
    target = prior * tl.Reward(reward_function(reward), beta=BETA[reward])
    prompts = prior.encode(list(PROMPTS))
    return target, prompts, tuple(ex.posterior(target, prompts, p) for p in range(len(prompts)))


def judged(sampler: Any, truth: tuple[ex.Exact, ...]) -> dict[str, float]:
    """Both divergences, in nats."""
    laws = [(e.log_prob(sampler), e.log_posterior) for e in truth]
    return {
        "to_posterior": sum(ex.kl(q, p) for q, p in laws) / len(laws),
        "from_posterior": sum(ex.kl(p, q) for q, p in laws) / len(laws),
    }


def exact_gradient(target: Any, truth: tuple[ex.Exact, ...], lr: float, steps: int) -> Any:
    """Adam on the exact gradient of KL(q||p*), a prompt a step: what the network can reach if sampling cost nothing."""
    policy = target.prior.policy(lora=None)
    optimiser = torch.optim.Adam(policy.named_parameters().values(), lr=lr)
    for step in range(steps):
        e = truth[step % len(truth)]
        log_q = policy.forward(e.scored.draws, frozenset({"log_q"})).log_q.sum(-1)
        loss = (log_q.exp() * (log_q - e.log_posterior)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 - step / steps)
    return policy


def source_of(engine: Any, options: argparse.Namespace) -> Any:
    """Every earlier draw again and again, or the engine's own; a teacher for who learns from given completions."""
    if options.replay:
        return Replay(options.replay, options.samples)
    if engine.claim.data == "given":
        return Decoded(tl.BestOfN(n=options.group))
    return default_source(engine.claim)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            found = run(parse(shlex.split(line)))
        print(json.dumps(found), flush=True)


def parse(flags: list[str]) -> argparse.Namespace:
    """One job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--engine", required=True, help='an engine\'s name, "exact-gradient", or "judge"')
    parser.add_argument("--judge", type=Path, help="folder of the model to judge")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--replay", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--engine-lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--decode", type=int, default=0, help="SMC particles with the trained policy as the proposal")
    return parser.parse_args(flags)


def run(options: argparse.Namespace) -> dict[str, float]:
    """The job's figures."""
    target, prompts, truth = target_of(options.model, options.target)
    steps = options.samples // (len(PROMPTS) * options.group)
    began = time.perf_counter()
    facts: dict[str, float] = {}
    if options.engine == "judge":
        policy = target.prior.policy_of(tl.load(options.judge, dtype="float32").body)
    elif options.engine == "exact-gradient":
        policy = exact_gradient(target, truth, options.lr, steps)
    else:
        engine = make_engine(training_engines(), options.engine, {"group": options.group, **options.options})
        monitor = Monitor(quiet=True)
        policy = tl.fit(
            target,
            prompts,
            engine,
            source=source_of(engine, options),
            lora=None,
            steps=steps,
            batch=len(PROMPTS),
            lr=options.lr,
            engine_lr=options.engine_lr,
            seed=options.seed,
            monitor=monitor,
        )
        facts["samples"] = monitor.drawn
    facts["seconds"] = time.perf_counter() - began
    if options.decode:
        facts["smc_bound"] = smc_bound(target, prompts, policy, truth, options.decode)
    return {**facts, **judged(policy, truth)}


def smc_bound(target: Any, prompts: Any, policy: Any, truth: tuple[ex.Exact, ...], particles: int) -> float:
    """log Z - E log Zhat with the policy as the proposal: at least the KL of what is returned from p*."""
    engine = tl.SMC(particles=particles)
    gaps = []
    for repeat in range(REPEATS):
        rng = torch.Generator().manual_seed(repeat)
        weighted = engine.sample(target, prompts, proposal=policy, rng=rng)
        gaps += [e.log_z - z.value for e, z in zip(truth, weighted.log_z or (), strict=True)]
    return sum(gaps) / len(gaps)


if __name__ == "__main__":
    main()
