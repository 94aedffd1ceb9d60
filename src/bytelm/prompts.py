"""Prompts of a file, continued together, and the file of their answers.

::

    with open("prompts.jsonl", "rb") as file:
        prompts = read_prompts(file, "prompts.jsonl", Request(b"", max_bytes=200))
    for answer in answer_prompts(lm, prompts):
        print(to_json(answer.record()))

The answers are a journal: each is on disk before the next, so what was answered when a process
ended is skipped by the next one (:func:`resume`).
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bytelm.codec import to_bytes
from bytelm.data.opening import DAMAGED, examine, suffix_of
from bytelm.data.records import parse_record
from bytelm.errors import BytelmError, ConfigError, DataError
from bytelm.inference import Finish, Request, RequestTooLongError, answer
from bytelm.inference.continuation import check_options
from bytelm.language_model import DEFAULT_SLOTS, LanguageModel
from bytelm.lm.kinds import CANNOT_PREDICT
from bytelm.progress import ignore
from bytelm.storage import read_lines, write_text

MAX_NAMED = 8
"""Most bad lines that an error names."""
MAX_DOCUMENT_BYTES = 8192
"""Longest document, prompt and continuation together, unless another limit is given."""
_BEGINNING = '{"index": '
"""How the lines of answers begin."""
_INTEGERS = ("max_bytes", "top_k", "seed")
_NUMBERS = ("temperature", "top_p", "min_p")


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file."""

    index: int
    """Its number among the prompts of the file, from 0."""
    id: str | int | float | None
    """Name that its answer has too."""
    request: Request

    def key(self, model: str) -> str:
        """Return a hash of all that decides the answer: the prompt, its options, and the model."""
        request = self.request
        options = (request.max_bytes, *astuple(request.sampling), list(request.stop))
        parts = repr((model, request.prompt, options))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


class Answer(NamedTuple):
    """The continuation of a prompt."""

    prompt: Prompt
    data: bytes
    finish: Finish | None
    """Reason why it ended; ``None`` if there is an error."""
    error: BytelmError | None = None
    """Why there is no continuation."""

    def record(self, model: str = "") -> dict[str, Any]:
        """Return the answer as JSON.

        ``text`` is UTF-8 with invalid bytes replaced; if it is not the exact text, ``bytes`` has
        that in base64.
        """
        found: dict[str, Any] = {"index": self.prompt.index}
        if self.prompt.id is not None:
            found["id"] = self.prompt.id
        if self.error is not None:
            return {**found, "error": str(self.error)}
        found["text"] = self.data.decode("utf-8", "replace")
        if found["text"].encode() != self.data:
            found["bytes"] = base64.b64encode(self.data).decode()
        return {**found, "finish": self.finish, "key": self.prompt.key(model)}


def read_prompts(file: io.BufferedIOBase, name: str, defaults: Request) -> list[Prompt]:
    """Return the prompts of a file.

    A file whose first line begins with ``{``, and one that is named ``.jsonl``, has an object on
    each line: ``prompt`` (or ``text``), and any of ``id``, ``max_bytes``, ``temperature``,
    ``top_k``, ``top_p``, ``min_p``, ``seed`` and ``stop``; null is as good as none, and other
    fields are ignored. In other files, and those named ``.txt``, every line is a prompt. Blank
    lines are skipped.

    Args:
        file: the file, which may be compressed.
        name: its name.
        defaults: options of prompts without their own. The seed of a prompt is that of the
            defaults plus its index.

    Raises:
        DataError: the file cannot be read, a line is no prompt, or there is none.
    """
    try:
        content = examine(file, name)
        if content.refusal:
            raise DataError(f"{name}: {content.refusal}")
        lines = content.stream.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except DAMAGED as error:
        raise DataError(f"cannot read {name}: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{name} holds no prompts: write one on each line")
    suffix = suffix_of(content.inner_name)
    is_json = suffix == ".jsonl" or (suffix != ".txt" and numbered[0][1].lstrip()[:1] == b"{")
    prompts, wrong = [], {}
    for index, (number, line) in enumerate(numbered):
        try:
            record = parse_record(line) if is_json else {"prompt": line.removesuffix(b"\r")}
            prompts.append(_parse(record, index, defaults))
        except (ValueError, OverflowError, ConfigError) as error:
            wrong[number] = str(error)
    if wrong:
        raise DataError(_describe(name, wrong))
    return prompts


def _describe(name: str, wrong: dict[int, str]) -> str:
    (number, error), *others = wrong.items()
    text = f"{name} line {number}: {error}"
    if others:
        named = ", ".join(str(other) for other, _ in others[:MAX_NAMED])
        more = ", ..." if len(others) > MAX_NAMED else ""
        text += f"; wrong too: line {named}{more}"
    return f"{text}. Nothing was generated"


