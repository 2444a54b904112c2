"""Tiny random decoders both ways, as a graph and in torch, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mobius
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.utils import logging

from hfaccel.artifact.contract import Contract, SessionSettings, TensorSpec, TextSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.model import GenerationModel

VOCABULARY = 400
CONTEXT = 192
CORPUS = [
    "The quick brown fox jumps over the lazy dog while it rains, and Anna moved there from Paris.",
    "Grüße aus Köln - ein Käse für 5 €; 日本語の文章です。🙂🙃 naïve café",
] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>{% endif %}"""


@dataclass(frozen=True)
class TinyDecoder:
    """A decoder as a graph and in torch."""

    graph: Path
    source: PreTrainedModel
    settings: GenerationSettings

    def open(self) -> Decoder:
        return Decoder(self.graph, SessionSettings(intra_op_num_threads=1), self.settings)

    def expected(self, row: list[int], tokens: int, **options: Any) -> list[int]:
        """What transformers generates, without the prompt; the end token is its last where it came."""
        with torch.no_grad():
            ids = self.source.generate(
                torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),
                max_new_tokens=tokens,
                eos_token_id=list(self.settings.end_token_ids) or None,
                pad_token_id=0,
                **{"do_sample": False, **options},
            )
        return ids[0, len(row) :].tolist()


def _build(config: PreTrainedConfig, kind: Any, heads: int, folder: Path) -> TinyDecoder:
    torch.manual_seed(0)
    source = kind(config).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    source.save_pretrained(folder / "source")
    package = mobius.build(str(folder / "source"), task="text-generation", dtype="f32", execution_provider="cpu")
    package.save(str(folder / "graph"))
    settings = GenerationSettings(
        layers=2,
        key_value_heads=heads,
        head_size=16,
        context_length=CONTEXT,
        vocabulary_size=VOCABULARY,
        end_token_ids=(),
        pad_token_id=0,
    )
    return TinyDecoder(folder / "graph" / "model.onnx", source, settings)


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    """Grouped key and value heads, rotary positions."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _build(config, LlamaForCausalLM, 2, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    """Its graph reads position_ids."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=1, eos_token_id=2
    )
    return _build(config, GPT2LMHeadModel, 4, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def llama_last(llama: TinyDecoder) -> TinyDecoder:
    """The same with logits of the last token of each row only, as compiled graphs give them."""
    model = onnx.load(str(llama.graph))
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["all_logits" if name == "logits" else name for name in node.output]
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    graph.initializer.extend([one, zero])
    graph.node.extend(
        [
            helper.make_node("ReduceSum", ["attention_mask", "one"], ["lengths"], keepdims=1),
            helper.make_node("Shape", ["attention_mask"], ["width"], start=1),
            helper.make_node("Shape", ["input_ids"], ["new"], start=1),
            helper.make_node("Sub", ["width", "new"], ["past"]),
            helper.make_node("Sub", ["lengths", "past"], ["ends"]),
            helper.make_node("Sub", ["ends", "one"], ["lasts"]),
            helper.make_node("Max", ["lasts", "zero"], ["places"]),
            helper.make_node("GatherND", ["all_logits", "places"], ["last_logits"], batch_dims=1),
            helper.make_node("Unsqueeze", ["last_logits", "one"], ["logits"]),
        ]
    )
    graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, VOCABULARY]))
    path = llama.graph.with_name("last.onnx")
    onnx.save_model(model, str(path))
    return replace(llama, graph=path)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE that puts ``<s>`` first, with padding and truncation in the file, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_padding(length=100)
    tokenizer.enable_truncation(5)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


MakeModel = Callable[..., GenerationModel]


@pytest.fixture
def make_model(llama: TinyDecoder, tokenizer_folder: Path) -> MakeModel:
    """A model of the tiny Llama; arguments replace fields of its generation settings."""

    def make(**changes: Any) -> GenerationModel:
        tiny = replace(llama, settings=replace(llama.settings, **changes))
        contract = Contract(
            task="text-generation",
            inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
            outputs=(TensorSpec("logits", "float32", ("batch", 1, VOCABULARY)),),
            text=TextSettings(max_length=CONTEXT, pad_token_id=0),
            generation=tiny.settings,
        )
        return GenerationModel(tiny.open(), tokenizer_folder, contract)

    return make
