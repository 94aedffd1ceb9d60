"""``bytelm data``: prepare, calibrate and inspect data, and train tokenizers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bytelm.cli.app import App, app, console, resumable
from bytelm.cli.options import build_rule
from bytelm.cli.reading import with_read_options
from bytelm.config import EntropyPatching
from bytelm.errors import ConfigError, PatchingError

if TYPE_CHECKING:
    from bytelm.data import ReadOptions

data_app = App(help="Prepare and inspect training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("prepare")
@with_read_options
def data_prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, pipes, - for standard input, prepared data or saved "
            "Hugging Face datasets; URLs (s3://, gs://, https://); hub:OWNER/NAME streams a data "
            "set of the Hub; NAME=INPUT names the source."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    scorer: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of the scorer that computes the entropies, or of a BLT that has one."
        ),
    ] = None,
    reset_at_newline: Annotated[
        bool,
        typer.Option("--reset-at-newline", help="Let newlines begin a new context of the scorer."),
    ] = False,
    patch_size: Annotated[
        float | None,
        typer.Option(min=1.0, help="Mean bytes per patch to find a threshold for. (default: 4.5)"),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(
            help="Input to hold out whole: a file, a folder, or a glob in quotes; can be given "
            "several times. Prepared data keeps its split."
        ),
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the other documents to hold out. (default: 0.01, or 0 with "
            "--validation)",
        ),
    ] = None,
    deduplicate: Annotated[
        bool,
        typer.Option(
            "--deduplicate", help="Of documents with the same bytes, keep only the first."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that score. (default: one per core with --scorer or on Ray, otherwise "
            "one)",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Use processes of this computer, or Ray: here, or at RAY_ADDRESS."),
    ] = "local",
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Device of the scorer; on Ray, a GPU per worker.")
    ] = "cpu",
    shard_mb: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Text per shard, in MB.")
    ] = 32.0,
    *,
    read: "ReadOptions",
) -> None:
    """Prepare text as Arrow shards, with entropies if a scorer is given.

    After an interruption the same command resumes where it stopped.

    [dim]bytelm data prepare books/*.jsonl.xz --out data
    bytelm data prepare data --scorer entropy-run --out data-scored[/]
    """
    from bytelm.data import PrepareOptions, prepare, read_manifest
    from bytelm.data.dataset import MANIFEST
    from bytelm.display import ConsoleProgress, show_data, show_inputs

    if scorer is None:
        given = {
            "--patch-size": patch_size is not None,
            "--reset-at-newline": reset_at_newline,
            "--device": device != "cpu",
        }
        for option in (name for name, is_given in given.items() if is_given):
            raise ConfigError(
                f"{option} is about entropies, which need a scorer: add --scorer CHECKPOINT, or "
                f"leave out {option}"
            )
    options = PrepareOptions(
        read=read,
        scorer=scorer,
        reset_at_newline=reset_at_newline,
        validation=tuple(validation or ()),
        validation_share=validation_share,
        shard_bytes=round(shard_mb * 1e6),
        deduplicate=deduplicate,
        workers=workers,
        engine=engine,
        device=device,
    )
    with resumable(), ConsoleProgress(console).preparing() as report:
        prepare(inputs, out, options, report)
    if scorer is not None:
        from bytelm.data.calibration import calibrate_folder

        try:
            with ConsoleProgress(console).waiting("calibrating"):
                calibrate_folder(out, EntropyPatching(), patch_size or 4.5)
        except PatchingError as error:
            # The data is complete; only the threshold is missing.
            console.print(f"not calibrated: {error}", style="yellow", soft_wrap=True)
    manifest = read_manifest(out)
    show_inputs(console, manifest.inputs, f"see {out / MANIFEST}")
    console.print()
    show_data(console, out, manifest)


@data_app.command("calibrate")
def data_calibrate(
    folder: Annotated[Path, typer.Argument(help="Prepared data with entropies.")],
    patch_size: Annotated[
        float | None,
        typer.Option(min=1.0, help="Mean bytes per patch to find a threshold for. (default: 4.5)"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Threshold to use instead, in nats; for monotonic, --increase is."),
    ] = None,
    rule: Annotated[
        Literal["entropy", "monotonic", "combined"], typer.Option(help="Rule to calibrate.")
    ] = "entropy",
    increase: Annotated[
        float | None,
        typer.Option(help="For combined or monotonic: the rise of the entropy to exceed, in nats."),
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest patch, in bytes.")] = None,
) -> None:
    """Patch prepared data with another threshold, and show the patches of each source.

    The threshold is given, or found for a mean patch size. The entropies are in the data, so
    nothing is scored again.

    [dim]bytelm data calibrate scored --patch-size 6
    bytelm data calibrate scored --threshold 1.3 --max-length 24[/]
    """
    from bytelm.config import CalibratedPatching
    from bytelm.data import read_manifest
    from bytelm.data.calibration import calibrate_folder, repatch_folder
    from bytelm.display import ConsoleProgress, show_data

    wanted = build_rule(rule, threshold, increase, None, max_length)
    assert isinstance(wanted, CalibratedPatching)
    given = "--increase" if rule == "monotonic" else "--threshold"
    if patch_size is not None and not wanted.needs_calibration:
        raise ConfigError(f"{given} and --patch-size exclude each other: leave out one of them")
    with ConsoleProgress(console).waiting("calibrating"):
        if wanted.needs_calibration:
            calibrate_folder(folder, wanted, patch_size or 4.5)
        else:
            repatch_folder(folder, wanted)
    show_data(console, folder, read_manifest(folder))


@data_app.command("tokenizer")
def data_tokenizer(
    folder: Annotated[Path, typer.Argument(help="Prepared data.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    vocab_size: Annotated[
        int,
        typer.Option(min=260, help="Size of the vocabulary, with 256 bytes and 4 special ids."),
    ] = 4096,
    max_mb: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Training text to use, in MB.")
    ] = 16.0,
) -> None:
    """Train a byte-pair tokenizer on prepared text, for the baseline that reads tokens.

    [dim]bytelm data tokenizer data --vocab-size 4096 --out tokens-4096.json
    bytelm train token-1m data.path=data data.tokenizer=tokens-4096.json --out run[/]
    """
    from bytelm.data import Dataset, train_dataset_tokenizer
    from bytelm.display import ConsoleProgress
    from bytelm.storage import check_absent

    check_absent(out)
    dataset = Dataset(folder, "train")
    with ConsoleProgress(console).waiting(f"training a tokenizer of {vocab_size} tokens"):
        tokenizer = train_dataset_tokenizer(dataset, vocab_size, round(max_mb * 1e6))
    tokenizer.save(out)
    console.print(f"{out}: {tokenizer.vocab_size:,} tokens")


@data_app.command("characters")
def data_characters(
    out: Annotated[Path, typer.Option(help="File to write, as JSONL: prompt, response.")],
    number: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 20_000,
    pronunciations: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="CMUdict (cmudict.dict, or .xz): ask how its words are pronounced.",
        ),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before each.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of words and order.")] = 0,
) -> None:
    """Write questions about the letters of words, to train on; eval asks about other words.

    [dim]bytelm data characters --out questions.jsonl
    bytelm data characters --pronunciations cmudict.dict --number 120000 --out sounds.jsonl
    bytelm data prepare questions.jsonl --field prompt,response --scorer runs/blt --out data[/]
    """
    from bytelm.evaluation.characters import training_questions
    from bytelm.evaluation.cute import training_pronunciations
    from bytelm.storage import atomic_file, disk_errors, to_json

    if pronunciations is None:
        records = training_questions(number, shots=shots, seed=seed)
    else:
        records = training_pronunciations(pronunciations, number, shots=shots, seed=seed)
    with disk_errors(out, ConfigError, "{remedy}"), atomic_file(out) as partial:
        partial.write_text("".join(to_json(one) + "\n" for one in records), encoding="utf-8")
    console.print(f"{out}: {len(records):,} questions", soft_wrap=True)


@data_app.command("info", hidden=True)
@data_app.command("inspect")
def data_inspect(
    folder: Annotated[Path, typer.Argument(help="Prepared data.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its hash.")
    ] = False,
    patches: Annotated[
        bool,
        typer.Option("--patches", help="Count the patches of all documents, not of a sample."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File for a figure of the same, such as data.svg.")
    ] = None,
) -> None:
    """Show the contents of prepared data: sizes, patches and entropies of each source.

    [dim]bytelm data inspect data --verify
    bytelm data inspect scored --patches --out scored.svg[/]
    """
    from bytelm.data.calibration import with_counted_patches
    from bytelm.data.dataset import check_shard, read_manifest
    from bytelm.data.statistics import folder_statistics
    from bytelm.display import ConsoleProgress, show_data, show_statistics
    from bytelm.figures import check_matplotlib, draw_data

    if out is not None:
        check_matplotlib()
    manifest = read_manifest(folder)
    with ConsoleProgress(console).waiting("comparing files with their hashes"):
        for shard in manifest.shards:
            check_shard(folder, shard, contents=verify)
    if patches:
        with ConsoleProgress(console).waiting("counting patches"):
            manifest = with_counted_patches(folder, manifest)
    show_data(console, folder, manifest)
    with ConsoleProgress(console).waiting("measuring entropies"):
        statistics = folder_statistics(folder, manifest)
    show_statistics(console, statistics, manifest.calibration)
    if verify:
        console.print("all files match their hashes")
    if out is not None:
        draw_data(statistics, manifest.calibration, out)
        console.print(str(out))
