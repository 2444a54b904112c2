"""Formulas of the fusion contract: integer arithmetic over a model's config, evaluated without ``eval``."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from hfaccel.errors import RecipeError
from hfaccel.recipe.closest import did_you_mean

_MAX_LENGTH = 200
_ALLOWED = "allowed are whole numbers, names of the model's config, + - * // and parentheses"


def evaluate_formula(text: str, config: Mapping[str, Any]) -> int:
    """The value of a formula such as ``2 * num_hidden_layers``.

    Args:
        text: the formula.
        config: the model's config.json.

    Raises:
        RecipeError: not a formula, a name that the config does not have as a whole number, or a division by zero.
    """
    expression = _parse(text)
    _check(expression, text)
    return _evaluate(expression, text, config)


def check_formula(text: str) -> None:
    """Refuse what is not a formula, before any config is known.

    Raises:
        RecipeError: not a formula.
    """
    _check(_parse(text), text)


def _parse(text: str) -> ast.expr:
    if len(text) > _MAX_LENGTH:
        raise RecipeError(f"the formula has {len(text)} characters, the limit is {_MAX_LENGTH}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RecipeError(f"'{text}' is not a formula", hint=_ALLOWED) from None


def _check(node: ast.expr, text: str) -> None:
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv(), right=right):
            _check(left, text)
            _check(right, text)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _check(operand, text)
        case ast.Constant(value=value) if type(value) is int:
            pass
        case ast.Name():
            pass
        case _:
            raise RecipeError(f"'{ast.unparse(node)}' is not allowed in the formula '{text}'", hint=_ALLOWED)


def _evaluate(node: ast.expr, text: str, config: Mapping[str, Any]) -> int:
    """The value of an expression that :func:`_check` has let pass."""
    match node:
        case ast.BinOp(left=left, op=operator, right=right):
            return _apply(operator, _evaluate(left, text, config), _evaluate(right, text, config), text)
        case ast.UnaryOp(operand=operand):
            return -_evaluate(operand, text, config)
        case ast.Name(id=name):
            return _look_up(name, text, config)
        case _:
            return int(ast.literal_eval(node))


def _apply(operator: ast.operator, left: int, right: int, text: str) -> int:
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case _:
            if right == 0:
                raise RecipeError(f"the formula '{text}' divides by zero")
            return left // right


def _look_up(name: str, text: str, config: Mapping[str, Any]) -> int:
    value = config.get(name)
    if type(value) is int:
        return value
    if name in config:
        raise RecipeError(f"the formula '{text}' needs a whole number, but '{name}' of the model's config is {value!r}")
    numbers = [key for key, item in config.items() if type(item) is int]
    raise RecipeError(
        f"the formula '{text}' uses '{name}', which the model's config does not have", hint=did_you_mean(name, numbers)
    )
