"""What is done to the encoder of an encoder-decoder for another engine: exact rewrites, and what rounding moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from hfaccel.construct import construct_encoder_decoder
from hfaccel.quant.build import build_candidate
from hfaccel.quant.calibration import ActivationStatistics, Feeds, observe
from hfaccel.quant.convolutions import convolution_inputs, store_convolutions
from hfaccel.quant.eight_bit_shares import attention_values, center_all_values, harmless, share_errors
from hfaccel.quant.observed import CalibrationData, gather_statistics
from hfaccel.quant.outlier_neurons import feed_forward_blocks, split_outlier_neurons
from hfaccel.quant.scheme import matmul_sites
from hfaccel.quant.smooth import smooth_activations
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import load_graph, operator_counts, save_graph
from hfaccel.rewrites.split_encoder_decoder import decoder_nodes, split_encoder_decoder
from hfaccel.runtime.session import GraphSession

LAYERS, HEADS, CHANNELS, FRAMES, VOCABULARY = 2, 4, 32, 300, 99
KINDS = ("sound", "text")
RUNG = Rung(
    name="one", scheme="static", graph="fused", smooth=0.5, outlier_neurons=2, eight_bit_scores=True, eight_bit_shares=0.9,
    eight_bit_convolutions=True, blockwise_decoder=True, quantize_embeddings=True, encoder_engine="openvino", block_size=16,
)  # fmt: skip


def _model(kind: str) -> Any:
    sizes = {
        "d_model": CHANNELS, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2,
        "decoder_start_token_id": 3, "bos_token_id": 1,
    }  # fmt: skip
    if kind == "text":
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, max_position_embeddings=FRAMES))
    config = transformers.WhisperConfig(**sizes, max_source_positions=FRAMES, max_target_positions=48, num_mel_bins=16)
    return transformers.WhisperForConditionalGeneration(config)


@pytest.fixture(params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Encoder and decoder in one graph, with weights that attend to few and biases that move values away from zero."""
    torch.manual_seed(0)
    source = _model(request.param).eval()
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            if name.endswith("v_proj.bias"):
                parameter.normal_(0, 2.0)
    (tmp_path / "whole").mkdir()
    return save_graph(construct_encoder_decoder(source), tmp_path / "whole")


@pytest.fixture
def encoder(whole: Path, tmp_path: Path) -> onnx_ir.Model:
    (tmp_path / "encoder").mkdir()
    return load_graph(save_graph(split_encoder_decoder(load_graph(whole))[0], tmp_path / "encoder"))


def feeds_of(model: onnx_ir.Model, seed: int = 0, rows: int = 2) -> Feeds:
    random = np.random.default_rng(seed)
    if model.graph.inputs[0].name == "input_features":
        return {"input_features": random.normal(size=(rows, 16, 2 * FRAMES)).astype(np.float32)}
    mask = np.ones((rows, 200), dtype=np.int64)
    mask[1:, 120:] = 0
    return {"input_ids": random.integers(4, VOCABULARY, mask.shape), "attention_mask": mask}


def answers(model: onnx_ir.Model, folder: Path, feeds: Feeds) -> dict[str, np.ndarray]:
    folder.mkdir()
    found = GraphSession(save_graph(model, folder)).run(feeds)
    mask = feeds.get("attention_mask", np.ones((2, FRAMES), dtype=np.int64))
    return {name: array * mask[:, None, :, None] for name, array in found.items()}  # cross.n.key [batch, heads, sequence, size]


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], within: float) -> None:
    for name, array in wanted.items():
        assert np.linalg.norm(found[name] - array) <= within * np.linalg.norm(array), name


def test_centered_values_have_no_mean_and_change_no_answer(encoder: onnx_ir.Model, tmp_path: Path) -> None:
    feeds = feeds_of(encoder)
    wanted = answers(encoder, tmp_path / "before", feeds)
    names = [
        *attention_values(encoder),
        *(node.outputs[0].name or "" for node in encoder.graph if node.op_type == "MultiHeadAttention"),
    ]
    statistics = observe(encoder, names, [feeds], workdir=tmp_path / "scratch")
    assert all(np.abs(statistics[name].channel_mean).max() > 1 for name in attention_values(encoder))
    before = len(list(encoder.graph))
    assert center_all_values(encoder, statistics) == LAYERS
    assert len(list(encoder.graph)) == before, "nothing more is computed"
    again = observe(encoder, names, [feeds], workdir=tmp_path / "scratch")
    for name in attention_values(encoder):
        assert np.abs(again[name].channel_mean).max() < 1e-4
    for name in names:
        (low, high), (least, most) = statistics[name].range("minmax"), again[name].range("minmax")
        assert low <= least + 1e-4
        assert high >= most - 1e-4
    same(answers(encoder, tmp_path / "after", feeds), wanted, within=1e-5)


