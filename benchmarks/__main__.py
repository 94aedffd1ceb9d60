"""The command line: `python -m benchmarks`, from the root of the repository."""

import datetime
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import describe_run, progress, record_path, redraw, section_name, update
from benchmarks.settings import SUITES, Device, Precision, Settings

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def main(
    suite: Annotated[
        str, typer.Option(help=f"Suites to run, separated by commas: {', '.join(SUITES)}.")
    ] = ",".join(SUITES),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models, one sample: see that it runs.")
    ] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Samples of each measurement; 5, with --quick 1.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of torch. With one, CPU time is comparable.")
    ] = 1,
    device: Annotated[Device, typer.Option(help="Where models run.")] = "cpu",
    precision: Annotated[
        Precision, typer.Option(help="Of ours, by autocast; theirs stays in float32.")
    ] = "float32",
    theirs_up_to: Annotated[
        int, typer.Option(min=0, help="Longest row for theirs: memory grows with its square.")
    ] = 8192,
    their_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes theirs generates, a full forward pass each.")
    ] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("benchmarks/records"),
    commit: Annotated[
        str | None, typer.Option(help="What to record, in a copy of the tree without history.")
    ] = None,
    redraw_file: Annotated[
        Path | None, typer.Option("--redraw", help="Only draw the tables of this record again.")
    ] = None,
) -> None:
    """Measure bytelm beside the BLT of `transformers`, and write it down.

    Both have the same weights, run in one process and take turns; every sample is
    kept, as wall time and as CPU time of the process. On a machine with other work,
    trust CPU time, minima and the ratios of neighbours.

    The record of the day, with its tables, is OUT/YYYY-MM-DD-DEVICE.json and .md.
    Suites run later on the same day replace their own section and leave the
    others, so they can be run one by one.

    [dim]python -m benchmarks --suite model,memory
    python -m benchmarks --suite generation --their-bytes 64 --repeats 3
    python -m benchmarks --quick --out /tmp/records
    python -m benchmarks --redraw benchmarks/records/2026-11-23-cpu.json[/]

    """
    if redraw_file is not None:
        if not redraw_file.is_file():
            raise typer.BadParameter(f"there is no record {redraw_file}", param_hint="--redraw")
        print(redraw(redraw_file))
        return
    settings = Settings(
        device=device,
        precision=precision,
        threads=threads,
        repeats=repeats or (1 if quick else 5),
        quick=quick,
        theirs_up_to=theirs_up_to,
        their_bytes=their_bytes,
    )
    if not run_suites(_suites(suite), settings, out, commit):
        raise typer.Exit(1)


def _suites(names: str) -> list[str]:
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in SUITES:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(SUITES)}", param_hint="--suite"
            )
    return wanted


def run_suites(suites: list[str], settings: Settings, out: Path, commit: str | None) -> bool:
    """Run suites in turn, each with its own section; whether all of them came to their end."""
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # of the processes that suites start
    import torch

    torch.set_num_threads(settings.threads)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is available", param_hint="--device")
    path = record_path(out, settings, datetime.date.today())
    all_ended = True
    for suite in suites:
        began = time.perf_counter()
        try:
            run = describe_run(settings, sys.argv[1:], commit)
            results = _load(suite)(settings, progress)
        except Exception:
            progress(f"{suite} failed:\n{traceback.format_exc()}")
            all_ended = False
            continue
        section = {"run": run, "seconds": time.perf_counter() - began, "results": results}
        update(path, section_name(suite, settings), section)
        print(f"{suite}: {path}", flush=True)
    return all_ended


def _load(suite: str) -> Callable[[Settings, Callable[[str], None]], dict[str, Any]]:
    return import_module(f"benchmarks.{suite.replace('-', '_')}").run


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
