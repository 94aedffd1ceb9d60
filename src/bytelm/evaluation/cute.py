"""Questions from files: CUTE, and the pronunciation of words from CMUdict.

CUTE (Edman et al., 2024; https://github.com/Leukas/CUTE) is a folder of tables, one for each task,
with the columns ``input1`` to ``input3`` and ``label``. The files hold no prompts; as in the
benchmark, arguments and answers are in quotation marks after solved examples and the answer is
generated up to the closing mark, but the wording here is our own, so figures are not those of the
published prompts. The wrong answers that are offered are ours, too.

CMUdict has the pronunciations of 135,000 English words. Whether a word is held out depends on its
hash only, so the split is the same everywhere; examples come from the other words.
"""

import csv
import hashlib
import lzma
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

from bytelm.errors import DataError
from bytelm.evaluation.questions import Question, QuestionSet, wrong_answers

__all__ = [
    "cute_questions",
    "is_held_out",
    "pronunciation_questions",
    "read_cmudict",
    "training_pronunciations",
]

NUM_QUESTIONS = 100
CUTE_SHOTS, CMUDICT_SHOTS = 4, 5
HELD_OUT = 10
"""One word of CMUdict in this many is held out."""
WORDINGS = {
    "spell": 'Spell out the word "{0}".',
    "spell_inverse": 'Write the word that is spelled out as "{0}".',
    "contains_char": 'Is the letter "{0}" in the word "{1}"?',
    "contains_word": 'Is the word "{0}" in the sentence "{1}"?',
    "orth": 'Which is closer in spelling to "{0}", "{1}" or "{2}"?',
    "sem": 'Which is closer in meaning to "{0}", "{1}" or "{2}"?',
    "ins_char": 'Add the letter "{0}" after every "{1}" in the word "{2}".',
    "ins_word": 'Add the word "{0}" after every "{1}" in the sentence "{2}".',
    "del_char": 'Delete every "{0}" from the word "{1}".',
    "del_word": 'Delete every "{0}" from the sentence "{1}".',
    "sub_char": 'Replace every "{0}" with "{1}" in the word "{2}".',
    "sub_word": 'Replace every "{0}" with "{1}" in the sentence "{2}".',
    "swap_char": 'Swap "{0}" and "{1}" in the word "{2}".',
    "swap_word": 'Swap "{0}" and "{1}" in the sentence "{2}".',
}
"""How a task is asked; a table of random letters, such as ``spell_rand``, is asked likewise."""


def cute_questions(
    folder: Path, *, shots: int = CUTE_SHOTS, limit: int | None = NUM_QUESTIONS, seed: int = 0
) -> list[QuestionSet]:
    """Return the questions of every table in CUTE's folder.

    Args:
        folder: folder with the files ``spell.tsv`` and others.
        shots: solved examples before each question, other rows of its table.
        limit: questions of each table, drawn at random; ``None`` for all.
        seed: seed of questions, examples and wrong answers.

    Raises:
        DataError: the folder has no such table, or one is damaged.
    """
    sets = []
    for task in WORDINGS:
        for name in (task, f"{task}_rand"):
            path = folder / f"{name}.tsv"
            if path.exists():
                rows = _read_table(path, shots)
                random = Random(f"{seed} {name} {shots}")
                questions = tuple(
                    _cute_question(task, rows, at, shots, random)
                    for at in _drawn(len(rows), limit, random)
                )
                by_word = task.endswith("_word")
                sets.append(QuestionSet(f"cute {name}", questions, "", '"', by_word))
    if not sets:
        raise DataError(f"{folder} has none of the tables of CUTE, such as spell.tsv")
    return sets


def _read_table(path: Path, shots: int) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    if head[-1] != "label" or any(len(row) != len(head) for row in rows):
        raise DataError(f"{path} is no table of CUTE: columns input1, ..., label, in every row")
    if len(rows) <= shots:
        raise DataError(f"{path} has {len(rows)} rows, too few for {shots} examples")
    return rows


def _drawn(number: int, limit: int | None, random: Random) -> list[int]:
    return random.sample(range(number), number if limit is None else min(limit, number))


def _cute_question(
    task: str, rows: Sequence[Sequence[str]], at: int, shots: int, random: Random
) -> Question:
    others = [number for number in random.sample(range(len(rows)), shots + 1) if number != at]
    lines = []
    for number in (*others[:shots], at):
        lines.append(f'{WORDINGS[task].format(*rows[number])} Answer: "')
        lines.append(f'{rows[number][-1]}"\n')
    *inputs, answer = rows[at]
    if task.startswith("contains"):
        wrong = ("No" if answer == "Yes" else "Yes",)
    elif task in ("orth", "sem"):
        wrong = tuple(one for one in inputs[1:] if one != answer)
    else:
        wrong = wrong_answers(answer, _miswritten(task, inputs[-1], answer, random))
    return Question("".join(lines[:-1]), answer, wrong)


