"""Generation: a prompt in, a stream of bytes out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from bytelm import codec
from bytelm.errors import ConfigError
from bytelm.generation.sampling import GREEDY, Sampler, Sampling
from bytelm.generation.session import Session, start_session
from bytelm.model.patched import PatchedModel
from bytelm.model.tokenized import TokenModel
from bytelm.model.transformer import Transformer

Finish = Literal["length", "end", "stop"]


@dataclass(frozen=True)
class Piece:
    """Bytes that are certain, as they come."""

    data: bytes
    finish: Finish | None
    """On the last piece, why generation ended: ``max_bytes`` reached, the model ended the
    document, or a stop string appeared (which is not part of the output)."""


def _byte(chosen: int) -> bytes:
    """The byte of an id; nothing of a special one."""
    return codec.decode([chosen])


def stream(
    model: PatchedModel | Transformer | TokenModel,
    prompt: bytes,
    *,
    max_bytes: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[bytes] = (),
) -> Iterator[Piece]:
    """Continue ``prompt``, any bytes or none, with a fresh session; see :func:`continue_from`."""
    ids, decode = codec.encode(prompt), _byte
    if isinstance(model, TokenModel):
        ids, decode = model.tokenizer.encode(ids), model.tokenizer.decode
        model = model.transformer
    return continue_from(
        start_session(model),
        torch.from_numpy(ids).to(next(model.parameters()).device),
        max_bytes=max_bytes,
        sampling=sampling,
        stop=stop,
        decode=decode,
    )


def continue_from(
    session: Session,
    ids: Int[Tensor, " bytes"],
    *,
    max_bytes: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[bytes] = (),
    decode: Callable[[int], bytes] = _byte,
) -> Iterator[Piece]:
    """Feed ``ids`` to a session and continue, yielding bytes as soon as they are certain.

    A byte is held back only while it may be the beginning of a stop string. The pieces end with
    one whose ``finish`` is set, possibly without data. The id chosen last is not fed: to go on with
    the same session, begin the next ``ids`` with it.

    Args:
        session: fed with what came before.
        ids: at least one; a document begins with BOS.
        max_bytes: most bytes to generate.
        sampling: how each byte is chosen.
        stop: byte strings that end generation.
        decode: the bytes of an id; of a model of tokens, its tokenizer's.

    Raises:
        ConfigError: ``max_bytes`` is negative or a stop string is empty.
    """
    if max_bytes < 0:
        raise ConfigError(f"max_bytes must be at least 0, not {max_bytes}")
    if not all(stop):
        raise ConfigError("a stop string must not be empty")
    return _continue(session, ids, max_bytes, Sampler(sampling), stop, decode)


def _continue(
    session: Session,
    ids: Tensor,
    max_bytes: int,
    sampler: Sampler,
    stop: Sequence[bytes],
    decode: Callable[[int], bytes],
) -> Iterator[Piece]:
    held, left = b"", max_bytes
    while left > 0:
        chosen = sampler.choose(session.feed(ids)[-1])
        if chosen == codec.EOS:
            yield Piece(held, "end")
            return
        new = decode(chosen)[:left]
        # A special id is nothing to see, but a model may go on choosing it.
        left -= max(len(new), 1)
        held += new
        match = _first_match(held, stop)
        if match is not None:
            yield Piece(held[:match], "stop")
            return
        certain = len(held) - _longest_partial_match(held, stop)
        if certain:
            yield Piece(held[:certain], None)
            held = held[certain:]
        ids = ids.new_tensor([chosen])
    yield Piece(held, "length")


def generate(
    model: PatchedModel | Transformer | TokenModel,
    prompt: bytes,
    *,
    max_bytes: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[bytes] = (),
) -> bytes:
    """All the bytes that :func:`stream` yields."""
    pieces = stream(model, prompt, max_bytes=max_bytes, sampling=sampling, stop=stop)
    return b"".join(piece.data for piece in pieces)


@torch.inference_mode()
def reference_generate(
    model: PatchedModel | Transformer,
    prompt: bytes,
    *,
    max_bytes: int,
    sampling: Sampling = GREEDY,
) -> bytes:
    """Twin of :func:`generate`, without stop strings: one full forward per byte."""
    sampler = Sampler(sampling)
    ids = torch.from_numpy(codec.encode(prompt)).to(next(model.parameters()).device)
    begin = len(ids)
    for _ in range(max_bytes):
        chosen = sampler.choose(model(ids[None])[0, -1])
        if chosen == codec.EOS:
            break
        ids = torch.cat((ids, ids.new_tensor([chosen])))
    return codec.decode(ids[begin:].cpu())


def _first_match(data: bytes, stop: Sequence[bytes]) -> int | None:
    """Where the first stop string in ``data`` begins."""
    found = [at for at in (data.find(s) for s in stop) if at >= 0]
    return min(found, default=None)


def _longest_partial_match(data: bytes, stop: Sequence[bytes]) -> int:
    """Length of the longest ending of ``data`` that begins a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for size in range(min(longest, len(data)), 0, -1):
        if any(s.startswith(data[-size:]) for s in stop):
            return size
    return 0
