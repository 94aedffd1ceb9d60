"""Exact counts of FLOPs, parameters and memory, by part of a model.

A multiply-add is 2 FLOPs; only matrix products and attention are counted (embeddings are look-ups;
norms, rotations and softmax are below 1%). Attention counts the pairs of a query and a key that the
mask admits: with a window ``w``, position ``i`` of a document sees ``min(i + 1, w)`` keys. A row is
taken to be one document, unless the documents in it are given. Training costs three times the
forward pass.

The scorer of a BLT is a separate model, and is not included in its counts.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytelm.accounting.parts import Axis, Matrix, Part, SelfAttention, model_parts
from bytelm.config import Node

NONE = np.empty(0, np.int64)
TRAINING_FACTOR = 3
"""A backward pass costs two forward passes (paper, section 4.5)."""
TRAINING_BYTES = 16
"""Bytes of memory per parameter in training: weight, gradient and AdamW's two moments, in fp32."""


class Flops(NamedTuple):
    """Forward FLOPs of one part over a row."""

    linear: int
    """Matrix products with weights."""
    attention: int
    """Products of queries with keys and of weights with values."""

    @property
    def total(self) -> int:
        """Sum of both."""
        return self.linear + self.attention


class DecodeCost(NamedTuple):
    """Cost of generating one byte in one part, as the mean over the bytes of a patch."""

    flops: float
    weights_read: float
    """Bytes of memory read: all matrices that are used, and the embeddings that are looked up."""
    cache_read: float
    """Bytes of memory read: keys and values of the visible positions."""


def forward_flops(config: Node, num_bytes: int, num_patches: int = 0) -> dict[str, Flops]:
    """Return the forward FLOPs of one row by part, in training or prefill.

    Args:
        config: configuration of the model.
        num_bytes: bytes in the row, with padding if it is computed.
        num_patches: patches in the row, likewise; not used by a plain transformer.
    """
    lengths = {"byte": num_bytes, "patch": num_patches}

    def pairs(axis: Axis, window: int | None) -> int:
        return _visible_pairs(np.array([lengths[axis]]), window)

    return {
        name: _forward(part, num_bytes, num_patches, pairs)
        for name, part in model_parts(config).items()
    }


def packed_flops(
    config: Node,
    stretches: NDArray[np.integer],
    patch_stretches: NDArray[np.integer] = NONE,
) -> dict[str, Flops]:
    """Return the forward FLOPs of packed rows by part, with attention within documents.

    Args:
        config: configuration of the model.
        stretches: lengths in bytes (or tokens) of the stretches of one document in all rows.
            Padding is computed, and counted like a document.
        patch_stretches: the same in patches; not used by a plain transformer.
    """
    lengths = {"byte": stretches, "patch": patch_stretches}
    num_bytes, num_patches = int(stretches.sum()), int(patch_stretches.sum())

    def pairs(axis: Axis, window: int | None) -> int:
        return _visible_pairs(lengths[axis], window)

    return {
        name: _forward(part, num_bytes, num_patches, pairs)
        for name, part in model_parts(config).items()
    }


def training_flops(config: Node, num_bytes: int, num_patches: int = 0) -> int:
    """Return the FLOPs of a forward and a backward pass over one row."""
    parts = forward_flops(config, num_bytes, num_patches)
    return TRAINING_FACTOR * sum(part.total for part in parts.values())


def decode_costs(
    config: Node,
    num_bytes: int,
    num_patches: int = 0,
    *,
    element_size: int,
) -> dict[str, DecodeCost]:
    """Return the cost by part of decoding the last of ``num_bytes``, with a batch size of 1.

    Parts that run once per patch count ``num_patches / num_bytes`` times for each byte. Activations
    and writes to caches are not counted.

    Args:
        config: configuration of the model.
        num_bytes: position of the byte, counted from 1; it sees itself and the bytes before it.
        num_patches: patches among them; not used by a plain transformer.
        element_size: bytes of memory per weight and per element of a cache, such as 2 for bfloat16.
    """
    return {
        name: _decode(part, num_bytes, num_patches, element_size)
        for name, part in model_parts(config).items()
    }


def cache_sizes(
    config: Node,
    num_bytes: int,
    num_patches: int = 0,
    *,
    element_size: int,
) -> dict[str, int]:
    """Return the bytes of memory by part that a session keeps after ``num_bytes``.

    These are the keys and values of all positions that later ones can see, and of the last latent;
    memory that is reserved for growth is not counted. Arguments are those of :func:`decode_costs`.
    """
    sizes = {}
    for name, part in model_parts(config).items():
        attention = part.self_attention
        kept = _cached(attention, num_bytes, num_patches) if attention else 0
        sizes[name] = element_size * (kept + part.latent)
    return sizes


def parameters_by_part(config: Node) -> dict[str, int]:
    """Return the number of parameters by part, without building the model."""
    return {name: part.parameters for name, part in model_parts(config).items()}


def parameter_counts(config: Node) -> tuple[int, int]:
    """Return the numbers of parameters outside and inside embeddings, which cost no FLOPs."""
    counts = parameters_by_part(config)
    embeddings = sum(count for name, count in counts.items() if "embedding" in name)
    return sum(counts.values()) - embeddings, embeddings


def _forward(
    part: Part, num_bytes: int, num_patches: int, pairs: Callable[[Axis, int | None], int]
) -> Flops:
    lengths = {"byte": num_bytes, "patch": num_patches}
    linear = sum(2 * m.parameters * m.vectors * lengths[m.per] for m in part.matrices)
    attention = 4 * num_bytes * part.cross_width
    if stack := part.self_attention:
        seen = pairs(stack.per, stack.window)
        attention += 4 * stack.num_layers * stack.query_width * seen
    return Flops(linear, attention)


def _decode(part: Part, num_bytes: int, num_patches: int, element_size: int) -> DecodeCost:
    per_byte = {"byte": 1.0, "patch": num_patches / num_bytes}

    def elements_read(matrix: Matrix) -> float:
        return matrix.parameters * per_byte[matrix.read_per]

    flops = sum(2 * m.parameters * m.vectors * per_byte[m.per] for m in part.matrices)
    flops += 4 * part.cross_width
    weights = sum(elements_read(m) for m in part.matrices) + part.looked_up
    cache = float(part.latent)
    if stack := part.self_attention:
        seen = _cached(stack, num_bytes, num_patches) * per_byte[stack.per]
        # Each element of a key or value costs a multiply-add for every query head that shares it.
        flops += 2 * seen * stack.query_width / stack.key_width
        cache += seen
    return DecodeCost(flops, element_size * weights, element_size * cache)


def _cached(stack: SelfAttention, num_bytes: int, num_patches: int) -> int:
    """Return the number of elements of keys and values visible to the last position."""
    length = {"byte": num_bytes, "patch": num_patches}[stack.per]
    return 2 * stack.num_layers * stack.key_width * min(length, stack.window or length)


def _visible_pairs(lengths: NDArray[np.integer], window: int | None) -> int:
    """Return the number of query-key pairs of documents, ``sum_i min(i + 1, window)`` of each."""
    ramps = lengths if window is None else np.minimum(lengths, window)
    return int((ramps * (ramps + 1) // 2 + (lengths - ramps) * ramps).sum())


def run_lengths(rows: NDArray[np.generic]) -> NDArray[np.integer]:
    """Return the lengths of the runs of equal numbers in each row, of all rows."""
    begins = np.ones(rows.shape, np.bool_)
    begins[:, 1:] = rows[:, 1:] != rows[:, :-1]
    return np.diff(np.flatnonzero(begins), append=rows.size)
