"""The `fastkv` command. Each subcommand is a module of this package.

Needs nothing of the `cli` extra until the command runs: `private_server` works without
it.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

from fastkv._version import __version__

if TYPE_CHECKING:
    import typer

_EXTRA = ("numpy", "rich", "typer")


def main() -> None:
    """Run the command line; the entry point of the `fastkv` script."""
    if sys.argv[1:] == ["--version"]:
        print(f"fastkv {__version__}")
        return
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"fastkv needs {', '.join(missing)}: pip install 'fastkv[cli]'")
    try:
        _app()()
    except KeyboardInterrupt:  # while modules load; later the commands see to it
        sys.exit(130)


def _app() -> typer.Typer:
    import typer

    from fastkv.cli.demo import demo

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        # Locals in a traceback would show the password of a URL.
        pretty_exceptions_show_locals=False,
    )

    def print_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"fastkv {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: bool = typer.Option(
            False,
            "--version",
            is_eager=True,
            callback=print_version,
            help="Show the version and exit.",
        ),
    ) -> None:
        """The Redis client for LLM KV caches."""

    app.command()(demo)
    return app
