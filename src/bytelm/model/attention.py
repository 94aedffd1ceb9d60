"""Causal self-attention within a window and within documents, in time linear in the length.

What may be attended to is described, never materialised: query ``i`` sees key ``j`` if ``j <= i``,
``i - j < window`` and both lie in the same document. :func:`attention` evaluates the description
in blocks of queries, so a windowed layer costs O(length x window) and no tensor of size
length x length exists; :func:`reference_attention` is its dense twin. :class:`AttentionCache` is
the same attention for a document that arrives piece by piece.

A stack of layers is run in a :class:`Context`, which supplies rotary factors and, for each layer,
an :data:`Attend`. :class:`StackSpec` makes contexts over packed rows and caches alike, so layers
neither know what their mask is nor whether they are cached.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor
from torch.nn import functional

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values ``[batch, length, heads, head_dim]`` -> outputs of the same shape."""

QUERY_BLOCK = 128
"""Queries per block of windowed attention: the fastest of 64..512 on CPUs for windows >= 128."""
FULL_QUERY_BLOCK = 512
"""Queries per block where there is no window; each block sees only the keys before its end."""


@runtime_checkable
class Context(Protocol):
    """What a stack of layers runs in."""

    @property
    def factors(self) -> Complex[Tensor, "batch length 1 half"]:
        """Rotary factors of the positions at hand."""
        ...

    def attend(self, layer: int) -> Attend:
        """The attention of one layer."""
        ...


class StackSpec(NamedTuple):
    """What attention needs to know of a stack of layers."""

    num_layers: int
    head_dim: int
    theta: float
    """Base of the rotary frequencies."""
    window: int | None
    """Positions visible to a position, itself included; ``None`` for all before it."""

    def over_rows(
        self, documents: Int[Tensor, "batch length"], positions: Int[Tensor, "batch length"]
    ) -> "RowsContext":
        """Context for whole packed rows; ``positions`` count within documents."""
        factors = rotation(positions, self.head_dim, self.theta)
        return RowsContext(factors, attention_mask(documents, self.window))

    def cache(self) -> "StackCache":
        """Empty caches for one growing document."""
        return StackCache(self)


class RowsContext(NamedTuple):
    """Context over packed rows: the same mask in every layer."""

    factors: Complex[Tensor, "batch length 1 half"]
    mask: "AttentionMask"

    def attend(self, layer: int) -> Attend:
        """The attention of any layer."""
        return lambda queries, keys, values: attention(queries, keys, values, self.mask)


class StackCache:
    """The caches of all layers of a stack, for one growing document.

    :meth:`extend` begins the next positions and returns the context to run every layer in, once.
    """

    def __init__(self, spec: StackSpec) -> None:
        self._spec = spec
        self._layers = [AttentionCache(spec.window) for _ in range(spec.num_layers)]
        self.position = 0
        """Position of the next element."""

    def clear(self) -> None:
        """Start a new document."""
        self.position = 0
        for layer in self._layers:
            layer.length = 0

    def extend(self, length: int, device: torch.device) -> "CachedContext":
        """Context for the next ``length`` positions."""
        positions = torch.arange(self.position, self.position + length, device=device)
        self.position += length
        factors = rotation(positions[None], self._spec.head_dim, self._spec.theta)
        return CachedContext(factors, self._layers)


class CachedContext(NamedTuple):
    """Context for the next positions of a cached stack."""

    factors: Complex[Tensor, "batch length 1 half"]
    layers: "list[AttentionCache]"

    def attend(self, layer: int) -> Attend:
        """Attention over the layer's cache and the new positions, which are added to it."""
        return self.layers[layer].attend


