"""Another side of the generation benchmark: `generate` of transformers, or its continuous batching.

Neither gives log-probabilities here: asking for them would cost them more.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import answer, clock, generation_parser, prompts, quiet_stdout, set_threads
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

BLOCKS = 1024
PAGE = 32
"""A cache of 32,768 tokens: room for all sequences at once. Left to itself it takes 60% of the free memory."""


def main() -> None:
    parser = generation_parser(__doc__)
    parser.add_argument("--continuous", action="store_true")
    arguments = parser.parse_args()
    set_threads(arguments)
    with quiet_stdout():
        tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
        model = model.to(arguments.device).eval()
        texts = prompts(arguments.model, arguments.prompts)
        law = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": arguments.tokens}
        config = GenerationConfig(
            **law, eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        make = in_pages(model, tokenizer, config) if arguments.continuous else in_a_rectangle(model, tokenizer, config)
        began = clock(arguments.device)
        make(texts, arguments.sequences[0] // arguments.prompts)
        facts: dict[str, Any] = {"warmup_seconds": [clock(arguments.device) - began], "seconds": [], "tokens": []}
        for count in arguments.sequences:
            began = clock(arguments.device)
            made = make(texts, count // arguments.prompts)
            facts["seconds"].append(clock(arguments.device) - began)
            facts["tokens"].append(made)
    answer(facts, arguments, ["torch", "transformers"])


def in_a_rectangle(model: Any, tokenizer: Any, config: GenerationConfig) -> Callable[[list[str], int], int]:
    """`generate`: prompts padded on the left, each run once for every sequence, all rows until the last has ended."""

    def make(texts: list[str], each: int) -> int:
        read = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            out = model.generate(**read, generation_config=config, num_return_sequences=each)
        return out[:, read["input_ids"].shape[1] :].numel()

    return make


def in_pages(model: Any, tokenizer: Any, config: GenerationConfig) -> Callable[[list[str], int], int]:
    """`generate_batch`: rows enter and leave as they like, keys and values in pages."""

    def make(texts: list[str], each: int) -> int:
        rows = [ids for ids in tokenizer(texts)["input_ids"] for _ in range(each)]
        pages = ContinuousBatchingConfig(num_blocks=BLOCKS, page_size=PAGE, max_batch_tokens=len(rows) * PAGE)
        out = model.generate_batch(
            inputs=rows, generation_config=config, continuous_batching_config=pages, progress_bar=False
        )
        return sum(len(one.generated_tokens) for one in out.values())

    return make


if __name__ == "__main__":
    main()
