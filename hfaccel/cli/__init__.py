"""One file per command: parse, call, render. Only ``output.py`` prints; ``app.py`` is the one boundary from errors to exit codes."""
