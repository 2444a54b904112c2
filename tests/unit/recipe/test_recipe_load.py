from __future__ import annotations

from pathlib import Path

import pytest

from hfaccel.errors import ExitCode, RecipeError
from hfaccel.recipe.load import choose_recipe, list_recipes, load_recipe, recipes_folder

GENERIC = "encoder"
PARENTS = ("encoder", "decoder", "encoder-decoder")
ATTENTION_OF_THEIR_OWN = ("deberta-v2",)
"""Recipes of architectures whose attention no operator of onnxruntime computes, so that nothing is there to fuse."""
NAMES = [path.stem for path in sorted(recipes_folder().glob("*.yaml"))]


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(name: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides=overrides)
    assert caught.value.exit_code is ExitCode.SETTINGS
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_loads(name: str) -> None:
    resolved = load_recipe(name)
    assert resolved.recipe.name == name
    assert resolved.recipe.description
    if name not in PARENTS:
        assert resolved.recipe.extends in PARENTS
        assert resolved.recipe.model_types
        assert bool(resolved.recipe.fuse.contract) == (name not in ATTENTION_OF_THEIR_OWN)
        assert ("contract:" in (recipes_folder() / f"{name}.yaml").read_text()) == (name not in ATTENTION_OF_THEIR_OWN)


def test_each_model_type_has_one_recipe() -> None:
    model_types = [item for summary in list_recipes() for item in summary.model_types]
    assert len(model_types) == len(set(model_types))


def test_choose_recipe() -> None:
    assert choose_recipe("distilbert", "fill-mask") == ("distilbert", None)
    assert choose_recipe("llama", "text-generation") == ("llama", None)
    assert choose_recipe("mystery", "fill-mask") == (
        "encoder",
        "no recipe for model type 'mystery': the generic recipe 'encoder' is used, which states no fusion contract",
    )
    assert choose_recipe("mystery", "text-generation") == (
        "decoder",
        "no recipe for model type 'mystery': the generic recipe 'decoder' is used, which states no fusion contract",
    )
    # a recipe of the architecture, but for another kind of task
    assert choose_recipe("bert", "text-generation")[0] == "decoder"
    assert choose_recipe("llama", "feature-extraction")[0] == "encoder"


def test_child_overrides_and_origins_tell_where(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "name: mine\ndescription: d\nextends: encoder\nquantize:\n  precision: int8\n  ladder:\n    - {name: a, scheme: dynamic, graph: fused}\n",
    )
    resolved = load_recipe(file, sets={"accuracy.max_loss": 0.02}, overrides=["quantize.ladder.0.per_channel=false"])
    assert resolved.recipe.quantize.precision == "int8"
    assert [(rung.name, rung.per_channel) for rung in resolved.recipe.quantize.ladder] == [("a", False)]
    assert resolved.origins["quantize.precision"] == f"{file}:5"
    assert resolved.origins["quantize.ladder.0.name"] == f"{file}:7"
    assert "quantize.ladder.1.name" not in resolved.origins
    assert resolved.origins["quantize.ladder.0.per_channel"] == "--set"
    assert resolved.origins["accuracy.max_loss"] == "command line"
    assert resolved.origins["seed"].startswith("encoder.yaml:")
    assert resolved.recipe.accuracy.max_loss == 0.02


def test_set_wins_over_other_options() -> None:
    resolved = load_recipe(GENERIC, sets={"quantize.precision": "fp32"}, overrides=["quantize.precision=int8"])
    assert resolved.recipe.quantize.precision == "int8"
    assert resolved.origins["quantize.precision"] == "--set"


def test_off_is_a_word_and_no_truth_value(tmp_path: Path) -> None:
    file = write(tmp_path, "name: mine\ndescription: d\nextends: encoder\nquantize:\n  fallback: off\n")
    assert load_recipe(file).recipe.quantize.fallback == "off"
    changed = load_recipe("bert", overrides=["quantize.fallback=off", "quantize.ladder.0.per_channel=True"]).recipe.quantize
    assert (changed.fallback, changed.ladder[0].per_channel) == ("off", True)


def test_parent_may_be_a_file_beside(tmp_path: Path) -> None:
    write(tmp_path, "name: base\nextends: encoder\nseed: 7\n", "base.yaml")
    file = write(tmp_path, "name: mine\nextends: base.yaml\n")
    assert load_recipe(file).recipe.seed == 7


