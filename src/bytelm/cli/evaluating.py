"""The command that evaluates a model: eval."""

from typing import TYPE_CHECKING, Annotated

import typer

from bytelm.cli.app import app, console, status
from bytelm.cli.options import Checkpoint, Device, Precision, Threads
from bytelm.cli.reading import HeldOutText, with_read_options
from bytelm.errors import DataError
from bytelm.storage import to_json

if TYPE_CHECKING:
    from bytelm.data import ReadOptions
    from bytelm.likelihood import Likelihood


@app.command("eval")
@with_read_options
def evaluate(
    checkpoint: Checkpoint,
    texts: Annotated[
        list[str],
        typer.Argument(
            help="Text to measure: files, folders or globs, read as by data prepare; prepared "
            "data, of which the held-out documents are measured."
        ),
    ],
    stride: Annotated[
        int | None,
        typer.Option(
            help="Bytes between the beginnings of contexts in long text; smaller values give every "
            "byte more context. (default: no overlap)"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: of all text, and by source.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    *,
    read: "ReadOptions",
) -> None:
    """Measure the bits per byte of text, by source.

    [dim]bytelm eval runs/blt-1m held-out/*.txt more=other.jsonl[/]
    """
    from bytelm.data import Reader, find_inputs
    from bytelm.display import ConsoleProgress, show_inputs, show_likelihood
    from bytelm.language_model import load
    from bytelm.likelihood import total
    from bytelm.threads import use_threads

    lm = load(checkpoint, device, precision)
    said = use_threads(threads, device)
    if said:
        status.print(said, highlight=False, markup=False, soft_wrap=True)
    reader = Reader(read)
    inputs = find_inputs(texts, read)
    reading = HeldOutText(inputs, reader)
    with ConsoleProgress(status).measuring("evaluating") as show:
        by_source = lm.likelihood(
            ((d.source, d.data, d.trained) for d in reading),
            stride=stride,
            report=lambda done: show(done, reading.expected_bytes),
        )
    if not by_source:
        raise DataError(
            "there is no text to evaluate: name other files (of prepared data, only held-out "
            "documents are evaluated)"
        )
    show_inputs(status, [one for one in reader.records if one.note or one.invalid_records])
    if as_json:
        units = lm.module.units.name

        def record(x: "Likelihood") -> dict[str, float]:
            count = {units: x.num_units} if units != "bytes" else {}
            return {"bits_per_byte": x.bits_per_byte, "bytes": x.num_bytes, **count}

        # A source may have any name, "all" too.
        sources = {name: record(one) for name, one in by_source.items()}
        print(to_json({"all": record(total(by_source.values())), "sources": sources}, indent=2))
        return
    show_likelihood(console, by_source, lm.module.units.name)
