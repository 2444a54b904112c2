from __future__ import annotations

import json

from hfaccel.recipe.json_schema import recipe_json_schema
from hfaccel.recipe.load import recipes_folder


def test_committed_schema_is_current() -> None:
    committed = json.loads((recipes_folder() / "recipe.schema.json").read_text(encoding="utf-8"))
    assert committed == recipe_json_schema(), "run: hfaccel recipes schema > recipes/recipe.schema.json"
