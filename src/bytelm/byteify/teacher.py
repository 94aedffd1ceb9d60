"""The distribution of the next byte that a token model's distribution of the next token implies.

A donor predicts a token at a time. The bytes ``p`` since the last token boundary leave the tokens
that begin with ``p``; ``M(p)`` is the sum of their probabilities, and ``m(p)`` that of the token
``p`` itself. Then, for every byte of a text whose tokens are known::

    next[b] = M(p b) / (M(p) - m(p))      the next byte, if the token goes on
    ends    = m(p) / M(p)                 whether the token ends with p

At a boundary ``p`` is empty, and the end of the document is one more outcome. Special tokens are
left out, so a token's probability is relative to all others and the end. The chain rule holds::

    P(token b1 .. bn) = next[b1] (1 - ends) next[b2] (1 - ends) .. next[bn] ends

Tokens are sorted by their bytes, so those that begin with ``p`` are a range, which is divided into
the token ``p`` and the ranges of its extensions by each byte. With the tokens a, an, and, at::

    sorted      a   an   and  at
    p = "a"     own [ n     ] [t]       next: n and t;  ends: P(a) / (P(a) + .. + P(at))
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from bytelm.byteify.donor import Donor
from bytelm.errors import CheckpointError, DataError
from bytelm.interop.tokenizer import byte_alphabet

END = 256
"""Outcome that the document ends."""
NUM_OUTCOMES = 257
"""Bytes, and the end of the document."""
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""Special tokens that end documents, besides those that the configuration names."""


class ByteTargets(NamedTuple):
    """What a donor predicts at every byte of a text."""

    next: Float[np.ndarray, "positions 257"]
    """Distribution of each byte given those before it, and of what follows the last one."""
    ends: Float[np.ndarray, " bytes"]
    """Probability that a token ends with each byte, given the bytes of the token so far."""
    is_end: NDArray[np.bool_]
    """Whether a token does end with each byte."""


class _Range(NamedTuple):
    """Tokens that begin with some bytes, as a range of the sorted ones."""

    first: int
    cuts: NDArray[np.int64]
    """Where the tokens of each extension begin, and where the last ones end."""
    extensions: NDArray[np.int64]
    """The bytes that extend it, in order."""


