"""``bytelm byteify``: a byte model from a token model of the Llama family."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytelm.cli.app import app, console, status
from bytelm.cli.reading import with_read_options

if TYPE_CHECKING:
    from bytelm.data import ReadOptions


DonorName = Annotated[
    str,
    typer.Argument(
        help="Folder, GGUF file or Hub repository (OWNER/NAME) of a Llama, Mistral, Qwen 2 or "
        "Qwen 3 model."
    ),
]
PatchSize = Annotated[
    float | None, typer.Option(help="Mean bytes per patch. (default: the donor's bytes per token)")
]
LocalDim = Annotated[
    int | None,
    typer.Option(
        min=64,
        help="Width of encoder and decoder, a multiple of 64. (default: about 0.4 times the "
        "donor's)",
    ),
]
EncoderLayers = Annotated[int, typer.Option(min=1, help="Layers of the encoder.")]
DecoderLayers = Annotated[int, typer.Option(min=1, help="Layers of the decoder.")]
Window = Annotated[int, typer.Option(min=1, help="Bytes that encoder and decoder attend to.")]
NumBuckets = Annotated[int, typer.Option(min=1, help="Hash embeddings per n-gram size.")]


@app.command("byteify")
@with_read_options
def byteify(
    donor: DonorName,
    texts: Annotated[
        list[str],
        typer.Argument(help="Text to find patches on, read as by data prepare; some is enough."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint to create.")],
    scorer: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the scorer. (default: n-grams counted in the text)"),
    ] = None,
    boundaries: Annotated[
        bool,
        typer.Option(
            "--boundaries",
            help="Let patches end where the donor's tokens have probably ended, not where the next "
            "byte is uncertain.",
        ),
    ] = False,
    vocabulary: Annotated[
        bool,
        typer.Option(
            "--vocabulary",
            help="Keep the donor's embeddings and head: patches are read as its tokens where they "
            "are some, and bytes predicted by its tokens' probabilities. Needs --boundaries.",
        ),
    ] = False,
    patch_size: PatchSize = None,
    local_dim: LocalDim = None,
    encoder_layers: EncoderLayers = 1,
    decoder_layers: DecoderLayers = 3,
    window: Window = 256,
    num_buckets: NumBuckets = 32_768,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
    *,
    read: "ReadOptions",
) -> None:
    """Make a BLT whose global transformer is a token model: the donor's blocks, exactly.

    Encoder and decoder are random, so the model has to be trained before it predicts. The recipe is
    OUT/train.yaml; its global transformer has a tenth of the learning rate (docs/byteify.md).

    [dim]bytelm byteify HuggingFaceTB/SmolLM2-135M books.jsonl --out smol-bytes
    bytelm data prepare books.jsonl --scorer smol-bytes --out data
    bytelm train smol-bytes/train.yaml data.path=data --out runs/smol-bytes[/]
    """
    from bytelm.byteify import RECIPE, LocalSizes, byteify
    from bytelm.display import ConsoleProgress

    made = byteify(
        donor,
        texts,
        out,
        scorer=scorer,
        boundaries=boundaries,
        vocabulary=vocabulary,
        patch_size=patch_size,
        sizes=LocalSizes(local_dim, encoder_layers, decoder_layers, window, num_buckets),
        seed=seed,
        read=read,
        progress=ConsoleProgress(status),
    )
    rule = made.description.patching
    lines = [
        f"{made.num_copied:,} parameters of the donor and {made.num_fresh:,} random ones in {out}",
        f"layers equal the donor's: largest relative error {made.largest_error:.1e}",
        f"the donor has {made.bytes_per_token:.2f} bytes per token; threshold "
        f"{getattr(rule, 'threshold', 0.0):.3f} {'' if boundaries else 'nats '}for "
        f"{getattr(rule, 'patch_size', 0.0):.2f} bytes per patch",
    ]
    if made.window is not None:
        lines.append(
            f"the donor attends to {made.window:,} tokens at most, the model to all patches"
        )
    lines += [
        "train it next:",
        f"  bytelm data prepare TEXT --scorer {out} --out DATA",
        f"  bytelm train {out / RECIPE} data.path=DATA --out RUN",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
