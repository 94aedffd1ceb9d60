"""``bytelm quickstart`` and ``bytelm recipes``."""

import re
import time
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bytelm.cli.app import app, console, resumable
from bytelm.cli.options import Threads
from bytelm.config import shipped_names, shipped_text
from bytelm.errors import ConfigError


@app.command()
def quickstart(
    data: Annotated[
        Path | None,
        typer.Option(
            help="File or folder of text to train on. (default: the standard library of Python)"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("bytelm-quickstart"),
    minutes: Annotated[
        float, typer.Option(min=0.2, help="Maximum duration; less means shorter training.")
    ] = 6.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    threads: Threads = None,
) -> None:
    """Train, evaluate and sample a small BLT on this computer; nothing is downloaded."""
    # Imports take seconds, and much longer on a busy computer.
    began = time.monotonic()
    from bytelm.display import ConsoleProgress, show_quickstart
    from bytelm.quickstart import STAGES, run_quickstart
    from bytelm.threads import use_threads

    said = use_threads(threads)
    if said:
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    progress = ConsoleProgress(console, STAGES)
    with resumable():
        found = run_quickstart(
            data, out, minutes=minutes, began=began, seed=seed, progress=progress
        )
    show_quickstart(console, found)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe or plan to print.")] = None,
) -> None:
    """List the shipped recipes and plans, or print one as a start for your own."""
    shipped = {
        each: shipped_text(kind, each)
        for kind in ("recipes", "plans")
        for each in shipped_names(kind)
    }
    if name is not None:
        if name not in shipped:
            raise ConfigError(
                f"{name!r} is neither a shipped recipe nor a plan: choose one of "
                f"{', '.join(shipped)}"
            )
        print(shipped[name], end="")
        return
    for kind in ("recipes", "plans"):
        table = Table(box=None, pad_edge=False)
        table.add_column(kind.removesuffix("s"), style="bold", min_width=16)
        table.add_column("description")
        for each in shipped_names(kind):
            table.add_row(each, _description(shipped[each]))
        console.print(table, "")


def _description(text: str) -> str:
    """Return the comment at the beginning of a YAML file, up to its commands."""
    comment = takewhile(lambda line: re.match(r"# ?\S", line), text.splitlines())
    return " ".join(line.lstrip("# ") for line in comment)
