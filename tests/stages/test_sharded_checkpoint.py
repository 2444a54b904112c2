"""A decoder whose weights lie in several files compiles, and answers as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import hfaccel
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.sampling import SamplingSettings

WORDS, NEW_TOKENS = 100, 24
PROMPT = [12, 80, 33, 7, 65, 41, 9]


def test_every_shard_is_read(tmp_path: Path, write_tokenizer: Callable[..., None]) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    write_tokenizer(tmp_path / "model", words=WORDS)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    result = hfaccel.compile(
        tmp_path / "model",
        output=tmp_path / "out",
        task="text-generation",
        target="cpu-arm-dotprod",  # no host of these tests: nothing is timed
        overrides=["quantize.enabled=false"],
        use_cache=False,
    )
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = wanted[0, len(PROMPT) :].tolist()
    assert len(set(expected)) > 5, "the model repeats itself: nothing would be compared"
    compiled = hfaccel.load(result.folder)
    assert isinstance(compiled, GenerationModel)
    assert compiled.generate_ids([PROMPT], SamplingSettings(max_new_tokens=NEW_TOKENS)) == [expected]