def _parse(record: dict[str, Any], index: int, defaults: Request) -> Prompt:
    given = {name: value for name, value in record.items() if value is not None}
    text = given.get("prompt", given.get("text"))
    if not isinstance(text, str | bytes):
        raise ValueError("the object needs a text in the field 'prompt' (or 'text')")
    values: dict[str, Any] = {}
    for name in set(given) & {*_INTEGERS, *_NUMBERS}:
        wanted = int if name in _INTEGERS else int | float
        if not isinstance(given[name], wanted) or isinstance(given[name], bool):
            what = "an integer" if name in _INTEGERS else "a number"
            raise ValueError(f"{name} must be {what}, not {given[name]!r:.60}")
        values[name] = given[name] if name in _INTEGERS else float(given[name])
    stop = given.get("stop")
    texts = [stop] if isinstance(stop, str) else stop
    if texts is not None and not (
        isinstance(texts, list) and all(isinstance(one, str) for one in texts)
    ):
        raise ValueError(f"stop must be a text or a list of texts, not {stop!r:.60}")
    name = given.get("id")
    if not isinstance(name, str | int | float | None):
        raise ValueError(f"id must be a text or a number, not {name!r:.60}")
    max_bytes = values.pop("max_bytes", defaults.max_bytes)
    sampling = replace(defaults.sampling, **{"seed": defaults.sampling.seed + index, **values})
    ends = defaults.stop if texts is None else tuple(map(to_bytes, texts))
    check_options(max_bytes, ends)
    return Prompt(index, name, Request(to_bytes(text), max_bytes, sampling, ends))


def answer_prompts(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    num_slots: int = DEFAULT_SLOTS,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    report: Callable[[int], None] = ignore,
) -> Iterator[Answer]:
    """Continue prompts at once, yielding answers as they end.

    Args:
        lm: language model.
        prompts: the prompts.
        num_slots: largest number of prompts that are decoded at once.
        max_document_bytes: longest document, prompt and continuation together. A prompt whose
            document could become longer is answered with an error.
        report: called with the number of bytes generated so far.

    Raises:
        ConfigError: ``num_slots`` is below 1, or the model is an n-gram scorer.
    """
    if not lm.module.can_predict:
        raise ConfigError(CANNOT_PREDICT)
    fitting: list[Prompt] = []
    for prompt in prompts:
        length, more = len(prompt.request.prompt), prompt.request.max_bytes
        if length + more <= max_document_bytes:
            fitting.append(prompt)
            continue
        error = RequestTooLongError(
            f"a prompt of {length:,} bytes and {more:,} more are over the limit of "
            f"{max_document_bytes:,}: shorten the prompt, ask for fewer bytes, or raise "
            "--max-document-bytes"
        )
        yield Answer(prompt, b"", None, error)
    data = [b""] * len(fitting)
    num_bytes = 0
    requests = [prompt.request for prompt in fitting]
    for number, part, error in answer(lm.module, requests, num_slots=num_slots):
        if part is None:
            # Anything but an error of the user concerns the other prompts too.
            if not isinstance(error, BytelmError):
                raise error or AssertionError("an event without a part has an error")
            yield Answer(fitting[number], b"", None, error)
            continue
        data[number] += part.data
        num_bytes += len(part.data)
        report(num_bytes)
        if part.finish is not None:
            yield Answer(fitting[number], data[number], part.finish)
            data[number] = b""


def resume(path: Path, prompts: Sequence[Prompt], model: str) -> list[Prompt]:
    """Return the prompts that are not answered in a file, which is created if it does not exist.

    Errors, which are tried again, and an incomplete last line are removed from the file.

    Args:
        path: the file of answers.
        prompts: all prompts.
        model: fingerprint of the model.

    Raises:
        ConfigError: the file has answers to other prompts, or by another model or options.
        DataError: the file holds anything else.
        OSError: the file cannot be read or written.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is not a file: leave out --out for standard output")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    keys = {prompt.index: prompt.key(model) for prompt in prompts}
    kept: dict[int, str] = {}
    for number, line in enumerate(_complete_lines(path), 1):
        try:
            record = json.loads(line)
            index = record["index"]
            if "error" in record:
                continue
            is_ours = keys.get(index) == record["key"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _foreign(path, number) from None
        if not is_ours:
            raise ConfigError(
                f"{path} line {number} is an answer to another prompt, with other options or by "
                "another model: choose another --out, or remove the file"
            )
        kept[index] = line
    text = "".join(f"{line}\n" for line in kept.values())
    if len(text.encode()) != path.stat().st_size:
        write_text(path, text)
    return [prompt for prompt in prompts if prompt.index not in kept]


def _complete_lines(path: Path) -> list[str]:
    """Return the lines of a file of answers; check that what is left is the beginning of one."""
    rest = path.read_bytes().rpartition(b"\n")[2].decode("utf-8", "replace")
    try:
        lines = read_lines(path)
    except UnicodeDecodeError:
        raise _foreign(path, 1) from None
    if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
        raise _foreign(path, len(lines) + 1)
    return lines


def _foreign(path: Path, number: int) -> DataError:
    return DataError(
        f"{path} line {number} is not an answer that `bytelm generate` wrote: choose another --out"
    )
