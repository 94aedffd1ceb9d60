"""Data of the tasks in ``bytelm/evaluation/tasks``, from files of a folder: no network is needed.

::

    hellaswag_val.jsonl   {"ctx", "endings": [4], "label": 0-3}
    arc_easy_test.jsonl   {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}
    piqa/valid.jsonl      {"goal", "sol1", "sol2"}
    piqa/valid-labels.lst 0 or 1 a line
    lambada_test.jsonl    {"text"}
    blimp/*.jsonl         {"sentence_good", "sentence_bad", "UID", "field", "linguistics_term"}

Each may be compressed, as ``.jsonl.xz``. The folder is ``--data``, or the environment variable
BYTELM_EVALUATION. Documents keep their order, except those of BLiMP, which alternate between
paradigms, so that a limit takes as many of each.
"""

import json
import lzma
import os
import re
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from bytelm.errors import DataError
from bytelm.storage import at_home

__all__ = ["FOLDER", "TASKS", "arc_easy", "blimp", "hellaswag", "lambada", "piqa"]

FOLDER = "BYTELM_EVALUATION"
"""Environment variable that names the folder."""
TASKS = Path(__file__).parent.parent / "tasks"
"""Folder of the tasks: the harness's ``--include_path``."""

Splits = dict[str, Any]


def hellaswag(**options: Any) -> Splits:
    """Return HellaSwag, with contexts as the harness's own task has them.

    An unfinished last sentence begins with a capital letter there, and is otherwise in lower case.
    """

    def context(text: str) -> str:
        *before, last = re.split(r"(?<=[.!?]) ", text)
        is_unfinished = text[-1:] not in {".", "!", "?", '"'}
        return " ".join([*before, last.capitalize() if is_unfinished else last])

    rows = _records(_folder(options), "hellaswag_val", ("ctx", "endings", "label"))
    return _test(
        {"query": context(one["ctx"]), "choices": one["endings"], "label": int(one["label"])}
        for one in rows
    )


def arc_easy(**options: Any) -> Splits:
    """Return ARC-Easy."""
    rows = _records(_folder(options), "arc_easy_test", ("question", "answerKey"))

    def document(one: dict[str, Any]) -> dict[str, Any]:
        choices = one["question"]["choices"]
        labels = [choice["label"] for choice in choices]
        return {
            "question": one["question"]["stem"],
            "choices": [choice["text"] for choice in choices],
            "label": labels.index(one["answerKey"]),
        }

    return _test(map(document, rows))


def piqa(**options: Any) -> Splits:
    """Return PIQA.

    Raises:
        DataError: as all of these; or the labels are not as many as the questions.
    """
    folder = _folder(options)
    rows = list(_records(folder, "piqa/valid", ("goal", "sol1", "sol2")))
    path = folder / "piqa" / "valid-labels.lst"
    if not path.is_file():
        raise DataError(f"there is no {path}: the labels of PIQA, 0 or 1 a line")
    labels = path.read_text().split()
    if len(labels) != len(rows):
        raise DataError(f"{path} has {len(labels)} labels for {len(rows)} questions")
    return _test({**one, "label": int(label)} for one, label in zip(rows, labels, strict=True))


def lambada(**options: Any) -> Splits:
    """Return LAMBADA: passages, of which the last word is to be predicted."""
    return _test(_records(_folder(options), "lambada_test", ("text",)))


def blimp(**options: Any) -> Splits:
    """Return the minimal pairs of BLiMP, one of each paradigm after the other."""
    folder = _folder(options) / "blimp"
    names = sorted({path.name.partition(".")[0] for path in folder.glob("*.jsonl*")})
    if not names:
        raise DataError(f"there is no {folder}/*.jsonl with the minimal pairs of BLiMP")
    keys = ("sentence_good", "sentence_bad", "UID")
    paradigms: dict[str, list[dict[str, Any]]] = {}
    for one in chain.from_iterable(_records(folder, name, keys) for name in names):
        paradigms.setdefault(one["UID"], []).append({key: one[key] for key in keys})
    return _test(one for each in zip_longest(*paradigms.values()) for one in each if one)


def _folder(options: dict[str, Any]) -> Path:
    """Return the folder that the user named."""
    named = options.get("data") or os.environ.get(FOLDER)
    if not named:
        raise DataError(
            "this task reads local files: name their folder with --data or the environment "
            f"variable {FOLDER} (docs/evaluation.md says what is in it)"
        )
    folder = at_home(named)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} with the data of tasks")
    return folder


def _records(folder: Path, name: str, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON Lines file, compressed or not.

    Raises:
        DataError: there is no such file, or a line is no record with these keys.
    """
    path, packed = folder / f"{name}.jsonl", folder / f"{name}.jsonl.xz"
    if not path.is_file() and not packed.is_file():
        raise DataError(f"there is no {path}, or {packed.name}, which this task reads")
    path, opened = (path, open) if path.is_file() else (packed, lzma.open)
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"line {number} of {path} is no JSON: {error}") from None
            missing = [key for key in keys if key not in record]
            if missing:
                raise DataError(f"line {number} of {path} has no {missing[0]!r}")
            yield record


def _test(rows: Any) -> Splits:
    """Return the only split of a task."""
    from datasets import Dataset

    return {"test": Dataset.from_list(list(rows))}
