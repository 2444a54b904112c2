"""From a failed validation to problems that name the file, the line, the key path and the closest key."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hfaccel.errors import RecipeError
from hfaccel.recipe.closest import did_you_mean
from hfaccel.recipe.contradictions import contradictions
from hfaccel.recipe.formula import check_formula
from hfaccel.recipe.schema import Recipe, Rung

_SHAPE = re.compile(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}")
_PROMPT_AND_ANSWER = re.compile(r"[1-9][0-9]{0,5}\+[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe.

    Attributes:
        origin: ``file:line``, ``--set`` or ``command line``.
        path: dotted key path.
        what: what is wrong.
        hint: what to do; may be empty.
    """

    origin: str
    path: str
    what: str
    hint: str


def join_problems(problems: Sequence[Problem], *, label: str) -> RecipeError:
    """One error that states all problems; ``label`` names the recipe when there are several."""
    errors = [RecipeError(item.what, where=f"{item.origin}: {item.path}", hint=item.hint) for item in problems]
    if len(errors) == 1:
        return errors[0]
    listed = "".join(f"\n  {error}" for error in errors)
    return RecipeError(f"{len(errors)} problems:{listed}", where=label)


def validation_problems(error: ValidationError, origins: Mapping[str, str]) -> list[Problem]:
    """What pydantic found, in our words."""
    problems: list[Problem] = []
    choices: dict[str, list[str]] = {}
    for detail in error.errors():
        # A value with alternatives (``Precision | "auto"``) fails once for each of them, under a path that names the alternative.
        path = _path(detail)
        if detail["type"] == "literal_error" and path in choices:
            choices[path] += _choices(detail)
            what, hint = _not_one_of(detail["input"], choices[path])
            problems = [replace(item, what=what, hint=hint) if item.path == path else item for item in problems]
            continue
        if detail["type"] == "literal_error":
            choices[path] = _choices(detail)
        what, hint = _words(detail)
        problems.append(Problem(origin_of(path, origins), path, what, hint))
    return problems


def recipe_problems(recipe: Recipe, origins: Mapping[str, str]) -> list[Problem]:
    """What the types alone cannot say: shapes, formulas, unique rung names."""
    problems: list[Problem] = []
    for path, shapes in (("parity.shapes", recipe.parity.shapes), ("measure.workload", recipe.measure.workload)):
        for index, shape in enumerate(shapes):
            generated = path == "measure.workload" and _PROMPT_AND_ANSWER.fullmatch(shape)
            if not _SHAPE.fullmatch(shape) and not generated:
                where = f"{path}.{index}"
                problems.append(
                    Problem(origin_of(where, origins), where, f"'{shape}' is not batch x sequence", "for example: 8x128")
                )
    for operator, formula in recipe.fuse.contract.items():
        try:
            check_formula(formula)
        except RecipeError as error:
            where = f"fuse.contract.{operator}"
            problems.append(Problem(origin_of(where, origins), where, error.what, error.hint))
    counts = Counter(rung.name for rung in recipe.quantize.ladder)
    for index, rung in enumerate(recipe.quantize.ladder):
        if counts[rung.name] > 1:
            where = f"quantize.ladder.{index}.name"
            problems.append(
                Problem(origin_of(where, origins), where, f"the name '{rung.name}' stands twice", "names must be unique")
            )
        for name, what in contradictions(rung):
            where = f"quantize.ladder.{index}.{name}"
            problems.append(Problem(origin_of(where, origins), where, what, "remove the key, or change engine or scheme"))
    return problems


def origin_of(path: str, origins: Mapping[str, str]) -> str:
    """Where the value at ``path`` was written, or else the closest key above it; ``recipe`` when nothing above it was."""
    while path:
        if path in origins:
            return origins[path]
        path = path.rpartition(".")[0]
    return "recipe"


def _path(detail: ErrorDetails) -> str:
    return ".".join(str(part) for part in detail["loc"] if not str(part).startswith("literal["))


def _choices(detail: ErrorDetails) -> list[str]:
    return re.findall(r"[^\s',]+", re.sub(r" or ", ", ", str(detail["ctx"]["expected"])))


def _not_one_of(value: Any, choices: list[str]) -> tuple[str, str]:
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    named = f"'{value}'" if isinstance(value, str) else _short(value)
    return f"{named} is not one of {', '.join(choices)}", hint if hint.startswith("did") else ""


def _words(detail: ErrorDetails) -> tuple[str, str]:
    value: Any = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            name = str(detail["loc"][-1])
            return f"unknown key '{name}'", did_you_mean(name, _fields_at(detail["loc"][:-1]))
        case "missing":
            return "the value is missing", "state it here or extend a recipe that does (extends: encoder)"
        case "literal_error":
            return _not_one_of(value, _choices(detail))
        case _:
            message = detail["msg"]
            return f"{message[:1].lower()}{message[1:]}, got {_short(value)}", ""


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return "nothing" if value is None else repr(value)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at a place of the recipe; a list index stands for an entry of the ladder, the only list of mappings."""
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, int):
            model = Rung
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
