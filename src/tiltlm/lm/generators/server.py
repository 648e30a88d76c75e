"""A running `vllm serve` as a generator, over its OpenAI-compatible endpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiltlm.errors import InputError, at_least_one, not_negative
from tiltlm.lm.generators.protocol import Continuation, Request, Terms
from tiltlm.lm.generators.weights import BASE, Weights, forget
from tiltlm.mismatch import Tolerance

if TYPE_CHECKING:
    from tiltlm.lm.view import View

SERVE = "vllm serve MODEL --enable-lora --max-lora-rank 16 --logprobs-mode processed_logprobs --dtype bfloat16"
ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
DEVELOP = "VLLM_SERVER_DEV_MODE=1"


class VLLMServer:
    """Draws completions from a `vllm serve` that runs here or on another machine.

    Prompts go as token ids to `/v1/completions`, and the sampled tokens come back with their log-probabilities. When the policy has
    moved, its new weights are written into `folder`, which the server reads too: an adapter under a name of its own
    (`/v1/load_lora_adapter`), all weights in place (`/collective_rpc`, `reload_weights`). One server serves one run.

    Args:
        url: where it listens, such as http://host:8000.
        model: the name under which it serves the base model; its only one by default.
        folder: where weights are written for it; a temporary folder by default, which a server on this machine can read.
        remote_folder: the same folder as the server sees it, where that is another path.
        key: environment variable that holds the API key; a server without one needs none.
        concurrency: requests at a time; one asks for all completions of a prompt.
        timeout: seconds for one request.
        retries: further tries after a refused, failed or late request, with exponential back-off.
        tolerance: how far its law may be from ours.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        folder: str | Path | None = None,
        remote_folder: str | Path | None = None,
        key: str = "VLLM_API_KEY",
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 2,
        tolerance: Tolerance = Tolerance(),
    ) -> None:
        self.url, self.model, self.key = url.rstrip("/").removesuffix("/v1"), model, key
        self.concurrency, self.timeout, self.retries, self.tolerance = concurrency, timeout, retries, tolerance
        at_least_one(self, "concurrency")
        not_negative(self, "retries")
        if not url.startswith(("http://", "https://")):
            raise InputError(f"generator is {url!r}; give the address of a vllm serve, such as http://localhost:8000")
        if not timeout > 0:
            raise InputError(f"timeout is {timeout}; give the seconds that a request may take, for example 600")
        if remote_folder is not None and folder is None:
            raise InputError(
                f"remote_folder is {str(remote_folder)!r} without a folder; give the same folder's path here"
            )
        self._folder = None if folder is None else Path(folder)
        self._remote = None if remote_folder is None else Path(remote_folder)
        self._adapter: str | None = None  # the one that is loaded there
        self._in_place = BASE  # whose weights the base model has

    def __str__(self) -> str:
        return f"the generator at {self.url}"

    # --- weights ---

    def serve(self, view: View) -> str:
        weights = Weights.of(view)
        if weights.kind == "adapter":
            self._reload(view, Weights(BASE, "base"))
            self._load(view, weights)
            return weights.name
        self._reload(view, weights)
        return self._base

    def _load(self, view: View, weights: Weights) -> None:
        if weights.name == self._adapter:
            return
        path = weights.write(view, self._root)
        if weights.name not in self._models():  # another run may have left the same weights there
            body = {"lora_name": weights.name, "lora_path": self._there(path)}
            self._call("/v1/load_lora_adapter", body, f"start it with {ALLOW} {SERVE}")
        if self._adapter is not None:  # the new one is there: the old one is not needed any more
            self._call("/v1/unload_lora_adapter", {"lora_name": self._adapter}, "restart it")
            forget(self._root, self._adapter)
        self._adapter = weights.name

    def _reload(self, view: View, weights: Weights) -> None:
        """Give the base model other weights, or its own again."""
        if weights.name == self._in_place:
            return
        path = self._models()[self._base] if weights.kind == "base" else self._there(weights.write(view, self._root))
        remedy = (
            f"start it with {DEVELOP} vllm serve MODEL, and only where nobody else can reach it; or train an adapter"
        )
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}, remedy)
        self._call("/reset_prefix_cache", {}, remedy)
        forget(self._root, self._in_place)
        self._in_place = weights.name

    @cached_property
    def _root(self) -> Path:
        return self._folder or Path(tempfile.mkdtemp(prefix="tiltlm-generator-"))

    def _there(self, path: Path) -> str:
        return str(self._remote / path.name if self._remote else path.resolve())

    @cached_property
    def _base(self) -> str:
        """The name of the base model."""
        served = self._models()
        if self.model is not None and self.model not in served:
            raise InputError(
                f"generator serves {', '.join(served) or 'nothing'}, not model {self.model!r}; name one of them"
            )
        if self.model is None and not served:
            raise InputError(f"{self} serves no model; start it with {SERVE}")
        return self.model or next(iter(served))

    def _models(self) -> Mapping[str, str]:
        """What is served, adapters too, by name: and its folder or hub id. The base model comes first."""
        found = self._call("/v1/models", None, f"start it with {SERVE}")
        try:
            cards = sorted(found["data"], key=lambda card: card.get("parent") is not None)
            return {str(card["id"]): str(card.get("root") or card["id"]) for card in cards}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self} lists no models at /v1/models; start it with {SERVE}") from error

    # --- completions ---

    def generate(self, requests: Sequence[Request], terms: Terms) -> list[tuple[Continuation, ...]]:
        _ = self._client
        with ThreadPoolExecutor(min(self.concurrency, max(1, len(requests)))) as pool:
            return list(pool.map(lambda request: self._continued(request, terms), requests))

    def _continued(self, request: Request, terms: Terms) -> tuple[Continuation, ...]:
        law = terms.law
        body = {
            "model": terms.weights,
            "prompt": list(request.tokens),
            "n": request.n,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            "temperature": law.temperature,
            "top_k": law.top_k or 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(law.stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": list(terms.eos),
            "ignore_eos": True,  # its idea of them; ours are the line above
            "logprobs": 0,
            "return_token_ids": True,
        }
        found = self._call(
            "/v1/completions", body, "see that it serves this model, and has room for prompt and completion"
        )
        try:
            choices = sorted(found["choices"], key=lambda choice: choice["index"])
            parts = tuple(
                Continuation(tuple(map(int, c["token_ids"])), tuple(map(float, c["logprobs"]["token_logprobs"])))
                for c in choices
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self} gave completions without token ids or log-probabilities ({type(error).__name__}: {error}); it must be vLLM "
                f"0.10 or newer, started as {SERVE}"
            ) from error
        if len(parts) != request.n or any(len(part.tokens) != len(part.log_mu) for part in parts):
            raise InputError(
                f"{self} gave {len(parts)} completions of {request.n}, or not a log-probability for each token; update it"
            )
        return parts

    # --- the wire ---

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise InputError(
                "generator is a server, which needs openai, which is not installed; run: pip install 'tiltlm[server]'"
            ) from error
        secret = os.environ.get(self.key) or "none"
        return openai.OpenAI(base_url=self.url, api_key=secret, timeout=self.timeout, max_retries=self.retries)

    def _call(self, path: str, body: Mapping[str, Any] | None, remedy: str) -> Any:
        """The answer to a request, as JSON if it is any.

        Raises:
            InputError: naming the address, what went wrong, and the remedy.
        """
        import openai

        client = self._client
        try:
            if body is None:
                return client.get(path, cast_to=object)
            return client.post(path, body=dict(body), cast_to=object)
        except openai.APITimeoutError as error:
            raise InputError(
                f"{self} did not answer {path} within {self.timeout:g} s; see how busy it is, or raise timeout"
            ) from error
        except openai.APIConnectionError as error:
            raise InputError(f"{self} cannot be reached ({error.__cause__ or error}); {remedy}") from error
        except openai.APIStatusError as error:
            raise InputError(f"{self} refused {path} ({error.status_code}: {_reason(error)}); {remedy}") from error

    def close(self) -> None:
        """Remove what was written for the server, if it was written to a temporary folder."""
        if self._folder is None and "_root" in self.__dict__:
            shutil.rmtree(self._root, ignore_errors=True)


def _reason(error: Any) -> str:
    """What the server says, in a line."""
    body = error.body if isinstance(error.body, Mapping) else {}
    return " ".join(str(body.get("message") or body.get("detail") or error.message).split())[:240]
