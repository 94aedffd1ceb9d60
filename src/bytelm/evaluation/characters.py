"""Generated questions about the characters of words, from easy to hard.

The operations are those of CUTE (Edman et al., 2024): spelling, joining what is spelled, whether a
letter occurs, which of two words is spelled alike, inserting, deleting, replacing and swapping
letters. Words are random, so that nothing can be known by heart, and the difficulty is chosen:
the length of words, the letters they are made of, and the number of solved examples. The prompt is
short, for small models. Words of the tests are of those that a hash holds out, one in ten, so a
model can be trained on questions about the others::

    swap e and n in pxen = pxne
    swap q and b in bqa = qba
    swap t and o in tko =
"""

import string
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Literal, NamedTuple

from bytelm.errors import ConfigError
from bytelm.evaluation.cute import is_held_out
from bytelm.evaluation.questions import Question, QuestionSet, wrong_answers

__all__ = ["OPERATIONS", "Split", "character_questions", "training_questions"]

Split = Literal["test", "train"]
"""Words that a hash holds out, or the others."""

LENGTHS = (3, 5, 8)
SHOTS = 4
NUM_QUESTIONS = 50
MOST_DRAWS = 1000
"""Draws after which there are too few words for examples that all differ."""


class _Example(NamedTuple):
    question: str
    answer: str
    wrong: tuple[str, ...]


class _Words:
    """Random words of one length over an alphabet, of one part of all words."""

    def __init__(self, length: int, alphabet: str, random: Random, split: Split) -> None:
        self.length, self.alphabet, self.random = length, alphabet, random
        self.is_test = split == "test"

    def word(self) -> str:
        """Return a word with at least two different letters.

        Raises:
            ConfigError: none is found.
        """
        for _ in range(MOST_DRAWS):
            word = "".join(self.random.choices(self.alphabet, k=self.length))
            if len(set(word)) > 1 and is_held_out(word) == self.is_test:
                return word
        raise _too_few(self, "the words asked about, of which one in ten is held out")

    def two(self, letters: str) -> list[str]:
        """Return two different letters of some."""
        return self.random.sample(sorted(set(letters)), 2)

    def outside(self, word: str) -> str:
        """Return a letter that is not in the word."""
        return self.random.choice([one for one in self.alphabet if one not in word])

    def replaced(self, word: str) -> str:
        """Return the word with one letter replaced by one that it does not have."""
        at = self.random.randrange(len(word))
        return word[:at] + self.outside(word) + word[at + 1 :]

    def misspelled(self, word: str) -> Iterator[str]:
        """Yield words with a letter replaced or two neighbours exchanged, without end."""
        while True:
            at = self.random.randrange(len(word))
            exchanged = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
            yield self.replaced(word) if self.random.random() < 0.5 else exchanged


def _too_few(words: _Words, wanted: str) -> ConfigError:
    """Return the error that there are too few words."""
    return ConfigError(
        f"there are too few words of {words.length} letters out of {len(words.alphabet)} for "
        f"{wanted}: use longer words, more letters or fewer shots"
    )


def _spell(words: _Words) -> _Example:
    word = words.word()
    wrong = wrong_answers(" ".join(word), map(" ".join, words.misspelled(word)))
    return _Example(f"spell {word}", " ".join(word), wrong)


def _join(words: _Words) -> _Example:
    word = words.word()
    return _Example(f"join {' '.join(word)}", word, wrong_answers(word, words.misspelled(word)))


def _contains(words: _Words) -> _Example:
    word = words.word()
    answers = [(words.random.choice(word), "yes"), (words.outside(word), "no")]
    words.random.shuffle(answers)
    (letter, answer), (_, other) = answers
    return _Example(f"is {letter} in {word}", answer, (other,))


def _similar(words: _Words) -> _Example:
    word = words.word()
    near, far = words.replaced(word), words.word()
    while any(a == b for a, b in zip(word, far, strict=True)):
        far = words.word()
    pair = [near, far]
    words.random.shuffle(pair)
    return _Example(f"like {word}, {pair[0]} or {pair[1]}", near, (far,))


def _edit(words: _Words, question: str, word: str, answer: str, others: Iterator[str]) -> _Example:
    """Return an example whose wrong answers are no edit, the same of other letters, or misspelled.

    Args:
        words: makes misspelled words.
        question: the question.
        word: the word that is edited.
        answer: the edited word.
        others: the results of the same edit of other letters.
    """

    def candidates() -> Iterator[str]:
        yield word
        yield from others
        yield from words.misspelled(answer)

    return _Example(question, answer, wrong_answers(answer, candidates()))