class Vocabulary:
    """The tokens of a donor, by their bytes.

    Args:
        tokens: bytes of each token; empty for special ones, which are left out.
        ends: special tokens that end a document.
    """

    def __init__(self, tokens: Sequence[bytes], ends: Iterable[int]) -> None:
        self.tokens = list(tokens)
        self.ends = sorted(set(ends))
        known = [token for token, data in enumerate(self.tokens) if data]
        order = sorted(known, key=lambda token: self.tokens[token])
        self._known = {self.tokens[token]: token for token in reversed(order)}
        self._order = np.array(order, np.int64)
        self._sorted = [self.tokens[token] for token in order]
        self._ranges: dict[bytes, _Range] = {}

    def masses(self, logits: Float[np.ndarray, " vocab"]) -> tuple[Float[np.ndarray, "_"], float]:
        """Return the probabilities of the sorted tokens, and that of the end, in fp64."""
        exponents = logits.astype(np.float64)
        exponents -= exponents.max()
        probabilities = np.exp(exponents)
        ordered, end = probabilities[self._order], float(probabilities[self.ends].sum())
        total = ordered.sum() + end
        return ordered / total, end / total

    def pieces(self) -> list[tuple[bytes, int]]:
        """Return the bytes and the tokens of a :mod:`vocabulary <bytelm.model.vocabulary>`.

        Of tokens with the same bytes it is the first. The empty piece is the token that the donor
        reads before documents.
        """
        return [(b"", self.ends[0]), *sorted(self._known.items())]

    def spell(self, data: bytes) -> list[int]:
        """Return tokens that spell some bytes: always the longest one that comes next.

        Raises:
            DataError: a byte is no token.
        """
        found: list[int] = []
        while data:
            size = len(data)
            while size and data[:size] not in self._known:
                size -= 1
            if not size:
                raise DataError(f"the donor has no token for the byte {data[0]:#04x}")
            found.append(self._known[data[:size]])
            data = data[size:]
        return found

    def divide(self, tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
        """Return the tokens of a text, of which one ends wherever it is wanted.

        A token that does not end there is spelled in parts.

        Args:
            tokens: tokens of the text.
            ends: numbers of bytes of the text after which a token has to end, in order.

        Raises:
            DataError: a byte is no token.
        """
        found: list[int] = []
        begin, wanted = 0, 0
        for token in tokens:
            data = self.tokens[token]
            cuts = [0]
            while wanted < len(ends) and ends[wanted] < begin + len(data):
                cuts.append(ends[wanted] - begin)
                wanted += 1
            parts = [data[a:b] for a, b in pairwise([*cuts, len(data)]) if a < b]
            found += [token] if len(parts) == 1 else chain.from_iterable(map(self.spell, parts))
            begin += len(data)
            while wanted < len(ends) and ends[wanted] <= begin:
                wanted += 1
        return found

    def after(self, prefix: bytes) -> _Range:
        """Return the range of the tokens that begin with some bytes."""
        found = self._ranges.get(prefix)
        if found is None:
            size = len(prefix)
            first = bisect_left(self._sorted, prefix)
            begin = bisect_right(self._sorted, prefix, first)
            end = bisect_right(self._sorted, prefix, first, key=lambda token: token[:size])
            following = np.array([token[size] for token in self._sorted[begin:end]], np.int64)
            is_first = np.ones(len(following), bool)
            is_first[1:] = following[1:] != following[:-1]
            starts = begin + np.flatnonzero(is_first)
            found = _Range(first, np.append(starts, end), following[is_first])
            self._ranges[prefix] = found
        return found


def byte_targets(
    vocabulary: Vocabulary, tokens: Sequence[int], logits: Float[np.ndarray, "steps vocab"]
) -> ByteTargets:
    """Return what a donor predicts at every byte of a text.

    Args:
        vocabulary: the donor's tokens.
        tokens: tokens of the text.
        logits: logits of each of them, and of the token after the last one.

    Raises:
        DataError: a token of the text is a special one, which has no bytes.
    """
    assert len(logits) == len(tokens) + 1
    size = sum(len(vocabulary.tokens[token]) for token in tokens)
    following = np.zeros((size + 1, NUM_OUTCOMES), np.float32)
    ends, is_end = np.zeros(size, np.float32), np.zeros(size, bool)
    at = 0
    for step, token in enumerate([*tokens, None]):
        data = b"" if token is None else vocabulary.tokens[token]
        if token is not None and not data:
            raise DataError(f"token {token} has no bytes: the text holds a special token")
        masses, end = vocabulary.masses(logits[step])
        for length in range(max(len(data), 1)):
            found = vocabulary.after(data[:length])
            row = np.zeros(NUM_OUTCOMES)
            row[found.extensions] = _sums(masses, found)
            row[END] = 0.0 if length else end
            following[at + length] = row / row.sum()
        for length in range(1, len(data) + 1):
            found = vocabulary.after(data[:length])
            own = masses[found.first : found.cuts[0]].sum()
            ends[at + length - 1] = own / masses[found.first : found.cuts[-1]].sum()
        at += len(data)
        if data:
            is_end[at - 1] = True
    return ByteTargets(following, ends, is_end)


def _sums(masses: Float[np.ndarray, " tokens"], found: _Range) -> Float[np.ndarray, " extensions"]:
    """Return the probability of the tokens of each extension."""
    # Sums within the ranges: differences of prefix sums would lose small probabilities.
    return np.add.reduceat(np.append(masses[: found.cuts[-1]], 0.0), found.cuts)[:-1]


def read_vocabulary(donor: Donor) -> Vocabulary:
    """Return the vocabulary of a donor whose tokenizer is byte-level, as Llama 3's and Qwen's.

    Raises:
        CheckpointError: the tokenizer is of another kind, such as Llama 2's.
    """
    values = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokens = [b""] * int(donor.model.config.vocab_size)
    added = donor.tokenizer.get_added_tokens_decoder()
    for text, token in donor.tokenizer.get_vocab(with_added_tokens=True).items():
        if token in added:
            tokens[token] = b"" if added[token].special else text.encode()
        elif all(character in values for character in text):
            tokens[token] = bytes(values[character] for character in text)
        else:
            raise CheckpointError(
                f"the tokenizer of {donor.name} is not byte-level (its token {text!r} is not "
                "written in bytes): choose a donor with the tokenizer of Llama 3, Qwen or SmolLM2"
            )
    return Vocabulary(tokens, _end_tokens(donor, added))


def _end_tokens(donor: Donor, added: dict[int, Any]) -> set[int]:
    named = donor.model.config.eos_token_id
    found = {token for token, one in added.items() if one.content in _ENDS}
    return found | set(named if isinstance(named, list) else [] if named is None else [named])


class Reading(NamedTuple):
    """A document as a donor reads it."""

    tokens: list[int]
    states: Float[Tensor, "steps dim"]
    """What the donor's head reads, after the final norm: for each token, and what follows."""
    targets: ByteTargets


@torch.inference_mode()
def read_document(
    donor: Donor, vocabulary: Vocabulary, text: str, ends: Sequence[int] = ()
) -> Reading:
    """Return a document as a donor reads it, in one pass.

    The document follows a token that ends documents, the first one of the vocabulary.

    Args:
        donor: the donor.
        vocabulary: its tokens.
        text: the document.
        ends: numbers of bytes after which a token has to end, in order, as
            :meth:`Vocabulary.divide` takes them.

    Raises:
        DataError: the donor's tokens do not spell the text, or are more than it can read.
    """
    tokens = donor.encode(text)
    if b"".join(vocabulary.tokens[token] for token in tokens) != text.encode():
        raise DataError(
            f"the tokens of {donor.name} do not spell the text: it holds special tokens, or the "
            "tokenizer changes characters; leave the document out"
        )
    tokens = vocabulary.divide(tokens, ends)
    room = int(donor.model.config.max_position_embeddings)
    if len(tokens) >= room:
        raise DataError(f"{len(tokens):,} tokens exceed the donor's {room:,}: cut the document")
    if not vocabulary.ends:
        raise DataError(f"{donor.name} has no token that ends a document: choose another donor")
    ids = torch.tensor([[vocabulary.ends[0], *tokens]])
    states = donor.model.model(ids, use_cache=False).last_hidden_state[0]
    logits = donor.model.get_output_embeddings()(states).numpy()
    return Reading(tokens, states, byte_targets(vocabulary, tokens, logits))


def donor_targets(donor: Donor, vocabulary: Vocabulary, text: str) -> ByteTargets:
    """Return what a donor predicts at every byte of a document; see :func:`read_document`."""
    return read_document(donor, vocabulary, text).targets
