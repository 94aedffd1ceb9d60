"""Generation from a file of prompts: what is shown, and where answers go."""

import io
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from bytelm.cli.app import resumable, status
from bytelm.errors import DataError
from bytelm.storage import append_line, to_json

if TYPE_CHECKING:
    from bytelm.inference import Request
    from bytelm.language_model import LanguageModel
    from bytelm.prompts import Prompt

SHOWN_SECONDS = 0.2
"""Least time between two updates of the progress bar."""


def continue_prompts(
    checkpoint: Path,
    source: Path,
    defaults: "Request",
    load: "Callable[[], LanguageModel]",
    *,
    out: Path | None,
    num_slots: int | None,
    max_document_bytes: int | None,
) -> None:
    """Continue the prompts of a file, and write the answers as JSON Lines.

    Args:
        checkpoint: the checkpoint, whose fingerprint the answers depend on.
        source: file of prompts; ``-`` for standard input.
        defaults: options of prompts without their own.
        load: returns the model; called after the prompts have been read.
        out: file of answers, in which those that are there are kept; ``None`` for standard output.
        num_slots: largest number of prompts that are decoded at once.
        max_document_bytes: longest document.

    Raises:
        typer.Exit: with status 1, if some prompts had errors.
    """
    from bytelm.checkpoint import fingerprint
    from bytelm.layout import find_checkpoint
    from bytelm.prompts import resume

    prompts = _read(source, defaults)
    model = fingerprint(find_checkpoint(checkpoint))
    left = prompts
    if out is not None:
        left = resume(out, prompts, model)
        if len(left) < len(prompts):
            done = len(prompts) - len(left)
            _say(f"{done:,} of {len(prompts):,} prompts are answered in {out} already")
    with resumable() if out is not None else nullcontext():
        num_wrong = _run(load(), left, model, out, num_slots, max_document_bytes) if left else 0
    if num_wrong:
        where = f" in {out}" if out is not None else ""
        _say(f"{num_wrong:,} of {len(prompts):,} prompts have no answer, but an error{where}")
        raise typer.Exit(1)


def _read(source: Path, defaults: "Request") -> "list[Prompt]":
    from bytelm.prompts import read_prompts

    if str(source) == "-":
        return read_prompts(cast(io.BufferedIOBase, sys.stdin.buffer), "standard input", defaults)
    try:
        with source.open("rb") as file:
            return read_prompts(file, str(source), defaults)
    except OSError as error:
        raise DataError(
            f"cannot read {source}: {error.strerror or error}; --prompts takes a file"
        ) from None


def _run(
    lm: "LanguageModel",
    prompts: "Sequence[Prompt]",
    model: str,
    out: Path | None,
    num_slots: int | None,
    max_document_bytes: int | None,
) -> int:
    """Continue prompts; return how many have an error."""
    from bytelm.display import COMPILING, ConsoleProgress, explaining
    from bytelm.language_model import DEFAULT_SLOTS
    from bytelm.progress import Progress
    from bytelm.prompts import MAX_DOCUMENT_BYTES, answer_prompts

    # Rich sends what is printed below a bar to its console, here that of errors.
    stream = sys.stdout
    is_shown = out is None and stream.isatty()
    began = shown = time.monotonic()
    num_done = num_wrong = num_bytes = 0

    def report(total: int) -> None:
        nonlocal shown, num_bytes
        started()
        num_bytes, now = total, time.monotonic()
        if now - shown > SHOWN_SECONDS:
            shown = now
            show(num_done, f"{total / (now - began):,.0f} bytes/s")

    progress = Progress() if is_shown else ConsoleProgress(status)
    with (
        progress.counting("generating", len(prompts)) as show,
        explaining(status, COMPILING) as started,
    ):
        for answer in answer_prompts(
            lm,
            prompts,
            num_slots=num_slots or DEFAULT_SLOTS,
            max_document_bytes=max_document_bytes or MAX_DOCUMENT_BYTES,
            report=report,
        ):
            line = to_json(answer.record(model))
            if out is not None:
                append_line(out, line)
            else:
                stream.write(f"{line}\n")
                stream.flush()
            num_done += 1
            num_wrong += answer.error is not None
        rate = num_bytes / max(time.monotonic() - began, 1e-9)
        show(num_done, f"{rate:,.0f} bytes/s")
    return num_wrong


def _say(text: str) -> None:
    status.print(text, highlight=False, markup=False, soft_wrap=True)