def test_loading_twice_gives_the_same(tmp_path: Path) -> None:
    load_recipe(GENERIC, overrides=["quantize.ladder.0.name=other"])
    assert load_recipe(GENERIC).recipe.quantize.ladder[0].name == "dynamic"


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "name: mine\nextends: encoder\nquantise:\n  precision: int8\naccuracy:\n  max_los: 0.1\nfuse:\n  enabled: maybe\n",
    )
    assert message(file) == (
        f"{file}: 3 problems:\n"
        f"  {file}:8: fuse.enabled: input should be a valid boolean, unable to interpret input, got 'maybe'\n"
        f"  {file}:6: accuracy.max_los: unknown key 'max_los' (did you mean 'max_loss'?)\n"
        f"  {file}:3: quantise: unknown key 'quantise' (did you mean 'quantize'?)"
    )


def test_unknown_key_of_a_rung_names_file_and_line(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "name: mine\nextends: encoder\nquantize:\n  ladder:\n    - name: a\n      scheme: dynamic\n      graph: fused\n      per_chanel: true\n",
    )
    assert message(file) == f"{file}:8: quantize.ladder.0.per_chanel: unknown key 'per_chanel' (did you mean 'per_channel'?)"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("quantise.precision=int8", "--set: quantise: unknown key 'quantise' (did you mean 'quantize'?)"),
        (
            "quantize.precision=int9",
            "--set: quantize.precision: 'int9' is not one of fp32, bf16, fp16, int8, int4, auto (did you mean 'int8'?)",
        ),
        (
            "quantize.ladder.19.name=a",
            "--set: quantize.ladder.19: '19' is not an entry of the list, which has 14 entries (entries count from 0)",
        ),
        ("seed.x=1", "--set: seed.x: 'seed' is a single value and has no key 'x'"),
        ("seed", "--set: 'seed' is not key.path=value (for example: --set quantize.precision=int8)"),
        ("measure.workload=[8by128]", "--set: measure.workload.0: '8by128' is not batch x sequence (for example: 8x128)"),
        (
            "quantize.ladder.1.name=dynamic",
            None,
        ),
        (
            "fuse.contract.Gelu=2 ** layers",
            "--set: fuse.contract.Gelu: '2 ** layers' is not allowed in the formula '2 ** layers' "
            "(allowed are whole numbers, names of the model's config, + - * // and parentheses)",
        ),
    ],
)
def test_wrong_override(override: str, text: str | None) -> None:
    found = message(GENERIC, override)
    if text is None:
        assert "--set: quantize.ladder.1.name: the name 'dynamic' stands twice (names must be unique)" in found
        assert "2 problems" in found
    else:
        assert found == text


def test_circle_of_parents(tmp_path: Path) -> None:
    file = write(tmp_path, "name: a\nextends: b.yaml\n", "a.yaml")
    write(tmp_path, "name: b\nextends: a.yaml\n", "b.yaml")
    assert message(file) == f"{tmp_path / 'b.yaml'}:2: extends: recipes extend each other in a circle: a.yaml -> b.yaml -> a.yaml"


def test_missing_parent(tmp_path: Path) -> None:
    file = write(tmp_path, "name: a\nextends: encodr\n")
    assert message(file) == f"{file}:2: extends: there is no recipe 'encodr' (did you mean 'encoder'? (a file must end in .yaml))"


def test_missing_file(tmp_path: Path) -> None:
    file = str(tmp_path / "none.yaml")
    assert message(file) == f"{file}: the recipe file does not exist (give a name of: hfaccel recipes list)"


def test_file_must_state_its_name(tmp_path: Path) -> None:
    file = write(tmp_path, "extends: encoder\n")
    assert message(file) == f"{file}:1: name: the file does not state its name (add: name: ...)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nseed: 1\nseed: 2\n", "{file}:3: seed: the key 'seed' stands twice (first in line 2)"),
        ("name: a\nseed: 2026-13-01\n", "{file}: not valid YAML: month must be in 1..12"),
        ("- a\n", "{file}:1: a recipe must be a mapping of keys to values (start with: name: ...)"),
        ("", "{file}:1: a recipe must be a mapping of keys to values (start with: name: ...)"),
        ("name: a\n1: b\n", "{file}:2: keys must be text (quote the key)"),
        ("name: &x a\ndescription: *x\n", "{file}:2: not valid YAML: aliases (*name) are not allowed in recipes"),
        (
            "name: !!python/object/apply:os.getcwd []\n",
            "{file}:1: the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd' is not allowed in recipes",
        ),
    ],
)
def test_unusable_yaml(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path, text)
    assert message(file) == expected.format(file=file)
