"""Commands that train and use models: train, patch, generate."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytelm.cli.app import app, console, resumable, status
from bytelm.cli.options import (
    Checkpoint,
    Device,
    Precision,
    Threads,
    build_rule,
    seconds,
    step_range,
)
from bytelm.cli.prompting import continue_prompts
from bytelm.config import (
    RULES,
    NgramRecipe,
    PatchingConfig,
    SpacePatching,
    StaticPatching,
    load_recipe,
)
from bytelm.errors import ConfigError
from bytelm.ranks import find_place
from bytelm.storage import to_json
from bytelm.terminal import escape_controls

if TYPE_CHECKING:
    from bytelm.language_model import LanguageModel, PatchedText

LONG_TEXT = 50_000
"""Bytes of text from which finding its patches takes seconds."""


@app.command(context_settings={"allow_interspersed_args": True})
def train(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (see `bytelm recipes`) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, such as data.path=data.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. (default: runs/RECIPE)")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            help="Stop with a checkpoint after this time (90s, 9m, 2h); the same command resumes."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Profile a step, or steps such as 10-12: traces and snapshots of GPU memory in "
            "RUN/profile."
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train an entropy model, a BLT or a byte transformer; or resume the run in the folder.

    Every value of a recipe can be set as key.path=value: data.path, data.row_bytes, train.steps,
    train.seed, train.device, optimizer.learning_rate, ... `bytelm recipes NAME` prints a recipe.
    More train.steps extend the run in the folder, if its schedule is wsd or constant.
    On several GPUs, start it with torchrun, or with srun in a SLURM job (docs/scaling.md).

    [dim]bytelm train entropy-tiny data.path=data --out entropy
    bytelm train blt-1m data.path=data-scored train.steps=2000
    torchrun --nproc-per-node 8 -m bytelm train blt-1b data.path=data-scored[/]
    """
    from bytelm.display import ConsoleProgress, TrainingBar, show_likelihood
    from bytelm.threads import use_threads
    from bytelm.training import fit_ngrams, recorded_threads, train

    console.quiet = find_place().rank > 0
    resolved = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / Path(recipe).stem
    if isinstance(resolved, NgramRecipe):
        with ConsoleProgress(console).waiting("counting n-grams"):
            scorer = fit_ngrams(resolved, folder)
        console.print(f"{len(scorer.keys):,} contexts in {folder}", highlight=False)
        return
    limit = seconds(time_limit) if time_limit else None
    # A resumed run computes with as many threads as before, to the same bits.
    said = use_threads(threads, resolved.train.device, recorded_threads(folder))
    if said:
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    bar = TrainingBar(console, folder.name)
    with resumable():
        steps = None if profile is None else step_range(profile)
        result = train(resolved, folder, callbacks=[bar], time_limit=limit, profile=steps)
    if not result.finished:
        console.print(
            f"stopped after step {result.step} with a checkpoint: the same command resumes",
            highlight=False,
        )
        if result.stopped and result.stopped in signal.Signals.__members__:
            raise typer.Exit(128 + signal.Signals[result.stopped])
        return
    if result.validation:
        units = "tokens" if resolved.data.tokenizer else "patches"
        show_likelihood(console, result.validation, units)
    console.print(f"{result.bytes_seen:,} bytes and {result.flops:.3g} FLOPs in {folder}")


