"""Parallel sentences: the same content in several languages, from a file for each.

A file is named by its language, up to the first dot. Its lines are sentences; in a ``.tsv`` file a
line is an id, a tab and a sentence. Any compression will do::

    en.tsv.xz           de.tsv.xz               PUD: aligned by id
    eng_Latn.dev.xz     deu_Latn.dev.xz         FLORES-200: aligned by line
    eng_Latn.devtest.xz deu_Latn.devtest.xz     further lines of the same languages

Nothing is translated or downloaded; the sentences of `PUD <https://universaldependencies.org>`_ and
`FLORES-200 <https://github.com/facebookresearch/flores>`_ can be had from there.
"""

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bytelm.data.opening import DAMAGED, examine
from bytelm.errors import DataError

Id = tuple[str, str]
"""The end of a file's name, and the id of a sentence in it, or the number of its line."""


@dataclass(frozen=True)
class Parallel:
    """Sentences by language; those with the same index say the same."""

    sentences: dict[str, list[bytes]]

    @property
    def languages(self) -> list[str]:
        """Names of the languages."""
        return list(self.sentences)

    def __len__(self) -> int:
        """Return the number of sentences in each language."""
        return len(next(iter(self.sentences.values())))

    def first(self, count: int) -> "Parallel":
        """Return the first sentences only."""
        return Parallel({name: some[:count] for name, some in self.sentences.items()})


def read_parallel(where: str | Path) -> Parallel:
    """Read parallel sentences.

    Args:
        where: folder of the files, or a glob of some of them, such as ``flores200/*.devtest.xz``.

    Raises:
        DataError: there are fewer than two languages, a file cannot be read, a sentence is empty,
            or the languages do not have the same sentences.
    """
    parts: dict[str, dict[str, Path]] = {}
    for path in _files(str(where)):
        language, _, rest = path.name.partition(".")
        parts.setdefault(language, {})[rest] = path
    if len(parts) < 2:
        raise DataError(
            f"{where} holds files of {len(parts)} languages: it needs a file for each of several, "
            "named by its language, such as en.txt and de.txt"
        )
    sentences = {}
    reference = next(iter(parts))
    ids: list[Id] = []
    for language, files in parts.items():
        if files.keys() != parts[reference].keys():
            raise DataError(
                f"{language} has the files {', '.join(files)}, but {reference} has "
                f"{', '.join(parts[reference])}: name the same for all, or choose some by a glob"
            )
        pairs = [pair for rest in sorted(files) for pair in _read(files[rest], rest)]
        if language == reference:
            ids = [key for key, _ in pairs]
        sentences[language] = _aligned(language, pairs, reference, ids)
    return Parallel(sentences)


def _files(where: str) -> list[Path]:
    path = Path(where).expanduser()
    if path.is_dir():
        found: Iterable[Path] = path.iterdir()
    else:
        found = map(Path, glob.glob(str(path)))
    # Licences and notes lie beside the sentences, and have no suffix.
    return sorted(one for one in found if one.is_file() and one.suffix and one.name[0] != ".")


def _read(path: Path, rest: str) -> list[tuple[Id, bytes]]:
    try:
        with path.open("rb") as file:
            content = examine(file, path.name)
            lines = content.stream.read().removesuffix(b"\n").split(b"\n")
    except DAMAGED as error:
        raise DataError(f"cannot read {path}: {error}; mend or remove the file") from error
    has_ids = content.inner_name.endswith(".tsv")
    pairs = []
    for number, line in enumerate(lines, 1):
        name, tab, sentence = line.partition(b"\t") if has_ids else (b"", b"", line)
        if has_ids and not tab:
            raise DataError(f"line {number} of {path} has no tab: write an id, a tab, a sentence")
        sentence = sentence.rstrip(b"\r")
        if not sentence.strip():
            raise DataError(f"line {number} of {path} has no sentence: remove it in all languages")
        key = name.decode(errors="replace") if has_ids else f"line {number}"
        pairs.append(((rest, key), sentence))
    return pairs


def _aligned(
    language: str, pairs: list[tuple[Id, bytes]], reference: str, ids: list[Id]
) -> list[bytes]:
    """Return the sentences of a language in the order of the reference's ids."""
    by_id = dict(pairs)
    if len(by_id) != len(pairs):
        raise DataError(f"{language} has several sentences of one id: give each its own")
    if missing := [*(set(ids) - by_id.keys()), *(by_id.keys() - set(ids))]:
        raise DataError(
            f"only one of {language} and {reference} has {min(missing)[1]} of {min(missing)[0]}: "
            "give files that are parallel"
        )
    return [by_id[key] for key in ids]
