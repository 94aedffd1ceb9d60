"""The verb that compares models: study."""

import signal
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bytelm.cli.app import app, console
from bytelm.cli.options import seconds
from bytelm.errors import TrainingError


@app.command(context_settings={"allow_interspersed_args": True})
def study(
    plan: Annotated[str, typer.Argument(help="A shipped plan, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help='key.path=value, such as text.train=["books"].')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; studies/PLAN.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what every run costs; train nothing.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Runs at once; with CUDA each on a device of its own.")
    ] = 1,
    time_limit: Annotated[
        str | None,
        typer.Option(help="Stop after this long (90s, 9m, 2h); the same command goes on."),
    ] = None,
    redraw: Annotated[
        Path | None,
        typer.Option(help="Train nothing: draw the table in this folder again, into --out."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Only runs whose name holds this text.")] = None,
    speed: Annotated[
        float, typer.Option(min=1.0, help="FLOPs per second of a worker, to estimate time.")
    ] = 2e10,
) -> None:
    """Compare families of models at equal FLOPs: plan, runs, table, fits, figures, a page.

    Every run has a folder of its own and goes on where it stopped, on any machine. What is
    finished is tabled, fitted and drawn each time.

    [dim]bytelm study cpu-corpus --dry-run
    bytelm study cpu-corpus --workers 2 --time-limit 9m
    bytelm study cpu-corpus --redraw docs/study --out docs/study[/]
    """
    from bytelm.display import show_study_costs
    from bytelm.study import (
        is_finished,
        load_plan,
        plan_runs,
        prepare_text,
        run_all,
        run_cost,
        spent_flops,
        write_page,
        write_table,
    )

    settled = load_plan(plan, overrides or ())
    folder = out or Path("studies") / settled.name
    runs = [run for run in plan_runs(settled) if only is None or only in run.name]
    if dry_run:
        costs = [run_cost(settled, run, folder, speed) for run in runs]
        done = [
            1.0 if is_finished(folder, run) else min(spent_flops(folder, run) / cost.flops, 0.99)
            for run, cost in zip(runs, costs, strict=True)
        ]
        show_study_costs(console, settled, costs, done)
        return
    if redraw is not None:
        console.print(f"{write_page(settled, redraw, folder)}")
        return
    deadline = time.time() + seconds(time_limit) if time_limit else None
    signal.signal(signal.SIGTERM, _interrupt)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        left = None if deadline is None else deadline - time.time()
        ready = prepare_text(settled, folder, console, left)
        problems = []
        if ready:
            problems = run_all(
                settled, runs, folder, workers=workers, console=console, deadline=deadline
            )
    except KeyboardInterrupt:
        console.print("stopped: the same command goes on")
        raise typer.Exit(130) from None
    finished = write_table(plan_runs(settled), folder)
    if finished:
        console.print(f"{finished} runs finished: {write_page(settled, folder, folder)}")
    if problems:
        raise TrainingError("; ".join(problems))


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
