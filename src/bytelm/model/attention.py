"""Self-attention of stacks of layers: over packed rows, and over a document that grows.

A stack of layers is run in a :class:`Context`, which supplies rotary factors and, for each layer,
an :data:`Attend`. :class:`StackSpec` makes contexts over packed rows and caches alike, so layers
neither know what their mask is nor whether they are cached. The attention itself is
:mod:`bytelm.kernels.self_attention`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn import functional

from bytelm import kernels

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values ``[batch, length, heads, head_dim]`` -> outputs of the same shape."""

QUERY_BLOCK = 512
"""New positions attended to at once by a cache without a window that holds older ones."""
TABLE = 1024
"""Positions whose rotary factors a cache computes at once."""


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
        return RowsContext(factors, kernels.attention_mask(documents, self.window))

    def cache(self) -> "StackCache":
        """Empty caches for one growing document."""
        return StackCache(self)


class RowsContext(NamedTuple):
    """Context over packed rows: the same mask in every layer."""

    factors: Complex[Tensor, "batch length 1 half"]
    mask: kernels.AttentionMask

    def attend(self, layer: int) -> Attend:
        """The attention of any layer."""
        return lambda queries, keys, values: kernels.attention(queries, keys, values, self.mask)


class StackCache:
    """The caches of all layers of a stack, for one growing document.

    :meth:`extend` begins the next positions and returns the context to run every layer in, once.
    """

    def __init__(self, spec: StackSpec) -> None:
        self.spec = spec
        self._layers = [AttentionCache(spec.window) for _ in range(spec.num_layers)]
        self._table: Complex[Tensor, "1 table 1 half"] | None = None
        self._table_begin = 0
        self.position = 0
        """Position of the next element."""

    def clear(self) -> None:
        """Start a new document."""
        self.position = 0
        for layer in self._layers:
            layer.length = 0

    def step(
        self, device: torch.device
    ) -> tuple[Complex[Tensor, "1 half"], "list[AttentionCache]"]:
        """Rotary factors of the next position, and the cache of each layer to append it to."""
        factors = self._factors(self.position, 1, device)
        self.position += 1
        return factors[0, 0], self._layers

    def reserve(self) -> int:
        """Make room in every layer for one more position; the positions there is room for.

        No layer is empty.
        """
        return min(layer.reserve() for layer in self._layers)

    def at(self, position: Int[Tensor, "1"]) -> "StaticContext":
        """Context for the next position, which only the device knows, in shapes that stay.

        The caches must have room (:meth:`reserve`), and :meth:`advance` once the layers have run.
        """
        factors = rotation(position[None], self.spec.head_dim, self.spec.theta)
        return StaticContext(factors, position, self._layers)

    def advance(self) -> None:
        """Count the position that was run with :meth:`at`."""
        self.position += 1
        for layer in self._layers:
            layer.advance()

    def extend(self, length: int, device: torch.device) -> "CachedContext":
        """Context for the next ``length`` positions."""
        factors = self._factors(self.position, length, device)
        self.position += length
        return CachedContext(factors, self._layers)

    def _factors(
        self, begin: int, length: int, device: torch.device
    ) -> Complex[Tensor, "1 length 1 half"]:
        """Rotary factors, from a table of the positions that come next."""
        offset = begin - self._table_begin
        if self._table is None or not 0 <= offset <= self._table.shape[1] - length:
            positions = torch.arange(begin, begin + max(length, TABLE), device=device)
            self._table = rotation(positions[None], self.spec.head_dim, self.spec.theta)
            self._table_begin, offset = begin, 0
        return self._table[:, offset : offset + length]


class CachedContext(NamedTuple):
    """Context for the next positions of a cached stack."""

    factors: Complex[Tensor, "batch length 1 half"]
    layers: "list[AttentionCache]"

    def attend(self, layer: int) -> Attend:
        """Attention over the layer's cache and the new positions, which are added to it."""
        return self.layers[layer].attend


class StaticContext(NamedTuple):
    """Context for the next position of a cached stack, in shapes that do not depend on it."""

    factors: Complex[Tensor, "1 1 1 half"]
    position: Int[Tensor, "1"]
    layers: "list[AttentionCache]"

    def attend(self, layer: int) -> Attend:
        """Attention over all of the layer's cache, under a mask."""
        return lambda *heads: self.layers[layer].attend_at(self.position, *heads)


