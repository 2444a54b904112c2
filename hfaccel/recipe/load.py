"""Recipes from files: inheritance, overrides, validation with file and line, and the origin of each value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from hfaccel.errors import RecipeError
from hfaccel.recipe.closest import did_you_mean
from hfaccel.recipe.problems import Problem, join_problems, recipe_problems, validation_problems
from hfaccel.recipe.schema import Recipe
from hfaccel.recipe.yaml_lines import YamlDocument, join_path, parse_value, parse_yaml

GENERIC_RECIPE = "encoder"
_GENERIC_RECIPES = {
    "text-generation": "decoder",
    "text2text-generation": "encoder-decoder",
    "automatic-speech-recognition": "encoder-decoder",
}


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and where each of its values comes from.

    Attributes:
        recipe: the validated recipe.
        origins: dotted key path -> ``encoder.yaml:12``, ``--set`` or ``command line``.
    """

    recipe: Recipe
    origins: Mapping[str, str]


@dataclass(frozen=True)
class RecipeSummary:
    """One line of ``hfaccel recipes list``."""

    name: str
    description: str
    extends: str | None
    model_types: tuple[str, ...]


def recipes_folder() -> Path:
    """The folder of the shipped recipes: inside the package in a wheel, beside it in a checkout.

    Raises:
        RecipeError: neither exists, so the installation is broken.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_recipes", package.parent / "recipes"):
        if (folder / f"{GENERIC_RECIPE}.yaml").is_file():
            return folder
    raise RecipeError(
        "the shipped recipes are missing", where=str(package), hint="reinstall: pip install --force-reinstall hfaccel"
    )


def load_recipe(
    name_or_file: str,
    *,
    overrides: Sequence[str] = (),
    sets: Mapping[str, Any] = MappingProxyType({}),
) -> ResolvedRecipe:
    """Load, merge and validate a recipe.

    Args:
        name_or_file: name of a shipped recipe, or a path that ends in ``.yaml`` or ``.yml``.
        overrides: ``key.path=value`` texts of ``--set``, values in YAML; they win over everything.
        sets: dotted key path -> value that other command line options set; they win over the files.

    Raises:
        RecipeError: all problems of the recipe at once, each with file and line.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    chain = _read_chain(_find(name_or_file, base=None))
    for document in reversed(chain):
        _merge(values, document.data, "", document, origins)
    for path, value in sets.items():
        _set(values, origins, path, value, "command line")
    for text in overrides:
        path, value = _parse_override(text)
        _set(values, origins, path, value, "--set")
    recipe, problems = _validate(values, origins)
    for document in chain:
        if "name" not in document.data:
            problems.append(Problem(f"{document.label}:1", "name", "the file does not state its name", "add: name: ..."))
    if problems or recipe is None:
        raise join_problems(problems, label=chain[0].label)
    return ResolvedRecipe(recipe, MappingProxyType(origins))


def list_recipes() -> tuple[RecipeSummary, ...]:
    """All shipped recipes by name.

    Raises:
        RecipeError: a shipped recipe is not valid.
    """
    recipes = [load_recipe(path.stem).recipe for path in sorted(recipes_folder().glob("*.yaml"))]
    return tuple(RecipeSummary(recipe.name, recipe.description, recipe.extends, recipe.model_types) for recipe in recipes)


def generic_recipe(task: str) -> str:
    """Name of the recipe that all others of the same kind of model extend."""
    return _GENERIC_RECIPES.get(task, GENERIC_RECIPE)


def choose_recipe(model_type: str, task: str) -> tuple[str, str | None]:
    """The shipped recipe of a ``model_type``, and a notice where only the generic one of the task fits.

    Raises:
        RecipeError: a shipped recipe is not valid.
    """
    for summary in list_recipes():
        if model_type in summary.model_types and generic_recipe(task) in (summary.name, summary.extends):
            return summary.name, None
    generic = generic_recipe(task)
    return generic, (
        f"no recipe for model type '{model_type}': the generic recipe '{generic}' is used, which states no fusion contract"
    )


