"""A donor's readings of some text, kept on disk: each document is read by the donor once.

::

    CACHE/cache.json                 donor, text and settings
    CACHE/shard-00000.safetensors    documents, and what the donor predicts at every byte of them

A shard is written whole or not at all, and the same call continues after the last one. Of each
distribution the most probable outcomes are kept, and the sum of the others, spread evenly over them
when it is read.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from bytelm.byteify.donor import Donor
from bytelm.byteify.teacher import NUM_OUTCOMES, Reading, Vocabulary, read_document
from bytelm.checkpoint import save_tensors
from bytelm.errors import DataError
from bytelm.progress import ignore
from bytelm.scoring import group_by_size
from bytelm.storage import atomic_file, locked, read_json, write_json

MANIFEST = "cache.json"
_TENSORS = {
    *("data", "tokens", "num_bytes", "num_tokens", "states", "ends", "outcomes", "probabilities")
}
_SPARE = 0.02
"""Share of the disk that is left free."""


class CachedDocument(NamedTuple):
    """A document of a cache."""

    data: bytes
    tokens: list[int]
    states: Float[Tensor, "steps dim"]
    """fp16; see :class:`bytelm.byteify.teacher.Reading`."""
    next: Float[Tensor, "positions 257"]
    """Distributions of the next byte, in fp32."""
    ends: Float[Tensor, " bytes"]
    """Probability that a token ends with each byte, in fp32."""


def cache_readings(
    donor: Donor,
    vocabulary: Vocabulary,
    documents: Sequence[str],
    folder: Path,
    *,
    ends: Sequence[Sequence[int]] | None = None,
    kept: int = 32,
    shard_bytes: int = 1_000_000,
    report: Callable[[int], None] = ignore,
) -> int:
    """Let a donor read documents, and keep what it predicts; or continue to do so.

    Documents that the donor cannot read (:func:`bytelm.byteify.teacher.read_document`) are left
    out.

    Args:
        donor: the donor.
        vocabulary: its tokens.
        documents: text of the documents.
        folder: folder of the cache, created if it does not exist.
        ends: for each document, after which bytes a token has to end (:func:`.read_document`);
            ``None`` for the donor's own tokens.
        kept: outcomes kept of each distribution.
        shard_bytes: most bytes of text in a shard, unless a document is longer.
        report: called with the number of documents read so far.

    Returns:
        The number of documents that were left out.

    Raises:
        DataError: the folder holds another cache, or the disk has too little room for this one.
    """
    divided = list(zip(documents, ends or [()] * len(documents), strict=True))
    shards = list(group_by_size(divided, lambda one: len(one[0].encode()), shard_bytes))
    text = "\0".join(documents) + ("" if ends is None else str([list(one) for one in ends]))
    manifest = {
        "donor": donor.name,
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        "kept": kept,
        "shards": len(shards),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / MANIFEST).exists() and read_json(folder / MANIFEST, DataError) != manifest:
            raise DataError(f"{folder} holds a cache of another donor or text: choose another one")
        missing = [n for n in range(len(shards)) if not _path(folder, n).exists()]
        _check_room(donor, [one for n in missing for one in shards[n]], folder, kept)
        write_json(folder / MANIFEST, manifest)
        done = len(documents) - sum(len(shards[n]) for n in missing)
        for number in missing:
            readings: list[tuple[bytes, Reading]] = []
            for text, cuts in shards[number]:
                try:
                    reading = read_document(donor, vocabulary, text, cuts)
                    readings.append((text.encode(), reading))
                except DataError:
                    continue
                finally:
                    done += 1
                    report(done)
            with atomic_file(_path(folder, number)) as path:
                save_tensors(path, _packed(readings, kept, donor.stack.dim))
    return len(documents) - sum(
        len(load_file(_path(folder, number))["num_bytes"]) for number in range(len(shards))
    )


def find_shards(donor: Donor, folder: Path) -> list[Path]:
    """Return the shards of a cache.

    Raises:
        DataError: there is none, or it is of another donor or not complete.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(f"there are no readings in {folder}: it has no {MANIFEST}")
    manifest = read_json(folder / MANIFEST, DataError)
    if manifest["donor"] != donor.name:
        raise DataError(f"{folder} holds readings of {manifest['donor']}, not of {donor.name}")
    shards = [_path(folder, number) for number in range(manifest["shards"])]
    missing = [path.name for path in shards if not path.exists()]
    if missing:
        raise DataError(
            f"the readings in {folder} are not complete ({missing[0]} is missing): let the command "
            "that makes them finish"
        )
    return shards


