"""The command line: verbs only. Each command's work is a function elsewhere."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
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
    recipe_names,
    recipe_text,
)
from bytelm.errors import BytelmError, ConfigError, PatchingError
from bytelm.tracking import preparation_bar
from bytelm.version import __version__

if TYPE_CHECKING:
    from bytelm.language_model import PatchedText

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

console = Console()
PATCH_STYLES = ("black on sky_blue2", "black on light_goldenrod2")

Rule = Literal["byte", "static", "space", "entropy", "monotonic", "combined"]
Checkpoint = Annotated[
    Path, typer.Argument(help="Folder of a checkpoint, or of a training run (its newest is used).")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for CUDA where there is one.")]


def main() -> None:
    """Run the command line; a user's mistake ends with one line and status 1."""
    try:
        app()
    except BytelmError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output has gone; there is no one to tell.
        sys.stderr.close()
        sys.exit(141)


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
        typer.Option(help="Input to hold out whole; may be repeated. Prepared data keeps its own."),
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the other documents held out. [0.01, or 0 with --validation]",
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
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Text per shard, in MB.")] = 32.0,
) -> None:
    """Turn text into Arrow shards, with entropies if a scorer is given.

    The same command after an interruption goes on where it stopped.

    [dim]bytelm data prepare books/*.jsonl.xz --out data
    bytelm data prepare data --scorer entropy-run --out data-scored[/]
    """
    from bytelm.data import PrepareOptions, ReadOptions, prepare

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
    with preparation_bar(console) as report:
        prepare(inputs, out, options, report)
    if scorer is not None:
        from bytelm.data.calibration import calibrate_folder

        try:
            calibrate_folder(out, EntropyPatching(), patch_size)
        except PatchingError as error:
            # The data is whole; only the suggestion of a threshold is missing.
            console.print(f"[yellow]not calibrated:[/] {escape(str(error))}", soft_wrap=True)
    _show_data(out)


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
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest patch.")] = None,
) -> None:
    """Find the threshold for a mean patch size, and show what it does to each source."""
    from bytelm.data.calibration import calibrate_folder

    wanted = _rule(rule, None, increase, None, max_length)
    calibrate_folder(folder, wanted, patch_size)
    _show_data(folder)


@data_app.command("info")
def data_info(
    folder: Annotated[Path, typer.Argument(help="Prepared data.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file.")] = False,
) -> None:
    """Show what prepared data holds."""
    from bytelm.data.dataset import check_shard, read_manifest

    for shard in read_manifest(folder).shards:
        check_shard(folder, shard, contents=verify)
    _show_data(folder)
    if verify:
        console.print("every file is as it was written")