def _find(name_or_file: str, *, base: Path | None) -> Path:
    """``base`` is the folder that a file in ``extends`` is relative to."""
    if name_or_file.endswith((".yaml", ".yml")):
        path = (base or Path()) / name_or_file
        if not path.is_file():
            raise RecipeError("the recipe file does not exist", where=str(path), hint="give a name of: hfaccel recipes list")
        return path
    path = recipes_folder() / f"{name_or_file}.yaml"
    names = [file.stem for file in recipes_folder().glob("*.yaml")]
    if name_or_file not in names:
        hint = did_you_mean(name_or_file, names) + " (a file must end in .yaml)"
        raise RecipeError(f"there is no recipe '{name_or_file}'", hint=hint)
    return path


def _read_chain(path: Path) -> list[YamlDocument]:
    """The recipe and its parents, child first."""
    documents: list[YamlDocument] = []
    seen: list[Path] = []
    while True:
        resolved = path.resolve()
        document = _read(path)
        documents.append(document)
        seen.append(resolved)
        parent = document.data.get("extends")
        if parent is None:
            return documents
        where = f"{document.label}:{document.lines['extends']}: extends"
        if not isinstance(parent, str):
            raise RecipeError("must be the name of a recipe or a file", where=where)
        try:
            path = _find(parent, base=path.parent)
        except RecipeError as error:
            raise RecipeError(error.what, where=where, hint=error.hint) from None
        if path.resolve() in seen:
            names = [item.name for item in seen[seen.index(path.resolve()) :]] + [path.name]
            raise RecipeError(f"recipes extend each other in a circle: {' -> '.join(names)}", where=where)


def _read(path: Path) -> YamlDocument:
    shipped = path.resolve().parent == recipes_folder()
    label = path.name if shipped else str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=label) from None
    return parse_yaml(text, label=label)


def _merge(values: dict[str, Any], new: Mapping[str, Any], path: str, document: YamlDocument, origins: dict[str, str]) -> None:
    """Merge mappings deeply, replace everything else; ``origins`` follows."""
    for key, value in new.items():
        key_path = join_path(path, key)
        old = values.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value, key_path, document, origins)
            continue
        _forget(origins, key_path)
        values[key] = _copy(value)
        prefix = key_path + "."
        for line_path, line in document.lines.items():
            if line_path == key_path or line_path.startswith(prefix):
                origins[line_path] = f"{document.label}:{line}"


def _forget(origins: dict[str, str], path: str) -> None:
    for known in [known for known in origins if known == path or known.startswith(path + ".")]:
        del origins[known]


def _copy(value: Any) -> Any:
    """A copy of nested mappings and lists, so that a later merge never edits a document."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


def _parse_override(text: str) -> tuple[str, Any]:
    path, separator, value_text = text.partition("=")
    path = path.strip()
    if not separator or not path or any(part == "" for part in path.split(".")):
        raise RecipeError(f"'{text}' is not key.path=value", where="--set", hint="for example: --set quantize.precision=int8")
    try:
        return path, parse_value(value_text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"the value '{value_text}' is not valid YAML: {problem}", where=f"--set: {path}") from None


def _set(values: dict[str, Any], origins: dict[str, str], path: str, value: Any, origin: str) -> None:
    """Set one value; a mapping on the way is made where missing, so that validation names the unknown key."""
    container: Any = values
    parts = path.split(".")
    for depth, part in enumerate(parts):
        here = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(container, list):
            if not part.isdecimal() or int(part) >= len(container):
                entries = "1 entry" if len(container) == 1 else f"{len(container)} entries"
                raise RecipeError(
                    f"'{part}' is not an entry of the list, which has {entries}",
                    where=f"{origin}: {here}",
                    hint="entries count from 0",
                )
            key: Any = int(part)
        elif isinstance(container, dict):
            key = part
            if not last and key not in container:
                container[key] = {}
                origins[here] = origin
        else:
            parent = ".".join(parts[:depth])
            raise RecipeError(f"'{parent}' is a single value and has no key '{part}'", where=f"{origin}: {here}")
        if last:
            container[key] = _copy(value)
        else:
            container = container[key]
    _forget(origins, path)
    origins[path] = origin


def _validate(values: dict[str, Any], origins: Mapping[str, str]) -> tuple[Recipe | None, list[Problem]]:
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        return None, validation_problems(error, origins)
    return recipe, recipe_problems(recipe, origins)