def _miswritten(task: str, text: str, answer: str, random: Random) -> Iterator[str]:
    """Yield the text as it was, and answers with letters or words exchanged, dropped or doubled."""
    if not task.startswith("spell"):
        yield text
    separator = " " if task == "spell" or task.endswith("_word") else ""
    right = answer.split(" ") if separator else list(answer)
    while True:
        units = list(right)
        for _ in range(1 if len(right) > 2 else random.randint(1, 3)):
            at, change = random.randrange(len(units)), random.randrange(3)
            if change == 0:
                units[at : at + 2] = units[at : at + 2][::-1]
            elif change == 1 and len(units) > 1:
                del units[at]
            else:
                units.insert(at, units[at])
        yield separator.join(units)


def read_cmudict(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the pronunciations of the words of a-z in CMUdict, in order; ``.xz`` is unpacked.

    Raises:
        DataError: the file is damaged, or no pronouncing dictionary.
    """
    opened = lzma.open if path.suffix == ".xz" else open
    found: dict[str, tuple[str, ...]] = {}
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for line in file:
                match = re.match(r"([a-z]+)(?:\(\d+\))? ([A-Z0-2 ]+)", line)
                if match:
                    found[match[1]] = (*found.get(match[1], ()), match[2].strip())
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch it again") from None
    if not found:
        raise DataError(f"{path} is no pronouncing dictionary: lines such as 'cat K AE1 T'")
    return found


def is_held_out(word: str) -> bool:
    """Whether a word is held out: one in ten is, by the last byte of its BLAKE2b hash."""
    return hashlib.blake2b(word.encode(), digest_size=8).digest()[-1] % HELD_OUT == 0


def pronunciation_questions(
    path: Path, *, shots: int = CMUDICT_SHOTS, limit: int | None = NUM_QUESTIONS, seed: int = 0
) -> QuestionSet:
    """Return questions for the pronunciation of held-out words: ``cat = K AE1 T``.

    The wrong answers that are offered are the pronunciations of the next words of the dictionary.
    A generated answer may be any pronunciation of the word.

    Args:
        path: file ``cmudict.dict``, perhaps packed as ``.xz``.
        shots: solved examples before each question, of words that are not held out.
        limit: number of questions, drawn at random; ``None`` for all held-out words.
        seed: seed of questions and examples.

    Raises:
        DataError: the file is no pronouncing dictionary, or too small.
    """
    words, known, asked = _split(path, shots)
    ordered = list(words)
    places = {word: at for at, word in enumerate(ordered)}
    random = Random(f"{seed} cmudict {shots}")
    questions = []
    for at in _drawn(len(asked), limit, random):
        word = asked[at]
        prompt = _prompt(word, random.sample(known, shots), words)
        near = ordered[places[word] + 1 :] + ordered[: places[word]]
        others = (way for one in near for way in words[one] if way not in words[word])
        right, *also = words[word]
        wrong = wrong_answers(right, others)
        questions.append(Question(prompt, right, wrong, tuple(also)))
    return QuestionSet("pronunciation", tuple(questions))


def training_pronunciations(
    path: Path, number: int, *, shots: int = 0, seed: int = 0
) -> list[dict[str, str]]:
    r"""Return words to train on, which :func:`pronunciation_questions` does not ask for.

    Each is a record such as ``{"prompt": "cat =", "response": " K AE1 T\n"}``, with the first of a
    word's pronunciations.

    Args:
        path: as for the questions.
        number: number of words, drawn at random; all if there are fewer.
        shots: solved examples before each, of other words.
        seed: seed of words, examples and order.

    Raises:
        DataError: the file is no pronouncing dictionary, or too small.
    """
    words, known, _ = _split(path, shots + 1)
    random = Random(f"{seed} cmudict train {shots}")
    records = []
    for word in random.sample(known, min(number, len(known))):
        examples = [one for one in random.sample(known, shots + 1) if one != word][:shots]
        records.append(
            {"prompt": _prompt(word, examples, words), "response": f" {words[word][0]}\n"}
        )
    return records


def _split(path: Path, shots: int) -> tuple[dict[str, tuple[str, ...]], list[str], list[str]]:
    """Return the words of a dictionary, those that are not held out, and those that are."""
    words = read_cmudict(path)
    known = [word for word in words if not is_held_out(word)]
    asked = [word for word in words if is_held_out(word)]
    if len(known) < shots or not asked:
        raise DataError(f"{path} has too few words: {len(known)} for {shots} examples")
    return words, known, asked


def _prompt(word: str, examples: Sequence[str], words: Mapping[str, tuple[str, ...]]) -> str:
    return "".join(f"{one} = {words[one][0]}\n" for one in examples) + f"{word} ="
