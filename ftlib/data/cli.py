"""The ``ftlib data`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from ftlib import runtime
from ftlib.data import DataCorrupt, DataUnavailable, catalogue
from ftlib.data import fetch as fetch_file
from ftlib.data.registry import data_sets

app = typer.Typer(help="List the data sets, and fetch them.")


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_data()


@app.command("list")
def list_data() -> None:
    """List the data sets: files, size, licence, and where they are."""
    for row in catalogue():
        typer.echo(
            f"{row.name:<20} {row.files:>3} files {row.bytes / 1e6:>6.1f} MB  "
            f"{row.licence:<23} {row.where:<15} {row.what}"
        )


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A data set that `list` names.")],
) -> None:
    """Fetch the files of a data set that are not here yet, and verify them all."""
    data_set = data_sets().get(name)
    if data_set is None:
        typer.echo(f"unknown data set {name!r}: `ftlib data` lists them", err=True)
        raise typer.Exit(2)
    try:
        for file in runtime.progress(data_set.files, desc=name, unit="file"):
            fetch_file(file.path)
    except (DataUnavailable, DataCorrupt) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stop:
        typer.echo(
            f"stopped: `ftlib data fetch {name}` goes on with the files not here yet",
            err=True,
        )
        raise typer.Exit(130) from stop
    typer.echo(f"{name}: {len(data_set.files)} files here and verified")
