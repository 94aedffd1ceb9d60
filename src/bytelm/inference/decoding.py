"""Generation of text from a prompt, as a stream of bytes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm import codec
from bytelm.errors import ConfigError
from bytelm.inference.sampling import GREEDY, Sampler, Sampling
from bytelm.inference.session import Decodable, Session
from bytelm.units import ByteUnits

BYTES = ByteUnits()
Finish = Literal["length", "end", "stop"]


@dataclass(frozen=True)
class Generated:
    """Part of a generated text."""

    data: bytes
    finish: Finish | None
    """``None`` except in the last part, which has the reason why generation ended: ``length``
    (``max_bytes`` were generated), ``end`` (the model ended the document), or ``stop`` (a stop
    string appeared; it is not part of the output)."""


@runtime_checkable
class Feedable(Protocol):
    """Decoder of one document, such as a :class:`Session`."""

    def feed(self, ids: Int[Tensor, " ids"]) -> Float[Tensor, "ids vocab"]:
        """Return the logits of the id after each of the document's next ``ids``."""
        ...


def stream(
    model: Decodable,
    prompt: bytes,
    *,
    max_bytes: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[bytes] = (),
) -> Iterator[Generated]:
    """Continue a prompt, which may be empty, in a new session; see :func:`continue_from`."""
    ids = model.units.encode(codec.encode(prompt))
    return continue_from(
        Session(model),
        torch.from_numpy(ids).to(model.device),
        max_bytes=max_bytes,
        sampling=sampling,
        stop=stop,
        decode=model.units.decode,
    )


def continue_from(
    session: Feedable,
    ids: Int[Tensor, " bytes"],
    *,
    max_bytes: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[bytes] = (),
    decode: Callable[[int], bytes] = BYTES.decode,
) -> Iterator[Generated]:
    """Feed ``ids`` to a session and continue, yielding bytes as soon as they are certain.

    A byte is held back only while it may be the beginning of a stop string. The last part has its
    ``finish`` set, and may be empty. The last id sampled is not fed: to continue with the same
    session, begin the next ``ids`` with it.

    Args:
        session: session that was fed the document so far.
        ids: next ids, at least one; a document begins with BOS.
        max_bytes: maximum number of bytes to generate.
        sampling: how each id is sampled.
        stop: byte strings that end generation.
        decode: returns the bytes of an id; use that of the model's units.

    Raises:
        ConfigError: ``max_bytes`` is negative or a stop string is empty.
    """
    if max_bytes < 0:
        raise ConfigError(f"max_bytes must be at least 0, not {max_bytes}")
    if not all(stop):
        raise ConfigError("a stop string must not be empty")
    return _continue(session, ids, max_bytes, Sampler(sampling), stop, decode)


def _continue(
    session: Feedable,
    ids: Tensor,
    max_bytes: int,
    sampler: Sampler,
    stop: Sequence[bytes],
    decode: Callable[[int], bytes],
) -> Iterator[Generated]:
    held, left = b"", max_bytes
    while left > 0:
        chosen = sampler.choose(session.feed(ids)[-1])
        if chosen == codec.EOS:
            yield Generated(held, "end")
            return
        new = decode(chosen)[:left]
        # Special ids yield no bytes; count them anyway so that generation terminates.
        left -= max(len(new), 1)
        held += new
        match = _first_match(held, stop)
        if match is not None:
            yield Generated(held[:match], "stop")
            return
        certain = len(held) - _longest_partial_match(held, stop)
        if certain:
            yield Generated(held[:certain], None)
            held = held[certain:]
        ids = ids.new_tensor([chosen])
    yield Generated(held, "length")


def generate(
    model: Decodable,
    prompt: bytes,
    *,
    max_bytes: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[bytes] = (),
) -> bytes:
    """Return all bytes that :func:`stream` yields."""
    parts = stream(model, prompt, max_bytes=max_bytes, sampling=sampling, stop=stop)
    return b"".join(part.data for part in parts)


@torch.inference_mode()
def reference_generate(
    model: Any,
    prompt: bytes,
    *,
    max_bytes: int,
    sampling: Sampling = GREEDY,
) -> bytes:
    """Reference implementation of :func:`generate` for byte models: a full forward per byte."""
    sampler = Sampler(sampling)
    ids = torch.from_numpy(codec.encode(prompt)).to(model.device)
    begin = len(ids)
    for _ in range(max_bytes):
        chosen = sampler.choose(model(ids[None])[0, -1])
        if chosen == codec.EOS:
            break
        ids = torch.cat((ids, ids.new_tensor([chosen])))
    return codec.decode(ids[begin:].cpu())


def _first_match(data: bytes, stop: Sequence[bytes]) -> int | None:
    """Return where the first stop string in ``data`` begins, or ``None``."""
    found = [at for at in (data.find(s) for s in stop) if at >= 0]
    return min(found, default=None)


def _longest_partial_match(data: bytes, stop: Sequence[bytes]) -> int:
    """Return the length of the longest suffix of ``data`` that is a prefix of a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for size in range(min(longest, len(data)), 0, -1):
        if any(s.startswith(data[-size:]) for s in stop):
            return size
    return 0
