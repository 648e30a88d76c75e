"""The recipe: one schema for YAML files and command-line flags."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
UNCERTAIN = Literal[
    "evidence-average",
    "mixture-of-posteriors",
    "log-pool",
    "lower-confidence-bound",
    "worst-of-ensemble",
    "variance-penalised",
]
"""What may be made of several rewards for one thing; see `tiltlm.evidence.uncertain`."""


class MomentSpec(BaseModel):
    """A feature of texts and the mean that it should have; see `tiltlm.Moment`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: str | None = Field(None, description="the feature, file.py:function or package.module:function")
    part: dict[str, Any] | None = Field(None, description="the feature, a named part with its settings")
    mean: float = Field(allow_inf_nan=False, description="the mean over prompts that it should have")
    name: str = Field("", description="how it is called in logs; the function's name by default")
    bounds: tuple[float, float] | None = Field(None, description="smallest and largest value of the feature")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`file.py:function=0.5`, as the flag has it; or a part's name and settings beside the mean."""
        if isinstance(value, dict) and isinstance(value.get("part"), str) and "function" not in value:
            own = {key: value[key] for key in ("mean", "name", "bounds") if key in value}
            return {**own, "part": {key: value[key] for key in value if key not in own}}
        if not isinstance(value, str):
            return value
        function, equals, mean = value.rpartition("=")
        if not equals or not function:
            raise ValueError(f"moments is {value!r}; write it as file.py:function=mean")
        return {"function": function, "mean": mean}

    @model_validator(mode="after")
    def _one_feature(self) -> MomentSpec:
        if (self.function is None) is (self.part is None):
            raise ValueError("a moment has one feature; give it a function: file.py:function, or a part: NAME")
        return self

    @property
    def source(self) -> str | list[dict[str, Any]]:
        """The feature, as a reward is written."""
        return self.function if self.function is not None else [dict(self.part or {})]

    @property
    def label(self) -> str:
        if self.name:
            return self.name
        return str(self.part["part"]) if self.part is not None else str(self.function).rpartition(":")[2]


