"""Key-value caches of a stack of layers, for the documents of several slots.

With a window the cache of a slot is a ring buffer of ``window`` entries; without, a buffer that
doubles when it is full. The cache makes the contexts
(:class:`~bytelm.model.attention.StackContext`) in which the stack's layers are run over new
positions: :meth:`KVCache.prefill` for many positions of one slot, :meth:`KVCache.decode` for one
position of each of several. The results equal those of :func:`bytelm.kernels.attention` over whole
documents.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn import functional

from bytelm import kernels
from bytelm.cpu.attending import Entries, rings
from bytelm.cpu.compiling import is_worth_it
from bytelm.model.attention import StackContext, StackSpec
from bytelm.slots import Slots, assign, select

QUERY_BLOCK = 512
"""Queries per block when a prefill of a cache without a window continues a document."""
ROTATIONS = 1024
"""Positions whose rotary factors are computed at once."""
MAX_ROTATIONS = 16
"""Number of blocks of rotary factors that are kept."""
FIRST_ROOM = 64
"""Initial size, in positions, of a buffer without a window."""


class KVCache:
    """Keys and values of every layer of a stack.

    Args:
        spec: shape of the stack.
        num_slots: number of slots.
        device: device of the cache.
        is_static: decode with constant shapes, as CUDA graphs need.
    """

    def __init__(
        self, spec: StackSpec, num_slots: int, device: torch.device, *, is_static: bool = False
    ) -> None:
        self.spec = spec
        self.num_slots = num_slots
        self.is_static = is_static
        self.positions: Int[Tensor, " slots"] = torch.zeros(
            num_slots, dtype=torch.long, device=device
        )
        """Next position of each slot."""
        self._host = self._host_view()
        self.keys: list[Float[Tensor, "slots kv_heads room head_dim"]] = []
        self.values: list[Float[Tensor, "slots kv_heads room head_dim"]] = []
        # Upper bounds of `positions` on the host, known without waiting for the device.
        self._given = [0] * num_slots
        self._rotations: dict[int, Complex[Tensor, "1 positions 1 half"]] = {}

    def _host_view(self) -> Any:
        """Return the positions in a form that the host reads and writes as numbers."""
        # A NumPy view is faster than a tensor.
        return self.positions.numpy() if self.positions.is_cpu else self.positions

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the view would not share memory with the copy of the positions.
        return {name: value for name, value in self.__dict__.items() if name != "_host"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._host = self._host_view()

    @property
    def room(self) -> int:
        """Positions per slot that memory is allocated for; 0 before the first."""
        return self.keys[0].shape[2] if self.keys else 0

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
        """Make room for the next position of some slots: the part of :meth:`decode` on the host."""
        for slot in range(self.num_slots) if slots is None else slots:
            self._given[slot] += 1
        if self.spec.window is not None or max(self._given) <= self.room or not self.keys:
            return
        # Documents that `TransformerState.restart` began are shorter than the bounds say.
        for slot, position in enumerate(self.positions.tolist()):
            self._given[slot] = min(self._given[slot], position + 1)
        self._grow(max(self._given))

    def step(self, slots: Slots = None) -> StackContext:
        """Begin the reserved position of some slots: the part of :meth:`decode` on the device."""
        num = self.num_slots if slots is None else len(slots)
        if num == 1 and not self.is_static:
            slot = 0 if slots is None else slots[0]
            position = int(self._host[slot])
            self._host[slot] += 1
            return _OnePosition(self, self._rotation(position), slot, position)
        positions = select(self.positions, slots).clone()
        assign(self.positions, slots, positions + 1)
        room = self.room
        factors = self.spec.rotation(positions[:, None])
        if not self.is_static:
            named = range(self.num_slots) if slots is None else slots
            context = self.in_place(named, positions, factors)
            if context is not None:
                return context
            room = min(room, max(self._given[slot] for slot in named))
        return _Decode(self, factors, slots, positions, room)

    def in_place(
        self,
        slots: Sequence[int],
        positions: Int[Tensor, " slots"],
        factors: Complex[Tensor, "slots 1 1 half"],
    ) -> "EntriesDecode | None":
        """Return a context that reads entries where they are, if kernels do so faster."""
        if not self.keys or not is_worth_it(self.keys[0]):
            return None
        entries = rings(slots, positions.numpy(), self.room, self.spec.kv_heads)
        return EntriesDecode(factors, entries, self.keys, self.values, self.room)

    def _rotation(self, position: int) -> Complex[Tensor, "1 1 1 half"]:
        """Return the rotary factors of one position, which are computed and kept in blocks."""
        number, offset = divmod(position, ROTATIONS)
        block = self._rotations.get(number)
        if block is None:
            positions = torch.arange(number * ROTATIONS, (number + 1) * ROTATIONS)
            block = self.spec.rotation(positions[None].to(self.positions.device))
            if len(self._rotations) >= MAX_ROTATIONS:
                self._rotations.clear()
            self._rotations[number] = block
        return block[:, offset : offset + 1]

    def past(self, layer: int, slot: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values ``[length, kv_heads, head_dim]`` of a slot's positions."""
        at = self.entries(torch.arange(begin, end, device=self.positions.device))
        keys, values = self.keys[layer][slot], self.values[layer][slot]
        return keys[:, at].transpose(0, 1), values[:, at].transpose(0, 1)

    def append(
        self,
        layer: int,
        slot: int,
        position: int,
        key: Float[Tensor, "kv_heads head_dim"],
        value: Float[Tensor, "kv_heads head_dim"],
    ) -> tuple[Float[Tensor, "kv_heads seen head_dim"], Float[Tensor, "kv_heads seen head_dim"]]:
        """Store a position's key and value, and return all that the position sees, unordered."""
        window = self.spec.window
        keys, values = self.keys[layer][slot], self.values[layer][slot]
        at = position if window is None else position % window
        keys.select(1, at).copy_(key)
        values.select(1, at).copy_(value)
        seen = position + 1
        if window is not None and seen >= window:
            return keys, values
        return keys.narrow(1, 0, seen), values.narrow(1, 0, seen)

    def store(self, layer: int, slot: int, begin: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values ``[length, kv_heads, head_dim]`` of a slot's new positions."""
        window = self.spec.window
        if window is not None and len(keys) > window:
            begin += len(keys) - window
            keys, values = keys[-window:], values[-window:]
        self._allocate(keys)
        self._grow(begin + len(keys))
        at = self.entries(torch.arange(begin, begin + len(keys), device=keys.device))
        self.keys[layer][slot][:, at] = keys.transpose(0, 1)
        self.values[layer][slot][:, at] = values.transpose(0, 1)

    def entries(self, positions: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the entries of the cache that hold the keys and values of positions."""
        return positions if self.spec.window is None else positions % self.spec.window

    def _allocate(self, like: Tensor) -> None:
        """Allocate the cache; not earlier, since the dtype of keys and values must be known."""
        if self.keys:
            return
        room = self.spec.window or FIRST_ROOM
        shape = (self.num_slots, self.spec.kv_heads, room, self.spec.head_dim)
        # Zeros, because masked entries must be finite.
        self.keys, self.values = (
            [like.new_zeros(shape) for _ in range(self.spec.num_layers)] for _ in range(2)
        )

    def _grow(self, needed: int) -> None:
        """Make room for ``needed`` positions in every slot; ring buffers do not grow."""
        room = self.room
        if self.spec.window is not None or needed <= room:
            return
        more = max(needed, 2 * room) - room
        self.keys = [functional.pad(keys, (0, 0, 0, more)) for keys in self.keys]
        self.values = [functional.pad(values, (0, 0, 0, more)) for values in self.values]

    def reset(self, slot: int) -> None:
        """Start a new document in a slot."""
        self.positions[slot] = 0
        self._given[slot] = 0

    def snapshot(self, slot: int) -> "Snapshot":
        """Return a snapshot of a slot: its position and, for ring buffers, a copy of its entries.

        Buffers without a window need no copy, since later positions do not overwrite their entries.
        """
        tensors = [] if self.spec.window is None else [*self.keys, *self.values]
        entries = [tensor[slot].clone() for tensor in tensors]
        return Snapshot(self.positions[slot].clone(), self._given[slot], entries)

    def rollback(self, slot: int, snapshot: "Snapshot") -> None:
        """Restore a slot from a snapshot of the same document."""
        self.positions[slot] = snapshot.position
        self._given[slot] = snapshot.given
        # There are no entries if the ring buffer was empty, or the cache has no window.
        if snapshot.entries:
            pairs = zip([*self.keys, *self.values], snapshot.entries, strict=True)
            for tensor, entries in pairs:
                tensor[slot] = entries

    def mark(self, slot: int, length: int) -> "Snapshot":
        """Return a snapshot of a slot that only undoes its next ``length`` positions.

        There must be fewer of them than a ring has entries.
        """
        if self.spec.window is None or not self.keys:
            return Snapshot(self.positions[slot].clone(), self._given[slot], [])
        begin = int(self._host[slot])
        at = self.entries(torch.arange(begin, begin + length, device=self.positions.device))
        entries = [tensor[slot][:, at] for tensor in (*self.keys, *self.values)]
        return Snapshot(self.positions[slot].clone(), self._given[slot], entries)

    def truncate(self, slot: int, mark: "Snapshot", kept: int) -> None:
        """Undo the positions since a mark, but for the first ``kept``."""
        self.positions[slot] = mark.position + kept
        self._given[slot] = mark.given + kept
        if not mark.entries:
            return
        begin, length = int(mark.position), mark.entries[0].shape[1]
        at = torch.arange(begin + kept, begin + length, device=self.positions.device)
        pairs = zip([*self.keys, *self.values], mark.entries, strict=True)
        for tensor, entries in pairs:
            tensor[slot][:, self.entries(at)] = entries[:, kept:]

    def copy(self, source: "KVCache", source_slot: int, slot: int) -> None:
        """Copy the document of another slot."""
        self.positions[slot] = source.positions[source_slot]
        self._given[slot] = source._given[source_slot]
        if source.keys:
            self._allocate(source.keys[0])
            self._grow(source.room)
        room = source.room
        for layer in range(len(source.keys)):
            self.keys[layer][slot, :, :room] = source.keys[layer][source_slot]
            self.values[layer][slot, :, :room] = source.values[layer][source_slot]


class Snapshot(NamedTuple):
    """Snapshot of one slot of a cache."""

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
        """Attend to the cache and the new positions, and store their keys and values."""
        cache, window, length = self.cache, self.cache.spec.window, queries.shape[1]
        if not length:
            return queries
        num_past = self.begin if window is None else min(self.begin, window - 1)
        all_keys, all_values = keys, values
        if num_past:
            past = cache.past(self.layer, self.slot, self.begin - num_past, self.begin)
            all_keys = torch.cat((past[0][None], keys), 1)
            all_values = torch.cat((past[1][None], values), 1)
        cache.store(self.layer, self.slot, self.begin, keys[0], values[0])
        if window is None and num_past:
            return _continue(queries, all_keys, all_values)
        # Queries for the past positions are computed and dropped: at most a window's worth.
        padded = functional.pad(queries, (0, 0, 0, 0, num_past, 0)) if num_past else queries
        document = torch.zeros(1, num_past + length, dtype=torch.long, device=keys.device)
        plan = kernels.plan_attention(kernels.Mask(document, window))
        return kernels.attention(padded, all_keys, all_values, plan)[:, num_past:]


class _OnePosition(NamedTuple):
    """Context of the next position of one slot, with views of the entries that it sees."""

    cache: KVCache
    factors: Complex[Tensor, "1 1 1 half"]
    slot: int
    position: int
    layer: int = 0

    @property
    def is_step(self) -> bool:
        """Whether each row has one position, and numbers may be read on the host."""
        return True

    def __getitem__(self, layer: int) -> "_OnePosition":  # pyright: ignore
        return _OnePosition(self.cache, self.factors, self.slot, self.position, layer)

    def in_place(self) -> "EntriesDecode | None":
        """Return the same for kernels, if they are faster."""
        return self.cache.in_place([self.slot], torch.tensor([self.position]), self.factors)

    def append(
        self,
        layer: int,
        key: Float[Tensor, "kv_heads head_dim"],
        value: Float[Tensor, "kv_heads head_dim"],
    ) -> tuple[Float[Tensor, "kv_heads seen head_dim"], Float[Tensor, "kv_heads seen head_dim"]]:
        """Store a layer's key and value, and return all that the position sees, unordered."""
        return self.cache.append(layer, self.slot, self.position, key, value)

    def attend(
        self,
        queries: Float[Tensor, "1 1 heads head_dim"],
        keys: Float[Tensor, "1 1 kv_heads head_dim"],
        values: Float[Tensor, "1 1 kv_heads head_dim"],
    ) -> Float[Tensor, "1 1 heads head_dim"]:
        """Attend to the cache and the new position, and store its key and value."""
        seen_keys, seen_values = self.append(self.layer, keys[0, 0], values[0, 0])
        grouped = queries[0, 0].unflatten(0, (seen_keys.shape[0], -1))
        scores = (grouped @ seen_keys.transpose(-2, -1)).float() * queries.shape[-1] ** -0.5
        mixed = scores.softmax(-1).to(values.dtype) @ seen_values
        return mixed.flatten(0, 1)[None, None]


class EntriesDecode(NamedTuple):
    """Context of the next position of each of some slots, of which only entries in use are read."""

    factors: Complex[Tensor, "slots 1 1 half"]
    entries: Entries
    keys: list[Tensor]
    values: list[Tensor]
    head_positions: int
    """Positions from a head's entries to those of the next head."""
    layer: int = 0

    @property
    def is_step(self) -> bool:
        """Whether each row has one position, and numbers may be read on the host."""
        return True

    def __getitem__(self, layer: int) -> "EntriesDecode":  # pyright: ignore
        return self._replace(layer=layer)

    def in_place(self) -> "EntriesDecode":
        """Return the same for kernels."""
        return self

    def attend(
        self,
        queries: Float[Tensor, "slots 1 heads head_dim"],
        keys: Float[Tensor, "slots 1 kv_heads head_dim"],
        values: Float[Tensor, "slots 1 kv_heads head_dim"],
    ) -> Float[Tensor, "slots 1 heads head_dim"]:
        """Store the new keys and values, and attend to the entries in use."""
        new = queries[:, 0], keys[:, 0], values[:, 0]
        cached = self.keys[self.layer], self.values[self.layer]
        return self.entries.attend(*new, *cached, self.head_positions)[:, None]


class _Decode(NamedTuple):
    """Context of the next position of each of some slots; of constant shapes in static caches."""

    cache: KVCache
    factors: Complex[Tensor, "slots 1 1 half"]
    slots: Slots
    positions: Int[Tensor, " slots"]
    room: int
    """Entries that are attended to, in use or not."""
    layer: int = 0

    @property
    def is_step(self) -> bool:
        """Whether each row has one position, and numbers may be read on the host."""
        return not self.cache.is_static

    def __getitem__(self, layer: int) -> "_Decode":  # pyright: ignore
        return self._replace(layer=layer)

    def in_place(self) -> None:
        """Kernels are not faster here."""

    def attend(
        self,
        queries: Float[Tensor, "slots 1 heads head_dim"],
        keys: Float[Tensor, "slots 1 kv_heads head_dim"],
        values: Float[Tensor, "slots 1 kv_heads head_dim"],
    ) -> Float[Tensor, "slots 1 heads head_dim"]:
        """Store the new keys and values, and attend to all entries in use under a mask."""
        cache, room = self.cache, self.room
        all_keys, all_values = cache.keys[self.layer], cache.values[self.layer]
        rows = torch.arange(cache.num_slots, device=keys.device)
        if self.slots is not None:
            rows = torch.tensor(list(self.slots), device=keys.device)
        at = cache.entries(self.positions)
        all_keys[rows, :, at] = keys[:, 0]
        all_values[rows, :, at] = values[:, 0]
        seen_keys = select(all_keys, self.slots)[:, :, :room]
        seen_values = select(all_values, self.slots)[:, :, :room]
        # Entries are filled in order; when a ring buffer is full, all are within the window.
        index = torch.arange(room, device=keys.device)
        is_seen = index <= self.positions[:, None]
        grouped = queries[:, 0].unflatten(1, (cache.spec.kv_heads, -1))
        scores = (grouped @ seen_keys.transpose(-2, -1)).float() * queries.shape[-1] ** -0.5
        weights = scores.masked_fill(~is_seen[:, None, None], float("-inf")).softmax(-1)
        return (weights.to(values.dtype) @ seen_values).flatten(1, 2)[:, None]


def _continue(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return causal attention of the last positions to all, in blocks of queries."""
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
