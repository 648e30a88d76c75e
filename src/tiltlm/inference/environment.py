"""The token MDP of a target as a gymnasium environment, for other libraries' agents.

import tiltlm.inference.environment
env = gymnasium.make("tiltlm/Tokens-v0", target=target, prompts=["The film was"])

An episode writes one completion. An agent that maximises the reward alone finds the best completion (beta -> 0). One that also
pays log pi(a|s) - log pi0(a|s) for every token, at temperature 1, has p* as its optimum and log Z as its value; what it needs
of the prior is in `info`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tiltlm.errors import InputError
from tiltlm.records import Prompts
from tiltlm.target import Target

try:
    import gymnasium
except ImportError as error:
    raise InputError(
        "the token environment needs gymnasium, which is not installed; run: pip install 'tiltlm[env]'"
    ) from error

ID = "tiltlm/Tokens-v0"


class TokenEnv(gymnasium.Env[Any, Any]):
    """Tokens as actions, the text so far as the state.

    Observation: `tokens`, the ids of prompt and completion so far, then zeros; and `mask`, 1 on real ones. Action: the next
    token's id. Reward: 0, and at the end the evidence r / beta, in nats. A completion that is cut at the law's
    `max_new_tokens` is an outcome like one that ends by itself, so both are `terminated` and nothing is ever `truncated`:
    an agent must not bootstrap beyond the cut.

    `info` has `log_prior`, log pi0 of the token just taken (0 after a reset); `log_prior_next`, log pi0 of every next token, as
    long as there is one; `prompt`, the prompt's number; and at the end `text` and the `rewards` by name, in their own units.

    Args:
        target: prior × evidence; the prior is one of `tiltlm.lm`.
        prompts: texts, messages, rows or `Prompts`. A reset chooses one at random, or `options={"prompt": 3}`.
        render_mode: None, or "ansi" for the completion so far as text.

    Raises:
        InputError: at the end of an episode whose completion the evidence dropped.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012  as gymnasium declares it

    def __init__(self, target: Target, prompts: Prompts | Sequence[Any], render_mode: str | None = None) -> None:
        self.target, self.render_mode = target, render_mode
        self._prior: Any = target.prior
        self._prompts = self._prior.encode(prompts)
        vocabulary = self._prior.body.vocabulary
        self._room = int(self._prompts.mask.sum(-1).max()) + self._prior.law.max_new_tokens
        self.action_space = gymnasium.spaces.Discrete(vocabulary)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "tokens": gymnasium.spaces.Box(0, vocabulary - 1, (self._room,), np.int64),
                "mask": gymnasium.spaces.MultiBinary(self._room),
            }
        )
        self._walk: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an empty completion of a prompt."""
        super().reset(seed=seed)
        number = (options or {}).get("prompt")
        self._number = int(self.np_random.integers(len(self._prompts))) if number is None else int(number)
        if not 0 <= self._number < len(self._prompts):
            raise InputError(f"prompt is {self._number}; there are {len(self._prompts)}, counted from 0")
        self._ids = self._prompts.tokens[self._number][self._prompts.mask[self._number]].tolist()
        self._walk = self._prior.walk(self._prompts.select([self._number]), 1)
        return self._observation(), self._info(0.0)

    def step(self, action: np.int64 | int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Append a token; the reward comes with the last one."""
        if self._walk is None:
            raise InputError("the episode is over, or has not begun; call reset() before step()")
        log_prior = float(self._walk.log_probs()[0, int(action)])
        self._walk.extend(torch.tensor([int(action)]), torch.tensor([True]))
        self._ids.append(int(action))
        if self._walk.live[0]:
            return self._observation(), 0.0, False, False, self._info(log_prior)
        scored = self.target.score(self._walk.draws())
        if not len(scored):
            raise InputError(
                "the evidence dropped a completion, which leaves a step without reward; use on_error='fail'"
            )
        rewards = {name: float(value[0]) for name, value in scored.rewards.items()}
        info = {"prompt": self._number, "log_prior": log_prior, "text": scored.draws.texts[0], "rewards": rewards}
        observation, self._walk = self._observation(), None
        return observation, float(scored.log_evidence[0]), True, False, info

    def render(self) -> str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The prompt and the completion so far, as text."""
        return self._prior.body.tokenizer.decode(self._ids) if self.render_mode == "ansi" else None

    def _observation(self) -> dict[str, np.ndarray]:
        tokens, mask = np.zeros(self._room, np.int64), np.zeros(self._room, np.int8)
        tokens[: len(self._ids)], mask[: len(self._ids)] = self._ids, 1
        return {"tokens": tokens, "mask": mask}

    def _info(self, log_prior: float) -> dict[str, Any]:
        ahead = self._walk.log_probs()[0].cpu().numpy()
        return {"prompt": self._number, "log_prior": log_prior, "log_prior_next": ahead}


gymnasium.register(ID, entry_point=f"{__name__}:{TokenEnv.__name__}")
