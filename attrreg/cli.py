"""The command line: `attrreg demo`, `attrreg bench`, `attrreg evidence`. A new command is a typed function, listed in `build_app`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def build_app() -> typer.Typer:
    """The app with all commands. Imports typer, which only the extras bring."""
    import typer

    from attrreg.bench.command import bench
    from attrreg.demo.command import demo
    from attrreg.evidence.command import evidence
    from attrreg.options import common

    app = typer.Typer(callback=common, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    for command in (demo, bench, evidence):
        app.command()(command)
    return app


def main() -> None:
    """The entry point `attrreg`."""
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        raise SystemExit("The attrreg command needs typer. Install with: pip install 'attrreg[demo]'") from None
    app(prog_name="attrreg")
