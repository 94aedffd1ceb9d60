"""The command that evaluates a model: eval."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytelm.cli.app import app, console, status
from bytelm.cli.languages import Wanted, measure_wanted, names_of, parse_thresholds
from bytelm.cli.options import Checkpoint, Device, Precision, Threads
from bytelm.cli.reading import HeldOutText, with_read_options
from bytelm.cli.robustness import (
    ask_about_characters,
    find_character_data,
    measure_noise,
    text_models,
)
from bytelm.cli.tasks import (
    TaskOptions,
    hugging_face_models,
    measure_with_harness,
    parse_parts,
    write_eval_report,
)
from bytelm.errors import ConfigError, DataError
from bytelm.storage import to_json

if TYPE_CHECKING:
    from bytelm.data import ReadOptions
    from bytelm.evaluation.section import Section
    from bytelm.language_model import LanguageModel
    from bytelm.likelihood import Labelled, Likelihood


@app.command("eval")
@with_read_options
def evaluate(
    checkpoint: Checkpoint,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text to measure: files, folders or globs, read as by data prepare; prepared "
            "data, of which the held-out documents are measured."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Bytes between the beginnings of contexts in long text; smaller values give every "
            "byte more context. (default: no overlap)"
        ),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Also measure clean text after noised text, and noised text; with --tasks, tasks "
            "with noised prompts, completions and both, with --translate noised prompts: all, "
            "paper, or names such as antspeak,drop:0.2,drop+uppercase.",
        ),
    ] = None,
    noise_parts: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="With --tasks and --noise: what is noised, of prompt,completion,both. "
            "(default: each in turn, and their mean)",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of the evaluation harness (extra harness), such as hellaswag_local,piqa; "
            "*_local read the files in --data.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Examples before each question or translation. (default: what the task says; 4 or "
            "5 of --characters and --translate)",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of more tasks, as YAML of the harness.")
    ] = None,
    hf: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Hugging Face model to compare with in --tasks, --translate, --noise and "
            "--characters: a folder, a GGUF file, a repository, or arguments such as "
            "pretrained=NAME,dtype=bfloat16; can be repeated.",
        ),
    ] = None,
    characters: Annotated[
        bool,
        typer.Option(
            "--characters",
            help="Ask about the characters of words: generated questions, and those of CUTE and "
            "CMUdict if --data has them.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the files of benchmarks: cute/ and cmudict.dict.xz; those of "
            "*_local tasks. (default of tasks: BYTELM_EVALUATION)"
        ),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Measure what parallel sentences cost in each language: a folder, or a glob in "
            "quotes, of files named by language (en.txt, de.tsv with ids, eng_Latn.dev.xz).",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Language that --parallel compares with. (default: English, or the first)"
        ),
    ] = None,
    tokenizer: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="With --parallel: also count the tokens of a tokenizer.json; can be repeated.",
        ),
    ] = None,
    translate: Annotated[
        str | None,
        typer.Option(
            metavar="PAIRS",
            help="With --parallel: also translate its sentences (extra harness), such as "
            "eng_Latn-deu_Latn,en-de; the first --num-fewshot are examples.",
        ),
    ] = None,
    tail: Annotated[
        bool,
        typer.Option(
            "--tail", help="Measure words and characters of the text by frequency and script."
        ),
    ] = False,
    frequencies: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT",
            help="Text in which --tail counts frequencies, such as that of the training; can be "
            "repeated. (default: the measured text)",
        ),
    ] = None,
    drift: Annotated[
        bool,
        typer.Option(
            "--drift",
            help="Measure the mean patch size by position, by every rule, with and without reset "
            "at newlines, in the text and in repetitive text.",
        ),
    ] = False,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Measure the bits per byte of the text, and the scores of --tasks, with other "
            "patching thresholds, in nats, such as 0.5,1.0,2.0.",
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Checkpoint to compare with in all but the bits per byte of text, --drift and "
            "--thresholds; can be repeated.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder in which answers of --tasks and --translate, and all of --hf, are kept, "
            "and read again by the same model.",
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder to draw the figures of what is measured into.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to write the results into, as one page (report.html) and JSON.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Questions of each kind, parallel sentences, or documents of each task. (default: "
            "50 or 100 questions, all sentences and documents)",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of noise, questions and intervals.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: of all text, and by source.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    *,
    read: "ReadOptions",
) -> None:
    """Measure bits per byte of text, tasks, robustness to noise, characters, languages and patches.

    [dim]bytelm eval runs/blt-1m held-out/*.txt more=other.jsonl --noise paper
    bytelm eval runs/blt-1m --tasks hellaswag_local --data benchmarks --report report
    bytelm eval runs/blt-1m --parallel pud --against runs/token-1m --figures figures
    bytelm eval runs/blt-1m held-out/*.txt --tail --drift --thresholds 0.5,1.0,2.0[/]
    """
    from bytelm.evaluation.noise import parse_noises
    from bytelm.figures import check_matplotlib
    from bytelm.language_model import load
    from bytelm.threads import use_threads

    wanted = Wanted(
        parallel,
        reference,
        tokenizer or [],
        tail,
        frequencies or [],
        drift,
        parse_thresholds(thresholds),
        against or [],
        has_tasks=tasks is not None,
        has_questions=characters or noise is not None,
    )
    wanted.check()
    noises = parse_noises(noise) if noise else []
    asked = TaskOptions(
        *(tasks, limit, num_fewshot, data, include_path, hf or [], device, noises, seed),
        *(translate, parallel, wanted.thresholds, cache, parse_parts(noise_parts)),
        asks=characters or bool(noise and texts),
        asks_questions=characters,
    )
    asked.check()
    is_idle = not (characters or parallel or tasks) or (noise and not (tasks or translate))
    if not texts and (is_idle or wanted.needs_text):
        raise ConfigError(
            "name the text to measure; without text there are --tasks, --characters and --parallel"
        )
    if figures is not None or report is not None:
        check_matplotlib()
    if characters:
        find_character_data(data)
    paths = [checkpoint, *wanted.against]
    lms = {
        name: load(path, device, precision)
        for name, path in zip(names_of(paths), paths, strict=True)
    }
    lm = next(iter(lms.values()))
    said = use_threads(threads, device)
    if said:
        status.print(said, highlight=False, markup=False, soft_wrap=True)
    kept: list[bytes] | None = [] if noises or drift or tail or thresholds else None
    by_source = _measure_text(lm, texts, read, stride, kept) if texts else {}
    others = hugging_face_models(asked)
    sections = measure_with_harness(asked, lms, others)
    everyone = {**lms, **text_models(others)}
    sections += measure_noise(everyone, kept or [], noises, seed) if noises and texts else []
    sections += (
        ask_about_characters(*(everyone, data, limit, seed, num_fewshot)) if characters else []
    )
    sections += measure_wanted(wanted, lms, kept or [], read, limit, seed)
    _present(lms, by_source, sections, figures, report, as_json)


def _present(
    lms: "Mapping[str, LanguageModel]",
    by_source: "dict[str, Likelihood]",
    sections: "list[Section]",
    figures: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Draw, write and print what was measured.

    Args:
        lms: models by name; the text was measured with the first.
        by_source: likelihood of text by source.
        sections: what else was measured.
        figures: folder for figures, if they are wanted.
        report: folder for the report, if one is wanted.
        as_json: print JSON, not tables.

    Raises:
        ConfigError: a file cannot be written.
    """
    from bytelm.display import show_likelihood, show_section
    from bytelm.evaluation.section import draw_sections

    lm = next(iter(lms.values()))
    if figures is not None:
        draw_sections(sections, figures)
    if report is not None:
        text = [_likelihood_section(lm, by_source)] if by_source else []
        page = write_eval_report(report, [*text, *sections], lms)
        status.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        records = {one.title: one.record for one in sections}
        print(to_json(_likelihood_record(lm, by_source) | records, indent=2))
        return
    if by_source:
        show_likelihood(console, by_source, lm.module.units.name)
    for one in sections:
        show_section(console, one)


def _measure_text(
    lm: "LanguageModel",
    texts: list[str],
    read: "ReadOptions",
    stride: int | None,
    kept: list[bytes] | None,
) -> "dict[str, Likelihood]":
    """Return the likelihood of text by source, and append its documents to ``kept``.

    Raises:
        DataError: there is no text.
    """
    from bytelm.data import Reader, find_inputs
    from bytelm.display import ConsoleProgress, show_inputs

    reader = Reader(read)
    reading = HeldOutText(find_inputs(texts, read), reader)

    def documents() -> "Iterator[Labelled]":
        for one in reading:
            if kept is not None:
                kept.append(one.data)
            yield one.source, one.data, one.trained

    with ConsoleProgress(status).measuring("evaluating") as show:
        by_source = lm.likelihood(
            documents(), stride=stride, report=lambda done: show(done, reading.expected_bytes)
        )
    if not by_source:
        raise DataError(
            "there is no text to evaluate: name other files (of prepared data, only held-out "
            "documents are evaluated)"
        )
    show_inputs(status, [one for one in reader.records if one.note or one.invalid_records])
    return by_source


def _likelihood_record(lm: "LanguageModel", by_source: "dict[str, Likelihood]") -> dict[str, Any]:
    """Return the likelihood of text, of all and by source, if there is text."""
    from bytelm.likelihood import total

    if not by_source:
        return {}
    units = lm.module.units.name

    def record(x: "Likelihood") -> dict[str, float]:
        count = {units: x.num_units} if units != "bytes" else {}
        return {"bits_per_byte": x.bits_per_byte, "bytes": x.num_bytes, **count}

    # A source may have any name, "all" too.
    sources = {name: record(one) for name, one in by_source.items()}
    return {"all": record(total(by_source.values())), "sources": sources}


def _likelihood_section(lm: "LanguageModel", by_source: "dict[str, Likelihood]") -> "Section":
    """Return the likelihood of text by source as a section."""
    from bytelm.evaluation.section import Section
    from bytelm.likelihood import total

    shown = sorted(by_source.items())
    if len(shown) > 1:
        shown.append(("all", total(by_source.values())))
    return Section(
        title="text",
        note="Bits per byte of text, by source.",
        columns=("source", "bytes", "bits per byte"),
        rows=tuple((name, one.num_bytes, one.bits_per_byte) for name, one in shown),
        record=_likelihood_record(lm, by_source),
        figures={},
    )
