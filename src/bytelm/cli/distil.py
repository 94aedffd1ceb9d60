"""``bytelm distil``: a byte model that a token model of the Llama family teaches."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytelm.cli.app import app, console, resumable, status
from bytelm.cli.byteify import (
    DecoderLayers,
    DonorName,
    EncoderLayers,
    LocalDim,
    NumBuckets,
    PatchSize,
    Window,
)
from bytelm.cli.options import Threads, seconds
from bytelm.cli.reading import with_read_options

if TYPE_CHECKING:
    from bytelm.data import ReadOptions


@app.command("distil")
@with_read_options
def distil(
    donor: DonorName,
    texts: Annotated[list[str], typer.Argument(help="Text to learn on, read as by data prepare.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    read_bytes: Annotated[
        int, typer.Option(min=10_000, help="Most bytes of text that the donor reads.")
    ] = 3_000_000,
    readings: Annotated[
        Path | None,
        typer.Option(help="Readings of the same donor from another run, RUN/readings."),
    ] = None,
    encoder_steps: Annotated[int, typer.Option(min=0, help="Steps of the encoder alone.")] = 600,
    parts_steps: Annotated[
        int, typer.Option(min=0, help="Steps of encoder and decoder, without the global model.")
    ] = 900,
    together_steps: Annotated[int, typer.Option(min=0, help="Steps of the whole model.")] = 30,
    row_bytes: Annotated[
        int,
        typer.Option(
            min=64,
            help="Bytes of text in a step, or one document; longer ones than 4,000 characters are "
            "cut.",
        ),
    ] = 4096,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    patch_size: PatchSize = None,
    local_dim: LocalDim = None,
    encoder_layers: EncoderLayers = 1,
    decoder_layers: DecoderLayers = 3,
    window: Window = 256,
    num_buckets: NumBuckets = 32_768,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the random weights and of the order of the text.")
    ] = 0,
    time_limit: Annotated[
        str | None,
        typer.Option(
            help="Stop with a checkpoint after this time (90s, 9m, 2h); the same command resumes."
        ),
    ] = None,
    threads: Threads = None,
    *,
    read: "ReadOptions",
) -> None:
    """Let a token model teach a byte model made of its blocks; or resume the run in the folder.

    The donor reads the text once. Then the encoder learns to make its embeddings and the decoder to
    predict what it predicts, without its blocks, and last the whole model together
    (docs/byteify.md). With the defaults and 135M parameters this took 70 minutes on two processor
    cores; more text is what makes the model better: raise --read-bytes and --parts-steps together.
    The folder is a run like any other: generate, patch, eval and export take it.

    [dim]bytelm distil HuggingFaceTB/SmolLM2-135M books.jsonl --out runs/smol-bytes
    bytelm generate runs/smol-bytes "The moon"[/]
    """
    from bytelm.byteify import LocalSizes
    from bytelm.byteify.course import Lessons
    from bytelm.byteify.distil import distil
    from bytelm.display import ConsoleProgress
    from bytelm.threads import use_threads
    from bytelm.training import recorded_threads

    limit = seconds(time_limit) if time_limit else None
    said = use_threads(threads, "cpu", recorded_threads(out))
    if said:
        status.print(said, highlight=False, markup=False, soft_wrap=True)
    with resumable():
        result = distil(
            donor,
            texts,
            out,
            lessons=Lessons(
                read_bytes=read_bytes,
                encoder_steps=encoder_steps,
                parts_steps=parts_steps,
                together_steps=together_steps,
                row_bytes=row_bytes,
                save_every=save_every,
            ),
            readings=readings,
            patch_size=patch_size,
            sizes=LocalSizes(local_dim, encoder_layers, decoder_layers, window, num_buckets),
            seed=seed,
            read=read,
            time_limit=limit,
            progress=ConsoleProgress(status),
        )
    if result.finished:
        console.print(f"{result.step:,} steps in {out}", highlight=False, markup=False)
        return
    console.print(
        f"stopped after step {result.step}: the same command resumes", highlight=False, markup=False
    )
    if result.stopped and result.stopped in signal.Signals.__members__:
        raise typer.Exit(128 + signal.Signals[result.stopped])
