"""Parts of eval: noise in text, and questions about characters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bytelm.cli.app import status
from bytelm.errors import DataError

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from bytelm.evaluation.noise import Noise
    from bytelm.evaluation.questions import SetScore
    from bytelm.evaluation.section import Section
    from bytelm.evaluation.text_model import TextModel

CMUDICT = ("cmudict.dict", "cmudict.dict.xz")
"""Names that the file of pronunciations may have."""


def measure_noise(
    lms: "Mapping[str, TextModel]",
    documents: Sequence[bytes],
    noises: "Sequence[Noise]",
    seed: int,
) -> "list[Section]":
    """Measure robustness to noise.

    Args:
        lms: models by name.
        documents: the text.
        noises: noises to measure besides clean text.
        seed: seed of the noises.

    Raises:
        DataError: the documents are too short.
    """
    from bytelm.display import ConsoleProgress
    from bytelm.evaluation.robustness import (
        cut_pieces,
        measure_robustness,
        num_texts,
        robustness_sections,
    )

    pieces = list(cut_pieces(documents))
    found = {}
    for name, lm in lms.items():
        with ConsoleProgress(status).counting(f"noise: {name}", num_texts(pieces, noises)) as show:
            found[name] = measure_robustness(
                lm, pieces, noises, seed=seed, report=lambda done, show=show: show(done, "texts")
            )
    return robustness_sections(found)


def text_models(others: "Mapping[str, LM]") -> "dict[str, TextModel]":
    """Return models of the harness as noise and questions ask them, by name."""
    if not others:
        return {}
    from bytelm.evaluation.harness.text import HarnessText

    return {name: HarnessText(lm) for name, lm in others.items()}


def find_character_data(data: Path | None) -> tuple[Path | None, Path | None]:
    """Return the folder of CUTE and the file of CMUdict in a folder, where it has them.

    Raises:
        DataError: the folder has neither.
    """
    if data is None:
        return None, None
    tables = data / "cute"
    words = next((path for path in map(data.joinpath, CMUDICT) if path.exists()), None)
    if not tables.is_dir() and words is None:
        raise DataError(f"{data} has neither a folder cute nor a file cmudict.dict[.xz]")
    return tables if tables.is_dir() else None, words


def ask_about_characters(
    lms: "Mapping[str, TextModel]",
    data: Path | None,
    limit: int | None,
    seed: int,
    num_fewshot: int | None = None,
) -> "list[Section]":
    """Ask generated questions, and those of CUTE and CMUdict if their files are there.

    Args:
        lms: models by name.
        data: folder with ``cute`` and ``cmudict.dict`` or ``cmudict.dict.xz``, or one of the two.
        limit: questions of each kind; ``None`` for the usual number.
        seed: seed of the questions.
        num_fewshot: solved examples before each question; ``None`` for the usual number.

    Raises:
        DataError: the folder has neither, or a file is damaged.
    """
    from bytelm.display import ConsoleProgress
    from bytelm.evaluation import characters, cute
    from bytelm.evaluation.questions import measure_questions, questions_sections

    def count(usual: int) -> int:
        return usual if num_fewshot is None else num_fewshot

    shots = count(characters.SHOTS)
    generated = characters.character_questions(
        shots=shots, num_questions=limit or characters.NUM_QUESTIONS, seed=seed
    )
    note = f"name and length of words, {shots}-shot."
    asked = {"characters: generated words": (generated, note)}
    limit = limit or cute.NUM_QUESTIONS
    tables, words = find_character_data(data)
    if tables is not None:
        shots = count(cute.CUTE_SHOTS)
        sets = cute.cute_questions(tables, shots=shots, limit=limit, seed=seed)
        asked["characters: CUTE"] = (sets, f"{shots}-shot, wording of bytelm.")
    if words is not None:
        shots = count(cute.CMUDICT_SHOTS)
        one = cute.pronunciation_questions(words, shots=shots, limit=limit, seed=seed)
        note = f"held-out words of CMUdict, {shots}-shot."
        asked["characters: pronunciation"] = ([one], note)
    every = [one for sets, _ in asked.values() for one in sets]
    total = sum(len(one.questions) for one in every)
    scores: dict[str, Sequence[SetScore]] = {}
    for name, lm in lms.items():
        with ConsoleProgress(status).counting(f"characters: {name}", total) as show:
            scores[name] = measure_questions(
                lm, every, seed=seed, report=lambda done, show=show: show(done, "questions")
            )
    sections, begin = [], 0
    for title, (sets, note) in asked.items():
        own = {name: some[begin : begin + len(sets)] for name, some in scores.items()}
        sections += questions_sections(own, title, note)
        begin += len(sets)
    return sections