def _show_data(folder: Path) -> None:
    from bytelm.data.dataset import read_manifest

    manifest = read_manifest(folder)
    table = Table(title=f"{folder}", title_justify="left", box=None, pad_edge=False)
    for name in ("source", "documents", "bytes", "held out"):
        table.add_column(name, justify="left" if name == "source" else "right")
    calibration = manifest.calibration
    if calibration:
        table.add_column("bytes/patch", justify="right")
        table.add_column("longest", justify="right")
    held_out = manifest.sources("validation")
    for name, total in manifest.sources().items():
        row = [name, f"{total.documents:,}", f"{total.text_bytes:,}"]
        row.append(f"{held_out[name].text_bytes:,}" if name in held_out else "0")
        if calibration and name in calibration.sources:
            report = calibration.sources[name]
            row += [f"{report.patch_size:.2f}", f"{report.longest:,}"]
        table.add_row(*row)
    console.print(table)
    if manifest.scorer:
        reset = ", context reset at newlines" if manifest.scorer.reset_at_newline else ""
        console.print(f"entropies by scorer {manifest.scorer.fingerprint}{reset}")
    if calibration:
        rule = {k: v for k, v in calibration.rule.items() if v is not None and k != "patch_size"}
        console.print(f"patches of {calibration.patch_size:.3f} bytes by {rule}", highlight=False)


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

    [dim]bytelm train entropy-tiny data.path=data --out entropy
    bytelm train blt-1m data.path=data-scored train.steps=2000[/]
    """
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
    _show_likelihood(result.validation)
    console.print(f"{result.bytes_seen:,} bytes and {result.flops:.3g} FLOPs in {folder}")


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    bpb: Annotated[
        list[str], typer.Option(help="Text: files, folders or globs, read as by data prepare.")
    ],
    stride: Annotated[
        int | None,
        typer.Option(
            help="Bytes between pieces of long text; less gives more context. [no overlap]"
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Field or column with the text.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
) -> None:
    """Bits per byte of text, by source.

    [dim]bytelm eval runs/blt-1m --bpb held-out/*.txt --bpb more.jsonl[/]
    """
    from bytelm.data import Reader, ReadOptions, find_inputs
    from bytelm.language_model import load

    lm = load(checkpoint, device)
    options = ReadOptions(field=field)
    reader = Reader(options)
    inputs = find_inputs(bpb, options)
    texts = ((d.source, d.data) for one in inputs for d in reader.read(one))
    with console.status("evaluating"):
        by_source = lm.likelihood(texts, stride=stride)
    if as_json:
        rows = {
            name: {"bits_per_byte": x.bits_per_byte, "bytes": x.num_bytes, "patches": x.num_patches}
            for name, x in by_source.items()
        }
        print(json.dumps(rows, indent=2))
        return
    _show_likelihood(by_source)


def _show_likelihood(by_source: dict) -> None:
    from bytelm.evaluation import total

    rows = sorted(by_source.items())
    if not rows:
        console.print("no text to evaluate")
        return
    everything = total(by_source.values())
    table = Table(box=None, pad_edge=False)
    table.add_column("source")
    for name in ("bytes", "bits per byte", "bytes/patch"):
        table.add_column(name, justify="right")
    if len(rows) > 1:
        rows.append(("all", everything))
    for name, one in rows:
        size = f"{one.patch_size:.2f}" if one.num_patches else "-"
        table.add_row(name, f"{one.num_bytes:,}", f"{one.bits_per_byte:.4f}", size)
    console.print(table)


@app.command()
def patch(
    checkpoint: Checkpoint,
    text: Annotated[str | None, typer.Argument(help="Text; - or none for standard input.")] = None,
    rule: Annotated[Rule | None, typer.Option(help="In place of the model's own.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Of an entropy rule, nats.")] = None,
    increase: Annotated[float | None, typer.Option(help="Of a monotonic rule, nats.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Of static patches.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest patch.")] = None,
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
        _show_patches(one, as_json)


def _show_patches(patched: "PatchedText", as_json: bool) -> None:
    if as_json:
        record = {
            "rule": patched.rule.model_dump(mode="json", exclude_none=True),
            "boundaries": patched.boundaries,
            "patches": [p.decode("utf-8", "backslashreplace") for p in patched.patches],
            "entropies": None if patched.entropies is None else patched.entropies.tolist(),
        }
        print(json.dumps(record))
        return
    shown = Text()
    for number, piece in enumerate(patched.patches):
        content = piece.decode("utf-8", "backslashreplace")
        if not console.is_terminal or console.no_color:
            content = f"|{content}" if number else content
        shown.append(content, PATCH_STYLES[number % 2])
    console.print(shown, soft_wrap=True)
    rule = patched.rule.model_dump(exclude_none=True)
    rule.pop("patch_size", None)
    console.print(
        f"{len(patched.data):,} bytes, {len(patched.boundaries):,} patches, "
        f"{patched.patch_size:.2f} bytes each ({', '.join(f'{k} {v}' for k, v in rule.items())})",
        style="dim",
        highlight=False,
    )


def _rule(
    kind: str,
    threshold: float | None,
    increase: float | None,
    length: int | None,
    max_length: int | None,
    own: PatchingConfig | None = None,
) -> PatchingConfig:
    """A rule from options; what they leave out is taken from ``own`` where that has it."""
    threshold = threshold if threshold is not None else getattr(own, "threshold", None)
    increase = increase if increase is not None else getattr(own, "increase", None)
    match kind:
        case "byte":
            return BytePatching(max_length=max_length)
        case "static":
            return StaticPatching(length=length or 4, max_length=max_length)
        case "space":
            return SpacePatching(max_length=max_length)
        case "entropy":
            return EntropyPatching(threshold=threshold, max_length=max_length)
        case "monotonic":
            return MonotonicPatching(increase=increase, max_length=max_length)
    if increase is None:
        raise ConfigError("the combined rule needs --increase")
    return CombinedPatching(threshold=threshold, increase=increase, max_length=max_length)


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
