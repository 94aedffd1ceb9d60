"""Where a newcomer begins: the quickstart and the recipes."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bytelm.cli.app import app, console
from bytelm.config import recipe_names, recipe_text
from bytelm.errors import ConfigError


@app.command()
def quickstart(
    data: Annotated[
        Path | None,
        typer.Option(help="Text to train on, a file or a folder; this Python's library if absent."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("bytelm-quickstart"),
    minutes: Annotated[
        float, typer.Option(min=0.2, help="Time to take at most, on this computer.")
    ] = 6.0,
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
) -> None:
    """Train, evaluate and sample a small BLT on this computer; nothing is downloaded."""
    from bytelm.quickstart import run_quickstart

    run_quickstart(data, out, minutes=minutes, seed=seed, console=console)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
) -> None:
    """List the shipped recipes, or print one: a start for your own."""
    if name is not None:
        if name not in recipe_names():
            raise ConfigError(
                f"{name!r} is not a shipped recipe; there are {', '.join(recipe_names())}"
            )
        print(recipe_text(name), end="")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", style="bold")
    table.add_column("what")
    for each in recipe_names():
        first = re.sub(r"^#\s*", "", recipe_text(each).splitlines()[0])
        table.add_row(each, first)
    console.print(table)
