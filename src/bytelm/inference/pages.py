"""Key-value caches without a window whose memory is bounded and shared, in pages of positions.

A :class:`PagedMemory` has so many positions, however many slots and states use it. A slot's
document holds a list of pages; documents that share a beginning share the pages of it, and a page
that is shared is copied before it is written to. Results are those of
:class:`~bytelm.inference.cache.KVCache`.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from bytelm.cpu.attending import paged
from bytelm.cpu.compiling import is_worth_it
from bytelm.inference.cache import EntriesDecode, KVCache
from bytelm.inference.cache import Snapshot as CacheSnapshot
from bytelm.model.attention import StackContext, StackSpec
from bytelm.slots import Slots

PAGE = 16
"""Positions of a page."""


class MemoryFullError(Exception):
    """There are too few free pages for what was asked; nothing has changed."""


class PagedMemory:
    """Memory for the keys and values of several states of one model.

    Args:
        num_positions: positions of documents to have room for, in each stack without a window.
    """

    def __init__(self, num_positions: int) -> None:
        self.num_pages = -(-num_positions // PAGE)
        self._pages: dict[nn.Module, Pages] = {}

    def new_cache(
        self, stack: nn.Module, spec: StackSpec, num_slots: int, device: torch.device
    ) -> "PagedCache":
        """Return a cache for a stack without a window; caches of the same stack share pages."""
        if stack not in self._pages:
            self._pages[stack] = Pages(spec, self.num_pages)
        return PagedCache(self._pages[stack], num_slots, device)

    @property
    def num_free(self) -> int:
        """Number of free pages, in the stack with the fewest."""
        return min((len(pages.free) for pages in self._pages.values()), default=self.num_pages)


class Pages:
    """Keys and values of a stack in pages, each owned by one document or more."""

    def __init__(self, spec: StackSpec, num_pages: int) -> None:
        self.spec = spec
        # A heap: the lowest first, so that documents are neighbours and memory stays small.
        self.free = list(range(num_pages))
        self._owners = [0] * num_pages
        self.keys: list[Float[Tensor, "kv_heads positions head_dim"]] = []
        self.values: list[Float[Tensor, "kv_heads positions head_dim"]] = []

    def check_free(self, wanted: int) -> None:
        """Check that there are enough free pages.

        Raises:
            MemoryFullError: there are too few.
        """
        if wanted > len(self.free):
            raise MemoryFullError(f"{wanted} pages are wanted, and {len(self.free)} are free")

    def take(self, count: int) -> list[int]:
        """Return free pages, which then have one owner.

        Raises:
            MemoryFullError: there are too few.
        """
        self.check_free(count)
        taken = [heapq.heappop(self.free) for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        if taken and self.keys:
            self._grow(max(taken) + 1)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to pages."""
        for page in pages:
            self._owners[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Take an owner from pages; those without one become free."""
        for page in pages:
            self._owners[page] -= 1
            if not self._owners[page]:
                heapq.heappush(self.free, page)

    def is_shared(self, page: int) -> bool:
        """Whether a page has several owners."""
        return self._owners[page] > 1

    def copy(self, page: int) -> int:
        """Return a copy of a page, whose owner no longer owns the original."""
        (new,) = self.take(1)
        for tensor in (*self.keys, *self.values):
            tensor[:, _span(new)] = tensor[:, _span(page)]
        self.give_back([page])
        return new

    def allocate(self, like: Tensor) -> None:
        """Allocate memory; not earlier, since the dtype of keys and values must be known."""
        if self.keys:
            return
        # On a CPU memory is only taken when it is written to, so all of it is allocated at once.
        room = len(self._owners) * PAGE if like.is_cpu else 0
        shape = self.spec.kv_heads, room, self.spec.head_dim
        self.keys, self.values = (
            [_zeros(shape, like) for _ in range(self.spec.num_layers)] for _ in range(2)
        )
        self._grow(max((n for n, owners in enumerate(self._owners) if owners), default=0) + 1)

    def _grow(self, num_pages: int) -> None:
        old = self.keys[0].shape[1]
        if num_pages * PAGE <= old:
            return
        room = min(max(num_pages * PAGE, 2 * old), len(self._owners) * PAGE)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                # Zeros, because masked entries must be finite.
                larger = tensor.new_zeros(tensor.shape[0], room, tensor.shape[2])
                larger[:, :old] = tensor
                tensors[layer] = larger


class PagedCache(KVCache):
    """Keys and values of a stack without a window, in pages."""

    def __init__(self, pages: Pages, num_slots: int, device: torch.device) -> None:
        super().__init__(pages.spec, num_slots, device)
        self._pages = pages
        self._tables: list[list[int]] = [[] for _ in range(num_slots)]
        self._has_begun = False

    @property
    def room(self) -> int:
        """Positions of the longest document so far, in whole pages; 0 before the first."""
        return PAGE * max(1, *map(len, self._tables)) if self._has_begun else 0

    def check_free(self, lengths: dict[int, int]) -> None:
        """Check that the next ``lengths`` positions of some slots fit.

        Raises:
            MemoryFullError: they may not.
        """
        self._pages.check_free(sum(self._num_wanted(*item) for item in lengths.items()))

    def _num_wanted(self, slot: int, length: int) -> int:
        """Return how many pages a slot's next positions take."""
        position, table = self._given[slot], self._tables[slot]
        if not length:
            return 0
        is_copied = position % PAGE != 0 and self._pages.is_shared(table[-1])
        return -(-(position + length) // PAGE) - len(table) + is_copied

    def _make_room(self, slot: int, length: int) -> None:
        """Take the pages of a slot's next positions."""
        position, table, pages = self._given[slot], self._tables[slot], self._pages
        if length and position % PAGE and pages.is_shared(table[-1]):
            table[-1] = pages.copy(table[-1])
        table += pages.take(-(-(position + length) // PAGE) - len(table))
        self._has_begun = True

    def reserve(self, slots: Slots = None) -> None:
        """Make room for the next position of some slots."""
        named = range(self.num_slots) if slots is None else slots
        self.check_free(dict.fromkeys(named, 1))
        for slot in named:
            self._make_room(slot, 1)
        super().reserve(slots)

    def prefill(self, slot: int, length: int) -> StackContext:
        """Begin the next ``length`` positions of one slot; return the context to run them in."""
        self.check_free({slot: length})
        self._make_room(slot, length)
        return super().prefill(slot, length)

    def step(self, slots: Slots = None) -> StackContext:
        """Begin the reserved position of some slots."""
        named = range(self.num_slots) if slots is None else slots
        if len(named) == 1:
            return super().step(slots)
        positions = self.positions[list(named)]
        self.positions[list(named)] += 1
        factors = self.spec.rotation(positions[:, None])
        context = self.in_place(named, positions, factors)
        if context is not None:
            return context
        num_pages = max(len(self._tables[slot]) for slot in named)
        table = torch.tensor(
            [[*self._tables[slot], *[0] * (num_pages - len(self._tables[slot]))] for slot in named],
            device=positions.device,
        )
        room = torch.arange(num_pages * PAGE, device=positions.device)
        is_seen = room <= positions[:, None]
        at = table.gather(1, positions[:, None] // PAGE)[:, 0] * PAGE + positions % PAGE
        return _PagedDecode(self._pages, factors, table, is_seen, at)

    def in_place(
        self,
        slots: Sequence[int],
        positions: Int[Tensor, " slots"],
        factors: Complex[Tensor, "slots 1 1 half"],
    ) -> EntriesDecode | None:
        """Return a context that reads entries where they are, if kernels do so faster."""
        keys, values = self._pages.keys, self._pages.values
        if not keys or not is_worth_it(keys[0]):
            return None
        entries = paged([self._tables[slot] for slot in slots], positions.numpy(), PAGE)
        return EntriesDecode(factors, entries, keys, values, keys[0].shape[1])

    def past(self, layer: int, slot: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values ``[length, kv_heads, head_dim]`` of a slot's positions."""
        entries = self._entries(slot, begin, end)
        keys, values = self._pages.keys[layer], self._pages.values[layer]
        return keys[:, entries].transpose(0, 1), values[:, entries].transpose(0, 1)

    def append(
        self,
        layer: int,
        slot: int,
        position: int,
        key: Float[Tensor, "kv_heads head_dim"],
        value: Float[Tensor, "kv_heads head_dim"],
    ) -> tuple[Float[Tensor, "kv_heads seen head_dim"], Float[Tensor, "kv_heads seen head_dim"]]:
        """Store a position's key and value, and return all that the position sees."""
        keys, values = self._pages.keys[layer], self._pages.values[layer]
        at = self._tables[slot][position // PAGE] * PAGE + position % PAGE
        keys.select(1, at).copy_(key)
        values.select(1, at).copy_(value)
        entries = self._entries(slot, 0, position + 1)
        return keys[:, entries], values[:, entries]

    def _entries(self, slot: int, begin: int, end: int) -> slice | Int[Tensor, " length"]:
        """Return where positions of a slot are: a slice if their pages are neighbours."""
        first, last = begin // PAGE, -(-end // PAGE)
        table = self._tables[slot][first:last]
        if table and table == list(range(table[0], table[0] + len(table))):
            start = table[0] * PAGE + begin % PAGE
            return slice(start, start + end - begin)
        at = torch.tensor(table, dtype=torch.long, device=self.positions.device)
        within = torch.arange(PAGE, device=at.device)
        offset = begin - first * PAGE
        return (at[:, None] * PAGE + within).flatten()[offset : offset + end - begin]

    def store(self, layer: int, slot: int, begin: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values ``[length, kv_heads, head_dim]`` of a slot's new positions."""
        self._pages.allocate(keys)
        entries = self._entries(slot, begin, begin + len(keys))
        self._pages.keys[layer][:, entries] = keys.transpose(0, 1)
        self._pages.values[layer][:, entries] = values.transpose(0, 1)

    def reset(self, slot: int) -> None:
        """Start a new document in a slot."""
        super().reset(slot)
        self._cut(slot, 0)

    def rollback(self, slot: int, snapshot: CacheSnapshot) -> None:
        """Restore a slot from a snapshot of the same document."""
        super().rollback(slot, snapshot)
        self._cut(slot, -(-snapshot.given // PAGE))

    def truncate(self, slot: int, mark: CacheSnapshot, kept: int) -> None:
        """Undo the positions since a mark, but for the first ``kept``."""
        super().truncate(slot, mark, kept)
        self._cut(slot, -(-self._given[slot] // PAGE))

    def _cut(self, slot: int, num_pages: int) -> None:
        self._pages.give_back(self._tables[slot][num_pages:])
        del self._tables[slot][num_pages:]

    def copy(self, source: KVCache, source_slot: int, slot: int) -> None:
        """Share the pages of the document of another slot."""
        assert isinstance(source, PagedCache)
        assert source._pages is self._pages
        table = list(source._tables[source_slot])
        self._pages.share(table)
        self._cut(slot, 0)
        self._tables[slot] = table
        self.positions[slot] = source.positions[source_slot]
        self._given[slot] = source._given[source_slot]
        self._has_begun |= source._has_begun


class _PagedDecode(NamedTuple):
    """Context of the next position of each of several slots."""

    pages: Pages
    factors: Complex[Tensor, "slots 1 1 half"]
    table: Int[Tensor, "slots pages"]
    is_seen: Bool[Tensor, "slots room"]
    at: Int[Tensor, " slots"]
    """Entry of the new position of each slot."""
    layer: int = 0

    @property
    def is_step(self) -> bool:
        """Whether each row has one position, and numbers may be read on the host."""
        return True

    def __getitem__(self, layer: int) -> "_PagedDecode":  # pyright: ignore
        return self._replace(layer=layer)

    def in_place(self) -> None:
        """Kernels are not faster here."""

    def attend(
        self,
        queries: Float[Tensor, "slots 1 heads head_dim"],
        keys: Float[Tensor, "slots 1 kv_heads head_dim"],
        values: Float[Tensor, "slots 1 kv_heads head_dim"],
    ) -> Float[Tensor, "slots 1 heads head_dim"]:
        """Store the new keys and values, and attend to the slots' pages under a mask."""
        all_keys, all_values = self.pages.keys[self.layer], self.pages.values[self.layer]
        all_keys[:, self.at] = keys[:, 0].transpose(0, 1)
        all_values[:, self.at] = values[:, 0].transpose(0, 1)
        seen_keys, seen_values = self._gather(all_keys), self._gather(all_values)
        grouped = queries[:, 0].unflatten(1, (len(all_keys), -1)).transpose(0, 1)
        scores = (grouped @ seen_keys.transpose(2, 3)).float() * queries.shape[-1] ** -0.5
        weights = scores.masked_fill(~self.is_seen[:, None], float("-inf")).softmax(-1)
        mixed = weights.to(values.dtype) @ seen_values
        return mixed.transpose(0, 1).flatten(1, 2)[:, None]

    def _gather(
        self, tensor: Float[Tensor, "kv_heads positions head_dim"]
    ) -> Float[Tensor, "kv_heads slots room head_dim"]:
        """Copy the pages of each slot, whole pages at a time."""
        pages = tensor.unflatten(1, (-1, PAGE)).flatten(2)
        chosen = pages.index_select(1, self.table.flatten())
        return chosen.view(len(tensor), len(self.table), -1, tensor.shape[2])


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros; on a CPU of memory that the system gives when it is first written to."""
    if not like.is_cpu:
        return like.new_zeros(shape)
    size = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(size, np.uint8)).view(like.dtype).view(shape)


def _span(page: int) -> slice:
    return slice(page * PAGE, (page + 1) * PAGE)


def check_free(caches: Sequence[KVCache], lengths: dict[int, int]) -> None:
    """Check that the next ``lengths`` ids of some slots fit into caches, whatever they hold.

    Raises:
        MemoryFullError: they may not.
    """
    for cache in caches:
        if isinstance(cache, PagedCache):
            cache.check_free(lengths)
