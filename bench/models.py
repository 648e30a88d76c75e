"""The models of the speed benchmarks, as ordinary folders with a `bench.json` beside the weights.

Both sides of every comparison must do the same work, so no completion may end before it is cut. Each folder's end token is
one that its model does not write: SmolLM2's `<filename>` (its probability was below exp(-14) at each of 768 positions), and at random
weights one whose logit is far below all others by construction. So nobody has to be told to ignore the end, which costs time in
some libraries and changes what is drawn in others; that all completions are whole is asserted.

python bench/models.py smollm2 FOLDER
python bench/models.py llama FOLDER --width 64 --layers 2 --vocabulary 256
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import RECIPES, TASK
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

EMBEDDED = "smollm2-135m-instruct"
NEVER_WRITTEN = "<filename>"
END = 0
PROMPT_WORDS = 8


def smollm2(folder: Path) -> None:
    """The embedded SmolLM2-135M-Instruct in bfloat16, with another end token."""
    from tiltlm.lm.load import model_source

    source = Path(model_source(EMBEDDED))
    for file in source.iterdir():
        shutil.copy2(file, folder / file.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(NEVER_WRITTEN)
    tokenizer.eos_token = NEVER_WRITTEN
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.eos_token_id = end
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    openings = (RECIPES / "film_openings.txt").read_text().splitlines()
    (folder / TASK).write_text(json.dumps({"prompts": openings, "reward": "sentiment"}))


def llama(folder: Path, width: int, layers: int, vocabulary: int, heads: int, seed: int = 0) -> None:
    """A Llama at random weights over words that mean nothing."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        initializer_range=width**-0.5,  # logits with a standard deviation of about 1
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END + 1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    forbid_the_end(model)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=f"w{END}", pad_token=f"w{END + 1}", padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    texts = [" ".join(f"w{2 + (7 * p + i) % (vocabulary - 2)}" for i in range(PROMPT_WORDS)) for p in range(64)]
    (folder / TASK).write_text(json.dumps({"prompts": texts, "reward": "even tokens"}))


@torch.no_grad()
def forbid_the_end(model: LlamaForCausalLM) -> None:
    """Keep the first coordinate of the residual stream at 1, and let the end token's logit be far below zero for it."""
    body, head = model.model, model.lm_head
    body.embed_tokens.weight[:, 0] = 1.0
    for layer in body.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    head.weight[:, 0] = 0.0
    head.weight[END] = 0.0
    head.weight[END, 0] = -100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["smollm2", "llama"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=256)
    arguments = parser.parse_args()
    unfinished = arguments.folder.with_name(f".{arguments.folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if arguments.kind == "smollm2":
        smollm2(unfinished)
    else:
        llama(unfinished, arguments.width, arguments.layers, arguments.vocabulary, arguments.heads)
    unfinished.rename(arguments.folder)


if __name__ == "__main__":
    main()
