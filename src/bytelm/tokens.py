"""Byte-level byte-pair encoding, for the baseline that reads tokens.

The first ids are those of :mod:`bytelm.codec` (four special ones, then the 256 bytes in order), and
a token for each merge follows: a tokenizer without merges is the byte codec. Text is pre-tokenised
as Llama 3 does (words with the space before them, at most three digits, runs of punctuation or
white space). Any bytes can be encoded: invalid UTF-8 becomes one token per byte.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm import codec
from bytelm.errors import ConfigError, DataError
from bytelm.storage import write_text

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenisation of Llama 3."""
MIN_VOCAB_SIZE = codec.VOCAB_SIZE
_UNDECODABLE = re.compile("([\ud800-\udfff]+)")
_CHUNK_BYTES = 1_000_000

try:
    import tokenizers
except ImportError:
    tokenizers = None


def _library() -> Any:
    if tokenizers is None:
        raise ConfigError(
            "byte-pair tokens need the `tokenizers` package: pip install 'bytelm[study]'"
        )
    return tokenizers


def _byte_characters() -> list[str]:
    """Return the printable character that represents each byte in byte-level BPE vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (n for n in range(256) if n not in printable)
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(0x100 + n) for n, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


class Tokenizer:
    """Byte-level byte-pair encoding.

    Args:
        merges: pairs of tokens, in order of rank, written in the characters that represent bytes.

    Raises:
        ConfigError: the ``tokenizers`` package is not installed.
        DataError: a merge names a token that no earlier merge makes.
    """

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        library = _library()
        characters = _byte_characters()
        self._values = {character: byte for byte, character in enumerate(characters)}
        self.merges = merges
        # A space represents no byte, so no merge can produce one of these names.
        special = [f"special {number}" for number in range(codec.OFFSET)]
        # Two merges may make the same token from different halves.
        merged = dict.fromkeys(left + right for left, right in merges)
        tokens = [*special, *characters, *merged]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        try:
            model = library.models.BPE(vocabulary, merges)
        except Exception as error:  # the library raises no narrower type
            raise DataError(
                f"the tokenizer is damaged: {error}; make one with `bytelm data tokenizer`"
            ) from None
        self._tokenizer = library.Tokenizer(model)
        self._tokenizer.pre_tokenizer = _pre_tokenizer()
        lengths = [0] * codec.OFFSET + [len(token) for token in tokens[codec.OFFSET :]]
        self._lengths = np.array(lengths, np.int64)
        self._tokens = tokens

    @property
    def vocab_size(self) -> int:
        """Number of ids: special ids, bytes and merged tokens."""
        return len(self._tokens)

    @property
    def fingerprint(self) -> str:
        """Short hash of the merges."""
        return hashlib.sha256(json.dumps(self.merges).encode()).hexdigest()[:16]

    def encode(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the token ids of byte ids; special ids are kept, and no merge crosses them."""
        parts = []
        special = np.flatnonzero(ids < codec.OFFSET)
        begin = 0
        for at in [*special.tolist(), len(ids)]:
            parts.append(self._encode((ids[begin:at] - codec.OFFSET).astype(np.uint8).tobytes()))
            parts.append(ids[at : at + 1])
            begin = at + 1
        return np.concatenate(parts)

    def num_ids(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of byte ids that each token encodes: its bytes, or one special id."""
        return np.maximum(self._lengths[tokens], 1)

    def decode(self, token: int) -> bytes:
        """Return the bytes of a token; a special id has none."""
        if token < codec.OFFSET:
            return b""
        return bytes(self._values[character] for character in self._tokens[token])

    def save(self, path: Path) -> None:
        """Write the merges, in order, to a JSON file, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        write_text(path, json.dumps({"merges": self.merges}, ensure_ascii=False) + "\n")

    def _encode(self, data: bytes) -> NDArray[np.int64]:
        found: list[int] = []
        text = data.decode("utf-8", "surrogateescape")
        for number, part in enumerate(_UNDECODABLE.split(text)):
            if number % 2:
                found += [codec.OFFSET + ord(escape) - 0xDC00 for escape in part]
            elif part:
                found += self._tokenizer.encode(part).ids
        return np.array(found, np.int64)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer that :meth:`Tokenizer.save` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        merges = json.loads(path.read_text("utf-8"))["merges"]
        pairs = [(str(left), str(right)) for left, right in merges]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not a tokenizer ({type(error).__name__}: {error}): make one with "
            "`bytelm data tokenizer`"
        ) from None
    return Tokenizer(pairs)


def train_tokenizer(documents: Iterable[bytes], vocab_size: int) -> Tokenizer:
    """Train a tokenizer on some text.

    Args:
        documents: any bytes; invalid UTF-8 is not counted.
        vocab_size: number of ids, special ids and bytes included, so at least 260.

    Raises:
        ConfigError: ``vocab_size`` is below 260, or the ``tokenizers`` package is not installed.
        DataError: the text has too few pairs for so large a vocabulary.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"a vocabulary of {vocab_size} is too small: it must have at least {MIN_VOCAB_SIZE} "
            "ids, for the bytes and the special ids"
        )
    library = _library()
    counted = library.Tokenizer(library.models.BPE())
    counted.pre_tokenizer = _pre_tokenizer()
    trainer = library.trainers.BpeTrainer(
        # The library does not count special ids.
        vocab_size=vocab_size - codec.OFFSET,
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    counted.train_from_iterator(_texts(documents), trainer)
    merges = [tuple(pair) for pair in json.loads(counted.to_str())["model"]["merges"]]
    tokenizer = Tokenizer([(left, right) for left, right in merges])
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"the text has only {len(merges)} pairs to merge: ask for a vocabulary of at most "
            f"{tokenizer.vocab_size}, or use more text"
        )
    return tokenizer


def _pre_tokenizer() -> Any:
    library = _library()
    split = library.pre_tokenizers.Split(library.Regex(SPLIT), "isolated")
    to_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return library.pre_tokenizers.Sequence([split, to_bytes])


def _texts(documents: Iterable[bytes]) -> Iterator[str]:
    for document in documents:
        for begin in range(0, len(document), _CHUNK_BYTES):
            yield document[begin : begin + _CHUNK_BYTES].decode("utf-8", "ignore")
