"""One side of the generation benchmark: TiltLM's own sampler. Log-probabilities of the draws come with them."""

import torch
from agreement import with_transformers
from common import (
    answer,
    clock,
    generation_parser,
    peak_device_memory,
    peak_memory,
    prompts,
    quiet_stdout,
    set_threads,
)

import tiltlm as tl


def main() -> None:
    arguments = generation_parser(__doc__).parse_args()
    set_threads(arguments)
    with quiet_stdout():
        language_model = tl.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
        prior = language_model.prior(max_new_tokens=arguments.tokens, rows=max(arguments.sequences))
        encoded = prior.encode(prompts(arguments.model, arguments.prompts))
        rng = torch.Generator().manual_seed(0)
        began = clock(arguments.device)
        prior.draw(encoded, arguments.sequences[0] // arguments.prompts, rng)
        facts = {"warmup_seconds": [clock(arguments.device) - began], "seconds": [], "tokens": []}
        for count in arguments.sequences:
            began = clock(arguments.device)
            draws = prior.draw(encoded, count // arguments.prompts, rng)
            facts["seconds"].append(clock(arguments.device) - began)
            facts["tokens"].append(int(draws.mask.sum()))
        facts["peak_memory_bytes"] = peak_memory()  # before the check, which loads the model again
        facts["peak_device_memory_bytes"] = peak_device_memory(arguments.device)
        facts["agreement"] = with_transformers(prior, arguments)
    answer(facts, arguments, ["tiltlm", "torch", "transformers"])


if __name__ == "__main__":
    main()
