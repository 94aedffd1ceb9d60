"""Scorer that computes the entropies of a plain transformer's predictions."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm import codec
from bytelm.inference.states import TransformerState
from bytelm.model.transformer import Transformer
from bytelm.patching import entropy
from bytelm.slots import CompoundState, Slots


class TransformerScorer(nn.Module):
    """Scorer that computes the entropies of a plain transformer's predictions (section 4.2).

    With ``reset_at_newline`` a newline byte begins a new context, as in the paper's large runs
    (section 4.4): the newline replaces BOS, so the entropy of repeated lines does not drop.
    """

    def __init__(self, transformer: Transformer, *, reset_at_newline: bool = False) -> None:
        super().__init__()
        self.transformer = transformer
        self.reset_at_newline = reset_at_newline

    def entropies(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes"]:
        """Return the entropies, in nats, of packed rows."""
        if self.reset_at_newline:
            documents = split_at_newlines(ids, documents)
        return entropy(self.transformer(ids, documents))

    def new_state(
        self, num_slots: int = 1, strategy: Any = "auto", memory: Any = None
    ) -> "TransformerScorerState":
        """Return a state with ``num_slots`` empty documents."""
        return TransformerScorerState(self, num_slots, strategy, memory)


class TransformerScorerState(CompoundState):
    """State of a :class:`TransformerScorer`: key-value caches of its window."""

    def __init__(
        self, scorer: TransformerScorer, num_slots: int, strategy: Any, memory: Any
    ) -> None:
        self._scorer = scorer
        # A cache that begins anew at each newline stays small without pages.
        memory = None if scorer.reset_at_newline else memory
        self._state = TransformerState(scorer.transformer, num_slots, strategy, memory)
        super().__init__(self._state)

    @property
    def window(self) -> int | None:
        """Bytes that an entropy depends on."""
        return self._scorer.transformer.spec.window

    def mark(self, slot: int, length: int) -> Any:
        """Return a snapshot of a slot that only undoes its next ``length`` bytes."""
        if self._scorer.reset_at_newline:
            return self.snapshot(slot)
        return self._state.mark(slot, length)

    def truncate(self, slot: int, mark: Any, ids: Int[Tensor, " bytes"]) -> None:
        """Undo the bytes since a mark, but for the first ``ids``."""
        if self._scorer.reset_at_newline:
            self.rollback(slot, mark)
            self.prefill(slot, ids)
        else:
            self._state.truncate(slot, mark, ids)

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Int[Tensor, " bytes"]) -> Float[Tensor, " bytes"]:
        """Return the entropies at the next bytes of one slot's document."""
        if not self._scorer.reset_at_newline:
            return entropy(self._state.prefill(slot, ids))
        newlines = (ids == codec.NEWLINE).nonzero().flatten().tolist()
        if not newlines:
            return entropy(self._state.prefill(slot, ids))
        # Whole lines need no cache; only the line in progress and the last one use it.
        first, last = newlines[0], newlines[-1]
        parts = [entropy(self._state.prefill(slot, ids[:first]))] if first else []
        if first < last:
            parts.append(self._scorer.entropies(ids[None, first:last])[0])
        self._state.reset(slot)
        parts.append(entropy(self._state.prefill(slot, ids[last:])))
        return torch.cat(parts)

    @torch.inference_mode()
    def decode(self, ids: Int[Tensor, " slots"], slots: Slots = None) -> Float[Tensor, " slots"]:
        """Return the entropy at the next byte of each slot's document."""
        if self._scorer.reset_at_newline:
            self._state.restart(ids == codec.NEWLINE, slots)
        return entropy(self._state.decode(ids, slots))


def split_at_newlines(
    ids: Int[Tensor, "batch bytes"], documents: Int[Tensor, "batch bytes"] | None
) -> Int[Tensor, "batch bytes"]:
    """Return document numbers that also change at every newline."""
    starts = ids == codec.NEWLINE
    starts[:, :1] = True
    if documents is not None:
        starts[:, 1:] |= documents[:, 1:] != documents[:, :-1]
    return starts.cumsum(1)
