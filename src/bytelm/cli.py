"""The command line: verbs only. Each command's work is a function elsewhere."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bytelm.config import (
    BytePatching,
    CombinedPatching,
    EntropyPatching,
    MonotonicPatching,
    PatchingConfig,
    SpacePatching,
    StaticPatching,
    TableRecipe,
    load_recipe,
    parse,
    recipe_names,
    recipe_text,
)
from bytelm.errors import BytelmError, ConfigError, DataError, PatchingError
from bytelm.tracking import preparation_bar
from bytelm.version import __version__

# Heavy modules are imported by the commands that need them: `--help` should not wait for torch.

app = typer.Typer(
    name="bytelm",
    help="Byte-level language models built on the Byte Latent Transformer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Prepare and inspect training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

# No markup: what is printed holds names of files and sources, with whatever brackets.
console = Console(markup=False, highlight=False)

RULES: dict[str, type[PatchingConfig]] = {
    "byte": BytePatching,
    "static": StaticPatching,
    "space": SpacePatching,
    "entropy": EntropyPatching,
    "monotonic": MonotonicPatching,
    "combined": CombinedPatching,
}
Rule = Literal["byte", "static", "space", "entropy", "monotonic", "combined"]
Checkpoint = Annotated[
    Path, typer.Argument(help="Folder of a checkpoint, or of a training run (its newest is used).")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for CUDA where there is one.")]


def main() -> None:
    """Run the command line; a user's mistake ends with one line and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character should not end the program.
            stream.reconfigure(errors="replace")
    try:
        app()
    except BytelmError as error:
        _fail(str(error))
    except BrokenPipeError:
        # Whoever read our output has gone; there is no one to tell.
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        _fail(
            f"{error.filename or 'the disk'}: {error.strerror or error}; check the path, its "
            "permissions and that the disk has room"
        )
    except (MemoryError, RuntimeError) as error:
        if not re.search("allocate|out of memory|^$", str(error)):
            raise
        _fail(
            "there is not enough memory: choose a smaller model, fewer rows at a time "
            "(train.micro_rows=1) or shorter ones (data.row_bytes)"
        )


