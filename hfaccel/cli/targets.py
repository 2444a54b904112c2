"""``hfaccel targets``: the profiles an artifact can be compiled for."""

from __future__ import annotations

from typing import Annotated

import typer

from hfaccel.cli.output import Output


def targets(json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False) -> None:
    """List the targets and mark the one of this host.

    Example: hfaccel targets --json
    """
    from hfaccel.recipe.targets import TARGETS, detect_host

    output = Output(as_json=json)
    host = detect_host()
    rows = [
        (
            "*" if target.name == host.profile else "",
            target.name,
            target.description,
            "yes" if target.int8_dot else "no",
            "16 bits" if target.saturates else "32 bits",
            "yes" if target.bf16 else "no",
            target.provider,
        )
        for target in TARGETS
    ]
    output.table("", ("host", "target", "description", "int8 dot", "sums in", "bf16", "provider"), rows)
    output.line(f"* this host: {host.brand} ({host.microarchitecture})")
    output.result(
        [
            {
                "name": target.name,
                "description": target.description,
                "features": list(target.features),
                "int8_dot": target.int8_dot,
                "saturates": target.saturates,
                "bf16": target.bf16,
                "provider": target.provider,
                "host": target.name == host.profile,
            }
            for target in TARGETS
        ]
    )
