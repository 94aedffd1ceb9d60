"""Score whole documents of any lengths."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.errors import NumericalError
from bytelm.patching import Scorer
from bytelm.progress import ignore

CHUNK = 8192
"""Bytes scored at once: a part of a long document, or several short ones in a row."""
ItemT = TypeVar("ItemT")


def check_entropies(entropies: Float[Tensor, " bytes"], name: str, first: int = 0) -> None:
    """Check that all entropies of a document, or of a part of one, are finite.

    Args:
        entropies: the entropies.
        name: name of the document, for the message.
        first: index of the byte that the first of them belongs to.

    Raises:
        NumericalError: naming the first byte whose entropy is not finite.
    """
    is_finite = entropies.isfinite()
    if not is_finite.all():
        index = int((~is_finite).nonzero()[0])
        raise NumericalError(
            f"the scorer's entropy of byte {first + index:,} of {name} is "
            f"{float(entropies[index])}: the scorer is damaged or overflows; use another "
            "checkpoint, or a higher precision"
        )


@torch.inference_mode()
def score_document(
    scorer: Scorer, ids: Int[Tensor, " bytes"], chunk: int = CHUNK, name: str = "the document"
) -> Iterator[Float[Tensor, " bytes"]]:
    """Yield the entropies of one document of any length, ``chunk`` bytes at a time.

    Raises:
        NumericalError: an entropy is not finite.
    """
    state = scorer.new_state()
    for index, part in enumerate(ids.split(chunk)):
        is_single = index > 0 and len(part) == 1  # decoding is faster than a prompt of one
        entropies = state.decode(part) if is_single else state.prefill(0, part)
        check_entropies(entropies, name, index * chunk)
        yield entropies


@torch.inference_mode()
def score_documents(
    scorer: Scorer,
    documents: Sequence[Int[Tensor, " _"]],
    row_bytes: int = CHUNK,
    name: Callable[[int], str] = lambda index: f"document {index + 1}",
    report: Callable[[int], None] = ignore,
) -> list[Float[Tensor, " _"]]:
    """Return the entropies of many documents: short ones share rows, long ones are streamed.

    Args:
        scorer: the scorer.
        documents: ids of each document, which begin with BOS.
        row_bytes: bytes scored at once.
        name: returns the name of a document, by its index, for errors.
        report: called with the number of ids scored so far.

    Raises:
        NumericalError: an entropy is not finite.
    """
    done = 0
    results: dict[int, Tensor] = {}
    short = [i for i, ids in enumerate(documents) if len(ids) <= row_bytes]
    for group in group_by_size(short, lambda i: len(documents[i]), row_bytes):
        ids = torch.cat([documents[i] for i in group])
        lengths = [len(documents[i]) for i in group]
        numbers = torch.arange(len(group)).repeat_interleave(torch.tensor(lengths))
        entropies = scorer.entropies(ids[None], numbers[None].to(ids.device))[0]
        results.update(zip(group, entropies.split(lengths), strict=True))
        if not entropies.isfinite().all():
            for index in group:
                check_entropies(results[index], name(index))
        done += len(ids)
        report(done)
    for index, ids in enumerate(documents):
        if index not in results:
            parts = []
            for part in score_document(scorer, ids, name=name(index)):
                parts.append(part)
                done += len(part)
                report(done)
            results[index] = torch.cat(parts)
    return [results[i] for i in range(len(documents))]


def group_by_size(
    items: Iterable[ItemT], size: Callable[[ItemT], int], max_size: int
) -> Iterator[list[ItemT]]:
    """Yield groups of consecutive items of a limited total size; a larger item is a group."""
    group: list[ItemT] = []
    total = 0
    for item in items:
        if group and total + size(item) > max_size:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group
