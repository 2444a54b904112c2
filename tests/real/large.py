"""Write a llama of more than 2 GiB of float32 weights in several shards: what protobuf cannot hold in one message.

Few wide layers and a small vocabulary of whole words, so that it is large and still compiles in minutes. Random, seeded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WORDS = 1000
SHARD_SIZE = "600MB"
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 3072,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SPECIAL = ("[PAD]", "[UNK]")


def write_large_llama(folder: Path) -> None:
    """Write the checkpoint; some 2.3 GB on disk, the same in memory meanwhile.

    Args:
        folder: where to; it exists.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *(f"word{number}" for number in range(WORDS - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_large_llama(target)
