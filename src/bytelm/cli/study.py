"""``bytelm study``: compare models at equal FLOPs."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytelm.cli.app import app, console
from bytelm.cli.options import seconds
from bytelm.config import shipped_names
from bytelm.errors import ConfigError, TrainingError
from bytelm.stopping import Stopping

if TYPE_CHECKING:
    from bytelm.study import Plan, Run


@app.command(context_settings={"allow_interspersed_args": True})
def study(
    plan: Annotated[
        str, typer.Argument(help=f"Plan: {', '.join(shipped_names('plans'))}, or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help='key.path=value, such as text.train=["books"].')
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study. (default: studies/PLAN)")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what every run costs; train nothing.")
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="Runs at once; they share the threads, and are spread over CUDA devices."
        ),
    ] = 1,
    time_limit: Annotated[
        str | None,
        typer.Option(help="Stop after this time (90s, 9m, 2h); the same command resumes."),
    ] = None,
    redraw: Annotated[
        Path | None,
        typer.Option(
            help="Train nothing: write page and figures of the results in this folder, or in that "
            "of a study, to --out."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only runs whose name contains this text; can be given several times."),
    ] = None,
    speed: Annotated[
        float, typer.Option(min=1.0, help="FLOPs per second of a worker, to estimate time.")
    ] = 1e10,
) -> None:
    """Compare families of models at equal FLOPs: plan, runs, table, fits, figures, a page.

    Every run has a folder of its own and resumes where it stopped, on any machine. Tables, fits and
    figures of the finished runs are updated each time.

    [dim]bytelm study cpu-study --dry-run
    bytelm study cpu-study --workers 2 --time-limit 9m
    bytelm study cpu-study --redraw docs/study --out page[/]
    """
    from bytelm.display import ConsoleProgress, show_study_costs
    from bytelm.study import (
        check_text,
        find_table,
        load_plan,
        plan_runs,
        run_costs,
        share_done,
        write_page,
    )

    loaded = load_plan(plan, overrides or ())
    folder = out or Path("studies") / loaded.name
    if redraw is not None:
        with ConsoleProgress(console).waiting("drawing"):
            page = write_page(loaded, find_table(loaded, redraw), folder)
        console.print(f"{page}", soft_wrap=True)
        return
    runs = plan_runs(loaded)
    for text in only or ():
        if not any(text in run.name for run in runs):
            raise ConfigError(f"--only {text}: no run name contains it")
    if only:
        runs = [run for run in runs if any(text in run.name for text in only)]
    if dry_run:
        check_text(loaded, folder)
        costs = run_costs(loaded, runs, folder, speed, ConsoleProgress(console))
        done = [share_done(folder, run, c.steps) for run, c in zip(runs, costs, strict=True)]
        show_study_costs(console, loaded, costs, done)
        return
    limit = seconds(time_limit) if time_limit else None
    problems = _run(loaded, runs, folder, workers, limit)
    if problems:
        raise TrainingError("; ".join(problems))


def _run(
    plan: "Plan", runs: "list[Run]", folder: Path, workers: int, time_limit: float | None
) -> list[str]:
    """Prepare, train, and write the results; return a line for each failed run."""
    from bytelm.display import ConsoleProgress
    from bytelm.study import prepare_text, run_all, table_folder, write_page, write_table

    deadline = None if time_limit is None else time.time() + time_limit
    progress = ConsoleProgress(console)
    problems: list[str] = []
    is_stopped = False
    # Its handlers end with this block, so that a second signal ends the command.
    stop = Stopping(time_limit)
    try:
        with stop.listening(), stop.interruptible():
            if prepare_text(plan, runs, folder, progress, deadline):
                problems = run_all(
                    plan, runs, folder, workers=workers, progress=progress, deadline=deadline
                )
    except KeyboardInterrupt:
        is_stopped = stop.reason != "time limit"
    num_finished, num_runs = write_table(plan, folder)
    if num_finished:
        tables = table_folder(plan, folder)
        with progress.waiting("drawing"):
            page = write_page(plan, tables, tables)
        console.print(f"{page}", soft_wrap=True)
    more = "" if num_finished == num_runs else "; the same command resumes"
    console.print(f"{num_finished} of {num_runs} runs finished{more}")
    if is_stopped:
        raise typer.Exit(143 if stop.reason == "SIGTERM" else 130)
    return problems
