"""The published JSON Schema of a recipe file, for editors."""

from __future__ import annotations

from typing import Any

from hfaccel.recipe.schema import Recipe


def recipe_json_schema() -> dict[str, Any]:
    """The schema of a recipe *file*: with ``extends`` every value may come from the parent, except the file's own name.

    Entries of the ladder stay complete, because a list replaces its parent's list.
    """
    schema = Recipe.model_json_schema()
    for name, definition in schema["$defs"].items():
        if name != "Rung":
            definition.pop("required", None)
    schema["required"] = ["name"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
