"""The ``ftlib`` command.

The commands import what they need when they run, so that ``ftlib --help`` answers
at once.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from ftlib import runtime

if TYPE_CHECKING:
    from ftlib.results import Results

app = typer.Typer(
    help="Run the book's experiments, and show what they recorded.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_STOPPED = "stopped: repeat the command to go on"
_FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}
ScaleOption = Annotated[
    str | None, typer.Option("--scale", help="cpu or gpu; by default what is here.")
]


@app.command()
def run(
    method: Annotated[str, typer.Argument(help="Method to run, such as cgm.")],
    scale: ScaleOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Run seeds 0 to K - 1.")] = 5,
    experiment: Annotated[
        str | None, typer.Option(help="Run this experiment alone.")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Run this arm alone; repeatable.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run again what is recorded.")
    ] = False,
) -> None:
    """Run a method's experiments and record them; a repeat goes on where it stopped."""
    with _clean_errors():
        from ftlib.experiments import run_plan
        from ftlib.results import results_path

        at = runtime.scale(scale)
        recorded = run_plan(
            method, at, range(seeds), experiment=experiment, arms=arm, force=force
        )
        _print_results(recorded)
        typer.echo(f"{len(recorded)} runs are recorded in {results_path(method, at)}")


@app.command()
def results(
    name: Annotated[
        str | None, typer.Argument(help="A method or a benchmark; default: all.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="cpu or gpu; default: both.")
    ] = None,
) -> None:
    """Print what is recorded, with intervals over the seeds."""
    with _clean_errors():
        from ftlib.experiments import METHODS, PlanError
        from ftlib.results import recorded

        known = sorted({*METHODS, *recorded()})
        if name not in (None, *known):
            raise PlanError(f"nothing is called {name!r}: choose from {known}")
        found = _load_all(
            known if name is None else [name],
            runtime.SCALES if scale is None else [runtime.scale(scale)],
        )
        for each in found:
            _print_results(each)


def _load_all(names: Iterable[str], scales: Iterable[str]) -> list[Results]:
    """Load what there is, and raise only where there is nothing."""
    from ftlib.results import NotRecordedError, load

    found, missing = [], []
    for name, scale in itertools.product(names, scales):
        try:
            found.append(load(name, scale))
        except NotRecordedError as error:
            missing.append(error)
    if not found:
        raise missing[0]
    return found


def _print_results(recorded: Results) -> None:
    from ftlib.results import PACKED_PREFIX, table

    for experiment in recorded.experiments():
        part = recorded.select(experiment)
        method, scale = part[0].method, part[0].scale
        typer.echo(f"{method}, scale {scale}, experiment {experiment}\n")
        shown = [m for m in part.metrics() if not m.startswith(PACKED_PREFIX)]
        typer.echo(table(part, shown))
        devices = sorted({record.device for record in part})
        commits = sorted({record.commit or "unknown" for record in part})
        typer.echo(f"\non {'; '.join(devices)}, at commit {', '.join(commits)}\n")


@app.command()
def report() -> None:
    """Print scale, device, memory, dtype and versions in one line."""
    with _clean_errors():
        typer.echo(runtime.report())


@app.command(context_settings=_FORWARDED, add_help_option=False)
def models(context: typer.Context) -> None:
    """List the models, and fetch them."""
    _forward(context)


@app.command(context_settings=_FORWARDED, add_help_option=False)
def data(context: typer.Context) -> None:
    """List the data, and fetch them."""
    _forward(context)


def _forward(context: typer.Context) -> None:
    """Hand the arguments to the Typer app of the subpackage with the command's name."""
    name = context.info_name
    with _clean_errors():
        command = importlib.import_module(f"ftlib.{name}.cli").app
        command(args=context.args, prog_name=context.command_path)


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Turn the errors that users can put right into one message and an exit code."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code = _exit_code(error)
        if code is None:
            raise
        typer.echo(f"ftlib: {str(error) or _STOPPED}", err=True)
        raise typer.Exit(code) from error


def _exit_code(error: BaseException) -> int | None:
    """Return 2 for a wrong request, 1 for a failure, ``None`` for a defect."""
    from ftlib.experiments import PlanError, RunsFailedError
    from ftlib.results import NotRecordedError, RecordError

    match error:
        case runtime.SettingError() | PlanError():
            return 2
        case RunsFailedError() | NotRecordedError() | RecordError() | OSError():
            return 1
        case KeyboardInterrupt():
            return 130  # what a shell reports for Ctrl-C
    return None
