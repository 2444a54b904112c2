"""Attention whose shares and values are 8 bit too, where that moves the outputs by little; for an engine with such products (OpenVINO).

Shares are rounded to multiples of 1/255, whatever the data, since none is larger than one. What that takes is what a token gives small shares
of its attention to: among 1,500 frames of sound half of all shares on average. So values are centered first (exact, see
:mod:`hfaccel.quant.attention_values`): what is lost then counts as much as the mean of all values in place of nothing. Whisper's logits are
moved by a twelfth as much (divergence 0.0046 in place of 0.053), and one of its four layers makes up for nearly all that is left: it keeps
its shares in float. Queries, keys, shares and values in 8 bit take attention over 1,500 frames from 10.7 to 7.4 ms a layer. Where a
processor adds products in pairs of 16 bits nothing saturates: two shares have 256 levels together at most.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.attention_values import center_values
from hfaccel.quant.calibration import open_with_outputs
from hfaccel.quant.eight_bit_scores import round_operand
from hfaccel.rewrites.fuse_attention import ATTENTION
from hfaccel.rewrites.plain_attention import can_be_spelled_out, spell_out_attention

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    import onnx_ir

    from hfaccel.quant.calibration import ActivationStatistics, Feeds

_VALUES = 2
"""Place of the values among what fused attention reads."""


def attention_values(model: onnx_ir.Model) -> tuple[str, ...]:
    """Names of the values [batch, sequence, channels] of fused attention, wherever in the graph that is."""
    return tuple(dict.fromkeys(_values(node).name or "" for node in model.graph.all_nodes() if node.op_type == ATTENTION))


def center_all_values(model: onnx_ir.Model, statistics: dict[str, ActivationStatistics]) -> int:
    """Center the values of every fused attention that has biases for it, around the mean of calibration; exact in float arithmetic.

    Args:
        model: changed in place.
        statistics: of values and of what attention gives; those of both become those of the centered ones.

    Returns:
        How many attentions were changed.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == ATTENTION]:
        values, given = _values(node), node.outputs[0]
        if values.name not in statistics or given.name not in statistics:
            continue
        mean = statistics[values.name].channel_mean
        if center_values(model, given, mean) is not None:
            statistics |= {name: statistics[name].shifted(-mean) for name in (values.name, given.name)}
            count += 1
    return count


def spell_out_rounded(
    model: onnx_ir.Model, ranges: Mapping[str, tuple[float, float]], names: Collection[str], *, exclude: Collection[str] = ()
) -> None:
    """Spell out fused attention (:func:`hfaccel.rewrites.plain_attention.spell_out_attention`), some of it with 8-bit shares and values.

    Args:
        model: changed in place.
        ranges: lowest and highest value of the values of those, by name.
        names: of the attentions that round their values, and the shares that mix them.
        exclude: names of nodes that are left as they are.
    """
    known: dict[str, onnx_ir.Value] = {}
    for node in [node for node in model.graph if node.name in names]:
        round_operand(model, node, _VALUES, ranges, known)
    spell_out_attention(model, exclude=exclude, round_shares=names)


def share_errors(
    model: onnx_ir.Model, ranges: Mapping[str, tuple[float, float]], batches: Sequence[Feeds], *, workdir: Path
) -> dict[str, float]:
    """By how much the outputs move, relative to them, when one attention rounds its shares and values, by name of the attention.

    The result of the attention itself says little: of Whisper's it moves least in the first layer, and the outputs most.

    Args:
        model: a float graph; it is not changed.
        ranges: lowest and highest value of the values, by name; attentions of others are left out.
        batches: a few texts or sounds.
        workdir: where a graph may lie meanwhile.
    """
    others = [node.name or "" for node in model.graph]
    names = [node.name or "" for node in model.graph if can_be_spelled_out(node) and _values(node).name in ranges]
    exact = _outputs(model, batches, workdir) if names else []
    sizes = sum(float(np.square(array).sum()) for array in exact)
    errors = {}
    for name in names:
        rounded = model.clone()
        spell_out_rounded(rounded, ranges, [name], exclude=others)
        found = _outputs(rounded, batches, workdir)
        moved = sum(float(np.square(left - right).sum()) for left, right in zip(found, exact, strict=True))
        errors[name] = math.sqrt(moved / sizes) if sizes > 0 else math.inf
    return errors


def harmless(errors: Mapping[str, float], limit: float) -> tuple[str, ...]:
    """As many attentions as together move the outputs by no more than ``limit``, if they do so independently of each other.

    None where those would be less than half: they bring less than can be measured (MiniLM, one of six).
    """
    chosen, total = [], 0.0
    for name in sorted(errors, key=errors.__getitem__):
        total += errors[name] ** 2
        if total > limit**2:
            break
        chosen.append(name)
    return tuple(chosen) if len(chosen) >= len(errors) / 2 else ()


def _outputs(model: onnx_ir.Model, batches: Sequence[Feeds], workdir: Path) -> list[np.ndarray]:
    """Everything that a graph gives, batch after batch; what padding gives is zero."""
    session = open_with_outputs(model, [], workdir)
    return [_without_padding(array, feeds.get("attention_mask")) for feeds in batches for array in session.run(feeds).values()]


def _without_padding(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is None or array.shape[:2] != mask.shape:
        return array
    return np.asarray(array * mask.reshape(*mask.shape, *[1] * (array.ndim - 2)))


def _values(node: onnx_ir.Node) -> onnx_ir.Value:
    values = node.inputs[_VALUES]
    assert values is not None  # fused attention has them
    return values
