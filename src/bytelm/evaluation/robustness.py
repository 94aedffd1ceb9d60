"""Robustness to noise in text: bits per byte of clean text after noised text, and of noised text.

Documents are cut into pieces of a context and a continuation. The context is noised and the
continuation is not, so what is predicted is the same for every noise and its bits per byte compare,
for models of bytes and of tokens. The piece noised as a whole is measured as well.

Changes from clean text are paired: both are measured on the same pieces, and intervals are over
documents drawn with replacement.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.bootstrap import Estimate, Floats, interval, resample
from bytelm.evaluation.noise import Noise
from bytelm.evaluation.section import Cell, Section
from bytelm.evaluation.text_model import TextModel
from bytelm.figures import new_figure, save_figure
from bytelm.progress import ignore

__all__ = [
    "NoiseScore",
    "Piece",
    "Robustness",
    "cut_pieces",
    "measure_robustness",
    "num_texts",
    "robustness_section",
    "robustness_sections",
]

CONTEXT_BYTES, CONTINUATION_BYTES = 512, 128
LEAST_BYTES = 8
"""Fewest bytes of each: the ends of a context move back by up to three of them, or a quarter of the
continuation."""
SCORED_TOGETHER = 256
"""Pieces between two reports of progress."""


class Piece(NamedTuple):
    """Part of a document: what is given and what is predicted."""

    document: int
    context: bytes
    continuation: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return len(self.context) + len(self.continuation)


class NoiseScore(NamedTuple):
    """Scores under one noise, each with its interval."""

    noise: str
    length: float
    """Bytes of the noised pieces per byte of the clean ones."""
    bits_per_byte: Estimate
    """Bits per byte of the clean continuations after noised contexts."""
    change: Estimate
    """The same, minus that after clean contexts."""
    whole: Estimate
    """Bits per byte of pieces noised as a whole."""
    whole_per_clean_byte: Estimate
    """Bits of pieces noised as a whole, per byte of the clean pieces."""
    whole_change: Estimate
    """The same, minus that of clean pieces."""


class Measured(NamedTuple):
    """Bits and bytes under one noise, by piece or by what is drawn for the intervals."""

    bits: Floats
    """Bits of the continuations."""
    num_bytes: Floats
    whole_bits: Floats
    """Bits of the pieces noised as a whole."""
    whole_bytes: Floats


class Robustness(NamedTuple):
    """Scores of one model on some text under several noises."""

    scores: tuple[NoiseScore, ...]
    """The first is that of clean text."""
    seed: int
    num_documents: int
    num_pieces: int
    num_bytes: int
    """Bytes of the continuations."""
    drawn: str
    """What is drawn with replacement for the intervals: documents, or the pieces of a single
    document."""
    sums: tuple[Measured, ...]
    """Bits and bytes of each score, by what is drawn."""

    def difference(self, other: "Robustness", noise: str) -> Estimate:
        """Return how much more the bits per byte of this model change than another's, paired.

        Args:
            other: the other model's results on the same text with the same seed.
            noise: name of the noise.

        Raises:
            ConfigError: the results are of different text, or lack the noise.
        """
        sizes = [one.sums[0].num_bytes for one in (self, other)]
        names = [[score.noise for score in one.scores] for one in (self, other)]
        if not np.array_equal(sizes[0], sizes[1]) or self.seed != other.seed:
            raise ConfigError("the results are of different text or seeds: measure both alike")
        if noise not in names[0] or noise not in names[1]:
            raise ConfigError(f"{noise!r} was not measured with both models")
        pairs = [
            (one.sums[name.index(noise)].bits - one.sums[0].bits)
            for one, name in zip((self, other), names, strict=True)
        ]
        weights = resample(len(sizes[0]), generator=self.seed).astype(float)
        bits = pairs[0] - pairs[1]
        drawn = (weights @ bits) / (weights @ sizes[0])
        return Estimate(float(bits.sum() / sizes[0].sum()), *interval(drawn))


def cut_pieces(
    documents: Iterable[bytes],
    context_bytes: int = CONTEXT_BYTES,
    continuation_bytes: int = CONTINUATION_BYTES,
) -> Iterator[Piece]:
    """Cut documents into pieces without overlap, before white space or at least between characters.

    A token model would find it harder to continue a word that is cut than a byte model does.
    The last piece of a document may have a shorter context; a rest without context is left out.

    Args:
        documents: any bytes.
        context_bytes: bytes of a context.
        continuation_bytes: bytes of a continuation.

    Raises:
        ConfigError: a number of bytes is below :data:`LEAST_BYTES`.
    """
    if min(context_bytes, continuation_bytes) < LEAST_BYTES:
        raise ConfigError(
            f"a context of {context_bytes} and a continuation of {continuation_bytes} bytes: both "
            f"need at least {LEAST_BYTES}"
        )
    furthest = continuation_bytes // 4
    for number, data in enumerate(documents):
        begin = 0
        while True:
            end = _place_to_cut(data, begin + context_bytes + continuation_bytes, furthest)
            cut = _place_to_cut(data, end - continuation_bytes, furthest)
            if cut <= begin:
                break
            yield Piece(number, data[begin:cut], data[cut:end])
            begin = end


def _place_to_cut(data: bytes, at: int, furthest: int) -> int:
    """Return the last place up to ``at`` where white space begins, or else a character of UTF-8.

    Args:
        data: a document.
        at: last place that is considered.
        furthest: bytes before it where white space may begin.
    """
    if at >= len(data):
        return len(data)
    for place in range(at, max(at - furthest, 0), -1):
        if data[place : place + 1].isspace() and not data[place - 1 : place].isspace():
            return place
    for back in range(min(4, at + 1)):
        if data[at - back] & 0xC0 != 0x80:
            return at - back
    return at


def measure_robustness(
    lm: TextModel,
    pieces: Sequence[Piece],
    noises: Sequence[Noise],
    *,
    seed: int = 0,
    report: Callable[[int], None] = ignore,
) -> Robustness:
    """Measure how much noise makes text harder to predict.

    With pieces ``(c, x)`` and a noise ``f``, the bits per byte are
    ``-sum log2 p(x | f(c)) / sum len(x)``, and those of whole pieces
    ``-sum log2 p(f(c + x)) / sum len(f(c + x))``.

    Args:
        lm: any language model.
        pieces: text, as :func:`cut_pieces` returns it.
        noises: noises to measure besides clean text.
        seed: seed of the noises and of the intervals.
        report: called with the number of texts that are measured, in all :func:`num_texts`.

    Raises:
        ConfigError: as :meth:`bytelm.LanguageModel.log_likelihood`.
        DataError: there are no pieces.
    """
    if not pieces:
        raise DataError(
            f"no document is long enough: robustness needs more than {CONTINUATION_BYTES} bytes, "
            "so that a context precedes what is predicted"
        )
    scorer = _Scorer(lm, report)
    measured = [_measure(scorer, pieces, noise, seed) for noise in (Noise(), *noises)]
    numbers = [piece.document for piece in pieces]
    several = numbers[0] != numbers[-1]
    items = np.unique(numbers if several else range(len(pieces)), return_inverse=True)[1]
    # By document: the sum over its pieces.
    summed = [
        Measured(*(np.bincount(items, one).astype(float) for one in columns))
        for columns in measured
    ]
    weights = resample(int(items[-1]) + 1, generator=seed).astype(float)
    names = map(str, (Noise(), *noises))
    return Robustness(
        scores=tuple(
            _score(name, one, summed[0], weights) for name, one in zip(names, summed, strict=True)
        ),
        seed=seed,
        num_documents=len(set(numbers)),
        num_pieces=len(pieces),
        num_bytes=sum(len(piece.continuation) for piece in pieces),
        drawn="documents" if several else "pieces",
        sums=tuple(summed),
    )


def num_texts(pieces: Sequence[Piece], noises: Sequence[Noise]) -> int:
    """Return how many texts are measured: pieces and continuations, clean and with each noise."""
    return 2 * len(pieces) * (1 + len(noises))


def _measure(scorer: "_Scorer", pieces: Sequence[Piece], noise: Noise, seed: int) -> Measured:
    wholes = [noise(piece.context + piece.continuation, seed) for piece in pieces]
    return Measured(
        bits=scorer([(noise(piece.context, seed), piece.continuation) for piece in pieces]),
        num_bytes=np.array([len(piece.continuation) for piece in pieces], float),
        whole_bits=scorer([(b"", whole) for whole in wholes]),
        whole_bytes=np.array([len(whole) for whole in wholes], float),
    )


class _Scorer:
    """Bits of continuations; those that were measured before are not measured again."""

    def __init__(self, lm: TextModel, report: Callable[[int], None]) -> None:
        self._lm, self._report, self._done = lm, report, 0
        self._known: dict[tuple[bytes, bytes], float] = {}

    def __call__(self, pairs: Sequence[tuple[bytes, bytes]]) -> Floats:
        for begin in range(0, len(pairs), SCORED_TOGETHER):
            part = pairs[begin : begin + SCORED_TOGETHER]
            new = [pair for pair in dict.fromkeys(part) if pair not in self._known]
            contexts, rests = [pair[0] for pair in new], [pair[1] for pair in new]
            found = self._lm.log_likelihood(contexts, rests)
            assert isinstance(found, list)
            self._known.update(zip(new, found, strict=True))
            self._done += len(part)
            self._report(self._done)
        return np.array([-self._known[pair] / math.log(2) for pair in pairs])


def _score(name: str, noised: Measured, clean: Measured, weights: Floats) -> NoiseScore:
    def estimate(ratio: Callable[[Floats], Floats]) -> Estimate:
        """Return a quantity of the sums over items, with its interval."""
        return Estimate(float(ratio(np.ones((1, weights.shape[1])))[0]), *interval(ratio(weights)))

    def per_byte(w: Floats) -> Floats:
        return (w @ noised.bits) / (w @ noised.num_bytes)

    def change(w: Floats) -> Floats:
        return per_byte(w) - (w @ clean.bits) / (w @ clean.num_bytes)

    def whole(w: Floats) -> Floats:
        return (w @ noised.whole_bits) / (w @ noised.whole_bytes)

    def per_clean_byte(w: Floats) -> Floats:
        return (w @ noised.whole_bits) / (w @ clean.whole_bytes)

    def whole_change(w: Floats) -> Floats:
        return per_clean_byte(w) - (w @ clean.whole_bits) / (w @ clean.whole_bytes)

    return NoiseScore(
        name,
        float(noised.whole_bytes.sum() / clean.whole_bytes.sum()),
        *map(estimate, (per_byte, change, whole, per_clean_byte, whole_change)),
    )


def robustness_section(found: Robustness, title: str = "noise") -> Section:
    """Return the scores as a table, with the figure of the changes."""
    rows = tuple(
        (
            one.noise,
            f"{one.bits_per_byte.value:.4f}",
            _signed(one.change),
            f"{one.length:.2f}",
            f"{one.whole.value:.4f}",
            f"{one.whole_per_clean_byte.value:.4f}",
            _signed(one.whole_change),
        )
        for one in found.scores
    )
    note = (
        f"bits per byte of {found.num_bytes:,} bytes of clean text after noised context, in "
        f"{found.num_pieces:,} pieces of {found.num_documents:,} documents, and of the pieces "
        f"noised as a whole; seed {found.seed}. Changes from clean text are paired, ± half of the "
        f"95% interval over {found.drawn}"
    )
    return Section(
        title=title,
        note=note,
        columns=(
            "noise",
            "bits/byte after it",
            "change",
            "length",
            "bits/byte of it",
            "bits/clean byte",
            "change",
        ),
        rows=rows,
        record={
            "seed": found.seed,
            "documents": found.num_documents,
            "pieces": found.num_pieces,
            "bytes": found.num_bytes,
            "interval_over": found.drawn,
            "noises": {
                one.noise: {
                    name: value._asdict() if isinstance(value, Estimate) else value
                    for name, value in one._asdict().items()
                    if name != "noise"
                }
                for one in found.scores
            },
        },
        figures={"noise": lambda path: draw_robustness({"": found}, path)},
    )


def _signed(change: Estimate) -> str:
    return f"{change.value:+.4f} ±{change.margin:.4f}"


def robustness_sections(models: Mapping[str, Robustness]) -> list[Section]:
    """Return the scores of each model, and of several models how their changes differ.

    Args:
        models: results on the same text with the same noises and seed, by name of the model.
    """
    if len(models) == 1:
        return [robustness_section(found) for found in models.values()]
    sections = [
        robustness_section(found, f"noise: {name}")._replace(figures={})
        for name, found in models.items()
    ]
    first, base = next(iter(models.items()))
    rows: list[tuple[Cell, ...]] = []
    records = []
    for at, noise in enumerate(one.noise for one in base.scores):
        for name, found in models.items():
            one = found.scores[at]
            less = found.difference(base, noise) if at and name != first else None
            cells = (noise, name, f"{one.bits_per_byte.value:.4f}", _signed(one.change))
            rows.append((*cells, None if less is None else _signed(less)))
            records.append(
                {
                    "noise": noise,
                    "model": name,
                    "change": one.change._asdict(),
                    "difference": None if less is None else less._asdict(),
                }
            )
    compared = Section(
        title="noise: compared",
        note=f"how much more bits per byte change than those of {first}, on the same text with the "
        f"same noise; ± is half of the paired 95% interval over {base.drawn}",
        columns=("noise", "model", "bits/byte after it", "change", f"minus {first}"),
        rows=tuple(rows),
        record={"changes": records},
        figures={"noise": lambda path: draw_robustness(models, path)},
    )
    return [*sections, compared]


def draw_robustness(models: Mapping[str, Robustness], path: Path) -> None:
    """Draw the change in bits per byte after each noise, with its 95% interval.

    Args:
        models: results with the same noises, by name of the model.
        path: file to draw into.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    names = [one.noise for one in next(iter(models.values())).scores[1:]]
    figure = new_figure(5.5, 1.0 + (0.2 + 0.08 * len(models)) * len(names))
    axis = figure.subplots()
    step = 0.5 / len(models)
    for number, (name, found) in enumerate(models.items()):
        change = np.array([one.change for one in found.scores[1:]]).reshape(-1, 3)
        errors = np.abs(change[:, 1:].T - change[:, 0])
        places = np.arange(len(names)) + step * (number - (len(models) - 1) / 2)
        axis.errorbar(change[:, 0], places, xerr=errors, fmt="o", ms=4, lw=1, label=name)
    axis.axvline(0, color="0.6", lw=0.8, ls=":")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("change in bits per byte of clean text after noised context")
    axis.spines[["top", "right"]].set_visible(False)
    if len(models) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, path)