def read_shard(path: Path) -> list[CachedDocument]:
    """Return the documents of a shard.

    Raises:
        DataError: it is damaged.
    """
    try:
        shard = load_file(path)
        missing = _TENSORS - shard.keys()
        if missing:
            raise ValueError(f"it has no {min(missing)}")
    except Exception as error:
        raise DataError(f"{path} is damaged ({error}): remove it and cache it again") from None
    sizes, counts = shard["num_bytes"].tolist(), shard["num_tokens"].tolist()
    parts = zip(
        shard["data"].split(sizes),
        shard["tokens"].split(counts),
        shard["states"].split([count + 1 for count in counts]),
        spread(shard["outcomes"], shard["probabilities"]).split([size + 1 for size in sizes]),
        shard["ends"].float().split(sizes),
        strict=True,
    )
    return [
        CachedDocument(data.numpy().tobytes(), tokens.tolist(), *others)
        for data, tokens, *others in parts
    ]


def spread(outcomes: Tensor, probabilities: Tensor) -> Float[Tensor, "positions 257"]:
    """Return distributions of which only the most probable outcomes are known.

    The outcomes that are not known have equal shares of what the others leave.
    """
    known = probabilities.float()
    others = max(NUM_OUTCOMES - outcomes.shape[1], 1)
    rest = (1 - known.sum(1, keepdim=True)).clamp(min=0) / others
    filled = rest.expand(-1, NUM_OUTCOMES).scatter(1, outcomes.long(), known)
    return filled / filled.sum(1, keepdim=True)


def _path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _packed(readings: list[tuple[bytes, Reading]], kept: int, dim: int) -> dict[str, Tensor]:
    """Return the tensors of a shard."""
    empty = np.zeros((0, NUM_OUTCOMES), np.float32)
    top = _most_probable([empty, *(one.targets.next for _, one in readings)], kept)
    ends = np.concatenate([empty[:, 0], *(one.targets.ends for _, one in readings)])
    data = np.frombuffer(b"".join(text for text, _ in readings), np.uint8).copy()
    tokens = [token for _, one in readings for token in one.tokens]
    return {
        "data": torch.from_numpy(data),
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "num_bytes": torch.tensor([len(text) for text, _ in readings], dtype=torch.int64),
        "num_tokens": torch.tensor([len(one.tokens) for _, one in readings], dtype=torch.int64),
        "states": torch.cat([torch.zeros(0, dim), *(one.states for _, one in readings)]).half(),
        "outcomes": top[0],
        "probabilities": top[1],
        "ends": torch.from_numpy(ends).half(),
    }


def _most_probable(distributions: list[Any], kept: int) -> tuple[Tensor, Tensor]:
    """Return the most probable outcomes of distributions, and their probabilities."""
    top = torch.from_numpy(np.concatenate(distributions)).topk(min(kept, NUM_OUTCOMES), 1)
    return top.indices.to(torch.int16), top.values.half()


def _check_room(
    donor: Donor, documents: list[tuple[str, Sequence[int]]], folder: Path, kept: int
) -> None:
    """Check that the disk has room for the documents that have not been read yet."""
    num_bytes = sum(len(text.encode()) + 1 for text, _ in documents)
    num_tokens = sum(len(donor.encode(text)) + 1 + len(ends) for text, ends in documents)
    needed = num_bytes * (1 + 2 + 4 * kept) + num_tokens * (4 + 2 * donor.stack.dim)
    disk = shutil.disk_usage(folder)
    room = disk.free - _SPARE * disk.total
    if needed > room:
        raise DataError(
            f"the cache needs {needed / 1e9:,.1f} GB, and {folder} has room for "
            f"{max(room, 0) / 1e9:,.1f}: give it less text, keep fewer outcomes (now {kept}), or "
            "choose another disk"
        )
