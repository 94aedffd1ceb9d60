"""Key-value caches of a stack of layers, for the documents of several slots.

With a window the cache of a slot is a ring of ``window`` entries; without, a buffer that doubles.
The cache makes the contexts (:class:`~bytelm.model.attention.StackContext`) in which the stack's
layers are run over new positions: :meth:`KVCache.prefill` for many of one slot,
:meth:`KVCache.decode` for one of each of several. What they compute equals the rows of
:func:`bytelm.kernels.attention` over the whole documents.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn import functional

from bytelm import kernels
from bytelm.model.attention import StackContext, StackSpec
from bytelm.slots import Slots, assign, select

QUERY_BLOCK = 512
"""New positions attended to at once by a cache without a window that holds older ones."""
ROTATIONS = 1024
"""Positions whose rotary factors are computed at once,"""
MAX_ROTATIONS = 16
"""and how many such tables are kept."""
FIRST_ROOM = 64
"""Positions that a buffer without a window begins with."""


class KVCache:
    """Keys and values of every layer of a stack.

    Args:
        spec: of the stack.
        num_slots: documents at once.
        device: where the cache is.
        is_static: run single positions in shapes that stay, as graphs need.
    """

    def __init__(
        self, spec: StackSpec, num_slots: int, device: torch.device, *, is_static: bool = False
    ) -> None:
        self.spec = spec
        self.num_slots = num_slots
        self._is_static = is_static
        self.positions: Int[Tensor, " slots"] = torch.zeros(
            num_slots, dtype=torch.long, device=device
        )
        """Next position of each slot."""
        # The same memory, read and written as numbers.
        self._host: Any = self.positions.numpy() if device.type == "cpu" else self.positions
        # Laid out as a single query's two products read them fastest.
        self.keys: list[Float[Tensor, "slots kv_heads head_dim room"]] = []
        self.values: list[Float[Tensor, "slots kv_heads room head_dim"]] = []
        # Positions that each slot was given since its last reset: what the host knows of
        # `positions` without waiting for the device.
        self._given = [0] * num_slots
        self._rotations: dict[int, Complex[Tensor, "1 positions 1 half"]] = {}

    @property
    def room(self) -> int:
        """Positions that there is memory for in each slot; 0 before the first."""
        return self.keys[0].shape[3] if self.keys else 0

    def prefill(self, slot: int, length: int) -> StackContext:
        """Begin the next ``length`` positions of one slot; return the context to run them in."""
        begin = int(self._host[slot])
        self._host[slot] += length
        self._given[slot] += length
        positions = torch.arange(begin, begin + length, device=self.positions.device)
        return _Prefill(self, self.spec.rotation(positions[None]), slot, begin)

    def decode(self, slots: Slots = None) -> StackContext:
        """Begin the next position of each of some slots; return the context to run them in."""
        self.reserve(slots)
        return self.step(slots)

    def reserve(self, slots: Slots = None) -> None:
        """Make room for one more position of each of some slots: the host's part of a step."""
        for slot in range(self.num_slots) if slots is None else slots:
            self._given[slot] += 1
        if self.keys and self.spec.window is None:
            self._grow(max(self._given))

    def step(self, slots: Slots = None) -> StackContext:
        """Begin a position that there is room for: the device's part, in shapes that stay."""
        num = self.num_slots if slots is None else len(slots)
        if num == 1 and not self._is_static:
            slot = 0 if slots is None else slots[0]
            position = int(self._host[slot])
            self._host[slot] += 1
            factors = self._rotation(position)
            return _OnePosition(self, factors, factors[0, 0], slot, position)
        positions = select(self.positions, slots).clone()
        assign(self.positions, slots, positions + 1)
        return _Decode(self, self.spec.rotation(positions[:, None]), slots, positions)

    def _rotation(self, position: int) -> Complex[Tensor, "1 1 1 half"]:
        """Return the rotary factors of one position, from a table of those around it."""
        number, offset = divmod(position, ROTATIONS)
        table = self._rotations.get(number)
        if table is None:
            positions = torch.arange(number * ROTATIONS, (number + 1) * ROTATIONS)
            table = self.spec.rotation(positions[None].to(self.positions.device))
            if len(self._rotations) >= MAX_ROTATIONS:
                self._rotations.clear()
            self._rotations[number] = table
        return table[:, offset : offset + 1]

    def store(self, layer: int, slot: int, begin: int, keys: Tensor, values: Tensor) -> None:
        """Keep the keys and values ``[length, kv_heads, head_dim]`` of a slot's new positions."""
        window = self.spec.window
        if window is not None and len(keys) > window:
            begin += len(keys) - window
            keys, values = keys[-window:], values[-window:]
        self._allocate(keys)
        self._grow(begin + len(keys))
        at = self.entries(torch.arange(begin, begin + len(keys), device=keys.device))
        self.keys[layer][slot][:, :, at] = keys.permute(1, 2, 0)
        self.values[layer][slot][:, at] = values.transpose(0, 1)

    def entries(self, positions: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return where the keys and values of positions lie."""
        return positions if self.spec.window is None else positions % self.spec.window

    def _allocate(self, like: Tensor) -> None:
        """Make the first room: not before the precision of keys and values is known."""
        if self.keys:
            return
        room = self.spec.window or FIRST_ROOM
        shape = (self.num_slots, self.spec.kv_heads)
        for _ in range(self.spec.num_layers):
            # Zeros: what is masked must still be a number.
            self.keys.append(like.new_zeros(*shape, self.spec.head_dim, room))
            self.values.append(like.new_zeros(*shape, room, self.spec.head_dim))

    def _grow(self, needed: int) -> None:
        """Make room for ``needed`` positions in every slot, if there is no window."""
        room = self.room
        if self.spec.window is not None or needed <= room:
            return
        more = max(needed, 2 * room) - room
        self.keys = [functional.pad(keys, (0, more)) for keys in self.keys]
        self.values = [functional.pad(values, (0, 0, 0, more)) for values in self.values]

    def reset(self, slot: int) -> None:
        """Start a new document."""
        self.positions[slot] = 0
        self._given[slot] = 0

    def snapshot(self, slot: int) -> "Snapshot":
        """Return the slot's position and, of rings, whose entries later ones overwrite, a copy."""
        tensors = [] if self.spec.window is None else [*self.keys, *self.values]
        entries = [tensor[slot].clone() for tensor in tensors]
        return Snapshot(self.positions[slot].clone(), self._given[slot], entries)

    def rollback(self, slot: int, snapshot: "Snapshot") -> None:
        """Come back to a snapshot of the same document."""
        self.positions[slot] = snapshot.position
        self._given[slot] = snapshot.given
        # Without entries the snapshot is of an empty ring, or of a buffer, which only grows.
        if snapshot.entries:
            pairs = zip([*self.keys, *self.values], snapshot.entries, strict=True)
            for tensor, entries in pairs:
                tensor[slot] = entries

    def copy(self, source: "KVCache", source_slot: int, slot: int) -> None:
        """Take over the document of another slot."""
        self.positions[slot] = source.positions[source_slot]
        self._given[slot] = source._given[source_slot]
        if source.keys:
            self._allocate(source.keys[0])
            self._grow(source.room)
        room = source.room
        for layer in range(len(source.keys)):
            self.keys[layer][slot, :, :, :room] = source.keys[layer][source_slot]
            self.values[layer][slot, :, :room] = source.values[layer][source_slot]


class Snapshot(NamedTuple):
    """Where a slot of a cache stood."""

    position: Int[Tensor, ""]
    given: int
    entries: list[Tensor]


class _Prefill(NamedTuple):
    """Context of the next positions of one slot."""

    cache: KVCache
    factors: Complex[Tensor, "1 length 1 half"]
    slot: int
    begin: int
    layer: int = 0

    def __getitem__(self, layer: int) -> "_Prefill":  # pyright: ignore
        return self._replace(layer=layer)

    def attend(
        self,
        queries: Float[Tensor, "1 length heads head_dim"],
        keys: Float[Tensor, "1 length kv_heads head_dim"],
        values: Float[Tensor, "1 length kv_heads head_dim"],
    ) -> Float[Tensor, "1 length heads head_dim"]:
        """Attend to the cache and the new positions, whose keys and values are kept."""
        cache, window, length = self.cache, self.cache.spec.window, queries.shape[1]
        if not length:
            return queries
        num_past = self.begin if window is None else min(self.begin, window - 1)
        all_keys, all_values = keys, values
        if num_past:
            past = torch.arange(self.begin - num_past, self.begin, device=keys.device)
            at = cache.entries(past)
            past_keys = cache.keys[self.layer][self.slot].index_select(2, at).permute(2, 0, 1)
            past_values = cache.values[self.layer][self.slot].index_select(1, at).transpose(0, 1)
            all_keys = torch.cat((past_keys[None], keys), 1)
            all_values = torch.cat((past_values[None], values), 1)
        cache.store(self.layer, self.slot, self.begin, keys[0], values[0])
        if window is None and num_past:
            return _continue(queries, all_keys, all_values)
        # Queries for the past positions are computed and dropped: at most a window's worth.
        padded = functional.pad(queries, (0, 0, 0, 0, num_past, 0)) if num_past else queries
        document = torch.zeros(1, num_past + length, dtype=torch.long, device=keys.device)
        plan = kernels.plan_attention(kernels.Mask(document, window))
        return kernels.attention(padded, all_keys, all_values, plan)[:, num_past:]


class _OnePosition(NamedTuple):
    """Context of the next position of one slot: views of just what it sees."""

    cache: KVCache
    factors: Complex[Tensor, "1 1 1 half"]
    factor: Complex[Tensor, "1 half"]
    """The same, of the one position."""
    slot: int
    position: int
    layer: int = 0

    def __getitem__(self, layer: int) -> "_OnePosition":  # pyright: ignore
        return _OnePosition(self.cache, self.factors, self.factor, self.slot, self.position, layer)

    def append(
        self,
        layer: int,
        key: Float[Tensor, "kv_heads head_dim"],
        value: Float[Tensor, "kv_heads head_dim"],
    ) -> tuple[Float[Tensor, "kv_heads head_dim seen"], Float[Tensor, "kv_heads seen head_dim"]]:
        """Keep a layer's key and value; return all that the position sees, in no certain order."""
        cache, window = self.cache, self.cache.spec.window
        keys, values = cache.keys[layer][self.slot], cache.values[layer][self.slot]
        at = self.position if window is None else self.position % window
        keys.select(2, at).copy_(key)
        values.select(1, at).copy_(value)
        seen = self.position + 1
        if window is not None and seen >= window:
            return keys, values
        return keys.narrow(2, 0, seen), values.narrow(1, 0, seen)

    def attend(
        self,
        queries: Float[Tensor, "1 1 heads head_dim"],
        keys: Float[Tensor, "1 1 kv_heads head_dim"],
        values: Float[Tensor, "1 1 kv_heads head_dim"],
    ) -> Float[Tensor, "1 1 heads head_dim"]:
        """Attend to the cache and the new position, whose key and value are kept."""
        seen_keys, seen_values = self.append(self.layer, keys[0, 0], values[0, 0])
        grouped = queries[0, 0].unflatten(0, (seen_keys.shape[0], -1))
        scores = (grouped @ seen_keys).float() * queries.shape[-1] ** -0.5
        mixed = scores.softmax(-1).to(values.dtype) @ seen_values
        return mixed.flatten(0, 1)[None, None]


class _Decode(NamedTuple):
    """Context of the next position of each of some slots, in shapes that do not depend on it."""

    cache: KVCache
    factors: Complex[Tensor, "slots 1 1 half"]
    slots: Slots
    positions: Int[Tensor, " slots"]
    layer: int = 0

    def __getitem__(self, layer: int) -> "_Decode":  # pyright: ignore
        return self._replace(layer=layer)

    def attend(
        self,
        queries: Float[Tensor, "slots 1 heads head_dim"],
        keys: Float[Tensor, "slots 1 kv_heads head_dim"],
        values: Float[Tensor, "slots 1 kv_heads head_dim"],
    ) -> Float[Tensor, "slots 1 heads head_dim"]:
        """Attend to all of the caches, under a mask; the new keys and values are kept."""
        cache = self.cache
        all_keys, all_values = cache.keys[self.layer], cache.values[self.layer]
        rows = torch.arange(cache.num_slots, device=keys.device)
        if self.slots is not None:
            rows = torch.tensor(list(self.slots), device=keys.device)
        at = cache.entries(self.positions)
        all_keys[rows, :, :, at] = keys[:, 0]
        all_values[rows, :, at] = values[:, 0]
        seen_keys, seen_values = select(all_keys, self.slots), select(all_values, self.slots)
        # Entries are filled in order, and once round all of them are within the window.
        index = torch.arange(cache.room, device=keys.device)
        is_seen = index <= self.positions[:, None]
        grouped = queries[:, 0].unflatten(1, (cache.spec.kv_heads, -1))
        scores = (grouped @ seen_keys).float() * queries.shape[-1] ** -0.5
        weights = scores.masked_fill(~is_seen[:, None, None], float("-inf")).softmax(-1)
        return (weights.to(values.dtype) @ seen_values).flatten(1, 2)[:, None]


def _continue(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend causally from the last positions to all, a block of queries at a time."""
    length, num_past = keys.shape[1], keys.shape[1] - queries.shape[1]
    index = torch.arange(length, device=queries.device)
    group = queries.shape[2] // keys.shape[2]
    if group > 1:
        keys, values = (x.repeat_interleave(group, dim=2) for x in (keys, values))
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    outputs = []
    for begin in range(num_past, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        block = queries[:, :, begin - num_past : end - num_past]
        outputs.append(
            functional.scaled_dot_product_attention(
                block,
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=index[begin:end, None] >= index[:end],
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)
