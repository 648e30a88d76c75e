"""`fit`: the one training loop. draw → score → loss → step, for any training engine.

All randomness of a step is a function of (seed, step), so a resumed run needs no generator state and goes on bit
for bit; and the loss is a function of log-probabilities, so a batch that does not fit into memory is cut into
micro-batches without the engine knowing, and without changing its gradient.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tiltlm.diagnostics.certificate import Certificate, certify
from tiltlm.errors import InputError, at_least_one, not_negative
from tiltlm.evidence.gold import Gold
from tiltlm.evidence.running.tally import SlowRewardWatch, counting
from tiltlm.inference import checkpoint
from tiltlm.inference.accumulate import accumulate
from tiltlm.inference.fitting import MicroBatches
from tiltlm.inference.monitor import Metrics, Monitor
from tiltlm.inference.optimise import Optimiser, Schedule, learning_rate
from tiltlm.inference.source import Source, batch_of, default_source, require_sound
from tiltlm.inference.training.policy_gradients.rloo import RLOO
from tiltlm.inference.watch import Watch
from tiltlm.lm.adapters import LoRA
from tiltlm.protocols import Policy, TrainingEngine
from tiltlm.records import POLICY_FIELDS, Prompts, Scored
from tiltlm.seeds import generator
from tiltlm.target import Target, require_finite, require_trainable

SAME_RUN = ("seed", "steps", "batch", "lr", "engine_lr", "schedule", "warmup", "clip", "weight_decay")
"""Settings that a resumed run must share with the one it goes on from."""

MEANINGFUL = 1e-3
"""Nats of ELBO that count as progress; certificates share their random numbers, so that smaller gains are rounding."""


@dataclass(frozen=True)
class Training:
    """Settings of the loop; what belongs to a method is on its engine.

    Attributes:
        steps: updates of the weights (times the engine's `updates` a batch).
        batch: prompts a step.
        lr: learning rate of AdamW, after a warm-up of `warmup` steps and under `schedule`.
        engine_lr: the same for what is trained beside the language model: an engine's log Z, value heads.
        clip: largest norm of the gradient.
        micro_tokens: most completion tokens in one pass with gradient; bounds memory, not the result.
        certify_every: certificate every so many steps, 0 for none.
        certify_samples: draws a prompt in it.
        patience: stop after so many certificates without a better ELBO, 0 to go on to the end.
        seconds: stop after so many seconds of training, 0 for no limit; the learning rate then falls with the time.
        checkpoint_every: checkpoint every so many steps; with `out` only.
        gold_every: judge the fresh draws by the held-out reward every so many steps, where there is one.
        stop_on_hacking: stop when the alarm says that the reward rises while the held-out one falls.
    """

    steps: int = 40
    batch: int = 4
    lr: float = 3e-4
    engine_lr: float = 1e-2
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 2
    schedule: Schedule = "linear"
    micro_tokens: int = 1024
    certify_every: int = 0
    certify_samples: int = 16
    patience: int = 0
    seconds: float = 0.0
    checkpoint_every: int = 10
    gold_every: int = 1
    stop_on_hacking: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "batch", "micro_tokens", "checkpoint_every", "certify_samples", "gold_every")
        not_negative(self, "warmup", "certify_every", "patience", "seconds", "weight_decay")
        for name, example in (("lr", "3e-4"), ("engine_lr", "0.01")):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be between 0 and 1, for example {example}")
        if not self.clip > 0:
            raise InputError(f"clip is {self.clip}; it must be positive, for example 1.0")
        if self.schedule not in get_args(Schedule):
            raise InputError(f"schedule is {self.schedule!r}; choose {', '.join(get_args(Schedule))}")
        if self.patience and not self.certify_every:
            raise InputError(
                f"patience is {self.patience}, but certify_every is 0, so there is no ELBO to wait for; set certify_every"
            )


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

    Returns:
        The policy, trained.

    Raises:
        InputError: for settings that make no sense, a source that the engine's claim does not cover, or a checkpoint that is
            not of this run.
    """
    engine = engine or RLOO()
    settings = replace(settings or Training(), **changes)
    source = source or default_source(engine.claim)
    require_sound(engine, source)
    encoded = target.prior.encode(prompts)
    made_of = ""
    if policy is None:
        policy = _new_policy(target, engine, lora, start, settings.seed)
        made_of = f"{lora}" if start is None else f"started from {start}"
    watch = Watch(gold, settings.gold_every, settings.steps) if gold is not None else None
    folder = Path(out) if out else None
    loop = _Loop(target, encoded, engine, source, policy, settings, folder, prior_draws, made_of, watch)
    if loop.out is not None and not resume:
        refuse_earlier(loop.out)
    monitor = monitor or Monitor(out=Path(out) if out else None)
    with monitor:
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
    ) -> None:
        self.made_of, self.watch = made_of, watch
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
        self.best_elbo, self.stale, self.slow = -float("inf"), 0, SlowRewardWatch()
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
            monitor.log(done, metrics)
            last = done == self.settings.steps or self._should_stop()
            if self.out and (done % self.settings.checkpoint_every == 0 or last):
                self._save(done, monitor)
            if last:
                break

    def _step(self, step: int) -> Metrics:
        began = time.perf_counter()
        index = batch_of(step, len(self.prompts), self.settings.batch, self.settings.seed)
        rng = generator(self.settings.seed, "draw", step)
        with counting() as tally:
            batch = self.stream.batch(index, self.engine.group, rng)
        scored, fresh = batch.scored, batch.fresh or batch.scored
        if not len(scored):
            raise InputError("every completion of a step was dropped: the reward judged none; mend it, then --resume")
        require_finite(scored)
        drawn = time.perf_counter()
        if hasattr(self.engine, "observe"):
            self.engine.observe(scored, self.state)  # pyright: ignore[reportAttributeAccessIssue]
        loss, info, norm = torch.zeros(()), {}, 0.0
        for update in range(self.engine.updates):
            learned = scored if update == 0 else self.stream.again(batch, index, rng)
            fresh_only = update == 0 and self.source.origin == "policy"
            work = partial(
                accumulate, self.policy, self.engine, learned, self.state, optimiser=self.optimiser, fresh=fresh_only
            )
            loss, info = self.micro.run(work, self.optimiser.forget, int(learned.draws.lengths.max()))
            factor = learning_rate(self._place(step), self.settings.steps, self.settings.warmup, self.settings.schedule)
            norm = self.optimiser.step(self.settings.clip, factor)
            if hasattr(self.policy, "refresh_target"):  # a critic's target network
                self.policy.refresh_target(getattr(self.engine, "target_rate", 1.0))  # pyright: ignore
            require_trainable(norm, scored)
        ended = time.perf_counter()
        self.slow.look(tally, ended - began)
        tokens = int(fresh.draws.mask.sum())
        reward = self.target.beta * fresh.log_evidence.double()
        kl = (fresh.draws.log_q.double() - fresh.log_prior.double()).sum(-1)
        whole = len(index) >= len(self.prompts)
        parts = {f"reward/{name}": float(value.mean()) for name, value in fresh.rewards.items()}
        return {
            "reward": float(reward.mean()),
            "kl_prior": float(kl.mean()) if batch.fresh is not None else None,  # of others' draws it says nothing
            "elbo": float(fresh.log_weight.double().mean()) if batch.fresh is not None else None,
            "loss": float(loss),
            "grad_norm": norm,
            "length": float(fresh.draws.lengths.double().mean()),
            "truncated": float((~fresh.draws.ended).double().mean()),
            "dropped": fresh.dropped,
            "drawn": batch.drawn,
            "tokens_per_second": tokens / (ended - began),
            "seconds": ended - began,
            "seconds_draw": drawn - began,
            "seconds_update": ended - drawn,
            **tally.metrics(),
            **parts,
            **(self.watch.measure(step + 1, self.target.beta, batch.fresh, whole) if self.watch else {}),
            **{f"engine/{name}": float(value.double().mean()) for name, value in info.items()},
        }

    def _certify(self) -> Certificate:
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
        late = 0 < self.settings.seconds <= time.perf_counter() - self.began
        hacked = self.settings.stop_on_hacking and self.watch is not None and self.watch.alarm is not None
        return hacked or late or 0 < self.settings.patience <= self.stale

    def _place(self, step: int) -> float:
        """How far the run is, in steps: by the count, or by the clock if that says more."""
        s = self.settings
        elapsed = (time.perf_counter() - self.began) / s.seconds if s.seconds else 0.0
        return max(float(step), min(1.0, elapsed) * s.steps)

    def _identity(self) -> dict[str, Any]:
        weights = self.optimiser.parameters
        return {
            "model": self.policy.fingerprint(),
            "prompts": self.prompts.fingerprint(),
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
        checkpoint.write(self.out / "checkpoints", checkpoint.Checkpoint(step, tensors, values))

    def _restore(self, monitor: Monitor, resume: bool) -> int:
        if self.out is None:
            if resume:
                raise InputError("resume is on, but there is no out folder to resume from; give out")
            return 0
        folder = self.out / "checkpoints"
        saved = checkpoint.latest(folder) if resume else None
        if saved is None:
            monitor.rewind(0)  # of a run that ended before its first checkpoint
            return 0
        for name, value in self._identity().items():
            before = saved.values["identity"].get(name)
            if before != value:
                raise InputError(
                    f"the checkpoint in {folder} is of another run: its {name} is {before!r}, now it is {value!r}; resume with "
                    f"the same settings, or choose another out folder"
                )
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


def _name(thing: Any) -> str:
    """A setting as text that is the same in another process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def refuse_earlier(out: Path) -> None:
    """Raise if a run in this folder has got somewhere.

    Raises:
        InputError: if it holds checkpoints, which a new run would replace.
    """
    if checkpoint.steps(out / "checkpoints"):
        raise InputError(
            f"out {str(out)!r} holds checkpoints of an earlier run; go on with --resume, or choose another folder"
        )


__all__ = ["Training", "fit", "refuse_earlier"]
