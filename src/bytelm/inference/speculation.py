"""Speculative decoding of a BLT: the decoder drafts past patch boundaries, one pass verifies.

A drafted byte passes through encoder and decoder only, and reads the last latent whether or not a
boundary lies between (Fast BLT, section 5.1, BLT-S). The verification runs scorer, patching rule,
global transformer and decoder over all drafted bytes at once; the encoder's states do not depend on
patches and are kept. A drafted byte is accepted if it is the one that decoding without drafts
chooses: with the noise of a position fixed, that makes sampling as lossless as greedy decoding.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm import codec
from bytelm.inference.continuation import Continuation, Prediction
from bytelm.inference.pages import check_free
from bytelm.inference.states import PatchedState, Reading

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Lengths of drafts that are considered; 1 is to decode without."""
FIRST = (1, 2, 4)
"""Lengths that are measured first; the times of others are extrapolated from theirs."""
RETRY = 64
"""Rounds after which the length next to the best one is measured again."""
MEMORY = 0.9
"""Weight of the past in running means."""


class Draft:
    """A draft of some bytes of one slot's document; :meth:`keep` ends it.

    Args:
        state: state of the slot, which has begun a document.
        slot: the slot.
        length: number of bytes, at most :func:`longest_draft`.

    Raises:
        MemoryFullError: there may be too few pages; nothing has changed.
    """

    def __init__(self, state: PatchedState, slot: int, length: int) -> None:
        check_free(state.caches, {slot: length})
        self._state, self._slot = state, slot
        self._marks = [cache.mark(slot, length) for cache in state.caches]
        self._patcher, self._embedding = (
            state.patcher.snapshot(slot),
            state.embedding.snapshot(slot),
        )
        self._open, self._latent = state.open.snapshot(slot), state.latent.snapshot(slot)
        self._pieces = None if state.pieces is None else state.pieces.snapshot(slot)
        self._nodes = None if self._pieces is None else self._pieces["node"][None]
        self._scored = None if state.scorer is None else mark_scorer(state.scorer, slot, length)
        self._ids: list[Tensor] = []
        self._states: list[list[Tensor]] = []
        self._reading: Reading | None = None

    @torch.inference_mode()
    def feed(self, chosen: int) -> Float[Tensor, " vocab"]:
        """Return the logits of the id after the next one, as if no patch ended."""
        state, slots = self._state, [self._slot]
        encoder, _, decoder = state.caches
        ids = torch.tensor([chosen], device=encoder.positions.device)
        x = state.embedding.decode(ids, slots)
        states = state.blt.encoder(x, encoder.decode(slots))
        self._ids.append(ids)
        self._states.append(states)
        state.passes.encoder += 1
        state.passes.decoder += 1
        if self._nodes is not None:
            assert state.blt.vocabulary is not None
            self._nodes = state.blt.vocabulary.step(self._nodes, ids)
        return state.predict(slots, states[-1], decoder.decode(slots), self._nodes)[0]

    @torch.inference_mode()
    def verify(self) -> list[Prediction]:
        """Return the prediction after each drafted byte."""
        decoder = self._state.caches[2]
        decoder.truncate(self._slot, self._marks[2], 0)
        states = [torch.cat(layer, 1) for layer in zip(*self._states, strict=True)]
        reading = self._state.read(self._slot, torch.cat(self._ids), states)
        self._reading = reading
        count, rows = len(self._ids), reading.logits.cpu()
        entropies = [None] * count if reading.entropies is None else reading.entropies.tolist()
        begins = reading.next_boundary.tolist()
        return [Prediction(*row) for row in zip(rows, entropies, begins, strict=True)]

    @torch.inference_mode()
    def keep(self, count: int) -> None:
        """Keep the first ``count`` bytes, at least one, as if the others had not been drafted."""
        state, slot, reading = self._state, self._slot, self._reading
        assert reading is not None
        if count == len(self._ids):
            return
        ids, states = torch.cat(self._ids)[:count], [x[:, :count] for x in reading.states]
        encoder, global_cache, decoder = state.caches
        next_boundary = reading.next_boundary[:count]
        num_closed = int(next_boundary.sum())
        for cache, mark, kept in zip(
            (encoder, global_cache, decoder), self._marks, (count, num_closed, count), strict=True
        ):
            cache.truncate(slot, mark, kept)
        state.patcher.rollback(slot, self._patcher)
        state.embedding.rollback(slot, self._embedding)
        entropies = None if reading.entropies is None else reading.entropies[:count]
        state.patcher.prefill(slot, ids, entropies, states[-1][0])
        state.embedding.advance(slot, ids)
        if state.scorer is not None:
            truncate_scorer(state.scorer, slot, self._scored, ids)
        state.open.rollback(slot, self._open)
        state.latent.rollback(slot, self._latent)
        if state.pieces is not None and self._pieces is not None:
            state.pieces.rollback(slot, self._pieces)
            state.pieces.prefill(slot, ids, next_boundary)
        if not num_closed:
            state.open.extend(slot, states)
            return
        last = int(next_boundary.nonzero()[-1])
        state.open.take(slot)
        state.open.extend(slot, [x[:, last + 1 :] for x in states])
        assert reading.latents is not None
        at = slice(num_closed - 1, num_closed)
        state.write_latent(slot, [tuple(x[:, at] for x in layer) for layer in reading.latents])


