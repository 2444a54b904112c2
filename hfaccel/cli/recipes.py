"""``hfaccel recipes``: list, show and check recipes, print their JSON Schema."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hfaccel.cli.output import Output
from hfaccel.errors import RecipeError

recipes_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@recipes_app.command("list")
def list_command(json: JsonOption = False) -> None:
    """List the shipped recipes and the model types they are chosen for.

    Example: hfaccel recipes list
    """
    from hfaccel.recipe.load import list_recipes

    output = Output(as_json=json)
    summaries = list_recipes()
    output.table(
        "",
        ("recipe", "extends", "model types", "description"),
        [(item.name, item.extends or "", ", ".join(item.model_types), item.description) for item in summaries],
    )
    output.result(
        [
            {
                "name": item.name,
                "extends": item.extends,
                "model_types": list(item.model_types),
                "description": item.description,
            }
            for item in summaries
        ]
    )


@recipes_app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value; may be repeated.")
    ] = None,
    origins: Annotated[bool, typer.Option("--origins", help="Show where each value comes from.")] = False,
    json: JsonOption = False,
) -> None:
    """Show a recipe as resolved: parents merged, overrides applied.

    Example: hfaccel recipes show bert --set quantize.precision=int8 --origins
    """
    import yaml

    from hfaccel.recipe.load import load_recipe
    from hfaccel.recipe.problems import origin_of

    output = Output(as_json=json)
    resolved = load_recipe(name, overrides=overrides or ())
    values = resolved.recipe.model_dump(mode="json")
    if origins:
        rows = [(path, value, origin_of(path, resolved.origins)) for path, value in _leaves("", values)]
        output.table("", ("key", "value", "origin"), rows)
    else:
        output.line(yaml.safe_dump(values, sort_keys=False, width=120).rstrip())
    output.result({"recipe": values, "origins": dict(resolved.origins)} if origins else {"recipe": values})


@recipes_app.command("check")
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Recipe files, or names of shipped recipes.")],
    json: JsonOption = False,
) -> None:
    """Check recipe files; every problem is named with file, line and key.

    Example: hfaccel recipes check mine.yaml
    """
    from hfaccel.recipe.load import load_recipe

    output = Output(as_json=json)
    names: list[str] = []
    errors: list[RecipeError] = []
    for file in files:
        try:
            names.append(load_recipe(file).recipe.name)
        except RecipeError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise RecipeError(f"{len(errors)} of {len(files)} recipes are not valid:" + "".join(f"\n{error}" for error in errors))
    for file, recipe_name in zip(files, names, strict=True):
        output.line(f"{file}: ok ({recipe_name})")
    output.result([{"file": file, "name": recipe_name} for file, recipe_name in zip(files, names, strict=True)])


@recipes_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a recipe file, for editors.

    Example: hfaccel recipes schema > recipe.schema.json
    """
    from hfaccel.recipe.json_schema import recipe_json_schema

    Output(as_json=True).result(recipe_json_schema())


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(f"{path}.{key}" if path else key, item)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(f"{path}.{index}", item)]
    return [(path, value)]