def test_without_biases_nothing_is_centered(encoder: onnx_ir.Model, tmp_path: Path) -> None:
    feeds = feeds_of(encoder)
    outputs = [node.outputs[0].name or "" for node in encoder.graph if node.op_type == "MultiHeadAttention"]
    statistics = observe(encoder, [*attention_values(encoder), *outputs], [feeds], workdir=tmp_path / "scratch")
    for node in list(encoder.graph):
        if node.op_type == "Add" and (node.name or "").endswith("out_proj.add"):
            product = next(value for value in node.inputs if value is not None and value.const_value is None)
            node.outputs[0].replace_all_uses_with(product)
    assert center_all_values(encoder, statistics) == 0


def test_rounded_shares_move_less_once_values_are_centered(encoder: onnx_ir.Model, tmp_path: Path) -> None:
    feeds = feeds_of(encoder)
    outputs = [node.outputs[0].name or "" for node in encoder.graph if node.op_type == "MultiHeadAttention"]
    statistics = observe(encoder, [*attention_values(encoder), *outputs], [feeds], workdir=tmp_path / "scratch")

    def errors() -> dict[str, float]:
        ranges = {name: statistics[name].range("minmax") for name in attention_values(encoder)}
        return share_errors(encoder, ranges, [feeds], workdir=tmp_path / "scratch")

    plain = errors()
    center_all_values(encoder, statistics)
    centered = errors()
    assert len(plain) == LAYERS
    assert all(0 < centered[name] < 0.5 * plain[name] for name in plain)
    assert share_errors(encoder, {}, [feeds], workdir=tmp_path / "scratch") == {}


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 10), max_size=8), st.floats(0.001, 20))
def test_as_many_attentions_as_move_the_outputs_by_little_together(errors: dict[str, float], limit: float) -> None:
    chosen = harmless(errors, limit)
    if not chosen:
        small = np.cumsum(np.square(sorted(errors.values()))) <= limit**2
        assert small.sum() < max(1, len(errors) / 2), "half of them or more could have been taken"
        return
    assert len(chosen) >= len(errors) / 2
    assert sum(errors[name] ** 2 for name in chosen) <= limit**2
    left = sorted(errors[name] for name in errors if name not in chosen)
    assert not left or sum(errors[name] ** 2 for name in chosen) + left[0] ** 2 > limit**2
    assert all(errors[name] <= left[0] for name in chosen if left)


