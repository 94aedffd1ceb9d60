"""Questions with one right answer among several, asked after solved examples.

A model is scored in three ways, from the easiest to the hardest for a small one:

* *share*: the probability of the right answer, divided by that of all answers offered;
* *accuracy*: how often the right answer is the most likely one offered;
* *exact*: how often greedy generation writes the right answer.

The likelihood of an answer includes that of the line end or quotation mark after it, so an answer
is not preferred because another one begins with it. ``1 / answers`` is the chance level of the
first two, 0 that of the third.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bytelm.errors import ConfigError
from bytelm.evaluation.bootstrap import Estimate, Floats, interval, resample
from bytelm.evaluation.score_sections import scores_section
from bytelm.evaluation.scores import Scores
from bytelm.evaluation.section import Section
from bytelm.evaluation.text_model import TextModel
from bytelm.progress import ignore

__all__ = [
    "Question",
    "QuestionSet",
    "SetScore",
    "measure_questions",
    "questions_section",
    "questions_sections",
    "wrong_answers",
]

NUM_WRONG = 3
"""Wrong answers that are offered, unless the question has only two answers."""
SLACK_BYTES = 8
"""Bytes that may be generated beyond the longest right answer."""


class Question(NamedTuple):
    """One question, with its examples."""

    prompt: str
    """Everything before the answer: the solved examples and the question."""
    answer: str
    wrong: tuple[str, ...]
    """Wrong answers that are offered."""
    also_right: tuple[str, ...] = ()
    """Further answers that are right when they are generated."""


class QuestionSet(NamedTuple):
    """Questions of one kind and difficulty."""

    name: str
    questions: tuple[Question, ...]
    before: str = " "
    """Text between prompt and answer, predicted with the answer."""
    after: str = "\n"
    """Text after the answer, which ends generation."""
    ignores_case: bool = False
    """Whether a generated answer may differ in case."""

    @property
    def chance(self) -> float:
        """Mean share of the right answer if all that are offered are equally likely."""
        return float(np.mean([1 / (1 + len(one.wrong)) for one in self.questions]))


class SetScore(NamedTuple):
    """Scores of a model on a set of questions, with intervals over questions."""

    name: str
    num_questions: int
    chance: float
    share: Estimate
    accuracy: Estimate
    exact: Estimate
    bits_per_byte: Estimate
    """Of the right answers."""
    values: Floats
    """Share, accuracy, exact, bits and bytes of the right answer: ``[5, question]``."""


def wrong_answers(
    right: str, candidates: Iterable[str], number: int = NUM_WRONG
) -> tuple[str, ...]:
    """Return the first candidates that are distinct, not empty and not the right answer."""
    found: dict[str, None] = {}
    for one in candidates:
        if one and one != right:
            found[one] = None
        if len(found) == number:
            break
    return tuple(found)


def measure_questions(
    lm: TextModel,
    sets: Sequence[QuestionSet],
    *,
    seed: int = 0,
    report: Callable[[int], None] = ignore,
) -> tuple[SetScore, ...]:
    """Ask a model questions.

    Args:
        lm: any language model.
        sets: sets of questions, none of them empty.
        seed: seed of the intervals.
        report: called with the number of questions that are answered.

    Raises:
        ConfigError: a set is empty; or as :meth:`bytelm.LanguageModel.log_likelihood`.
    """
    scores, done = [], 0
    for one in sets:
        if not one.questions:
            raise ConfigError(f"{one.name} has no questions: there must be at least one")
        scores.append(_measure_set(lm, one, seed))
        done += len(one.questions)
        report(done)
    return tuple(scores)


def _measure_set(lm: TextModel, one: QuestionSet, seed: int) -> SetScore:
    offered = [
        (number, question.prompt, one.before + answer + one.after)
        for number, question in enumerate(one.questions)
        for answer in (question.answer, *question.wrong)
    ]
    found = lm.log_likelihood([prompt for _, prompt, _ in offered], [text for *_, text in offered])
    nats = np.array(found)
    numbers = np.array([number for number, *_ in offered])
    each = [nats[numbers == number] for number in range(len(one.questions))]
    right = np.array([values[0] for values in each])
    sizes = [len((one.before + q.answer + one.after).encode()) for q in one.questions]
    measured = np.array(
        [
            [_share(values) for values in each],
            [_is_best(values) for values in each],
            _exact(lm, one),
            -right / math.log(2),
            sizes,
        ]
    )
    return _scored(one.name, one.chance, measured, seed)


def _scored(name: str, chance: float, measured: Floats, seed: int) -> SetScore:
    """Return the scores of questions, with intervals over them, from their values."""
    number = measured.shape[1]
    weights = resample(number, generator=seed).astype(float)

    def estimate(row: Floats, per: Floats) -> Estimate:
        return Estimate(float(row.sum() / per.sum()), *interval((weights @ row) / (weights @ per)))

    share, accuracy, exact = (estimate(row, np.ones(number)) for row in measured[:3])
    bits_per_byte = estimate(measured[3], measured[4])
    return SetScore(name, number, chance, share, accuracy, exact, bits_per_byte, measured)


def _with_all(scores: Sequence[SetScore]) -> list[SetScore]:
    """Return the scores, and after several those of all questions together."""
    if len(scores) < 2:
        return list(scores)
    numbers = [one.num_questions for one in scores]
    chance = float(np.average([one.chance for one in scores], weights=numbers))
    values = np.concatenate([one.values for one in scores], axis=1)
    return [*scores, _scored("all", chance, values, 0)]


def _share(nats: Floats) -> float:
    """Return the probability of the first answer, divided by that of all."""
    return float(1 / np.exp(nats - nats[0]).sum())


def _is_best(nats: Floats) -> float:
    """Return 1 if the first answer is the most likely, its part of 1 if several are, or 0."""
    best = nats == nats.max()
    return float(best[0] / best.sum())


def _exact(lm: TextModel, one: QuestionSet) -> list[float]:
    """Return 1 for each question whose right answer is generated, or 0."""

    def same(text: str) -> str:
        return text.strip().lower() if one.ignores_case else text.strip()

    longest = max(len((one.before + q.answer).encode()) for q in one.questions)
    prompts = [question.prompt + one.before.rstrip() for question in one.questions]
    written = lm.generate(prompts, max_bytes=longest + SLACK_BYTES, stop=[one.after])
    texts = [same(data.decode("utf-8", "replace")) for data in written]
    return [
        float(text in map(same, (question.answer, *question.also_right)))
        for text, question in zip(texts, one.questions, strict=True)
    ]


def questions_section(scores: Sequence[SetScore], title: str, note: str) -> Section:
    """Return scores as a table.

    Args:
        scores: scores of sets of questions.
        title: title of the table.
        note: what was asked.
    """
    every = _with_all(scores)
    rows = tuple(
        (
            one.name,
            one.num_questions,
            f"{one.chance:.2f}",
            *(f"{x.value:.3f} ±{x.margin:.3f}" for x in (one.share, one.accuracy, one.exact)),
            f"{one.bits_per_byte.value:.3f}",
        )
        for one in every
    )
    record = {
        one.name: {
            name: value._asdict() if isinstance(value, Estimate) else value
            for name, value in one._asdict().items()
            if name not in ("name", "values")
        }
        for one in every
    }
    note += (
        " share: of the right answer in the probability of all that are offered; accuracy: it is "
        "the most likely; both are at chance level for a model that knows nothing. exact: it is "
        "generated. ± is half of the 95% interval over questions"
    )
    columns = ("questions", "number", "chance", "share", "accuracy", "exact", "bits/byte")
    return Section(title, note, columns, rows, record, figures={})


def questions_sections(
    models: Mapping[str, Sequence[SetScore]], title: str, note: str
) -> list[Section]:
    """Return the scores of each model, and of several models their differences from the first.

    Args:
        models: scores of the same sets of questions, by name of the model.
        title: what was asked, in a few words.
        note: what was asked.
    """
    if len(models) == 1:
        return [questions_section(scores, title, note) for scores in models.values()]
    sections = [
        questions_section(scores, f"{title}: {name}", note) for name, scores in models.items()
    ]
    compared = scores_section(
        {
            name: [x for one in _with_all(some) for x in _by_metric(one)]
            for name, some in models.items()
        },
        "",
        {},
    )
    note = (
        "Differences are paired, on the same questions: bootstrap intervals, and p of McNemar's "
        "exact test where answers are right or wrong."
    )
    return [*sections, compared._replace(title=f"{title}: compared", note=note, figures={})]


def _by_metric(one: SetScore) -> list[Scores]:
    """Return the shares, accuracies and exact answers of a set, by question."""
    questions = tuple(map(str, range(one.num_questions)))
    ones = np.ones(one.num_questions)
    return [
        Scores(one.name, metric, "mean", values, ones, questions)
        for metric, values in zip(("share", "accuracy", "exact"), one.values[:3], strict=True)
    ]
