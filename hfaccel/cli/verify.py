"""``hfaccel verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfaccel.cli.output import Output
from hfaccel.errors import IntegrityError


def verify(
    artifact: Annotated[Path, typer.Argument(help="Compiled folder.", show_default=False)],
    golden: Annotated[bool, typer.Option(help="Also open it in a fresh process and compare its golden answers.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Check that every file is what the manifest says, and that the artifact answers its golden inputs.

    Example:
      hfaccel verify minilm
    """
    from hfaccel.artifact.load_test import load_test
    from hfaccel.artifact.manifest import read_manifest, verify_files

    printer = Output(as_json=json)
    problems = verify_files(artifact)
    if problems:
        raise IntegrityError(
            "; ".join(problems), where=str(artifact), hint="copy the folder again, or compile again with --force"
        )
    if golden:
        load_test(artifact)
    count = len(read_manifest(artifact)["files"])
    printer.result({"artifact": str(artifact), "files": count, "golden_answers": "same" if golden else "not asked"})
    printer.line(f"{artifact}: {count} files as in the manifest{', golden answers as recorded' if golden else ''}")