def rotation(
    positions: Int[Tensor, "batch length"], head_dim: int, theta: float
) -> Complex[Tensor, "batch length 1 half"]:
    """Rotary position factors ``exp(i * position * theta ** (-2 j / head_dim))``.

    Angles are computed in fp64, so that positions in the millions keep full precision.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
    angles = positions[..., None].double() * theta ** (-exponents / head_dim)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[:, :, None]


class AttentionMask(NamedTuple):
    """Description of a causal mask, with what :func:`attention` needs of it precomputed."""

    window: int | None
    """Keys visible to a query, itself included; ``None`` for all before it."""
    blocks: Bool[Tensor, "batch num_blocks block span"] | tuple[Bool[Tensor, "batch _ _"], ...]
    """The mask of each block of queries over its span of keys: with a window all of one shape in
    one tensor, without one a tensor for each."""


def attention_mask(documents: Int[Tensor, "batch length"], window: int | None) -> AttentionMask:
    """Describe causal attention over packed rows; computed once, shared by all layers."""
    if window is None or window >= documents.shape[1]:
        return AttentionMask(None, tuple(_causal_blocks(documents, documents.shape[1])))
    return AttentionMask(window, _window_blocks(documents, window))


def attention(
    queries: Float[Tensor, "batch length heads head_dim"],
    keys: Float[Tensor, "batch length heads head_dim"],
    values: Float[Tensor, "batch length heads head_dim"],
    mask: AttentionMask,
) -> Float[Tensor, "batch length heads head_dim"]:
    """Scaled dot-product attention under ``mask``, scale ``1 / sqrt(head_dim)``."""
    if isinstance(mask.blocks, Tensor):
        assert mask.window is not None
        return _windowed(queries, keys, values, mask.blocks, mask.window)
    return _full(queries, keys, values, mask.blocks)


def reference_attention(
    queries: Float[Tensor, "batch length heads head_dim"],
    keys: Float[Tensor, "batch length heads head_dim"],
    values: Float[Tensor, "batch length heads head_dim"],
    documents: Int[Tensor, "batch length"],
    window: int | None,
) -> Float[Tensor, "batch length heads head_dim"]:
    """Twin of :func:`attention` that writes the mask and the softmax out."""
    length = queries.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = (distance >= 0) & (distance < (window or length))
    allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * queries.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (queries, keys, values))
    return functional.scaled_dot_product_attention(*heads_first, attn_mask=allowed).transpose(1, 2)


def _causal_blocks(
    documents: Int[Tensor, "batch length"], num_queries: int
) -> Iterator[Bool[Tensor, "batch block span"]]:
    """Which keys up to its own end each block of the last ``num_queries`` positions sees."""
    length = documents.shape[1]
    index = torch.arange(length, device=documents.device)
    for begin in range(length - num_queries, length, FULL_QUERY_BLOCK):
        end = min(begin + FULL_QUERY_BLOCK, length)
        is_same = documents[:, begin:end, None] == documents[:, None, :end]
        yield is_same & (index[begin:end, None] >= index[:end])


def _full(queries: Tensor, keys: Tensor, values: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    outputs = []
    for block, allowed in zip(queries.split(FULL_QUERY_BLOCK, 1), blocks, strict=False):
        end = allowed.shape[-1]
        outputs.append(_sdpa(block, keys[:, :end], values[:, :end], allowed[:, None]))
    return torch.cat(outputs, 1) if outputs else queries


def _window_blocks(
    documents: Int[Tensor, "batch length"], window: int
) -> Bool[Tensor, "batch num_blocks block span"]:
    """Which of the ``window + block - 1`` keys ending with its own each query of a block sees."""
    block = min(QUERY_BLOCK, window)
    padding = -documents.shape[1] % block
    # Positions added at the end are a document of their own; those before the start match none.
    padded = functional.pad(documents, (0, padding), value=-2)
    keys = functional.pad(padded, (window - 1, 0), value=-3).unfold(1, window - 1 + block, block)
    queries = padded.unflatten(1, (-1, block))
    device = documents.device
    distance = torch.arange(block, device=device)[:, None] + window - 1
    distance = distance - torch.arange(window - 1 + block, device=device)
    in_window = (distance >= 0) & (distance < window)
    return in_window & (queries[..., None] == keys[..., None, :])


def _windowed(queries: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, window: int) -> Tensor:
    batch, length = queries.shape[:2]
    num_blocks, block, span = blocks.shape[1:]
    padding = num_blocks * block - length

    def spans(x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 0, 0, 0, window - 1, padding))
        return x.unfold(1, span, block).movedim(-1, 2).flatten(0, 1)

    queries = functional.pad(queries, (0, 0, 0, 0, 0, padding))
    queries = queries.unflatten(1, (num_blocks, block)).flatten(0, 1)
    allowed = blocks.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    out = _sdpa(queries, spans(keys), spans(values), allowed)
    return out.unflatten(0, (batch, num_blocks)).flatten(1, 2)[:, :length]


class AttentionCache:
    """Keys and values of one layer for one growing document.

    With a window it is a ring buffer of ``window`` entries; without, a buffer that doubles.
    :meth:`attend` is an :data:`Attend` for the document's next positions, equal to the rows of
    :func:`attention` over the whole document.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.length = 0
        """Positions seen; setting it to 0 starts a new document."""
        self._keys = torch.empty(0)
        self._values = torch.empty(0)

    def attend(
        self,
        queries: Float[Tensor, "1 length heads head_dim"],
        keys: Float[Tensor, "1 length heads head_dim"],
        values: Float[Tensor, "1 length heads head_dim"],
    ) -> Float[Tensor, "1 length heads head_dim"]:
        """Attention of the next ``length`` positions; their keys and values are kept."""
        if queries.shape[1] == 1:
            self._store(keys, values)
            num_valid = self.length if self.window is None else min(self.length, self.window)
            return _sdpa(queries, self._keys[:, :num_valid], self._values[:, :num_valid], None)
        num_past = self.length if self.window is None else min(self.length, self.window - 1)
        past = torch.arange(self.length - num_past, self.length, device=keys.device)
        self._reserve(keys)
        all_keys = torch.cat((self._keys[:, self._slots(past)], keys), 1)
        all_values = torch.cat((self._values[:, self._slots(past)], values), 1)
        self._store(keys, values)
        index = torch.arange(all_keys.shape[1], device=keys.device)
        document = torch.zeros_like(index)[None]
        if self.window is None:
            blocks = _causal_blocks(document, queries.shape[1])
            return _full(queries, all_keys, all_values, blocks)
        # Queries for the past positions are computed and dropped: at most a window's worth.
        padded = functional.pad(queries, (0, 0, 0, 0, num_past, 0))
        mask = attention_mask(document, self.window)
        return attention(padded, all_keys, all_values, mask)[:, num_past:]

    def _slots(self, positions: Int[Tensor, " length"]) -> Int[Tensor, " length"]:
        return positions if self.window is None else positions % self.window

    def _store(self, keys: Tensor, values: Tensor) -> None:
        if self.window is not None and keys.shape[1] > self.window:
            self.length += keys.shape[1] - self.window
            keys, values = keys[:, -self.window :], values[:, -self.window :]
        self._reserve(keys)
        new = torch.arange(self.length, self.length + keys.shape[1], device=keys.device)
        self._keys[:, self._slots(new)] = keys
        self._values[:, self._slots(new)] = values
        self.length += keys.shape[1]

    def _reserve(self, like: Tensor) -> None:
        """Make room for ``like`` more positions."""
        capacity = self._keys.shape[1] if self._keys.dim() == 4 else 0
        needed = self.window or self.length + like.shape[1]
        if capacity and capacity >= needed:
            return
        grown = self.window or max(needed, 2 * capacity, 64)
        shape = (1, grown, *like.shape[2:])
        keys, values = like.new_empty(shape), like.new_empty(shape)
        if capacity:
            keys[:, : self.length] = self._keys[:, : self.length]
            values[:, : self.length] = self._values[:, : self.length]
        self._keys, self._values = keys, values