def _insert(words: _Words) -> _Example:
    word, new = words.word(), words.random.choice(words.alphabet)
    letter, other = words.two(word)
    question = f"add {new} after {letter} in {word}"
    results = [word.replace(one, one + new) for one in (letter, other)]
    return _edit(words, question, word, results[0], iter(results[1:]))


def _delete(words: _Words) -> _Example:
    word = words.word()
    letter, other = words.two(word)
    results = [word.replace(one, "") for one in (letter, other)]
    return _edit(words, f"delete {letter} in {word}", word, results[0], iter(results[1:]))


def _substitute(words: _Words) -> _Example:
    word = words.word()
    (letter, other), new = words.two(word), words.outside(word)
    results = [word.replace(one, new) for one in (letter, other)]
    question = f"replace {letter} by {new} in {word}"
    return _edit(words, question, word, results[0], iter(results[1:]))


def _swap(words: _Words) -> _Example:
    word = words.word()
    a, b = words.two(word)
    answer = word.translate(str.maketrans(a + b, b + a))
    one_way = iter((word.replace(a, b), word.replace(b, a)))
    return _edit(words, f"swap {a} and {b} in {word}", word, answer, one_way)


OPERATIONS: dict[str, Callable[[_Words], _Example]] = {
    "spell": _spell,
    "join": _join,
    "contains": _contains,
    "similar": _similar,
    "insert": _insert,
    "delete": _delete,
    "substitute": _substitute,
    "swap": _swap,
}
"""What is asked. Edits are of every occurrence of a letter."""


def character_questions(
    operations: Sequence[str] = tuple(OPERATIONS),
    *,
    lengths: Sequence[int] = LENGTHS,
    alphabet: str = string.ascii_lowercase,
    shots: int = SHOTS,
    num_questions: int = NUM_QUESTIONS,
    seed: int = 0,
    split: Split = "test",
) -> list[QuestionSet]:
    """Return a set of questions for each operation and length of words.

    The questions of one operation and length do not depend on the others that are asked for.

    Args:
        operations: names of :data:`OPERATIONS`.
        lengths: lengths of words, at least 2.
        alphabet: letters of words, more than a word has.
        shots: solved examples before each question, different ones for each.
        num_questions: questions of each set.
        seed: seed of words and letters.
        split: part of all words that the words are of.

    Raises:
        ConfigError: an operation is unknown, a length or the alphabet is too small, or there are
            too few different words.
    """
    for name in operations:
        if name not in OPERATIONS:
            raise ConfigError(f"unknown operation {name!r}: {', '.join(OPERATIONS)}")
    if min(lengths) < 2 or len(set(alphabet)) <= max(lengths):
        raise ConfigError(
            f"words of {min(lengths)} to {max(lengths)} letters out of {len(set(alphabet))}: words "
            "need at least two letters, and the alphabet more than the longest word"
        )
    sets = []
    for name in operations:
        for length in lengths:
            random = Random(f"{seed} {name} {length} {alphabet} {shots}")
            words = _Words(length, alphabet, random, split)
            questions = tuple(_ask(name, words, shots) for _ in range(num_questions))
            sets.append(QuestionSet(f"{name} {length}", questions))
    return sets


def _ask(name: str, words: _Words, shots: int) -> Question:
    examples: dict[str, _Example] = {}
    for _ in range(MOST_DRAWS):
        example = OPERATIONS[name](words)
        examples.setdefault(example.question, example)
        if len(examples) > shots:
            break
    else:
        raise _too_few(words, f"{shots} examples")
    *solved, last = examples.values()
    lines = [f"{one.question} = {one.answer}\n" for one in solved]
    return Question("".join(lines) + f"{last.question} =", last.answer, last.wrong)


def training_questions(
    number: int, *, lengths: Sequence[int] = LENGTHS, shots: int = 0, seed: int = 0
) -> list[dict[str, str]]:
    r"""Return questions to train on, about words that tests do not ask about.

    Each is a record such as ``{"prompt": "swap q and b in bqa =", "response": " qba\n"}``. All
    operations and lengths occur alike, in random order.

    Args:
        number: number of questions.
        lengths: lengths of words.
        shots: solved examples before each question.
        seed: seed of words, letters and order.

    Raises:
        ConfigError: as :func:`character_questions`.
    """
    each = -(-number // (len(OPERATIONS) * len(lengths)))
    sets = character_questions(
        lengths=lengths, shots=shots, num_questions=each, seed=seed, split="train"
    )
    records = [
        {"prompt": question.prompt, "response": one.before + question.answer + one.after}
        for one in sets
        for question in one.questions
    ]
    Random(f"{seed} order").shuffle(records)
    return records[:number]
