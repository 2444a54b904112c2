"""Beside a cache of 8 bits the graph for prompts attends in float: what is near is exact, what is stored is rounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from onnx import TensorProto, helper

from hfaccel.quant.float_prompts import attend_in_float
from hfaccel.quant.quantize_cache import store_in_integers
from hfaccel.rewrites.graphs import load_graph, save_graph
from hfaccel.runtime.generation.decoding import ATTEND_IN_FLOAT
from hfaccel.runtime.session import GraphSession

HEADS, KEY_VALUE_HEADS, SIZE, POSITIONS = 4, 2, 16, 64
WIDTH = (HEADS + 2 * KEY_VALUE_HEADS) * SIZE
SCALE = 0.03
CACHE = ("past_key_values.0.key", "past_key_values.0.value"), ("present.0.key", "present.0.value")


def attention(folder: Path, **attributes: int | float) -> Path:
    """One attention with rotated positions, as constructed decoders have it; ``input_ids`` are there for their shape."""
    angles = np.arange(POSITIONS)[:, None] * 0.7 ** np.arange(SIZE // 2)
    tables = [helper.make_tensor(name, TensorProto.FLOAT, angles.shape, function(angles).ravel()) for name, function in (("cos", np.cos), ("sin", np.sin))]  # fmt: skip
    node = helper.make_node(
        "GroupQueryAttention",
        ["packed", "", "", *CACHE[0], "last", "total", "cos", "sin"],
        ["attended", *CACHE[1]],
        domain="com.microsoft",
        name="attention",
        num_heads=HEADS,
        kv_num_heads=KEY_VALUE_HEADS,
        do_rotary=1,
        **attributes,
    )
    counts = [
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["length"], keepdims=0),
        helper.make_node("Sub", ["length", "one"], ["last_long"]),
        helper.make_node("Cast", ["last_long"], ["last"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "one"], ["total_long"]),
        helper.make_node("Cast", ["total_long"], ["total"], to=TensorProto.INT32),
    ]
    ids = ("input_ids", "attention_mask")
    state = ["batch", KEY_VALUE_HEADS, "tokens", SIZE]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", f"{name}_tokens"]) for name in ids]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, state) for name in CACHE[0]]
    inputs.append(helper.make_tensor_value_info("packed", TensorProto.FLOAT, ["batch", "input_ids_tokens", WIDTH]))
    outputs = [helper.make_tensor_value_info("attended", TensorProto.FLOAT, None)]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, state) for name in CACHE[1]]
    constants = [helper.make_tensor("axis", TensorProto.INT64, [1], [1]), helper.make_tensor("one", TensorProto.INT64, [], [1])]
    graph = helper.make_graph([*counts, node], "attention", inputs, outputs, [*tables, *constants])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = onnx_ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    folder.mkdir(exist_ok=True)
    return save_graph(model, folder)


def in_8_bits(graph: Path, folder: Path, *, prompts: bool) -> GraphSession:
    model = load_graph(graph)
    scale = np.full((1, KEY_VALUE_HEADS, 1, SIZE), SCALE, dtype=np.float32)
    store_in_integers(model, dict.fromkeys(CACHE[1], scale), 8)
    if prompts:
        assert attend_in_float(model) == 1
    folder.mkdir()
    return GraphSession(save_graph(model, folder))


def feeds(batch: int, new: int, past: int, *, lengths: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    random = np.random.default_rng(new)
    mask = np.ones((batch, past + new), dtype=np.int64)
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    stored = [random.integers(-90, 90, (batch, KEY_VALUE_HEADS, past, SIZE)).astype(np.int8) for _ in CACHE[0]]
    packed = random.normal(0, 0.8, (batch, new, WIDTH)).astype(np.float32)
    return {"input_ids": np.zeros((batch, new), dtype=np.int64), "attention_mask": mask, "packed": packed, **dict(zip(CACHE[0], stored, strict=True))}  # fmt: skip


def of_float_cache(fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**fed, **{name: (fed[name] * np.float32(SCALE)) for name in CACHE[0]}}


@pytest.mark.parametrize("attributes", [{}, {"local_window_size": 6}, {"softcap": 3.0}, {"rotary_interleaved": 1}])
@pytest.mark.parametrize(("batch", "new", "past"), [(1, 9, 0), (1, 9, 7), (3, 9, 0), (1, 2, 20)])
def test_several_tokens_attend_as_with_a_float_cache_of_what_is_stored(
    attributes: dict[str, int | float], batch: int, new: int, past: int, tmp_path: Path
) -> None:
    graph = attention(tmp_path / "float", **attributes)
    fed = feeds(batch, new, past, lengths=(9, 4, 7)[:batch] if batch > 1 else ())
    exact = GraphSession(graph).run(of_float_cache(fed))
    found = in_8_bits(graph, tmp_path / "integers", prompts=True).run(fed)
    for row, tokens in enumerate(fed["attention_mask"].sum(axis=1) - past):
        np.testing.assert_allclose(found["attended"][row, :tokens], exact["attended"][row, :tokens], atol=2e-6)
        for name, stored in zip(CACHE[1], CACHE[0], strict=True):
            assert found[name].dtype == np.int8
            assert found[name].shape == (batch, KEY_VALUE_HEADS, past + new, SIZE)
            np.testing.assert_array_equal(found[name][row, :, :past], fed[stored][row])
            rounded = np.clip(np.rint(exact[name][row, :, past : past + tokens] / np.float32(SCALE)), -128, 127)
            np.testing.assert_array_equal(found[name][row, :, past : past + tokens], rounded)


def test_single_tokens_and_the_gate_read_the_integers(tmp_path: Path) -> None:
    graph = attention(tmp_path / "float")
    kernel = in_8_bits(graph, tmp_path / "kernel", prompts=False)
    choosing = in_8_bits(graph, tmp_path / "choosing", prompts=True)
    assert choosing.optional_input_names == (ATTEND_IN_FLOAT,)
    several, step = feeds(1, 9, 0), feeds(2, 1, 12)
    in_integers = choosing.run({**several, ATTEND_IN_FLOAT: np.array(False)})
    for ours, theirs in ((in_integers, kernel.run(several)), (choosing.run(step), kernel.run(step))):
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values)
    in_float = choosing.run(several)
    assert not np.array_equal(in_integers["attended"], in_float["attended"])
    for name in CACHE[1]:  # and what is stored is what the kernel stores
        np.testing.assert_array_equal(in_integers[name], in_float[name])


def test_a_cache_in_float_or_4_bits_is_left_alone(tmp_path: Path) -> None:
    model = load_graph(attention(tmp_path))
    assert attend_in_float(model) == 0
    store_in_integers(model, dict.fromkeys(CACHE[1], np.ones((1, KEY_VALUE_HEADS, 1, SIZE), dtype=np.float32)), 4)
    assert attend_in_float(model) == 0
    assert [node.op_type for node in model.graph if node.op_type in ("If", "GroupQueryAttention")] == ["GroupQueryAttention"]
