"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from tiltlm.errors import InputError, at_least_one, not_negative
from tiltlm.inference.optimise import Schedule


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
        gradient_checkpointing: keep of each layer only what goes in, and run it again in the backward pass: less memory for a third
            more arithmetic; for models that TiltLM runs itself (docs/models.md).
        certify_every: certificate every so many steps, 0 for none.
        certify_samples: draws a prompt in it.
        patience: stop after so many certificates without a better ELBO, 0 to go on to the end.
        seconds: stop after so many seconds of training, 0 for no limit; the learning rate then falls with the time.
        checkpoint_every: checkpoint every so many steps; with `out` only.
        gold_every: judge the fresh draws by the held-out reward every so many steps, where there is one.
        stop_on_hacking: stop when the alarm says that the reward rises while the held-out one falls.
        shard: of several processes, each keeps only its share of weights, gradients and optimiser state (FSDP2); see
            docs/devices.md. One process has nothing to share.
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
    gradient_checkpointing: bool = False
    certify_every: int = 0
    certify_samples: int = 16
    patience: int = 0
    seconds: float = 0.0
    checkpoint_every: int = 10
    gold_every: int = 1
    stop_on_hacking: bool = False
    shard: bool = False
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


__all__ = ["Training"]
