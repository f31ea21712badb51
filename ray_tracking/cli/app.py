"""The program `ray-tracking`: its commands put together, and what becomes of an error."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from ray_tracking.cli import (
    checkpoints,
    doctor,
    export,
    gc,
    job_driver,
    keeping,
    logs,
    report,
    resume,
    runs,
    status,
    stop,
    submit,
    sweep,
    sync,
    train,
    ui,
)
from ray_tracking.errors import RayTrackingError

DEBUG_FLAG = "--debug"
INTERRUPTED = 130


class Commands(TyperGroup):
    """The top group: turns the errors a user can cause into a message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RayTrackingError as error:
            if _debug():
                traceback.print_exc()
            _complain(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _complain("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich help costs 0.2 s of imports: `--help` would miss its 0.4 s on a busy machine
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train PyTorch models on Ray: one run that survives anything, tracked everywhere.",
    epilog="Exit status: 0 done, 1 the run failed, 2 wrong usage or config, 3 refused.",
)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            typer.echo(f"ray-tracking {installed('ray-tracking')}")
        except PackageNotFoundError:  # run from a source tree that is not installed
            typer.echo("ray-tracking (not installed)")
        raise typer.Exit


app.command("demo")(train.demo)
app.command("train")(train.train)
app.add_typer(sweep.group, name="sweep")
app.command("resume")(resume.resume)
app.add_typer(submit.group, name="submit")
app.add_typer(runs.group, name="runs")
app.add_typer(checkpoints.group, name="checkpoints")
checkpoints.group.command("pin")(keeping.pin)
checkpoints.group.command("unpin")(keeping.unpin)
checkpoints.group.command("prune")(keeping.prune)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("sync")(sync.sync)
app.command("status")(status.status)
app.command("logs")(logs.logs)
app.command("stop")(stop.stop)
app.command("gc")(gc.gc)
app.command("ui", short_help="Start TensorBoard and MLflow; Ctrl-C ends both.")(ui.ui)
app.command("doctor")(doctor.doctor)
app.command("job-driver", hidden=True)(job_driver.job_driver)


def main() -> None:
    """Run the command line on `sys.argv` and exit with its status."""
    try:
        app(prog_name="ray-tracking")
    except Exception as error:  # noqa: BLE001 - the last line of defence: a newcomer gets a sentence, not a traceback
        if _debug():
            traceback.print_exc()
        else:
            first = (str(error).splitlines() or [""])[0]
            _complain(f"Unexpected {type(error).__name__}: {first}\nRun again with {DEBUG_FLAG} to see where.")
        sys.exit(1)


def _debug() -> bool:
    # Read from the arguments themselves: an error may come before or while they are parsed.
    return DEBUG_FLAG in sys.argv[1:]


def _complain(message: str) -> None:
    typer.echo(message, err=True)
