"""A language model as the judge, over an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from tiltlm.errors import InputError
from tiltlm.evidence.composition import Bounds
from tiltlm.evidence.parts import Part, text_of
from tiltlm.rewards.optional import require

TEMPLATE = """Rate how good the answer is, from {{ low }} (useless) to {{ high }} (perfect).

Question:
{{ prompt }}

Answer:
{{ completion }}

Reply with the number alone."""
"""The default question; `prompt`, `completion`, `low`, `high` and the data's columns are at hand."""


@dataclass(frozen=True)
class Judge(Part):
    """A number that a language model gives each completion, on a scale that you name. One request a completion.

    An answer in which no number on the scale is found is no reward (None), and treated as `on_error` says. The completion
    is text in the judge's prompt, and may try to talk it round: look at the best-rated ones.

    Attributes:
        model: its name at the endpoint.
        url: the endpoint, such as http://localhost:8000/v1 for vLLM; None for the openai library's default.
        template: what it is asked, as a Jinja2 template with `prompt`, `completion`, `low`, `high` and the data's columns.
        scale: the smallest and largest number it may give; the reward's bounds.
        pattern: a regular expression that finds the number, in its last group if it has one; the first match counts.
        key: the environment variable that holds the API key; a local server needs none.
        concurrency: requests at a time.
        timeout: seconds for one request.
        retries: further tries after a refused, failed or late request, with exponential back-off.
        max_tokens: longest answer of the judge.
    """

    model: str
    url: str | None = None
    template: str = TEMPLATE
    scale: tuple[float, float] = (0.0, 10.0)
    pattern: str = r"-?\d+(?:\.\d+)?"
    key: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 2
    max_tokens: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))
        if len(self.scale) != 2 or not self.scale[0] < self.scale[1]:
            raise InputError(f"scale is {self.scale}; give the smallest number first, then the largest")
        if min(self.concurrency, self.max_tokens) < 1 or self.timeout <= 0 or self.retries < 0:
            raise InputError("concurrency and max_tokens must be at least 1, timeout positive and retries not negative")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise InputError(f"url is {self.url!r}; give the endpoint's address, such as http://localhost:8000/v1")
        try:
            _ = self._template, re.compile(self.pattern)
        except TemplateError as error:
            raise InputError(f"template of {self.label!r} is no Jinja2 template ({error}); mend it") from error
        except re.error as error:
            raise InputError(
                f"pattern is {self.pattern!r}, which is no regular expression ({error}); mend it"
            ) from error

    @property
    def bounds(self) -> Bounds:
        return self.scale

    @property
    def reads(self) -> tuple[str, ...]:
        used = meta.find_undeclared_variables(SandboxedEnvironment().parse(self.template))
        return ("prompts", *sorted(used - {"prompt", "completion", "low", "high"}))

    @cached_property
    def _template(self) -> Any:
        return SandboxedEnvironment(undefined=StrictUndefined).from_string(self.template)

    @cached_property
    def _client(self) -> Any:
        openai = require("openai", "openai", self.label)
        secret = os.environ.get(self.key) or ("none" if self.url else None)
        if secret is None:
            raise InputError(f"{self.key} is not set; put the API key there, or give the url of a local server")
        return openai.OpenAI(base_url=self.url, api_key=secret, timeout=self.timeout, max_retries=self.retries)

    def score(self, texts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        questions = [self.question(text, {n: v[row] for n, v in columns.items()}) for row, text in enumerate(texts)]
        _ = self._client
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._asked, questions))

    def question(self, text: str, columns: Mapping[str, Any]) -> str:
        """What the judge is asked about one completion."""
        prompt = columns["prompts"]
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{m['role']}: {text_of([m])}" for m in prompt)
        low, high = (f"{end:g}" for end in self.scale)
        further = {name: value for name, value in columns.items() if name != "prompts"}
        return str(self._template.render(**further, prompt=prompt, completion=text, low=low, high=high))

    def _asked(self, question: str) -> float:
        openai = require("openai", "openai", self.label)
        where = self.url or "the openai library's default endpoint"
        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": question}],
                temperature=0.0,
                max_tokens=self.max_tokens,
            )
        except openai.APIConnectionError as error:  # timeouts too
            raise ConnectionError(
                f"{where} did not answer: {error} Start the server, or mend the judge's url or timeout"
            ) from error
        try:
            answer = reply.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"{where} answered, but with no chat completion; it must be OpenAI-compatible") from error
        return self.number(answer or "")  # pyright: ignore[reportReturnType]

    def number(self, answer: str) -> float | None:
        """The number in a judge's answer; None if there is none on the scale."""
        match = re.search(self.pattern, answer)
        if match is None:
            return None
        try:
            value = float(match[match.lastindex or 0])
        except (TypeError, ValueError):
            return None
        return value if self.scale[0] <= value <= self.scale[1] else None
