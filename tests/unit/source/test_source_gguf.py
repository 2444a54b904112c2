"""GGUF files as sources: written here by the package gguf, read as any checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import hfaccel
from hfaccel.errors import ExportError, MissingExtraError, SourceError
from hfaccel.request import CompileRequest, prepare
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.sampling import SamplingSettings
from hfaccel.source import gguf as gguf_source
from hfaccel.source.resolve import resolve_source
from hfaccel.source.text import check_tokenizer, write_tokenizer
from hfaccel.source.torch_model import TorchRunner, load_torch_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

HEADS, KEY_VALUE_HEADS, LAYERS, HIDDEN = 4, 2, 2, 64
END = 1
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
IDS = np.array([[5, 80, 7, 33, 120, 9, 2, 61]], dtype=np.int64)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WriteGguf = Callable[..., Path]


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges: two special ones, all bytes, and one word."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", "<|end|>", *sorted(ByteLevel.alphabet()), "wo", "wor"], ["w o", "wo r"]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: the two halves of a head's rotation side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary()[0]),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def write_gguf(llama: Any, tmp_path: Path) -> WriteGguf:
    """Write the model as llama.cpp's converter would: ``write("model.gguf", eight_bit=True)``; with 8 bit it rounds the model's weights too."""

    def write(name: str = "model.gguf", *, eight_bit: bool = False, architecture: str = "llama", left_out: str = "-") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(path, architecture)
        config = llama.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KEY_VALUE_HEADS)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(5000.0)
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        tokens, merges = vocabulary()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        writer.add_token_types([3, 3, *([1] * (len(tokens) - 2))])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(END)
        writer.add_pad_token_id(0)
        writer.add_chat_template(TEMPLATE)
        for parameter, weight in llama.state_dict().items():
            stored = gguf_name(parameter)
            if not stored.startswith(left_out):
                add_tensor(writer, stored, weight.numpy().astype(np.float32), eight_bit=eight_bit)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def gguf_name(parameter: str) -> str:
    parts = parameter.removeprefix("model.").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:-1])]}.weight"
    return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[0]] + ".weight"


def add_tensor(writer: Any, name: str, weight: np.ndarray, *, eight_bit: bool) -> None:
    if "attn_q" in name or "attn_k" in name:
        weight = interleaved(weight, HEADS if "attn_q" in name else KEY_VALUE_HEADS)
    if eight_bit and weight.ndim > 1:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(weight))


def logits_of(path: Path) -> np.ndarray:
    runner = TorchRunner(load_torch_model(resolve_source(str(path)), attention="sdpa"))
    return runner.run({"input_ids": IDS, "attention_mask": np.ones_like(IDS)})["logits"]


def expected_logits(llama: Any) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(llama(torch.from_numpy(IDS)).logits.numpy())


def test_the_same_logits_from_float_and_nearly_from_8_bit(write_gguf: WriteGguf, llama: Any) -> None:
    expected = expected_logits(llama)
    np.testing.assert_allclose(logits_of(write_gguf()), expected, atol=1e-4)
    rounded = np.abs(logits_of(write_gguf("rounded.gguf", eight_bit=True)) - expected).max()
    assert 1e-4 < rounded < 0.05 * np.abs(expected).max()


def test_what_the_file_says_is_in_the_checkpoint(write_gguf: WriteGguf, tmp_path: Path) -> None:
    path = write_gguf()
    source = resolve_source(str(path))
    assert (source.id, source.task, source.model_type, source.dequantized_from) == (
        str(path),
        "text-generation",
        "llama",
        path.name,
    )
    assert source.config["num_key_value_heads"] == KEY_VALUE_HEADS
    assert source.config["eos_token_id"] == END
    assert "quantization_config" not in source.config
    assert TEMPLATE in (source.folder / "chat_template.jinja").read_text(encoding="utf-8")
    write_tokenizer(source, tmp_path / "out")
    check_tokenizer(source, tmp_path / "out")
    assert resolve_source(str(path)) == source
    # A folder with nothing else means the same.
    (tmp_path / "alone").mkdir()
    shutil.copyfile(path, tmp_path / "alone" / "other.gguf")
    assert resolve_source(str(tmp_path / "alone")).sha256 == source.sha256


def test_files_beside_it_count_where_the_folder_is_given(write_gguf: WriteGguf, llama: Any, tmp_path: Path) -> None:
    path = write_gguf("folder/model.gguf")
    made = resolve_source(str(path))
    shutil.copyfile(made.folder / "tokenizer.json", path.parent / "tokenizer.json")
    (path.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 40}')
    llama.config.save_pretrained(path.parent)
    beside = resolve_source(str(path.parent))
    assert (beside.folder / "tokenizer_config.json").read_text() == (path.parent / "tokenizer_config.json").read_text()
    np.testing.assert_allclose(logits_of(path.parent), expected_logits(llama), atol=1e-4)
    assert resolve_source(str(path)).sha256 == made.sha256


def test_it_is_converted_once(write_gguf: WriteGguf) -> None:
    path = write_gguf("once.gguf")
    first = resolve_source(str(path)).folder
    written_at = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_source(str(path)).folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written_at


def test_the_user_is_told_what_losses_mean(write_gguf: WriteGguf, tmp_path: Path) -> None:
    plan = prepare(CompileRequest(model=str(write_gguf()), output=tmp_path / "out"))
    assert any("quantized already" in notice and "model.gguf" in notice for notice in plan.notices)


def test_refusals(write_gguf: WriteGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="no GGUF files of architecture 'rwkv6'"):
        resolve_source(str(write_gguf("unknown.gguf", architecture="rwkv6")))
    whole = write_gguf()
    with pytest.raises(SourceError, match=r"no weights for .*layers.1.*would be random"):
        resolve_source(str(write_gguf("part.gguf", left_out="blk.1.")))
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(whole.read_bytes()[:300])
    text.write_text("not weights")
    for damaged in (cut, text):
        with pytest.raises(SourceError):
            resolve_source(str(damaged))
    with pytest.raises(SourceError, match="holds 5 GGUF files"):
        resolve_source(str(tmp_path))
    monkeypatch.setattr(gguf_source, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="gguf"):
        resolve_source(str(whole))


def test_a_file_compiles_to_what_it_was_written_from(write_gguf: WriteGguf, llama: Any, tmp_path: Path) -> None:
    result = hfaccel.compile(
        write_gguf(),
        output=tmp_path / "out",
        target="cpu-arm-dotprod",  # no host of these tests: nothing is timed
        overrides=["quantize.enabled=false"],
    )
    ids, tokens = torch.from_numpy(IDS), 16
    with torch.inference_mode():
        wanted = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=END
        )
    compiled = hfaccel.load(result.folder)
    assert isinstance(compiled, GenerationModel)
    answer = compiled.generate_ids([IDS[0].tolist()], SamplingSettings(max_new_tokens=tokens))[0]
    assert answer == wanted[0, IDS.shape[1] :].tolist()
    assert any("quantized already" in notice for notice in result.manifest["notices"])
