"""The import contracts of pyproject.toml hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_CONTRACTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def is_print(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def test_imports_point_one_way() -> None:
    command = [sys.executable, "-c", RUN_CONTRACTS]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_only_the_output_module_prints() -> None:
    talkers = [
        path.relative_to(REPOSITORY).as_posix()
        for path in sorted((REPOSITORY / "hfaccel").rglob("*.py"))
        if path.name != "output.py" and any(map(is_print, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    ]
    assert talkers == []
