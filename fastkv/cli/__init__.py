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

_EXAMPLES = {
    "demo": (
        "fastkv demo",
        "fastkv demo --url redis://host:6379 --tokens 8192",
    ),
    "bench": (
        "fastkv bench redis://localhost",
        "fastkv bench unix:///run/redis.sock --workers 1,2 --baseline redis-py",
        "fastkv bench rediss://:password@host --sizes 1M,8M --connections 8,16,32",
        "fastkv bench redis://node:7000 --plot curve.png --json > report.json",
    ),
    "tune": (
        "fastkv tune redis://localhost --model llama-3.1-8b",
        "fastkv tune redis://host --model deepseek-v3 --chunk-tokens 64,256",
        "fastkv tune redis://host --bytes-per-token 40K --chunk-tokens 256 --json",
    ),
    "doctor": (
        "fastkv doctor redis://localhost",
        "fastkv doctor rediss://:password@host --seconds 0",
        "fastkv doctor redis://node:7000 --json || alert",
    ),
}


def main() -> None:
    """Run the command line; the entry point of the `fastkv` script."""
    if sys.argv[1:] == ["--version"]:
        print(f"fastkv {__version__}")
        return
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"fastkv needs {', '.join(missing)}: pip install 'fastkv[cli]'")
    try:
        make_app()()
    except KeyboardInterrupt:  # while modules load; later the commands see to it
        sys.exit(130)


def make_app() -> typer.Typer:
    """All commands."""
    import typer

    from fastkv.cli.bench import bench
    from fastkv.cli.demo import demo
    from fastkv.cli.doctor import doctor
    from fastkv.cli.tune import tune

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

    for command in (demo, bench, tune, doctor):
        examples = "\n\n".join(_EXAMPLES[command.__name__])
        app.command(epilog=f"Examples:\n\n{examples}")(command)
    return app
