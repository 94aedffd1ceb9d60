"""Bytes to ids and back.

An id is a byte plus 4; the four ids below it are special. Any byte string is legal: nothing here
assumes UTF-8, except :class:`Utf8Stream`, which turns a stream of arbitrary bytes into text that
can be shown while it arrives.
"""

import codecs

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bytelm.errors import ConfigError

BOE = 0
"""Beginning of example: left padding of hash n-grams, and of rows in batches."""
BOS = 1
"""Beginning of a document."""
EOS = 2
"""End of a document."""
BPE = 3
"""Delimiter before each BPE token in byte streams that carry token boundaries."""
NEVER_SAMPLED = (BOE, BOS, BPE)
"""Ids that no text is made of: of the special ids, only the end of a document is ever generated."""
OFFSET = 4
"""Id of byte 0."""
VOCAB_SIZE = OFFSET + 256
NEWLINE = OFFSET + ord("\n")
BYTES = (*[b""] * OFFSET, *(bytes([value]) for value in range(256)))
"""Bytes of each id; a special id has none."""


BytesLike = bytes | bytearray | memoryview
Text = str | BytesLike
"""A text: characters, or any bytes."""


def to_bytes(text: Text) -> bytes:
    """Return the bytes of ``text``: UTF-8, with bytes that Python escaped as surrogates restored.

    Lone surrogates that did not come from ``surrogateescape`` keep their three-byte form, so
    every ``str`` has bytes.

    Raises:
        ConfigError: the argument is no text, but for example a list of texts.
    """
    if isinstance(text, BytesLike):
        return bytes(text)
    if not isinstance(text, str):
        what = f"a text must be str or bytes, not {type(text).__name__}"
        if isinstance(text, list | tuple | set | dict):
            what += ": give one text at a time, [f(text) for text in texts]"
        raise ConfigError(what)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        kinds = ("surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass" for c in text)
        return b"".join(c.encode("utf-8", kind) for c, kind in zip(text, kinds, strict=True))


def encode(document: Text, *, bos: bool = True, eos: bool = False) -> NDArray[np.int64]:
    """Return the ids of one document, with BOS and EOS if requested.

    Args:
        document: any bytes; a ``str`` is encoded as UTF-8.
        bos: start with :data:`BOS`, as every model here expects.
        eos: end with :data:`EOS`, which models predict but never read.

    Returns:
        ``int64[bos + len(document) + eos]``.
    """
    data = np.frombuffer(to_bytes(document), dtype=np.uint8)
    ids = np.empty(len(data) + bos + eos, dtype=np.int64)
    ids[bos : bos + len(data)] = data
    ids[bos : bos + len(data)] += OFFSET
    if bos:
        ids[0] = BOS
    if eos:
        ids[-1] = EOS
    return ids


def decode(ids: ArrayLike) -> bytes:
    """Return the bytes of ``ids``, without the special ids.

    Raises:
        ValueError: an id is outside 0..259.
    """
    array = np.asarray(ids, dtype=np.int64)
    if array.size and not (array.min() >= 0 and array.max() < VOCAB_SIZE):
        bad = array[(array < 0) | (array >= VOCAB_SIZE)][0]
        raise ValueError(f"id {bad} is outside 0..{VOCAB_SIZE - 1}")
    return (array[array >= OFFSET] - OFFSET).astype(np.uint8).tobytes()


class Utf8Stream:
    """Incremental UTF-8 decoder that returns text as early as it is certain.

    A character is never split, and at most three bytes (the start of a character that may still
    become valid) are held back: invalid bytes come out at once as U+FFFD, so a model that writes
    invalid UTF-8 cannot stall the stream. The parts concatenate to
    ``data.decode("utf-8", "replace")``.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """Return the text that ``data`` completes."""
        return self._decoder.decode(data)

    def close(self) -> str:
        """Return the rest of the text: U+FFFD for an unfinished character, otherwise nothing."""
        return self._decoder.decode(b"", final=True)
