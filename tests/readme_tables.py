"""The tables of README.md that follow from the code: exit codes, options of ``hfaccel compile``, recipes.

python tests/readme_tables.py    # writes them between their marker comments; `make readme` does the same
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from hfaccel.cli.app import app
from hfaccel.errors import ExitCode
from hfaccel.recipe.load import list_recipes, load_recipe

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"<!-- generated: ([a-z-]+) -->\n.*?<!-- end -->\n", re.DOTALL)

MEANINGS: Mapping[ExitCode, str] = {
    ExitCode.DONE: "done",
    ExitCode.UNEXPECTED: "unexpected fault; `--debug` shows the traceback",
    ExitCode.USAGE: "the command line cannot be carried out as written",
    ExitCode.SETTINGS: "recipe, settings or data: missing file, empty, wrong columns",
    ExitCode.SOURCE: "source model: missing, corrupt, no tokenizer, or refused (remote code, pickle)",
    ExitCode.EXPORT: "export failed, or the architecture is not supported",
    ExitCode.GATE: "a gate was missed (parity, accuracy, fusion contract); nothing is published",
    ExitCode.RESOURCES: "not enough memory, disk or time",
    ExitCode.TARGET: "target, provider or engine unknown or not available here",
    ExitCode.INTEGRITY: "artifact integrity: verify or load test failed",
    ExitCode.BATCH: "batch finished with failures",
    ExitCode.INTERRUPTED: "interrupted",
}


def exit_codes() -> str:
    """One row an exit code; a code whose command does not exist yet is marked."""
    reserved = {} if "batch" in _commands() else {ExitCode.BATCH: "reserved: "}
    return _table(("code", "meaning"), ((str(int(code)), reserved.get(code, "") + MEANINGS[code]) for code in ExitCode))


def compile_options() -> str:
    """One row an option of ``hfaccel compile``, in the order of ``--help``."""
    rows = []
    for parameter in _commands()["compile"].params:
        name = parameter.name.upper() if parameter.param_type_name == "argument" and parameter.name else ", ".join(parameter.opts)
        rows.append((f"`{name}`", _default(parameter), getattr(parameter, "help", None) or ""))
    return _table(("option", "default", "what it does"), rows)


def recipes() -> str:
    """One row a shipped recipe: the architectures it is chosen for and the operators that its graph must have when fused."""
    rows = []
    for summary in list_recipes():
        contract = load_recipe(summary.name).recipe.fuse.contract
        expected = ", ".join(f"{operator} = {count}" for operator, count in contract.items())
        rows.append((summary.name, ", ".join(summary.model_types) or "all others", expected or "none"))
    return _table(("recipe", "architectures (`model_type`)", "fusion contract"), rows)


TABLES: Mapping[str, Callable[[], str]] = {"exit-codes": exit_codes, "compile-options": compile_options, "recipes": recipes}


def rewritten(text: str) -> str:
    """The text of the README with every generated block made anew.

    Raises:
        ValueError: a table has no block, or a block has no table.
    """
    names = [match[1] for match in BLOCK.finditer(text)]
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"README.md has the generated blocks {sorted(names)}, expected {sorted(TABLES)}")
    return BLOCK.sub(lambda match: f"<!-- generated: {match[1]} -->\n{TABLES[match[1]]()}<!-- end -->\n", text)


def _commands() -> Mapping[str, typer.core.TyperCommand]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined, no-any-return]


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is False:
        return "off"
    return f"`{parameter.default}`" if parameter.default not in (None, ()) else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
