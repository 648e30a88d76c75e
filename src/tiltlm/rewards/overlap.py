"""Task metrics for longer texts: BLEU and chrF by sacrebleu, ROUGE-L by rouge-score. All in [0, 1], their usual figure / 100."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.rewards.optional import require
from tiltlm.rewards.references import AgainstReference


@dataclass(frozen=True)
class _SacreBLEU(AgainstReference):
    """A metric of sacrebleu, of a sentence as a reward and of a corpus as evaluation."""

    extent: ClassVar[Bounds] = (0.0, 1.0)

    @property
    @abstractmethod
    def _metric(self) -> Any:
        """sacrebleu's, of a sentence."""

    @property
    def _corpus_metric(self) -> Any:
        return self._metric

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        pairs = zip(texts, self.references(columns), strict=True)
        return [_share(self._metric.sentence_score(text, references).score) for text, references in pairs]

    def corpus(self, texts: Sequence[str], **columns: Sequence[Any]) -> dict[str, float]:
        """The corpus's score, which is not the mean of its sentences'."""
        return {self.label: _share(self._corpus_metric.corpus_score(list(texts), self._streams(columns)).score)}

    def summable(
        self, texts: Sequence[str], **columns: Sequence[Any]
    ) -> tuple[Float[Tensor, "B S"], Callable[[Float[Tensor, " S"]], dict[str, float]]]:
        """Each text's counts of n-grams, and the corpus's score from their sums: what a bootstrap adds up in another way each time."""
        metric = self._corpus_metric
        # sacrebleu's own bootstrap goes the same way, and has no public one that compares two systems on the same resamples
        counts = torch.tensor(
            metric._extract_corpus_statistics(list(texts), self._streams(columns)), dtype=torch.float64
        )
        return counts, lambda sums: {self.label: _share(metric._compute_score_from_stats(sums.long().tolist()).score)}

    def _streams(self, columns: dict[str, Sequence[Any]]) -> list[list[str | None]]:
        """The references as sacrebleu has them, all first ones, all second ones, …"""
        references = self.references(columns)
        most = max(map(len, references))
        return [[some[k] if k < len(some) else None for some in references] for k in range(most)]


@dataclass(frozen=True)
class BLEU(_SacreBLEU):
    """BLEU against the references (Papineni et al. 2002; sacrebleu, Post 2018).

    Of a sentence with the effective order, so that a short one is not 0 for want of 4-grams; of a corpus as sacrebleu reports it.

    Attributes:
        tokenize: sacrebleu's tokenisation, such as 13a, intl, char, zh.
    """

    tokenize: str = "13a"

    @property
    def _metric(self) -> Any:
        return self._made

    @cached_property
    def _made(self) -> Any:
        metric = require("sacrebleu", "sacrebleu", self.label).BLEU
        if self.tokenize not in metric.TOKENIZERS:
            raise InputError(f"tokenize is {self.tokenize!r}; sacrebleu has {', '.join(metric.TOKENIZERS)}")
        return metric(effective_order=True, tokenize=self.tokenize)

    @property
    def _corpus_metric(self) -> Any:
        return require("sacrebleu", "sacrebleu", self.label).BLEU(tokenize=self.tokenize)


@dataclass(frozen=True)
class CHRF(_SacreBLEU):
    """chrF, the F-score over character n-grams (Popović 2015), by sacrebleu.

    Attributes:
        word_order: n-grams of words beside it; 2 is chrF++.
    """

    word_order: int = 0

    @property
    def _metric(self) -> Any:
        return self._made

    @cached_property
    def _made(self) -> Any:
        return require("sacrebleu", "sacrebleu", self.label).CHRF(word_order=self.word_order)


@dataclass(frozen=True)
class RougeL(AgainstReference):
    """ROUGE-L, the F-score of the longest common subsequence of words (Lin 2004), by rouge-score.

    Attributes:
        stem: compare the words' stems (Porter's); English.
    """

    extent: ClassVar[Bounds] = (0.0, 1.0)
    stem: bool = False

    @cached_property
    def _scorer(self) -> Any:
        module = require("rouge_score.rouge_scorer", "rouge-score", self.label)
        return module.RougeScorer(["rougeL"], use_stemmer=self.stem)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return self.best(texts, columns, lambda text, ref: float(self._scorer.score(ref, text)["rougeL"].fmeasure))


def _share(percent: float) -> float:
    return min(1.0, max(0.0, percent / 100))
