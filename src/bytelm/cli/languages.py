"""Parts of eval: languages, the long tail, entropy drift, and other thresholds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bytelm.cli.app import status
from bytelm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from bytelm.data import ReadOptions
    from bytelm.evaluation.section import Section
    from bytelm.language_model import LanguageModel

REFERENCES = ("en", "eng", "eng_Latn", "english")
"""Names of the reference language that are looked for, if none is given."""


class Wanted(NamedTuple):
    """Options of what to measure of languages, the long tail and patches."""

    parallel: str | None
    reference: str | None
    tokenizers: list[Path]
    tail: bool
    frequencies: list[str]
    drift: bool
    thresholds: list[float]
    against: list[Path]
    has_tasks: bool
    """Whether tasks are run: models are compared on them, and with other thresholds."""
    has_questions: bool
    """Whether noise or characters are measured, on which models are compared too."""

    @property
    def needs_text(self) -> bool:
        """Whether there is something to measure on the given text."""
        return self.tail or self.drift or (bool(self.thresholds) and not self.has_tasks)

    def check(self) -> None:
        """Check that options which belong to others come with them.

        Raises:
            ConfigError: one does not.
        """
        for option, is_given, other, is_other in (
            ("--reference", self.reference is not None, "--parallel", self.parallel is not None),
            ("--tokenizer", bool(self.tokenizers), "--parallel", self.parallel is not None),
            ("--frequencies", bool(self.frequencies), "--tail", self.tail),
            (
                "--against",
                bool(self.against),
                "--tasks, --parallel, --tail, --noise or --characters",
                self.has_tasks or self.has_questions or self.tail or self.parallel is not None,
            ),
        ):
            if is_given and not is_other:
                raise ConfigError(f"{option} belongs to {other}: add it, or leave {option} out")


def parse_thresholds(text: str | None) -> list[float]:
    """Return the numbers of a text such as ``0.5,1.0``.

    Raises:
        ConfigError: these are no numbers.
    """
    try:
        values = [float(one) for one in text.split(",")] if text is not None else []
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise ConfigError(
            f"--thresholds {text!r} must be numbers with commas between, such as 0.5,1.0"
        )
    return values


def measure_wanted(
    wanted: Wanted,
    lms: "Mapping[str, LanguageModel]",
    documents: Sequence[bytes],
    read: "ReadOptions",
    limit: int | None,
    seed: int,
) -> "Iterator[Section]":
    """Yield the sections that are wanted.

    Args:
        wanted: what to measure.
        lms: models by name; patches are measured of the first.
        documents: the text.
        read: how the text for frequencies is read.
        limit: parallel sentences to measure; ``None`` for all.
        seed: seed of the intervals.

    Raises:
        ConfigError: the model does not have what is to be measured.
        DataError: text is missing, too short or not parallel.
    """
    lm = next(iter(lms.values()))
    if wanted.parallel is not None:
        where, reference, files = wanted.parallel, wanted.reference, wanted.tokenizers
        yield from measure_parallel(lms, where, reference, files, limit, seed)
    if wanted.tail:
        yield from measure_long_tail(lms, documents, wanted.frequencies, read)
    if wanted.drift:
        yield measure_patch_drift(lm, documents)
    if wanted.thresholds and documents:
        yield measure_other_thresholds(lm, documents, wanted.thresholds)


def measure_parallel(
    lms: "Mapping[str, LanguageModel]",
    where: str,
    reference: str | None,
    tokenizers: Sequence[Path],
    limit: int | None,
    seed: int,
) -> "list[Section]":
    """Measure what parallel sentences cost in each language.

    Args:
        lms: models by name.
        where: folder or glob of the sentences.
        reference: language that ratios refer to; ``None`` for English, or else the first.
        tokenizers: files of tokenizers to count tokens by.
        limit: sentences to measure; ``None`` for all.
        seed: seed of the intervals.

    Raises:
        ConfigError: the reference is none of the languages.
        DataError: the sentences are not parallel, or a file is no tokenizer.
    """
    from bytelm.display import ConsoleProgress
    from bytelm.evaluation.language_sections import language_sections
    from bytelm.evaluation.languages import Languages, count_tokens, measure
    from bytelm.evaluation.parallel import read_parallel

    parallel = read_parallel(where)
    if limit is not None:
        parallel = parallel.first(limit)
    known = (one for one in REFERENCES if one in parallel.languages)
    reference = reference or next(known, parallel.languages[0])
    total = sum(len(data) for some in parallel.sentences.values() for data in some)
    measured = []
    for name, lm in lms.items():
        with ConsoleProgress(status).measuring(f"languages: {name}") as show:
            measured.append(measure(lm, parallel, name, lambda done, show=show: show(done, total)))
    measured += [count_tokens(path, parallel) for path in tokenizers]
    return language_sections([Languages(one, reference, seed=seed) for one in measured])


def measure_long_tail(
    lms: "Mapping[str, LanguageModel]",
    documents: Sequence[bytes],
    frequencies: Sequence[str],
    read: "ReadOptions",
) -> "list[Section]":
    """Measure words and characters of some text by their frequency, and characters by script.

    Args:
        lms: models by name; characters are measured of those that read bytes.
        documents: the text.
        frequencies: inputs with the text that frequencies are counted in; none for the text itself.
        read: how they are read.

    Raises:
        DataError: there is no word.
    """
    from bytelm.data import Reader, find_inputs
    from bytelm.display import ConsoleProgress
    from bytelm.evaluation.tail import (
        Frequencies,
        characters,
        measure_characters,
        measure_words,
        tail_section,
        words,
    )

    reference = list(documents)
    if frequencies:
        reader = Reader(read)
        inputs = find_inputs(list(frequencies), read)
        reference = [document.data for one in inputs for document in reader.read(one)]
    where = "the reference" if frequencies else "this text"
    total = sum(map(len, documents))
    by_bytes = {name: lm for name, lm in lms.items() if lm.module.units.name != "tokens"}
    with ConsoleProgress(status).measuring("words") as show:
        found = measure_words(
            lms, documents, Frequencies(reference, words), lambda done: show(done, total)
        )
    note = f", by occurrences per million in {where}"
    sections = [tail_section(found, "words by frequency", note)]
    if not by_bytes:
        return sections
    with ConsoleProgress(status).measuring("characters") as show:
        counted = Frequencies(reference, characters)
        found = measure_characters(by_bytes, documents, counted, report=lambda x: show(x, total))
    sections.append(tail_section(found, "characters by frequency", note))
    with ConsoleProgress(status).measuring("scripts") as show:
        found = measure_characters(
            by_bytes, documents, by_script=True, report=lambda x: show(x, total)
        )
    return [*sections, tail_section(found, "characters by script")]


def measure_patch_drift(lm: "LanguageModel", documents: Sequence[bytes]) -> "Section":
    """Measure patch sizes by position.

    Raises:
        ConfigError: the model has no scorer.
        DataError: the documents are too short.
    """
    from bytelm.display import ConsoleProgress
    from bytelm.evaluation.drift import measure_drift
    from bytelm.evaluation.drift_sections import drift_section

    with ConsoleProgress(status).measuring("drift") as show:
        return drift_section(measure_drift(lm, documents, report=lambda done: show(done, None)))


def measure_other_thresholds(
    lm: "LanguageModel", documents: Sequence[bytes], thresholds: Sequence[float]
) -> "Section":
    """Measure bits per byte with other thresholds.

    Args:
        lm: a BLT.
        documents: the text.
        thresholds: thresholds in nats.

    Raises:
        ConfigError: the model's rule has no threshold.
        DataError: there is no text.
    """
    from bytelm.display import ConsoleProgress
    from bytelm.evaluation.drift_sections import thresholds_section
    from bytelm.evaluation.thresholds import measure_thresholds

    with ConsoleProgress(status).measuring("thresholds") as show:
        points = measure_thresholds(lm, documents, thresholds, lambda done: show(done, None))
    return thresholds_section(points, lm.context_bytes)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for each checkpoint: the last part of its path, or all of it if that is shared.

    Raises:
        DataError: a checkpoint is given twice.
    """
    if len(set(paths)) < len(paths):
        raise DataError("a checkpoint is given twice: compare different ones")
    last = [path.resolve().name for path in paths]
    return last if len(set(last)) == len(last) else [str(path) for path in paths]
