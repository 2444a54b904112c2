"""The command line: composes the commands, and is the one place where an error becomes an exit code."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from hfaccel.cli.bench import bench
from hfaccel.cli.cache import cache_app
from hfaccel.cli.compile import compile_command
from hfaccel.cli.doctor import doctor
from hfaccel.cli.inspect import inspect
from hfaccel.cli.output import Output
from hfaccel.cli.plan import plan
from hfaccel.cli.recipes import recipes_app
from hfaccel.cli.run import run
from hfaccel.cli.targets import targets
from hfaccel.cli.verify import verify
from hfaccel.errors import ExitCode, HfaccelError

app = typer.Typer(
    name="hfaccel",
    help="Compile Hugging Face Transformers checkpoints into measured, gated, deployable artifacts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compile")(compile_command)
app.command("plan")(plan)
app.command("run")(run)
app.command("bench")(bench)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.add_typer(recipes_app, name="recipes")
app.add_typer(cache_app, name="cache")
app.command("targets")(targets)
app.command("doctor")(doctor)


def main() -> None:
    """Run the command line; every way out passes through here."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    output = Output(as_json="--json" in arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == ExitCode.INTERRUPTED:  # typer makes this of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else ExitCode.DONE)
    except HfaccelError as error:
        if debug:
            traceback.print_exc()
        output.error(error)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        output.info("interrupted; finished stages are kept, run the same command to go on")
        sys.exit(ExitCode.INTERRUPTED)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        _unexpected(error, output, debug=debug)


def _unexpected(error: Exception, output: Output, *, debug: bool) -> None:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of click
        error.show()
        sys.exit(ExitCode.USAGE)
    if debug:
        traceback.print_exc()
    what = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    output.error(
        HfaccelError(f"unexpected {type(error).__name__}: {what}", hint="run again with --debug and report the traceback")
    )
    sys.exit(ExitCode.UNEXPECTED)
