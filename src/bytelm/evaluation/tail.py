"""Bits per byte in the long tail: of rare words, rare characters, and scripts.

A word is a run of letters and combining marks, with the space before it, if there is one::

    ' the'  ' cat'  's'  ' hat'          of " the cat's hat, 12"

Its frequency is that of the word without the space and regardless of case, in a reference, such as
the training text, or in the measured text itself. Languages that write no spaces have runs of words
instead. A character's frequency is counted likewise, with case.

Token models have no probability of a byte, so a word is measured if a token begins and one ends
where it does; of several models, only the words that all of them can measure. Words between other
characters than spaces are often not among them: the result says how many are. Characters lie
within tokens, and are measured for byte models only.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.bootstrap import REPLICATES, Estimate, Floats, ratio_estimate
from bytelm.evaluation.section import Cell, Section
from bytelm.language_model import LanguageModel
from bytelm.likelihood import target_log_probs
from bytelm.progress import ignore
from bytelm.units import TokenUnits

PER_MILLION = (1.0, 10.0, 100.0, 1000.0)
"""Limits of bands of frequency, in occurrences per million."""
BANDS = ("unseen", "below 1", "1 to 10", "10 to 100", "100 to 1000", "1000 and above")


class Piece(NamedTuple):
    """A word or a character of a document."""

    begin: int
    end: int
    key: str
    """What its frequency is counted by."""


def words(data: bytes) -> Iterator[Piece]:
    """Yield the words of a document, each with the space before it."""
    begin, at, word = 0, 0, ""
    previous = ""
    for character in [*data.decode("utf-8", "surrogateescape"), ""]:
        if character and _is_letter(character):
            if not word:
                begin = at - (previous == " ")
            word += character
        elif word:
            yield Piece(begin, at, word.casefold())
            word = ""
        at += len(character.encode("utf-8", "surrogateescape"))
        previous = character


def characters(data: bytes) -> Iterator[Piece]:
    """Yield the characters of a document, without bytes that are not UTF-8."""
    at = 0
    for character in data.decode("utf-8", "surrogateescape"):
        size = len(character.encode("utf-8", "surrogateescape"))
        if not "\udc80" <= character <= "\udcff":
            yield Piece(at, at + size, character)
        at += size


@cache
def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"


@cache
def script(character: str) -> str:
    """Return the script of a letter by the first word of its name in Unicode, such as ``CYRILLIC``.

    Other characters belong to ``digits``, ``white space`` or ``other``.
    """
    kind = unicodedata.category(character)
    if kind[0] in "LM":
        return unicodedata.name(character, "other").split()[0]
    if kind == "Nd":
        return "digits"
    return "white space" if character.isspace() else "other"


class Frequencies:
    """Frequencies of words or characters in some text.

    Args:
        documents: the text.
        split: :func:`words` or :func:`characters`.
    """

    def __init__(
        self, documents: Iterable[bytes], split: Callable[[bytes], Iterator[Piece]] = words
    ) -> None:
        self.counts = Counter(piece.key for data in documents for piece in split(data))
        self.total = self.counts.total()

    def per_million(self, key: str) -> float:
        """Return the occurrences per million; 0 if unseen."""
        return 1e6 * self.counts[key] / self.total if self.total else 0.0

    def band(self, key: str) -> str:
        """Return the band of a frequency, one of :data:`BANDS`."""
        frequency = self.per_million(key)
        return BANDS[0 if not frequency else 1 + int(np.digitize(frequency, PER_MILLION))]


@dataclass(frozen=True)
class Tail:
    """Likelihood of pieces of text by group, of one or several models on the same pieces."""

    models: tuple[str, ...]
    groups: tuple[str, ...]
    counts: tuple[int, ...]
    """Pieces of each group that are measured."""
    left_out: int
    """Pieces whose ends are not those of tokens."""
    bits: Floats
    """``[model, document, group]``."""
    num_bytes: Floats
    """``[document, group]``."""

    def bits_per_byte(
        self, model: str, group: str, minus: str | None = None, replicates: int = REPLICATES
    ) -> Estimate:
        """Return the bits per byte of a group, with a 95% interval that resamples documents.

        Args:
            model: name of the model.
            group: name of the group.
            minus: model to subtract, paired by document; ``None`` for none.
            replicates: replicates of the bootstrap. The interval is NaN for one document.
        """
        column = self.groups.index(group)
        bits = self.bits[self.models.index(model), :, column]
        if minus is not None:
            bits = bits - self.bits[self.models.index(minus), :, column]
        num_bytes = self.num_bytes[:, column]
        # A document without a piece of the group says nothing about it.
        bits, num_bytes = bits[num_bytes > 0], num_bytes[num_bytes > 0]
        return ratio_estimate(bits, num_bytes, replicates)


def measure_words(
    lms: Mapping[str, LanguageModel],
    documents: Sequence[bytes],
    frequencies: Frequencies | None = None,
    report: Callable[[int], None] = ignore,
) -> Tail:
    """Measure the words of some text by their frequency.

    Args:
        lms: models by name.
        documents: the text.
        frequencies: frequencies of words; ``None`` for those in the text itself.
        report: called with the bytes that a model has measured so far.

    Raises:
        ConfigError: a model is an n-gram scorer.
        DataError: there is no word that can be measured.
    """
    frequencies = frequencies or Frequencies(documents)
    return _measure(lms, documents, words, frequencies.band, report, BANDS)


def measure_characters(
    lms: Mapping[str, LanguageModel],
    documents: Sequence[bytes],
    frequencies: Frequencies | None = None,
    *,
    by_script: bool = False,
    report: Callable[[int], None] = ignore,
) -> Tail:
    """Measure the characters of some text by their frequency, or by script.

    Args:
        lms: models of bytes or patches, by name.
        documents: the text.
        frequencies: frequencies of characters; ``None`` for those in the text itself.
        by_script: group by :func:`script` instead.
        report: as in :func:`measure_words`.

    Raises:
        ConfigError: a model reads tokens, or is an n-gram scorer.
        DataError: there is no character.
    """
    for name, lm in lms.items():
        if isinstance(lm.module.units, TokenUnits):
            raise ConfigError(
                f"{name} reads tokens, which characters are only parts of: measure words instead, "
                "or a byte model"
            )
    if by_script:
        return _measure(lms, documents, characters, script, report)
    frequencies = frequencies or Frequencies(documents, characters)
    return _measure(lms, documents, characters, frequencies.band, report, BANDS)


def _measure(
    lms: Mapping[str, LanguageModel],
    documents: Sequence[bytes],
    split: Callable[[bytes], Iterator[Piece]],
    group: Callable[[str], str],
    report: Callable[[int], None],
    order: Sequence[str] = (),
) -> Tail:
    known = [cumulative_bits(lm, documents, report) for lm in lms.values()]
    sums: list[dict[str, list[float]]] = []
    counts: Counter[str] = Counter()
    left_out = 0
    for data, *cumulative in zip(documents, *known, strict=True):
        document: dict[str, list[float]] = {}
        stacked = np.stack(cumulative)
        for piece in split(data):
            bits = stacked[:, piece.end] - stacked[:, piece.begin]
            if np.isnan(bits).any():
                left_out += 1
                continue
            name = group(piece.key)
            counts[name] += 1
            added = document.setdefault(name, [0.0] * (1 + len(lms)))
            for index, value in enumerate((piece.end - piece.begin, *bits.tolist())):
                added[index] += value
        sums.append(document)
    if not counts:
        raise DataError("no word or character can be measured: give more text")
    groups = [one for one in order if one in counts]
    groups += sorted(counts.keys() - set(order), key=lambda one: -counts[one])
    empty = [0.0] * (1 + len(lms))
    table = np.array([[document.get(one, empty) for one in groups] for document in sums])
    return Tail(
        models=tuple(lms),
        groups=tuple(groups),
        counts=tuple(counts[one] for one in groups),
        left_out=left_out,
        bits=np.moveaxis(table[:, :, 1:], -1, 0),
        num_bytes=table[:, :, 0],
    )


def cumulative_bits(
    lm: LanguageModel, documents: Sequence[bytes], report: Callable[[int], None] = ignore
) -> Iterator[Floats]:
    """Yield the bits of the first ``i`` bytes of each document, NaN within a token.

    Args:
        lm: model of bytes, patches or tokens.
        documents: any bytes.
        report: called with the bytes measured so far.

    Yields:
        ``float64[len(document) + 1]``.
    """
    found = target_log_probs(lm.module, documents, context_bytes=lm.context_bytes)
    done = 0
    for data, (log_probs, target_bytes) in zip(documents, found, strict=True):
        bits = np.full(len(data) + 1, np.nan)
        bits[0] = 0.0
        bits[np.cumsum(target_bytes[:-1])] = np.cumsum(-log_probs[:-1]) / np.log(2)
        done += len(data)
        report(done)
        yield bits


def tail_section(tail: Tail, title: str, note: str = "") -> Section:
    """Return the table of a measurement, with differences from the first of several models.

    Args:
        tail: the measurement.
        title: title, such as ``words by frequency``.
        note: what the groups are.
    """
    first, *others = tail.models
    share = tail.num_bytes.sum(0) / tail.num_bytes.sum()
    rows: list[tuple[Cell, ...]] = []
    record: dict[str, Any] = {}
    for column, group in enumerate(tail.groups):
        found = {name: tail.bits_per_byte(name, group) for name in tail.models}
        changes = {name: tail.bits_per_byte(name, group, minus=first) for name in others}
        cells = [one.text(3) for one in found.values()]
        cells += [one.text(3, signed=True) for one in changes.values()]
        rows.append((group, tail.counts[column], f"{share[column]:.1%}", *cells))
        record[group] = {
            "count": tail.counts[column],
            "bytes": int(tail.num_bytes[:, column].sum()),
            "bits_per_byte": {name: one.record() for name, one in found.items()},
            "minus_first": {name: one.record() for name, one in changes.items()},
        }
    if tail.left_out:
        every = tail.left_out + sum(tail.counts)
        note += f"; {tail.left_out / every:.1%} are left out, as no token ends with them"
    return Section(
        title=title,
        note=f"bits per byte{note} (± half of the 95% interval, documents resampled)",
        columns=(
            "group",
            "count",
            "of bytes",
            *tail.models,
            *(f"{name} - {first}" for name in others),
        ),
        rows=tuple(rows),
        record={"groups": record, "left_out": tail.left_out},
        figures={},
    )