def rotation(
    positions: Int[Tensor, "batch length"], head_dim: int, theta: float
) -> Complex[Tensor, "batch length 1 half"]:
    """Rotary position factors ``exp(i * position * theta ** (-2 j / head_dim))``.

    Angles are computed in fp64, so that positions in the millions keep full precision.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
    angles = positions[..., None].double() * theta ** (-exponents / head_dim)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[:, :, None]


class AttentionCache:
    """Keys and values of one layer for one growing document.

    With a window it is a ring buffer of ``window`` entries; without, a buffer that doubles.
    :meth:`attend` is an :data:`Attend` for the document's next positions, equal to the rows of
    :func:`bytelm.kernels.attention` over the whole document.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.length = 0
        """Positions seen; setting it to 0 starts a new document."""
        # Laid out as a single query's two products read them fastest.
        self._keys: Float[Tensor, "heads head_dim capacity"] | None = None
        self._values: Float[Tensor, "heads capacity head_dim"] | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        queries: Float[Tensor, "1 length heads head_dim"],
        keys: Float[Tensor, "1 length heads head_dim"],
        values: Float[Tensor, "1 length heads head_dim"],
    ) -> Float[Tensor, "1 length heads head_dim"]:
        """Attention of the next ``length`` positions; their keys and values are kept."""
        length = queries.shape[1]
        if not length:
            return queries
        if length == 1:
            seen_keys, seen_values = self.append(keys[0, 0], values[0, 0])
            heads_first = queries.transpose(1, 2)[0]
            return _sdpa(heads_first, seen_keys.transpose(1, 2), seen_values)[None].transpose(1, 2)
        num_past = self.length if self.window is None else min(self.length, self.window - 1)
        if num_past:
            assert self._keys is not None
            assert self._values is not None
            past = torch.arange(self.length - num_past, self.length, device=keys.device)
            slots = self._slots(past)
            past_keys = self._keys.index_select(2, slots).permute(2, 0, 1)
            past_values = self._values.index_select(1, slots).transpose(0, 1)
            all_keys = torch.cat((past_keys[None], keys), 1)
            all_values = torch.cat((past_values[None], values), 1)
        else:
            all_keys, all_values = keys, values
        self._store(keys, values)
        if self.window is None and num_past:
            return _continue(queries, all_keys, all_values)
        # Queries for the past positions are computed and dropped: at most a window's worth.
        padded = functional.pad(queries, (0, 0, 0, 0, num_past, 0)) if num_past else queries
        document = torch.zeros(1, num_past + length, dtype=torch.long, device=keys.device)
        mask = kernels.attention_mask(document, self.window)
        return kernels.attention(padded, all_keys, all_values, mask)[:, num_past:]

    def append(
        self, key: Float[Tensor, "heads head_dim"], value: Float[Tensor, "heads head_dim"]
    ) -> tuple[Float[Tensor, "heads head_dim seen"], Float[Tensor, "heads seen head_dim"]]:
        """Keep the key and value of one more position; all that it sees, in no certain order."""
        keys, values = self._reserve(key, 1)
        slot = self.length if self.window is None else self.length % self.window
        keys.select(2, slot).copy_(key)
        values.select(1, slot).copy_(value)
        self.length += 1
        if self._seen is None or self.window is None or self.length <= self.window:
            self._seen = keys[:, :, : self.length], values[:, : self.length]
        return self._seen

    def attend_at(
        self,
        position: Int[Tensor, "1"],
        queries: Float[Tensor, "1 1 heads head_dim"],
        keys: Float[Tensor, "1 1 heads head_dim"],
        values: Float[Tensor, "1 1 heads head_dim"],
    ) -> Float[Tensor, "1 1 heads head_dim"]:
        """:meth:`attend` of the next position, known to the device alone, in shapes that stay.

        Twice at the same position is as good as once; :meth:`advance` counts it.
        """
        assert self._keys is not None
        assert self._values is not None
        capacity = self._keys.shape[2]
        slot = position % capacity
        self._keys.index_copy_(2, slot, keys[0].permute(1, 2, 0))
        self._values.index_copy_(1, slot, values[0].transpose(0, 1))
        # Slots are filled in order, and once round all of them are within the window.
        is_seen = torch.arange(capacity, device=position.device) <= position
        scores = (queries[0].transpose(0, 1) @ self._keys).float() * queries.shape[-1] ** -0.5
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
        return (weights.to(values.dtype) @ self._values).transpose(0, 1)[None]

    def reserve(self) -> int:
        """Make room for one more position in a cache that is not empty; the capacity."""
        assert self._keys is not None
        assert self._values is not None
        return self._reserve(self._keys[:, :, 0], 1)[0].shape[2]

    def advance(self) -> None:
        """Count a position that was run with :meth:`attend_at`."""
        self.length += 1
        self._seen = None

    def _slots(self, positions: Int[Tensor, " length"]) -> Int[Tensor, " length"]:
        return positions if self.window is None else positions % self.window

    def _store(self, keys: Tensor, values: Tensor) -> None:
        if self.window is not None and keys.shape[1] > self.window:
            self.length += keys.shape[1] - self.window
            keys, values = keys[:, -self.window :], values[:, -self.window :]
        length = keys.shape[1]
        stored_keys, stored_values = self._reserve(keys[0, 0], length)
        slots = self._slots(torch.arange(self.length, self.length + length, device=keys.device))
        stored_keys[:, :, slots] = keys[0].permute(1, 2, 0)
        stored_values[:, slots] = values[0].transpose(0, 1)
        self.length += length
        self._seen = None

    def _reserve(
        self, like: Float[Tensor, "heads head_dim"], more: int
    ) -> tuple[Float[Tensor, "heads head_dim room"], Float[Tensor, "heads room head_dim"]]:
        """Room for ``more`` positions."""
        needed = self.window or self.length + more
        capacity = 0 if self._keys is None else self._keys.shape[2]
        if self._keys is None or self._values is None or capacity < needed:
            grown = self.window or max(needed, 2 * capacity, 64)
            heads, head_dim = like.shape
            # Zeros: what is masked must still be a number.
            keys = like.new_zeros(heads, head_dim, grown)
            values = like.new_zeros(heads, grown, head_dim)
            if self._keys is not None and self._values is not None:
                keys[:, :, : self.length] = self._keys[:, :, : self.length]
                values[:, : self.length] = self._values[:, : self.length]
            self._keys, self._values = keys, values
        return self._keys, self._values


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)


def _continue(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last positions to all, a block of queries at a time."""
    length, num_past = keys.shape[1], keys.shape[1] - queries.shape[1]
    index = torch.arange(length, device=queries.device)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    outputs = []
    for begin in range(num_past, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        allowed = index[begin:end, None] >= index[:end]
        block = queries[:, :, begin - num_past : end - num_past]
        outputs.append(_sdpa(block, keys[:, :, :end], values[:, :, :end], allowed))
    return torch.cat(outputs, 2).transpose(1, 2)