class Recipe(BaseModel):
    """What to do, and with what. Every field is a key of the YAML file and a flag of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # the prior
    model: str = Field(description="hub id, folder, .gguf file, or an embedded model: smollm2-135m-instruct")
    prior_adapter: str | None = Field(None, description="PEFT adapter that belongs to the prior, frozen")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    device: str = Field("auto", description="auto, cpu, cuda, …")
    prompts: str | None = Field(
        None,
        description="prompts: .txt (one a line), .jsonl, .json, .csv, .parquet, data:NAME or hub:OWNER/NAME; [a:b] takes some rows",
    )
    column: str = Field("prompt", description="column that holds the prompt")
    template: str | None = Field(
        None, description="Jinja2 template of the columns that makes the prompt, such as 'Q: {{ prompt }}\\nA:'"
    )
    columns: dict[str, str] = Field({}, description="our name of a column and the source's, as ours=theirs")
    chat: bool | None = Field(None, description="send plain prompts through the model's chat template")
    max_new_tokens: Positive = Field(64, description="longest completion, in tokens")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="of the prior's (and the policy's) sampling")
    stop: list[str] = Field([], description="texts or special tokens that end a completion")

    # the evidence
    reward: str | list[dict[str, Any]] | None = Field(
        None,
        description="reward function, file.py:function or package.module:function; or, in a file, a list of parts with their weights",
    )
    beta: float | None = Field(
        None, description="temperature in reward units per nat; or choose it by kl_budget, reward_goal"
    )
    kl_budget: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="choose beta so that the optimum moves this many nats a prompt"
    )
    reward_goal: float | None = Field(
        None, allow_inf_nan=False, description="choose beta so that the optimum has this mean reward"
    )
    bounds: tuple[float, float] | None = Field(None, description="smallest and largest reward; makes rejection exact")
    uncertainty: UNCERTAIN | None = Field(
        None,
        description="what to make of a learned reward's uncertainty: evidence-average, mixture-of-posteriors, log-pool, "
        "lower-confidence-bound, worst-of-ensemble or variance-penalised; by default its mean alone counts",
    )
    uncertainty_options: dict[str, Any] = Field(
        {}, description="its settings: members=32, and k=1 or penalty=1 where there is one"
    )
    on_error: Literal["fail", "drop"] = Field("fail", description="completions without a usable reward")
    moments: list[MomentSpec] = Field([], description="features and their means, file.py:function=mean")
    gold: str | list[dict[str, Any]] | None = Field(
        None, description="held-out reward, never trained on: file.py:function; or, in a file, parts as in reward"
    )

    # how the reward is run
    reward_batch: Positive | None = Field(
        None, description="most completions in a call of the reward; all at once by default"
    )
    reward_workers: Annotated[int, Field(ge=0)] = Field(
        0, description="worker processes for the reward; 0 calls it here"
    )
    reward_timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="seconds a call may take; then it is killed (uses a worker process)",
    )
    reward_memory: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="MiB by which a worker process may grow (uses a worker process)"
    )
    reward_retries: Annotated[int, Field(ge=0)] = Field(
        0, description="further tries where a remote reward's service fails"
    )
    reward_cache: bool = Field(False, description="the reward is deterministic: keep its values, in the run's folder")

    # the application
    test: str | None = Field(None, description="held-out prompts with references, for tiltlm task; read as prompts are")
    metrics: list[dict[str, Any]] = Field(
        [],
        description="parts that completions of the test prompts are judged by, such as {part: chrf, column: reference}",
    )
    baselines: list[str] = Field(
        [], description="further rows of --table: sft/policy, mrt, prior/mbr, copy, lead-N, vote-T"
    )
    methods: dict[str, dict[str, Any]] = Field(
        {}, description="keys that another method than the recipe's engine trains with, such as dpo: {lr: 3e-5}"
    )
    completion: str = Field(
        "{{ reference }}", description="Jinja2 template of the columns: the completion that sft learns"
    )
    quick: dict[str, Any] = Field({}, description="keys that --quick changes, for a run in half a minute")

    # plan, sample and certify
    samples: Annotated[int, Field(ge=2)] = Field(64, description="draws a prompt, for plan and certify")
    exact_budget: Annotated[int, Field(ge=0)] = Field(
        128, description="further prior draws for a prompt without exact sample"
    )

    # train
    engine: str = Field("rloo", description="training engine; tiltlm engines lists them")
    options: dict[str, Any] = Field({}, description="the engine's own settings, as name=value")
    group: Annotated[int, Field(ge=1)] = Field(8, description="completions a prompt in a step")
    replay: Annotated[int, Field(ge=0)] = Field(
        0, description="earlier draws of a prompt in a step, beside the fresh ones"
    )
    lag: Annotated[int, Field(ge=0)] = Field(
        0,
        description="draw from an earlier policy, renewed after so many steps if that brings it nearer to p*; 0: from the policy",
    )
    ahead: bool = Field(
        False,
        description="run rewards while the next completions are drawn; these are then one update old, and weighed",
    )
    teacher: str | None = Field(None, description="decoding engine whose samples are learned from, for sft and dpo")
    data: str | None = Field(
        None, description="file of completions or preferences, with TRL's columns; sft learns the chosen ones"
    )
    steps: Positive = Field(40, description="training steps")
    batch: Positive = Field(4, description="prompts a step")
    lr: float = Field(3e-4, gt=0, lt=1, description="learning rate")
    engine_lr: float = Field(1e-2, gt=0, lt=1, description="learning rate of log Z, value heads and the like")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="of the learning rate")
    warmup: Annotated[int, Field(ge=0)] = Field(2, description="steps until the learning rate is reached")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's weight decay")
    lora_r: Annotated[int, Field(ge=0)] = Field(16, description="rank of the adapter; 0 trains all weights")
    lora_alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="scale of the adapter; 2 r by default"
    )
    lora_targets: list[str] = Field([], description="modules that get an adapter; all linear ones by default")
    start: str | None = Field(None, description="PEFT adapter to start from; the prior remains the reference")
    micro_tokens: Positive = Field(1024, description="most completion tokens in a pass with gradient; bounds memory")
    gradient_checkpointing: bool = Field(
        False, description="run each layer again in the backward pass: less memory, a third more arithmetic"
    )
    shard: bool = Field(False, description="of several processes, each keeps a share of the weights only (FSDP2)")
    certify_every: Annotated[int, Field(ge=0)] = Field(0, description="certificate every so many steps; 0 for none")
    certify_samples: Annotated[int, Field(ge=2)] = Field(16, description="draws a prompt in it")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="stop after so many certificates without a better ELBO"
    )
    checkpoint_every: Positive = Field(10, description="checkpoint every so many steps")
    gold_every: Positive = Field(1, description="judge the draws by gold every so many steps")
    stop_on_hacking: bool = Field(False, description="stop when the reward rises while gold falls")
    trackers: list[str] = Field([], description="tensorboard, wandb, trackio")

    generator: str | None = Field(
        None,
        description="what draws completions instead of our sampler: vllm, or a vllm serve's address, http://host:8000",
    )
    generator_options: dict[str, Any] = Field({}, description="the generator's own settings, as name=value")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of everything random")
    out: str = Field("runs/tilt", description="folder of the run")

    @field_validator("reward", "gold", mode="before")
    @classmethod
    def _one_part(cls, value: Any) -> Any:
        """One part alone is a list of it."""
        return [value] if isinstance(value, dict) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        """One text alone is a list of it."""
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list) and "" in stops:
            raise ValueError(f"stop is {value!r}; an empty text is in every completion, leave it out")
        return stops

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        """True and false are numbers to Python, and not to whoever writes `beta: true`."""
        for name, field in cls.model_fields.items() if isinstance(values, Mapping) else ():
            if isinstance(values.get(name), bool) and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{name} is {str(values[name]).lower()}, which it cannot be ({field.description})")
        return values

    @model_validator(mode="after")
    def _enough(self) -> Recipe:
        for name in ("prompts", "reward"):
            if getattr(self, name) is None and self.data is None and not (name == "reward" and self.moments):
                raise ValueError(f"{name} is missing; give --{name} or write '{name}: …' into the recipe")
        if self.reward is None and self.beta is None and not self.moments and not self.imitates:
            raise ValueError("beta is missing; without a reward nothing can choose it, give --beta, for example 0.1")
        return self

    @model_validator(mode="after")
    def _one_temperature(self) -> Recipe:
        chosen = [name for name in ("beta", "kl_budget", "reward_goal") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are ways to choose the same thing; give one of them")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; it is a temperature in reward units per nat and must be positive")
        sources = [name for name in ("replay", "lag", "ahead", "teacher", "data") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are ways to get completions to learn from; give one of them")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds are {self.bounds}; give the smallest reward first, then the largest")
        if self.stop_on_hacking and self.gold is None:
            raise ValueError("stop_on_hacking is on, but there is no gold to tell by; give a held-out reward, gold")
        return self

    @model_validator(mode="after")
    def _moments_fit(self) -> Recipe:
        if not self.moments:
            return self
        labels = [moment.label for moment in self.moments]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"moments has {twice!r} twice; give each a name of its own, name: …")
        if self.reward is None and (self.beta is not None or self.data is not None):
            name = "data" if self.data is not None else "beta"
            raise ValueError(
                f"{name} has no meaning for moments alone, whose weights are in nats; leave it out, or add a reward"
            )
        if (
            self.kl_budget is not None
            or self.reward_goal is not None
            or (self.reward is not None and self.beta is None)
        ):
            raise ValueError(
                "beta is missing; moments beside a reward hold at one temperature, so give --beta, not a budget or goal"
            )
        return self

    @property
    def imitates(self) -> bool:
        """Whether what is learned is the law of `data`, to which reward and temperature are nothing."""
        from tiltlm.inference.catalogue import imitates  # which loads every engine, and torch

        return self.data is not None and imitates(self.engine)

    @property
    def has_temperature(self) -> bool:
        """Whether beta is given, or there is a way to choose it."""
        return any(value is not None for value in (self.beta, self.kl_budget, self.reward_goal))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out)


class PriorRecipe(Recipe):
    """A recipe of which only the prior and the prompts are used: whoever asks for labels has no reward yet."""

    @model_validator(mode="after")
    def _enough(self) -> PriorRecipe:
        if self.prompts is None:
            raise ValueError("prompts is missing; give --prompts or write 'prompts: …' into the recipe")
        return self


def with_versions(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, with the versions of the packages that its numbers depend on."""
    names = ("tiltlm", "torch", "transformers", "peft")
    return {**recipe.model_dump(), "versions": {name: importlib.metadata.version(name) for name in names}}
