"""vLLM in this process as a generator."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiltlm.errors import InputError
from tiltlm.lm.generators.protocol import Continuation, Request, Terms
from tiltlm.lm.generators.weights import BASE, Weights, forget
from tiltlm.mismatch import Tolerance

if TYPE_CHECKING:
    from tiltlm.lm.view import View

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that vLLM can be started with."""


@dataclass(frozen=True)
class _Engine:
    """A started vLLM: its module, its LLM, and the largest rank of an adapter that it takes."""

    module: Any
    llm: Any
    rank: int


class VLLM:
    """Draws completions with vLLM in this process, beside the model that is trained.

    It starts at the first draw, and holds a copy of the base model of its own. A policy's adapter goes to it as a LoRARequest with a new
    id whenever it has changed; all weights by `reload_weights`. It has to be started with room for adapters, so one that was started for
    the prior alone is started again for a policy.

    Args:
        model: folder or hub id of the base model; the one that the prior was loaded from by default.
        folder: where weights are written for it; a temporary folder by default.
        tolerance: how far its law may be from ours.
        options: further arguments of `vllm.LLM`, such as gpu_memory_utilization or max_model_len.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        folder: str | Path | None = None,
        tolerance: Tolerance = Tolerance(),
        **options: Any,
    ) -> None:
        self.model, self.tolerance, self.options = None if model is None else str(model), tolerance, options
        self._folder = None if folder is None else Path(folder)
        self._engine: _Engine | None = None
        self._in_place = BASE  # whose weights the base model has
        self._adapter: tuple[str, int] | None = (
            None  # the one that is loaded: its name, and its id, which no other ever had
        )

    def __str__(self) -> str:
        return "vLLM in this process"

    def serve(self, view: View) -> str:
        weights = Weights.of(view)
        llm = self._started(view, weights.rank)
        self._reload(llm, view, Weights(BASE, "base") if weights.kind == "adapter" else weights)
        if weights.kind != "adapter":
            return BASE
        if self._adapter is None or weights.name != self._adapter[0]:
            weights.write(view, self._root)
            name, number = self._adapter or ("", 0)
            if number:
                llm.llm_engine.remove_lora(number)
                forget(self._root, name)
            self._adapter = weights.name, number + 1
        return weights.name

    def _reload(self, llm: Any, view: View, weights: Weights) -> None:
        """Give the base model other weights, or its own again."""
        if weights.name == self._in_place:
            return
        path = self._source(view) if weights.kind == "base" else str(weights.write(view, self._root))
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        llm.reset_prefix_cache()
        forget(self._root, self._in_place)
        self._in_place = weights.name

    def generate(self, requests: Sequence[Request], terms: Terms) -> list[tuple[Continuation, ...]]:
        assert self._engine is not None
        vllm, adapter = self._engine.module, None
        if terms.weights != BASE:
            assert self._adapter is not None
            lora = importlib.import_module("vllm.lora.request")
            adapter = lora.LoRARequest(*self._adapter, str(self._root / terms.weights))
        parameters = [
            vllm.SamplingParams(
                n=request.n,
                seed=request.seed,
                max_tokens=request.max_tokens,
                temperature=terms.law.temperature,
                top_k=terms.law.top_k or 0,
                stop=list(terms.law.stop),
                include_stop_str_in_output=True,
                stop_token_ids=list(terms.eos),
                ignore_eos=True,  # its idea of them; ours are the line above
                logprobs=0,
                detokenize=bool(terms.law.stop),
            )
            for request in requests
        ]
        prompts = [vllm.TokensPrompt(prompt_token_ids=list(request.tokens)) for request in requests]
        try:
            outputs = self._engine.llm.generate(prompts, parameters, use_tqdm=False, lora_request=adapter)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{self} cannot draw ({_line(error)}); lower max_new_tokens, shorten the prompts, or give it another max_model_len"
            ) from error
        return [tuple(_continuation(part) for part in output.outputs) for output in outputs]

    def _started(self, view: View, rank: int) -> Any:
        """The engine, with room for an adapter of this rank."""
        if self._engine is not None and rank <= self._engine.rank:
            return self._engine.llm
        self._stop()
        room = next((most for most in RANKS if rank <= most), None) if rank else 0
        if room is None:
            raise InputError(f"lora_r is {rank}, and vLLM takes adapters up to rank {RANKS[-1]}; lower it")
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # a process of its own could not be started from a script
        try:
            vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise InputError(
                f"generator is vllm, which is not installed here ({_line(error)}); run: pip install 'tiltlm[vllm]', or give the address "
                f"of a running vllm serve"
            ) from error
        lora = {"enable_lora": True, "max_lora_rank": room, "max_loras": 1} if room else {}
        settings = {
            "model": self._source(view),
            "dtype": str(view.body.model.dtype).removeprefix("torch."),
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # none of the model's own habits of sampling
            "disable_log_stats": True,
            **lora,
            **self.options,
        }
        try:
            llm = vllm.LLM(**settings)
        except Exception as error:  # whatever vLLM raises for a model that it cannot run
            raise InputError(
                f"vLLM cannot serve model {settings['model']!r} ({_line(error)}); leave generator out"
            ) from error
        self._engine = _Engine(vllm, llm, room)
        return llm

    def _source(self, view: View) -> str:
        from tiltlm.lm.load import model_source

        return self.model or model_source(view.body.name)

    @cached_property
    def _root(self) -> Path:
        return self._folder or Path(tempfile.mkdtemp(prefix="tiltlm-generator-"))

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.llm.llm_engine.engine_core.shutdown()
            self._engine, self._in_place, self._adapter = None, BASE, None
            gc.collect()

    def close(self) -> None:
        """Stop the engine, and remove what was written for it."""
        self._stop()
        if self._folder is None and "_root" in self.__dict__:
            shutil.rmtree(self._root, ignore_errors=True)
            del self._root


def _continuation(part: Any) -> Continuation:
    tokens = tuple(int(token) for token in part.token_ids)
    return Continuation(tokens, tuple(known[t].logprob for t, known in zip(tokens, part.logprobs, strict=True)))


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__)[:240]
