"""One side of the SMC benchmark: TiltLM's SMC, the reward of the unfinished text as the twist."""

import torch
from common import BETA, answer, clock, prompts, quiet_stdout, reward_of, set_threads, smc_parser

import tiltlm as tl
from tiltlm.inference.decoding.smc import prefix_evidence


def main() -> None:
    arguments = smc_parser(__doc__).parse_args()
    set_threads(arguments)
    with quiet_stdout():
        language_model = tl.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
        prior = language_model.prior(max_new_tokens=arguments.tokens)
        target = prior * tl.Reward(reward_of(arguments.model), beta=BETA)
        encoded = prior.encode(prompts(arguments.model, 1))
        rng = torch.Generator().manual_seed(0)
        began = clock(arguments.device)
        _run(arguments.particles[0], target, encoded, rng)
        facts = {"warmup_seconds": [clock(arguments.device) - began], "seconds": [], "tokens": [], "log_z": []}
        for count in arguments.particles:
            began = clock(arguments.device)
            weighted = _run(count, target, encoded, rng)
            facts["seconds"].append(clock(arguments.device) - began)
            facts["tokens"].append(int(weighted.scored.draws.mask.sum()))
            facts["log_z"].append(weighted.log_z[0].value)
    answer(facts, arguments, ["tiltlm", "torch", "transformers"])


def _run(particles: int, target: tl.Target, encoded: tl.Prompts, rng: torch.Generator) -> tl.Weighted:
    return tl.SMC(particles=particles, twist=prefix_evidence).sample(target, encoded, rng=rng)


if __name__ == "__main__":
    main()