def longest_draft(state: PatchedState) -> int:
    """Return the longest draft that leaves every ring with something to go back to."""
    windows = [cache.spec.window for cache in state.caches]
    if state.scorer is not None:
        windows += [getattr(state.scorer, "window", None)]
    return max(1, min((one - 1 for one in windows if one is not None), default=LENGTHS[-1]))


def mark_scorer(scorer: Any, slot: int, length: int) -> Any:
    """Return what :func:`truncate_scorer` needs to undo the next ids of a scorer's slot."""
    return scorer.mark(slot, length) if hasattr(scorer, "mark") else scorer.snapshot(slot)


def truncate_scorer(scorer: Any, slot: int, mark: Any, ids: Int[Tensor, " ids"]) -> None:
    """Undo what a scorer read since a mark, but for the first ``ids``."""
    if hasattr(scorer, "mark"):
        scorer.truncate(slot, mark, ids)
    else:
        scorer.rollback(slot, mark)
        scorer.prefill(slot, ids)


class DraftLength:
    """Choice of the length of drafts, from the acceptance and the times that were measured.

    If a drafted byte is accepted with probability ``a``, a round of length ``k`` yields
    ``1 + a + ... + a^(k-1)`` bytes; the length is chosen that yields most bytes per second. The
    time of a length that was not tried yet is extrapolated.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._lengths = [length for length in LENGTHS if length <= longest] or [1]
        self._times: dict[int, float] = {}  # running means of the seconds of a round
        self._acceptance = 0.7
        self._num_rounds = 0
        self._began = 0.0

    def begin(self) -> int:
        """Begin a round, and return its length."""
        self._num_rounds += 1
        untried = [one for one in FIRST if one in self._lengths and one not in self._times]
        best = max(self._lengths, key=self.rate)
        length = untried[0] if untried else best
        if not untried and self._num_rounds % RETRY == 0:
            at = self._lengths.index(best) + (1 if self._num_rounds % (2 * RETRY) else -1)
            length = self._lengths[max(0, min(at, len(self._lengths) - 1))]
        self._began = time.perf_counter()
        return length

    def end(self, length: int, num_drafted: int, num_accepted: int) -> None:
        """End a round in which so many bytes were drafted beyond the first, and accepted."""
        seconds = time.perf_counter() - self._began
        old = self._times.get(length)
        if old is not None:
            seconds = MEMORY * old + (1 - MEMORY) * seconds
        self._times[length] = seconds
        # The first that is rejected says something, those behind it do not.
        tried = min(num_accepted + 1, num_drafted)
        for accepted in [1.0] * num_accepted + [0.0] * (tried - num_accepted):
            self._acceptance = 0.98 * self._acceptance + 0.02 * accepted

    def rate(self, length: int) -> float:
        """Return the bytes per second to expect of a length."""
        expected = sum(self._acceptance**n for n in range(length))
        return expected / self._seconds(length)

    def _seconds(self, length: int) -> float:
        if length in self._times:
            return self._times[length]
        known = sorted(one for one in self._times if one > 1)
        if not known:
            return float(length)
        nearest = min(known, key=lambda one: abs(one - length))
        low, high = known[0], known[-1]
        slope = (self._times[high] - self._times[low]) / (high - low) if high > low else 0.0
        return self._times[nearest] + max(slope, 0.0) * (length - nearest)


class Speculation:
    """Decoding of the document in a state's first slot with drafts.

    Args:
        state: the state.
    """

    def __init__(self, state: PatchedState) -> None:
        self._state = state
        self.lengths = DraftLength(longest_draft(state))
        self.num_drafted = self.num_accepted = 0
        """Bytes that were drafted, and of these accepted."""

    def run(
        self, continuation: Continuation, length: int, choose: Callable[[Prediction], None]
    ) -> int:
        """Draft up to ``length`` bytes, the one that was chosen last included, and verify them.

        Args:
            continuation: continuation of the document.
            length: as :meth:`DraftLength.begin` says.
            choose: called with the prediction after each byte that is accepted.

        Returns:
            The number of bytes that were fed.

        Raises:
            MemoryFullError: there may be too few pages; nothing has changed.
        """
        draft, ids = Draft(self._state, 0, length), continuation.chosen[-1:]
        for ahead in range(length):
            logits = draft.feed(ids[ahead])
            if ahead + 1 < length:
                ids.append(continuation.sample(logits, ahead))
            if ids[-1] == codec.EOS:
                ids.pop()
                break
        kept = 0
        for kept, prediction in enumerate(draft.verify(), 1):
            choose(prediction)
            is_last = continuation.has_ended or kept == len(ids)
            if is_last or continuation.chosen[-1] != ids[kept]:
                break
        draft.keep(kept)
        self.num_drafted += len(ids) - 1
        self.num_accepted += kept - 1
        if len(ids) == length:
            self.lengths.end(length, len(ids) - 1, kept - 1)
        return kept