@app.command()
def patch(
    checkpoint: Checkpoint,
    text: Annotated[
        str | None, typer.Argument(help="Text; standard input if it is - or left out.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help=f"Rule to use instead of the model's own: {', '.join(RULES.nodes)}, or a "
            "registered one."
        ),
    ] = None,
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; with --compare, a list of the rules.")
    ] = False,
) -> None:
    """Show the patches of a text, and optionally the entropies behind them.

    [dim]bytelm patch runs/blt-1m "Daenerys Targaryen is in Game of Thrones"
    bytelm patch runs/entropy-tiny --rule entropy --threshold 1.3 < text.txt
    bytelm patch runs/blt-1m "some text" --figure entropies.svg[/]
    """
    from bytelm.codec import to_bytes
    from bytelm.display import ConsoleProgress, patches_record, show_patches
    from bytelm.language_model import load

    lm = load(checkpoint, "cpu")
    data = sys.stdin.buffer.read() if text in (None, "-") else to_bytes(text or "")
    own = lm.config.patching
    chosen = own
    if rule is not None or any(x is not None for x in (threshold, increase, length, max_length)):
        chosen = build_rule(
            rule or (own.kind if own else "entropy"), threshold, increase, length, max_length, own
        )
    rules: list[PatchingConfig | None] = [chosen]
    if compare:
        kind = None if chosen is None else chosen.kind
        rules += [one for one in (StaticPatching(length=4), SpacePatching()) if one.kind != kind]

    def patched_by(rule: PatchingConfig | None) -> "PatchedText":
        if len(data) < LONG_TEXT:
            return lm.patch(data, rule)
        with ConsoleProgress(status).measuring("patching") as show:
            return lm.patch(data, rule, report=lambda done: show(done, len(data)))

    patched = [patched_by(one) for one in rules]
    if figure is not None:
        from bytelm.figures import draw_entropies, draw_rules

        if compare:
            draw_rules(patched, figure)
        else:
            draw_entropies(patched[0], figure)
    if as_json:
        records = [patches_record(one) for one in patched]
        print(to_json(records if compare else records[0]))
        return
    for one in patched:
        show_patches(console, one)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - for standard input.")] = "",
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Reply to the prompt, as the message of a user in a chat."),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat: the system's message before it.")
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=0, help="Maximum number of bytes.")] = 400,
    temperature: Annotated[
        float, typer.Option(help="Temperature of sampling; 0 for greedy decoding.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable bytes.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the most probable bytes that reach this total probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Keep bytes with at least this fraction of the highest probability."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; can be given several times.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Write raw bytes instead of decoded text.")
    ] = False,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="Let the decoder of a BLT draft bytes, as many as pay; the text stays the same.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Continue all prompts of a file, as JSON Lines: lines of text, or JSON Lines with "
            "prompt and optionally id, max_bytes, temperature, top_k, top_p, min_p, seed, stop; "
            "- for standard input."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --prompts: file of the answers; the same command resumes. (default: "
            "standard output)"
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="With --prompts: prompts continued at once. (default: 16)"),
    ] = None,
    max_document_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --prompts: longest document, prompt and continuation together. (default: "
            "8192)",
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads to compute with. (default: OMP_NUM_THREADS, or all)"),
    ] = None,
) -> None:
    """Continue a prompt, printing bytes as they are generated; or all prompts of a file, at once.

    On a terminal, control characters are escaped. The seed of prompt i of a file, from 0, is --seed
    plus i. Answers are written as they end, with the index of their prompt.

    [dim]bytelm generate runs/blt-1m "def main(" --temperature 0.7 --max-bytes 300
    bytelm generate runs/blt-1m --prompts prompts.jsonl --out answers.jsonl
    bytelm generate runs/tuned "What is the capital of France?" --chat --temperature 0[/]
    """
    from bytelm.chat import chat_prompt
    from bytelm.codec import to_bytes
    from bytelm.inference import Request, Sampling
    from bytelm.language_model import load
    from bytelm.threads import use_threads

    sampling = Sampling(temperature, top_k, top_p, min_p, seed)

    def load_model() -> "LanguageModel":
        if threads is not None:
            use_threads(threads, device)
        return load(checkpoint, device, precision)

    given = {"--out": out, "--slots": slots, "--max-document-bytes": max_document_bytes}
    if prompts is not None:
        others = {"PROMPT": prompt, "--chat": chat, "--system": system, "--raw": raw}
        others |= {"--speculate": speculate}
        if unwanted := [name for name, value in others.items() if value]:
            raise ConfigError(
                "--prompts takes prompts from a file, and writes JSON Lines: leave out "
                + " and ".join(unwanted)
            )
        defaults = Request(b"", max_bytes, sampling, tuple(map(to_bytes, stop or ())))
        continue_prompts(
            checkpoint,
            prompts,
            defaults,
            load_model,
            out=out,
            num_slots=slots,
            max_document_bytes=max_document_bytes,
        )
        return
    if unwanted := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{unwanted[0]} is about a file of prompts: add --prompts FILE")
    lm = load_model()
    data = sys.stdin.buffer.read() if prompt == "-" else to_bytes(prompt)
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        data = chat_prompt([*before, {"role": "user", "content": data}])
    elif system is not None:
        raise ConfigError("--system is the beginning of a chat: add --chat")
    options: dict[str, Any] = {"max_bytes": max_bytes, "sampling": sampling, "stop": stop or ()}
    options["speculate"] = speculate
    is_terminal = sys.stdout.isatty()
    if raw and is_terminal:
        raise ConfigError("--raw writes control characters as they are: send it to a file or pipe")
    if raw:
        for part in lm.stream(data, **options):
            sys.stdout.buffer.write(part.data)
            sys.stdout.buffer.flush()
        return
    try:
        for text in lm.stream_text(data, **options):
            print(escape_controls(text) if is_terminal else text, end="", flush=True)
    finally:
        # What follows, also if it is stopped, begins on a line of its own.
        print(flush=True)