def _fail(message: str) -> NoReturn:
    shown = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, highlight=False).print(shown, soft_wrap=True)
    sys.exit(1)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Byte-level language models built on the Byte Latent Transformer."""
    if version:
        print(__version__)
        raise typer.Exit


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


@data_app.command("prepare")
def data_prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, - for standard input, prepared or Hugging Face data; "
            "NAME=INPUT names the source."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    scorer: Annotated[
        Path | None, typer.Option(help="Checkpoint whose entropies cut the patches.")
    ] = None,
    reset_at_newline: Annotated[
        bool, typer.Option("--reset-at-newline", help="A newline begins a new scorer context.")
    ] = False,
    patch_size: Annotated[
        float, typer.Option(min=1.0, help="Mean bytes per patch to find a threshold for.")
    ] = 4.5,
    validation: Annotated[
        list[str] | None,
        typer.Option(
            help="Input to hold out whole: a file, a folder, or a glob in quotes; may be repeated. "
            "Prepared data keeps its split."
        ),
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the other documents held out. (default: 0.01, or 0 with --validation)",
        ),
    ] = None,
    format: Annotated[
        Literal["auto", "text", "lines", "jsonl", "parquet"],
        typer.Option(help="auto: by name; text: a file is a document; lines: a line is."),
    ] = "auto",
    field: Annotated[str, typer.Option(help="Field or column with the text.")] = "text",
    source_field: Annotated[
        str | None, typer.Option(help="Field or column that names the source.")
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="Glob for files in folders, such as '*.py'.")
    ] = None,
    binary: Annotated[
        bool, typer.Option("--binary", help="Also read binary files found in folders.")
    ] = False,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Pass over records that cannot be read.")
    ] = False,
    cut_bytes: Annotated[
        int | None, typer.Option(min=1, help="Cut longer documents, at line ends if possible.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. (default: with a scorer, one per core)")
    ] = None,
    shard_mb: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Text per shard, in MB.")
    ] = 32.0,
) -> None:
    """Turn text into Arrow shards, with entropies if a scorer is given.

    The same command after an interruption goes on where it stopped.

    [dim]bytelm data prepare books/*.jsonl.xz --out data
    bytelm data prepare data --scorer entropy-run --out data-scored[/]
    """
    from bytelm.data import PrepareOptions, ReadOptions, prepare, read_manifest
    from bytelm.display import show_data

    read = ReadOptions(
        format=format,
        field=field,
        source_field=source_field,
        include=include,
        binary=binary,
        skip_invalid=skip_invalid,
        cut_bytes=cut_bytes,
    )
    options = PrepareOptions(
        read=read,
        scorer=scorer,
        reset_at_newline=reset_at_newline,
        validation=tuple(validation or ()),
        validation_share=validation_share,
        shard_bytes=round(shard_mb * 1e6),
        workers=workers,
    )
    try:
        with preparation_bar(console) as report:
            prepare(inputs, out, options, report)
    except KeyboardInterrupt:
        console.print("stopped: the same command goes on")
        raise typer.Exit(130) from None
    if scorer is not None:
        from bytelm.data.calibration import calibrate_folder

        try:
            calibrate_folder(out, EntropyPatching(), patch_size)
        except PatchingError as error:
            # The data is whole; only the suggestion of a threshold is missing.
            console.print(f"not calibrated: {error}", style="yellow", soft_wrap=True)
    show_data(console, out, read_manifest(out))


@data_app.command("calibrate")
def data_calibrate(
    folder: Annotated[Path, typer.Argument(help="Prepared data with entropies.")],
    patch_size: Annotated[float, typer.Option(min=1.0, help="Wanted mean bytes per patch.")] = 4.5,
    rule: Annotated[
        Literal["entropy", "monotonic", "combined"], typer.Option(help="Rule to calibrate.")
    ] = "entropy",
    increase: Annotated[
        float | None, typer.Option(help="For combined: the least rise of the entropy, in nats.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest patch, in bytes.")] = None,
) -> None:
    """Find the threshold for a mean patch size, and show what it does to each source."""
    from bytelm.data import read_manifest
    from bytelm.data.calibration import calibrate_folder
    from bytelm.display import show_data

    wanted = _rule(rule, None, increase, None, max_length)
    calibrate_folder(folder, wanted, patch_size)
    show_data(console, folder, read_manifest(folder))


@data_app.command("info")
def data_info(
    folder: Annotated[Path, typer.Argument(help="Prepared data.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file.")] = False,
) -> None:
    """Show what prepared data holds."""
    from bytelm.data.dataset import check_shard, read_manifest
    from bytelm.display import show_data

    manifest = read_manifest(folder)
    for shard in manifest.shards:
        check_shard(folder, shard, contents=verify)
    show_data(console, folder, manifest)
    if verify:
        console.print("every file is as it was written")


@app.command(context_settings={"allow_interspersed_args": True})
def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (see `bytelm recipes`) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, such as data.path=data.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE.")] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(help="Stop with a checkpoint after this long (90s, 9m, 2h); rerun to go on."),
    ] = None,
) -> None:
    """Train an entropy model, a BLT or a byte transformer; or resume the run in the folder.

    Every value of a recipe can be set as key.path=value: data.path, data.row_bytes, train.steps,
    train.seed, train.device, optimizer.learning_rate, ... `bytelm recipes NAME` prints a recipe.

    [dim]bytelm train entropy-tiny data.path=data --out entropy
    bytelm train blt-1m data.path=data-scored train.steps=2000[/]
    """
    from bytelm.display import show_likelihood
    from bytelm.training import fit_table, train

    settled = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / Path(recipe).stem
    if isinstance(settled, TableRecipe):
        with console.status("counting"):
            scorer = fit_table(settled, folder)
        console.print(f"{len(scorer.keys):,} contexts in {folder}", highlight=False)
        return
    limit = _seconds(time_limit) if time_limit else None
    result = train(settled, folder, console=console, title=folder.name, time_limit=limit)
    if not result.finished:
        console.print(
            f"stopped after step {result.step} with a checkpoint: the same command goes on",
            highlight=False,
        )
        return
    if result.validation:
        show_likelihood(console, result.validation)
    console.print(f"{result.bytes_seen:,} bytes and {result.flops:.3g} FLOPs in {folder}")


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    texts: Annotated[
        list[str],
        typer.Argument(
            help="Text to measure: files, folders or globs, read as by data prepare; of prepared "
            "data, what is held out."
        ),
    ],
    bpb: Annotated[bool, typer.Option("--bpb", help="Measure bits per byte: the default.")] = True,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Bytes between pieces of long text; less gives more context. (default: no overlap)"
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Field or column with the text.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
) -> None:
    """Bits per byte of text, by source.

    [dim]bytelm eval runs/blt-1m held-out/*.txt more=other.jsonl[/]
    """
    from bytelm.data import Reader, ReadOptions, find_inputs
    from bytelm.display import show_likelihood
    from bytelm.language_model import load

    lm = load(checkpoint, device)
    options = ReadOptions(field=field)
    reader = Reader(options)
    inputs = find_inputs(texts, options)
    documents = (d for one in inputs for d in reader.read(one) if d.split != "train")
    with console.status("evaluating"):
        by_source = lm.likelihood(((d.source, d.data) for d in documents), stride=stride)
    if not by_source:
        raise DataError("there is no text to evaluate (of prepared data, what is held out is)")
    if as_json:
        rows = {
            name: {"bits_per_byte": x.bits_per_byte, "bytes": x.num_bytes, "patches": x.num_patches}
            for name, x in by_source.items()
        }
        print(json.dumps(rows, indent=2))
        return
    show_likelihood(console, by_source)


@app.command()
def patch(
    checkpoint: Checkpoint,
    text: Annotated[str | None, typer.Argument(help="Text; - or none for standard input.")] = None,
    rule: Annotated[Rule | None, typer.Option(help="In place of the model's own.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Entropy above which a patch starts, in nats.")
    ] = None,
    increase: Annotated[
        float | None, typer.Option(help="Rise of the entropy that starts a patch, in nats.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Bytes in a static patch. (default: 4)")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest patch, in bytes.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also show other rules on the same text.")
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw the entropies (or, with --compare, the rules): SVG, PDF or PNG."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the patches of a text, and why.

    [dim]bytelm patch runs/blt-1m "Daenerys Targaryen is in Game of Thrones"
    bytelm patch runs/entropy-tiny --rule entropy --threshold 1.3 < text.txt
    bytelm patch runs/blt-1m "some text" --figure entropies.svg[/]
    """
    from bytelm.codec import to_bytes
    from bytelm.display import patches_json, show_patches
    from bytelm.language_model import load

    lm = load(checkpoint, "cpu")
    data = sys.stdin.buffer.read() if text in (None, "-") else to_bytes(text or "")
    own = lm.config.patching
    chosen = own
    if rule is not None or any(x is not None for x in (threshold, increase, length, max_length)):
        chosen = _rule(
            rule or (own.kind if own else "entropy"), threshold, increase, length, max_length, own
        )
    patched = [lm.patch(data, chosen)]
    if compare:
        others: list[PatchingConfig] = [StaticPatching(length=4), SpacePatching()]
        patched += [lm.patch(data, other) for other in others if other.kind != patched[0].rule.kind]
    if figure is not None:
        from bytelm.figures import draw_entropies, draw_rules

        if compare:
            draw_rules(patched, figure)
        else:
            draw_entropies(patched[0], figure)
    for one in patched:
        if as_json:
            print(patches_json(one))
        else:
            show_patches(console, one)


def _rule(
    kind: str,
    threshold: float | None,
    increase: float | None,
    length: int | None,
    max_length: int | None,
    own: PatchingConfig | None = None,
) -> PatchingConfig:
    """A rule from options; what they leave out is taken from ``own`` where that has it."""
    node = RULES[kind]
    options = {
        "threshold": threshold,
        "increase": increase,
        "length": length,
        "max_length": max_length,
    }
    values = {"length": 4} if kind == "static" else {}
    if own is not None:
        values |= {k: v for k, v in own.model_dump(exclude_none=True).items() if k in options}
    values |= {k: v for k, v in options.items() if v is not None}
    values = {k: v for k, v in values.items() if k in node.model_fields}
    if kind == "combined" and "increase" not in values:
        raise ConfigError("the combined rule needs --increase")
    return parse(node, values, f"the {kind} rule")


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - for standard input.")] = "",
    max_bytes: Annotated[int, typer.Option(min=0, help="Bytes to generate at most.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 for greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable bytes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep bytes up to this sum.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep bytes this probable, relative to the best.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Write bytes as they are, in place of readable text.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Continue a prompt, byte by byte as they come.

    [dim]bytelm generate runs/blt-1m "def main(" --temperature 0.7 --max-bytes 300[/]
    """
    from bytelm.codec import to_bytes
    from bytelm.generation import Sampling
    from bytelm.language_model import load

    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    lm = load(checkpoint, device)
    data = sys.stdin.buffer.read() if prompt == "-" else to_bytes(prompt)
    options = {"max_bytes": max_bytes, "sampling": sampling, "stop": stop or ()}
    if raw:
        for piece in lm.stream(data, **options):
            sys.stdout.buffer.write(piece.data)
            sys.stdout.buffer.flush()
        return
    for text in lm.stream_text(data, **options):
        print(text, end="", flush=True)
    print()


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


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
    if not match:
        raise ConfigError(f"time limit {text!r} must look like 90s, 9m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