def test_norms_take_the_scale_of_smoothing(whole: Path, encoder: onnx_ir.Model, tmp_path: Path) -> None:
    """Where products alone read a norm, Whisper's, nothing more is computed; BART's feed sums too."""
    feeds = feeds_of(encoder)
    wanted = answers(encoder, tmp_path / "before", feeds)
    names = [site.activation for site in matmul_sites(encoder)]
    statistics = observe(encoder, names, [feeds], workdir=tmp_path / "scratch")
    down = {block.down.inputs[0].name for block in feed_forward_blocks(encoder) if block.down.inputs[0] is not None}
    for name in down:  # outliers, so that a product in float reads the unscaled norm
        statistics[name or ""].channel_maximum[:2] *= 10
    split = split_outlier_neurons(encoder, statistics, 2)
    assert split
    smooth_activations(encoder, statistics, 0.5, names=statistics.keys() - down, exclude=split)
    same(answers(encoder, tmp_path / "after", feeds), wanted, within=1e-4)
    sound = "input_features" in feeds
    assert (operator_counts(encoder).get("Mul", 0) == 0) == sound
    sites = {site.activation for site in matmul_sites(encoder) if site.node not in split}
    observed = observe(encoder, sorted(sites), [feeds], workdir=tmp_path / "scratch")
    for name in sites - down:  # nothing is centered here
        np.testing.assert_allclose(statistics[name].range("minmax"), observed[name].range("minmax"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sums_in_16_bits", [False, True])
@pytest.mark.parametrize("whole", ["sound"], indirect=True)
def test_convolutions_of_eight_bits_stay_near(encoder: onnx_ir.Model, tmp_path: Path, sums_in_16_bits: bool) -> None:
    feeds = feeds_of(encoder)
    wanted = answers(encoder, tmp_path / "before", feeds)
    names = convolution_inputs(encoder)
    assert names[0] == "input_features"
    statistics = observe(encoder, names, [feeds], workdir=tmp_path / "scratch")
    ranges = {name: statistics[name].range("minmax") for name in names}
    assert ranges["input_features"] == (feeds["input_features"].min(), feeds["input_features"].max())
    first = next(node for node in encoder.graph if node.op_type == "Conv")
    assert store_convolutions(encoder, ranges, WeightFormat(), exclude=[node.name or "" for node in encoder.graph]) == 0
    assert store_convolutions(encoder, ranges, WeightFormat(sums_in_16_bits=sums_in_16_bits)) == 2
    back = first.inputs[1].producer()  # type: ignore[union-attr]
    assert back is not None
    levels = back.inputs[0].const_value.numpy()  # type: ignore[union-attr]
    assert levels.dtype == np.int8
    assert np.abs(levels).max() == (63 if sums_in_16_bits else 127)
    found = answers(encoder, tmp_path / "after", feeds)
    same(found, wanted, within=0.05)
    assert not np.array_equal(found["cross.0.key"], wanted["cross.0.key"])


def test_only_the_encoder_is_written_for_the_other_engine(whole: Path, tmp_path: Path) -> None:
    model = load_graph(whole)
    encoder = split_encoder_decoder(model)[0]
    batches = [feeds_of(encoder, seed) for seed in range(3)]
    calibration = CalibrationData(batches, gather_statistics(whole, batches, tmp_path / "statistics"))
    (tmp_path / "out").mkdir()
    built = build_candidate(RUNG, whole, calibration, weights=WeightFormat(), folder=tmp_path / "out")
    made = load_graph(built.path)
    of_decoder = decoder_nodes(made)
    theirs = {node.op_type for node in made.graph if node.name in of_decoder}
    assert {"MatMulNBits", "MultiHeadAttention", "GroupQueryAttention"} <= theirs
    assert not {"MatMul", "QuantizeLinear", "Softmax"} & theirs
    ours = operator_counts(split_encoder_decoder(made)[0])
    assert ours["Softmax"] == LAYERS
    assert "MatMulNBits" not in ours
    products = {site.node for site in matmul_sites(model)}
    assert products <= set(built.quantized)
    wanted = answers(encoder, tmp_path / "float", batches[0])
    found = answers(split_encoder_decoder(made)[0], tmp_path / "eight", batches[0])
    same(found, wanted, within=0.2)


def test_the_other_engine_reads_it_as_it_is_written(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    from hfaccel.artifact.contract import SessionSettings
    from hfaccel.evaluate.cached_decoding import open_parts

    encoder = split_encoder_decoder(load_graph(whole))[0]
    batches = [feeds_of(encoder, seed) for seed in range(3)]
    calibration = CalibrationData(batches, gather_statistics(whole, batches, tmp_path / "statistics"))
    (tmp_path / "out").mkdir()
    built = build_candidate(RUNG, whole, calibration, weights=WeightFormat(sums_in_16_bits=True), folder=tmp_path / "out")
    mask = batches[0].get("attention_mask", np.ones((2, FRAMES), dtype=np.int64))[:, None, :, None]
    theirs, ours = (open_parts(built.path, settings)[0] for settings in (RUNG.session(), SessionSettings()))
    assert type(theirs) is not type(ours)
    wanted = ours.run(batches[0])
    for name, array in theirs.run(batches[0]).items():
        assert np.linalg.norm((array - wanted[name]) * mask) <= 0.05 * np.linalg.norm(wanted[name] * mask), name


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_mean_is_that_of_all_batches(shift: float) -> None:
    values = np.random.default_rng(0).normal(shift, 1, (60, 5)).astype(np.float32)
    statistics = ActivationStatistics.empty(5)
    for part in np.split(values, [7, 30]):
        statistics.update(part)
    np.testing.assert_allclose(statistics.channel_mean, values.mean(axis=0), rtol=1e-5, atol=1e-6)
    moved, exact = statistics.shifted(-statistics.channel_mean), values - values.mean(axis=0)
    assert (moved.channel_minimum <= exact.min(axis=0) + 1e-4).all()
    assert (moved.channel_maximum >= exact.max(axis=0) - 1e-4).all()
    assert np.maximum(-moved.channel_minimum, moved.channel_maximum).max() <= np.abs(values).max() + shift + 1
    assert np.array_equal(ActivationStatistics.empty(5).channel_mean, np.zeros(5))
