"""Rewards that run beside the next draws: training one update behind, with what that costs put right."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from tiltlm.errors import TiltWarning
from tiltlm.evidence.running.tally import Tally, counting, report
from tiltlm.inference.source import Batch, Memory, Origin, Stream, Turn
from tiltlm.mismatch import ENOUGH, Mismatch, Tolerance
from tiltlm.protocols import Claim, Policy
from tiltlm.records import Draws, Likelihood, Prompts, Scored
from tiltlm.store import scored_of, tensors_of
from tiltlm.target import Target


@runtime_checkable
class LooksAhead(Protocol):
    """A stream that works on the next step while this one is under way."""

    def expect(self, turn: Turn | None) -> None:
        """Say what the step after this one will ask; None after the last."""
        ...

    def settle(self) -> None:
        """Wait until no reward runs beside the caller, who is about to ask for rewards as well."""
        ...


@dataclass(frozen=True)
class Ahead:
    """Draws of the policy before its last update, judged while the policy is updated and draws the next.

    For rewards that take as long as drawing: a judge behind an API, programs that are run. In step k the policy draws for step
    k + 1, then the rewards of step k are waited for, then comes the update; the rewards of k + 1 have the update and the draws of
    k + 2 to run beside. A reward that reads the very model that is trained waits for its turn with it, and gains little.

    Attributes:
        reweigh: let the draws count for the policy as it is, by the weight q / mu of each completion, truncated
            (`tiltlm.mismatch`); it takes one more pass of the policy over them,
            which a reward that is faster than that does not repay. False leaves them draws of the law that drew
            them, for engines whose claim covers that.
    """

    reweigh: bool = True
    one_process: ClassVar = True

    @staticmethod
    def for_claim(claim: Claim) -> Ahead:
        """As an engine with this claim needs it."""
        return Ahead(reweigh=claim.data == "on-policy")

    @property
    def origin(self) -> Origin:
        return "policy" if self.reweigh else "other"

    def open(self, target: Target, policy: Policy, prompts: Prompts, seed: int) -> Stream:
        return _Ahead(self, target, policy, prompts)


class _Ahead:
    def __init__(self, choice: Ahead, target: Target, policy: Policy, prompts: Prompts) -> None:
        self.choice, self.target, self.policy, self.prompts = choice, target, policy, prompts
        self.following: Turn | None = None
        self.pending: _Judging | _Judged | None = None
        self.said = False

    def expect(self, turn: Turn | None) -> None:
        self.following = turn

    def settle(self) -> None:
        if isinstance(self.pending, _Judging):
            self.pending = self.pending.finish()

    def batch(self, turn: Turn) -> Batch:
        if self.pending is None:
            self.pending = _Judging(self.target, turn, self._draw(turn))
        following = self.following
        draws = None if following is None else self._draw(following)
        self.settle()
        current = self.pending
        assert isinstance(current, _Judged)
        report(current.tally)
        self.pending = None if following is None or draws is None else _Judging(self.target, following, draws)
        scored = self._reweighed(current.scored) if self.choice.reweigh and len(current.scored) else current.scored
        return Batch(scored, scored, current.drawn)

    def again(self, batch: Batch, turn: Turn) -> Scored:
        return batch.scored

    def memory(self) -> Memory:
        self.settle()
        if not isinstance(self.pending, _Judged):
            return {}, {}
        tensors, values = tensors_of(self.pending.scored)
        return tensors, values | {"index": list(self.pending.index), "drawn": self.pending.drawn}

    def remember(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        index = [int(place) for place in values["index"]]
        scored = scored_of(tensors, values, self.prompts.select(index))
        self.pending = _Judged(index, scored, int(values["drawn"]))

    def _draw(self, turn: Turn) -> Draws:
        draw = getattr(self.policy, "draw_weighted", self.policy.draw)
        return draw(self.prompts.select(turn.index), turn.group, turn.rng)

    def _reweighed(self, scored: Scored) -> Scored:
        """Draws of the law that drew them as draws of the policy as it is, with `log_mu`."""
        draws = scored.draws
        log_mu = draws.log_q if draws.log_mu is None else draws.log_mu
        draws = replace(draws, log_q=self.policy.log_prob(draws), log_mu=log_mu, sampler="")
        self._warn(draws)
        return replace(scored, draws=draws)

    def _warn(self, draws: Draws) -> None:
        ess = Mismatch.of(draws).ess
        if self.said or len(draws) < ENOUGH or ess >= Tolerance().ess:
            return
        self.said = True
        warnings.warn(
            f"one update moved the policy so far that of the draws before it {ess:.0%} count; lower lr, or leave ahead out",
            TiltWarning,
            stacklevel=2,
        )


@dataclass(frozen=True)
class _Judged:
    """The completions of a turn, scored.

    Attributes:
        index: their prompts.
        drawn: how many were drawn, kept or not.
        tally: what their rewards cost.
    """

    index: Sequence[int]
    scored: Scored
    drawn: int
    tally: Tally = field(default_factory=Tally)


class _Judging:
    """The completions of a turn, while their evidence is asked for in a thread. There is one such thread at a time."""

    def __init__(self, target: Target, turn: Turn, draws: Draws) -> None:
        self.target, self.turn, self.draws = target, turn, draws
        self.answer: Future[tuple[Likelihood, Tally]] = Future()
        # a daemon: Ctrl-C does not wait for a judge that does not answer
        Thread(target=self._ask, name="tiltlm rewards beside", daemon=True).start()

    def finish(self) -> _Judged:
        """Wait for the evidence; the prior's log-probabilities are computed meanwhile."""
        log_prior = self.target.prior.log_prob(self.draws)
        began = time.perf_counter()
        likelihood, tally = self.answer.result()
        tally.beside = max(0.0, sum(tally.seconds.values()) - (time.perf_counter() - began))
        scored = self.target.joined(self.draws, likelihood, log_prior)
        return _Judged(self.turn.index, scored, len(self.draws), tally)

    def _ask(self) -> None:
        try:
            with counting() as tally:
                likelihood = self.target.evidence.log_likelihood(self.draws)
            self.answer.set_result((likelihood, tally))
        except BaseException as error:  # whoever waits for it raises it
            self.answer.set_exception(error)


__all__ = ["Ahead", "LooksAhead"]
