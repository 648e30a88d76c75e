"""`fit`: the one training loop. draw → score → loss → step, for any training engine.

All randomness of a step is a function of (seed, step), so a resumed run needs no generator state and goes on bit
for bit; and the loss is a function of log-probabilities, so a batch that does not fit into memory is cut into
micro-batches without the engine knowing, and without changing its gradient.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm.diagnostics.certificate import Certificate, certify
from tiltlm.errors import InputError
from tiltlm.evidence.gold import Gold, as_gold
from tiltlm.evidence.running.tally import SlowRewardWatch, counting, merged
from tiltlm.inference import checkpoint
from tiltlm.inference.accumulate import accumulate
from tiltlm.inference.ahead import LooksAhead
from tiltlm.inference.divided import DividedEvidence, divided, divided_update, require_divisible, require_enough
from tiltlm.inference.fitting import MicroBatches, recomputing
from tiltlm.inference.monitor import Metrics, Monitor
from tiltlm.inference.optimise import Optimiser, learning_rate
from tiltlm.inference.settings import Training
from tiltlm.inference.source import Batch, Source, Turn, batch_of, default_source, require_sound
from tiltlm.inference.training.policy_gradients.rloo import RLOO
from tiltlm.inference.watch import EqualRewardsWatch, Watch
from tiltlm.lm.adapters import LoRA
from tiltlm.mismatch import Mismatch
from tiltlm.protocols import Policy, TrainingEngine
from tiltlm.records import POLICY_FIELDS, Info, Prompts, Scored
from tiltlm.seeds import generator
from tiltlm.target import Target, require_finite, require_trainable
from tiltlm.world import ALONE, World, asked_to_shard, join

SAME_RUN = ("seed", "steps", "batch", "lr", "engine_lr", "schedule", "warmup", "clip", "weight_decay")
"""Settings that a resumed run must share with the one it goes on from."""

MEANINGFUL = 1e-3
"""Nats of ELBO that count as progress; certificates share their random numbers, so that smaller gains are rounding."""


def fit(
    target: Target,
    prompts: Prompts | Sequence[Any],
    engine: TrainingEngine[Any] | None = None,
    *,
    source: Source | None = None,
    policy: Policy | None = None,
    lora: LoRA | None = LoRA(),
    start: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    monitor: Monitor | None = None,
    prior_draws: Scored | None = None,
    gold: Gold | None = None,
    settings: Training | None = None,
    **changes: Any,
) -> Any:
    """Train a policy towards the posterior.

    Args:
        engine: how; `RLOO()` by default.
        source: where the completions come from; by default fresh draws of whatever the engine's claim asks for. `Replay()`
            reuses earlier draws, `Pool(…)` the plan's, `Decoded(Rejection())` exact samples, `Given(…)` a data set.
        policy: the policy to train, instead of a new one made from the prior with `lora` and `start`.
        lora: the adapter to train; None trains all weights, or of a critic the heads alone, on frozen features.
        start: folder of an adapter, or of a critic, to start from. The KL's reference remains the target's prior.
        out: folder for checkpoints and `metrics.jsonl`; nothing is written without it.
        resume: go on from the newest whole checkpoint in `out`.
        monitor: where progress and metrics go; a progress bar by default.
        prior_draws: the plan's draws, which save the certificate its exact samples.
        gold: a held-out reward, evidence or function, that judges the fresh draws and is never trained on; logged as `gold`
            beside `reward`, and one TiltWarning says when the one rises while the other falls.
        settings: see `Training`; `changes` are single fields of it.

    Where a launcher started several processes, they share the work, and end with the same policy as one would; see
    docs/devices.md.

    Returns:
        The policy, trained.

    Raises:
        InputError: for settings that make no sense, a source that the engine's claim does not cover, or a checkpoint that is
            not of this run.
    """
    engine = engine or RLOO()
    if not hasattr(engine, "claim"):
        raise InputError(f"engine is {engine!r}; give one such as RLOO()")
    settings = replace(settings or Training(), **changes)
    source = source or default_source(engine.claim)
    require_sound(engine, source)
    encoded = target.prior.encode(prompts)
    made_of = ""
    if policy is None:
        policy = _new_policy(target, engine, lora, start, settings.seed)
        made_of = f"{lora}" if start is None else f"started from {start}"
    folder, world = Path(out) if out else None, join()
    shared, trained, shard = target, policy, False
    if world.size > 1:
        require_enough(world, settings.batch, len(encoded))
        shard = settings.shard or asked_to_shard()
        require_divisible(source, world, shard)
        shared, trained = divided(target, policy, world, shard)
        judge: Any = None if gold is None else DividedEvidence(as_gold(gold), world)
        gold = judge
    watch = Watch(gold, settings.gold_every, settings.steps) if gold is not None else None
    loop = _Loop(shared, encoded, engine, source, trained, settings, folder, prior_draws, made_of, watch, world)
    if loop.out is not None and not resume:
        checkpoint.refuse_earlier(loop.out)
    monitor = (monitor or Monitor(out=folder)) if world.main else Monitor(quiet=True)
    with ExitStack() as stack:
        stack.enter_context(recomputing(policy, settings, shard))
        world.each(lambda: stack.enter_context(monitor))
        loop.run(monitor, resume)
    return policy


def _new_policy(
    target: Target, engine: TrainingEngine[Any], lora: LoRA | None, start: str | Path | None, seed: int
) -> Policy:
    """What the engine trains: a policy, with a value head if its loss reads one, or a critic."""
    needs = engine.claim.needs
    if not needs <= POLICY_FIELDS:
        return target.prior.critic(lora=lora, start=start, seed=seed)
    return target.prior.policy(lora=lora, start=start, seed=seed, values="values" in needs)


class _Loop:
    def __init__(
        self,
        target: Target,
        prompts: Prompts,
        engine: TrainingEngine[Any],
        source: Source,
        policy: Policy,
        settings: Training,
        out: Path | None,
        prior_draws: Scored | None,
        made_of: str,
        watch: Watch | None = None,
        world: World = ALONE,
    ) -> None:
        self.made_of, self.watch, self.world = made_of, watch, world
        self.target, self.prompts, self.engine, self.policy = target, prompts, engine, policy
        self.settings, self.out, self.prior_draws = settings, out, prior_draws
        self.source, self.stream = source, source.open(target, policy, prompts, settings.seed)
        self.state = engine.init(prompts)
        trained = dict(policy.named_parameters())
        if isinstance(self.state, nn.Module):
            trained |= {f"engine:{name}": value for name, value in self.state.named_parameters()}
        rates = {name: settings.engine_lr for name in trained if name.startswith(("engine:", "head:"))}
        self.optimiser = Optimiser(trained, settings.lr, settings.weight_decay, rates)
        self.micro = MicroBatches(settings.micro_tokens)
        self.best_elbo, self.stale = -float("inf"), 0
        self.slow, self.equal = SlowRewardWatch(), EqualRewardsWatch()
        self.began = time.perf_counter()

    def run(self, monitor: Monitor, resume: bool) -> None:
        first = self._restore(monitor, resume)
        monitor.start(self.settings.steps, first)
        if self._should_stop():  # a resumed run that had stopped early
            return
        for step in range(first, self.settings.steps):
            metrics = self._step(step)
            done = step + 1
            if self.settings.certify_every and done % self.settings.certify_every == 0:
                certificate = self._certify()
                metrics |= {"certificate": certificate.as_dict()}
                self._judge(certificate)
            if self.watch is not None:
                metrics |= self.watch.alarm_at(done, metrics)
            self.world.each(lambda done=done, metrics=metrics: monitor.log(done, metrics))
            last = done == self.settings.steps or self._should_stop()
            if self.out and (done % self.settings.checkpoint_every == 0 or last):
                self._save(done, monitor)
            if last:
                self._settle()
                break

    def _step(self, step: int) -> Metrics:
        began = time.perf_counter()
        turn = self._turn(step)
        if isinstance(self.stream, LooksAhead):
            self.stream.expect(self._turn(step + 1) if step + 1 < self.settings.steps else None)
        with counting() as tally:
            batch = self.stream.batch(turn)
        scored, fresh = batch.scored, batch.fresh or batch.scored
        if not len(scored):
            raise InputError("every completion of a step was dropped: the reward judged none; mend it, then --resume")
        require_finite(scored)
        self.equal.look(batch.fresh)
        drawn = time.perf_counter()
        if hasattr(self.engine, "observe"):
            self.engine.observe(scored, self.state)  # pyright: ignore[reportAttributeAccessIssue]
        loss, info, norm = torch.zeros(()), {}, 0.0
        for update in range(self.engine.updates):
            learned = scored if update == 0 else self.stream.again(batch, turn)
            loss, info, norm = self._update(learned, step, fresh=update == 0 and self.source.origin == "policy")
            require_trainable(norm, scored)
        ended = time.perf_counter()
        if self.world.size > 1:
            tally = merged(self.world.exchange(tally.sent()))
        self.slow.look(tally, ended - began)
        whole = len(turn.index) >= len(self.prompts)
        if self.watch:
            self._settle()
        return {
            **_of_draws(batch, self.target.beta),
            "loss": float(loss),
            "grad_norm": norm,
            "tokens_per_second": int(fresh.draws.mask.sum()) / (ended - began),
            "seconds": ended - began,
            "seconds_draw": drawn - began,
            "seconds_update": ended - drawn,
            **tally.metrics(),
            **{f"reward/{name}": float(value.mean()) for name, value in fresh.rewards.items()},
            **(Mismatch.of(fresh.draws).metrics() if fresh.draws.log_mu is not None else {}),
            **(self.watch.measure(step + 1, self.target.beta, batch.fresh, whole) if self.watch else {}),
            **{f"engine/{name}": float(value.double().mean()) for name, value in info.items()},
        }

    def _turn(self, step: int) -> Turn:
        s = self.settings
        index = batch_of(step, len(self.prompts), s.batch, s.seed)
        return Turn(index, self.engine.group, generator(s.seed, "draw", step))

    def _settle(self) -> None:
        if isinstance(self.stream, LooksAhead):
            self.stream.settle()

    def _update(self, scored: Scored, step: int, *, fresh: bool) -> tuple[Tensor, Info, float]:
        """One step of the optimiser; the loss, what the engine says of it, and the gradient's norm."""
        s = self.settings

        def move() -> float:
            factor = learning_rate(self._place(step), s.steps, s.warmup, s.schedule)
            return self.optimiser.step(s.clip, factor)

        if self.world.size > 1:
            loss, info, norm = divided_update(
                self.policy,  # pyright: ignore[reportArgumentType]  a DividedPolicy
                self.engine,
                scored,
                self.state,
                s.micro_tokens,
                self.optimiser,
                fresh=fresh,
                step=move,
            )
        else:
            work = partial(
                accumulate, self.policy, self.engine, scored, self.state, optimiser=self.optimiser, fresh=fresh
            )
            loss, info = self.micro.run(work, self.optimiser.forget, int(scored.draws.lengths.max()))
            norm = move()
        if hasattr(self.policy, "refresh_target"):  # a critic's target network
            self.policy.refresh_target(getattr(self.engine, "target_rate", 1.0))  # pyright: ignore
        return loss, info, norm

    def _certify(self) -> Certificate:
        self._settle()
        return certify(
            self.policy,
            self.target,
            self.prompts,
            samples=self.settings.certify_samples,
            prior_draws=self.prior_draws,
            exact_budget=0,
            seed=self.settings.seed,
        )

    def _judge(self, certificate: Certificate) -> None:
        better = certificate.elbo.value > self.best_elbo + MEANINGFUL
        self.stale = 0 if better else self.stale + 1
        self.best_elbo = max(self.best_elbo, certificate.elbo.value)

    def _should_stop(self) -> bool:
        late = 0 < self.settings.seconds <= self._elapsed()
        hacked = self.settings.stop_on_hacking and self.watch is not None and self.watch.alarm is not None
        return hacked or late or 0 < self.settings.patience <= self.stale

    def _place(self, step: int) -> float:
        """How far the run is, in steps: by the count, or by the clock if that says more."""
        s = self.settings
        elapsed = self._elapsed() / s.seconds if s.seconds else 0.0
        return max(float(step), min(1.0, elapsed) * s.steps)

    def _elapsed(self) -> float:
        """Seconds of training by the main process's clock, if the run goes by the clock."""
        return self.world.of_main(time.perf_counter() - self.began) if self.settings.seconds else 0.0

    def _identity(self) -> dict[str, Any]:
        weights = self.optimiser.parameters
        return {
            "model": self.policy.fingerprint(),
            "prompts": self.prompts.fingerprint(),
            "columns": self.prompts.column_fingerprints(),
            "law": str(self.policy.law),
            "beta": self.target.beta,
            "evidence": getattr(self.target.evidence, "identity", ""),
            "engine": _name(self.engine),
            "source": getattr(self.source, "identity", _name(self.source)),
            "policy": self.made_of,
            "weights": f"{sum(v.numel() for v in weights.values())} numbers in {len(weights)} tensors",
            "gold": self.watch.name if self.watch else None,
            **{name: getattr(self.settings, name) for name in SAME_RUN},
        }

    def _buffers(self) -> dict[str, Tensor]:
        """What the engine and the critic keep beside what the optimiser trains, such as a running log Z or a target network."""
        own = dict(self.state.named_buffers()) if isinstance(self.state, nn.Module) else {}
        others = self.policy.named_buffers() if hasattr(self.policy, "named_buffers") else {}  # pyright: ignore
        return {f"buffer.{name}": value for name, value in {**own, **others}.items()}

    def _save(self, step: int, monitor: Monitor) -> None:
        assert self.out is not None
        kept, remembered = self.stream.memory()
        tensors = self.optimiser.tensors() | self._buffers()
        tensors |= {f"stream.{name}": value for name, value in kept.items()}
        values = {
            "stream": remembered,
            "identity": self._identity(),
            "metrics_bytes": monitor.position(),
            "best_elbo": self.best_elbo if self.best_elbo > -float("inf") else None,
            "stale": self.stale,
            "gold": self.watch.state() if self.watch else None,
        }
        saved = checkpoint.Checkpoint(step, tensors, values)
        checkpoint.write(self.out / "checkpoints", saved, world=self.world)

    def _require_same_columns(self, identity: dict[str, Any], folder: Path) -> None:
        """Rewards read the columns, and what is kept of earlier steps, such as replayed draws, was judged by them.

        The reward's code is not looked at: it may be mended between two runs. Nor are the columns of a checkpoint that does not
        know them, which an earlier version wrote.
        """
        now = self.prompts.column_fingerprints()
        before = identity.get("columns", now)
        other = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if other:
            raise InputError(
                f"the checkpoint in {folder} is of another run: its prompts have other values in the column {', '.join(other)}; "
                f"resume with the same data, or choose another out folder"
            )

    def _restore(self, monitor: Monitor, resume: bool) -> int:
        if self.out is None:
            if resume:
                raise InputError("resume is on, but there is no out folder to resume from; give out")
            return 0
        folder = self.out / "checkpoints"
        saved = self.world.each(lambda: checkpoint.latest(folder, self.optimiser.shared()) if resume else None)
        if self.world.size > 1:
            seen = {"the checkpoint": None if saved is None else saved.step, **self._identity()}
            self.world.agree(seen, "give them the same settings, and an out folder that all of them see")
        if saved is None:
            monitor.rewind(0)  # of a run that ended before its first checkpoint
            return 0
        for name, value in self._identity().items():
            before = saved.values["identity"].get(name)
            if before != value and name != "columns":
                raise InputError(
                    f"the checkpoint in {folder} is of another run: its {name} is {before!r}, now it is {value!r}; resume with "
                    f"the same settings, or choose another out folder"
                )
        self._require_same_columns(saved.values["identity"], folder)
        with getattr(self.policy, "training", nullcontext)():
            self.optimiser.restore(saved.tensors)
        for name, value in self._buffers().items():
            value.copy_(saved.tensors[name])
        if saved.values["stream"]:
            kept = {name[7:]: value for name, value in saved.tensors.items() if name.startswith("stream.")}
            self.stream.remember(kept, saved.values["stream"])
        self.stale = int(saved.values["stale"])
        if self.watch is not None:
            self.watch.restore(saved.values["gold"])
        best = saved.values["best_elbo"]
        self.best_elbo = -float("inf") if best is None else float(best)
        monitor.rewind(int(saved.values["metrics_bytes"]))
        return saved.step


def _of_draws(batch: Batch, beta: float) -> Metrics:
    """What a step's completions say of the law that drew them: of the policy's fresh ones, where there are any."""
    fresh = batch.fresh or batch.scored
    drew = fresh.draws.log_q if fresh.draws.log_mu is None else fresh.draws.log_mu
    kl = (drew.double() - fresh.log_prior.double()).sum(-1)
    return {
        "reward": float((beta * fresh.log_evidence.double()).mean()),
        "kl_prior": float(kl.mean()) if batch.fresh is not None else None,  # of others' draws it says nothing
        "elbo": float((fresh.log_evidence.double() - kl).mean()) if batch.fresh is not None else None,
        "length": float(fresh.draws.lengths.double().mean()),
        "truncated": float((~fresh.draws.ended).double().mean()),
        "dropped": fresh.dropped,
        "drawn": batch.drawn,
    }


def _name(thing: Any) -> str:
    """A setting as text that is the same in another process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


__all__ = ["Training", "fit"]
