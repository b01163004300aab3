"""The ``ftlib`` command."""
import typer

app = typer.Typer()
