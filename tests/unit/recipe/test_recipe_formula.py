from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfaccel.errors import RecipeError
from hfaccel.recipe.formula import check_formula, evaluate_formula

ALLOWED = "(allowed are whole numbers, names of the model's config, + - * // and parentheses)"


@given(layers=st.integers(0, 200), heads=st.integers(1, 64))
def test_arithmetic(layers: int, heads: int) -> None:
    config = {"num_hidden_layers": layers, "num_attention_heads": heads}
    formula = "2 * (num_hidden_layers + 1) - -3 // num_attention_heads"
    assert evaluate_formula(formula, config) == 2 * (layers + 1) - -3 // heads


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (
            "2 * num_hidden_layer",
            "the formula '2 * num_hidden_layer' uses 'num_hidden_layer', which the model's config does not have (did you mean 'num_hidden_layers'?)",
        ),
        ("flag", "the formula 'flag' needs a whole number, but 'flag' of the model's config is True"),
        ("1 // 0", "the formula '1 // 0' divides by zero"),
        ("2 ** 9", f"'2 ** 9' is not allowed in the formula '2 ** 9' {ALLOWED}"),
        ("exit()", f"'exit()' is not allowed in the formula 'exit()' {ALLOWED}"),
        ("1.5", f"'1.5' is not allowed in the formula '1.5' {ALLOWED}"),
        ("2 *", f"'2 *' is not a formula {ALLOWED}"),
    ],
)
def test_refusals(formula: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        evaluate_formula(formula, {"num_hidden_layers": 2, "flag": True})
    assert str(caught.value) == text


def test_check_needs_no_config() -> None:
    check_formula("2 * anything")
    with pytest.raises(RecipeError, match="the formula has 201 characters"):
        check_formula("1" * 201)
