"""Generation of text from a prompt, as a stream of bytes."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm import codec
from bytelm.errors import ConfigError
from bytelm.inference.continuation import Continuation, Generated, Prediction, check_options
from bytelm.inference.engine import Engine
from bytelm.inference.requests import LOOK_AHEAD, Event, Request
from bytelm.inference.sampling import GREEDY, Sampler, Sampling
from bytelm.inference.session import Decodable, Session
from bytelm.units import ByteUnits

BYTES = ByteUnits()


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
    speculate: bool = False,
) -> Iterator[Generated]:
    """Continue a prompt, which may be empty, in a new session; see :func:`continue_from`.

    With ``speculate`` it is continued in an :class:`Engine` that drafts bytes, which are the same.
    """
    if speculate:
        check_options(max_bytes, stop)
        request = Request(prompt, max_bytes, sampling, stop)
        return (part for _, part in _parts(answer(model, [request], speculate=True)))
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
    check_options(max_bytes, stop)
    return _continue(session, ids, Continuation(max_bytes, sampling, stop, decode))


def _continue(session: Feedable, ids: Tensor, continuation: Continuation) -> Iterator[Generated]:
    yield from continuation.begin()
    while not continuation.has_ended:
        yield from continuation.choose(Prediction(session.feed(ids)[-1]))
        ids = ids.new_tensor(continuation.chosen[-1:])


def stream_many(
    model: Decodable,
    prompts: Sequence[bytes],
    *,
    max_bytes: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop: Sequence[bytes] = (),
    num_slots: int = 16,
) -> Iterator[tuple[int, Generated]]:
    """Continue several prompts at once, yielding (index of the prompt, part).

    Up to ``num_slots`` prompts are decoded as one batch, in an :class:`Engine`; as soon as one
    ends, the next takes its slot. Each gets the bytes of :func:`stream` (as long as rounding, which
    depends on the size of a batch, does not change a choice).

    Args:
        model: as in :func:`stream`.
        prompts: any bytes, of any lengths.
        max_bytes: maximum number of bytes to generate for each prompt.
        sampling: as in :func:`continue_from`; one for all prompts, or one for each.
        stop: as in :func:`continue_from`.
        num_slots: largest number of prompts decoded at once.

    Raises:
        ConfigError: as :func:`continue_from`; the number of samplings is not that of the prompts;
            or ``num_slots`` is below 1.
    """
    check_options(max_bytes, stop)
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    if len(samplings) != len(prompts):
        raise ConfigError(
            f"{len(samplings)} samplings were given for {len(prompts)} prompts: give one for each, "
            "or one for all"
        )
    if num_slots < 1:
        raise ConfigError(f"num_slots must be at least 1, not {num_slots}")
    requests = [
        Request(prompt, max_bytes, one, stop)
        for prompt, one in zip(prompts, samplings, strict=True)
    ]
    return _parts(answer(model, requests, num_slots=num_slots))


def _parts(events: Iterator[Event]) -> Iterator[tuple[int, Generated]]:
    for number, part, error in events:
        if error is not None:
            raise error
        assert part is not None
        yield number, part


def answer(
    model: Decodable,
    requests: Sequence[Request],
    *,
    num_slots: int = 16,
    speculate: bool = False,
) -> Iterator[Event]:
    """Answer requests in an :class:`Engine`, yielding events whose tickets number the requests.

    Args:
        model: as in :func:`stream`.
        requests: any number of requests; few of them are encoded at a time.
        num_slots: largest number of requests that are decoded at once.
        speculate: as in :class:`Engine`.

    Raises:
        ConfigError: an option is out of range.
    """
    if not requests:
        return
    longest = max(len(request.prompt) + request.max_bytes for request in requests)
    num_slots = min(num_slots, len(requests))
    engine = Engine(model, num_slots, max_document_bytes=max(longest, 1), speculate=speculate)
    waiting = enumerate(requests)
    numbers: dict[int, int] = {}
    while True:
        for number, request in islice(waiting, num_slots + LOOK_AHEAD - len(numbers)):
            numbers[engine.submit(request)] = number
        if not numbers:
            return
        for event in engine.step():
            number = numbers[event.ticket]
            if event.part is None or event.part.finish is not None:
                del numbers[event.ticket]
            yield event._replace(ticket=number)


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
    for position in range(max_bytes):
        chosen = sampler.choose(model(ids[None])[0, -1], position)
        if chosen == codec.EOS:
            break
        ids = torch.cat((ids, ids.new_tensor([chosen])))
    return codec.decode(ids[begin:].cpu())
