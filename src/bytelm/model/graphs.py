"""One position at a time on CUDA: the model's own layers in shapes that never change, as graphs.

A single position keeps a GPU busy for less time than Python takes to launch its kernels. Here each
part of a session is a function of a few integers (a position, ids) and of buffers that stay where
they are: caches at their full capacity, under a mask. Nothing in it branches on what the device
computes, so CUDA captures it once and replays it with one call. It is captured again when a cache
or a patch outgrows its buffer, which doubles. Parts have the interface of those for the CPU,
:mod:`bytelm.model.step`; without CUDA they run as they are, which is how the tests compare them.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm import codec
from bytelm.model.attention import StackCache
from bytelm.model.blt import BLT, LocalDecoder, LocalEncoder, Readable
from bytelm.model.embedding import NgramEmbedding
from bytelm.model.transformer import Transformer

Out = TypeVar("Out")

PATCH_BYTES = 64
"""Bytes of a patch that its first buffer holds."""


def can_capture(module: nn.Module) -> bool:
    """Whether steps of a model can be graphs: on CUDA, in the precision of its weights.

    Autocast would keep its copies of the weights in memory that belongs to a graph.
    """
    is_cuda = next(module.parameters()).device.type == "cuda"
    return is_cuda and not torch.is_autocast_enabled("cuda")


class _Graph(Generic[Out]):
    """A function of integers, the first of them the next position of a cache.

    It must give the same result if it runs twice at a position, as it does when it is captured.
    What it returns lies in buffers that the next call overwrites.
    """

    def __init__(
        self, function: Callable[[Int[Tensor, " numbers"]], Out], cache: StackCache
    ) -> None:
        self._function = function
        self._cache = cache
        self._numbers: Int[Tensor, " numbers"] | None = None
        self._capacity = 0
        self._replay: Callable[[], Out] | None = None

    def __call__(self, device: torch.device, *numbers: int) -> Out:
        """The function at the next position, which is then taken."""
        given = torch.tensor([self._cache.position, *numbers])
        if self._numbers is None:
            self._numbers = given.to(device, copy=True)
        self._numbers.copy_(given)
        capacity = self._cache.reserve()
        if self._replay is None or capacity != self._capacity:
            self._replay, self._capacity = self._capture(self._numbers), capacity
        out = self._replay()
        self._cache.advance()
        return out

    def reset(self) -> None:
        """Capture again at the next call: a buffer is another."""
        self._replay = None

    def _capture(self, numbers: Int[Tensor, " numbers"]) -> Callable[[], Out]:
        if numbers.device.type != "cuda":
            return lambda: self._function(numbers)
        with torch.cuda.device(numbers.device):
            # Libraries set themselves up when they are first called, which cannot be captured.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._function(numbers)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self._function(numbers)

        def replay() -> Out:
            graph.replay()
            return out

        return replay


class _LastEmbedded:
    """The embedding of the last of a document's ids, from numbers: its position, the ids."""

    def __init__(self, embedding: NgramEmbedding) -> None:
        self._embedding = embedding
        self._device = embedding.ids.weight.device

    def __call__(self, numbers: Int[Tensor, " numbers"]) -> Float[Tensor, "1 1 dim"]:
        """It, after those that :attr:`NgramEmbedding.context` says that it depends on."""
        position, ids = numbers[:1], numbers[1:]
        before = torch.arange(-self._embedding.context, 1, device=self._device)
        return self._embedding(ids[None], (position + before)[None])[:, -1:]

    def numbers(self, ids: Sequence[int]) -> tuple[torch.device, *tuple[int, ...]]:
        """The device of a graph, and its numbers after the position."""
        missing = self._embedding.context + 1 - len(ids)
        return self._device, *[codec.BOE] * missing, *ids


class TransformerGraph:
    """One id through a plain transformer."""

    def __init__(self, model: Transformer, cache: StackCache) -> None:
        self._embedding = _LastEmbedded(model.embedding)

        def run(numbers: Int[Tensor, " numbers"]) -> Float[Tensor, "1 vocab"]:
            return model.run(self._embedding(numbers), cache.at(numbers[:1]))[0]

        self._graph = _Graph(run, cache)

    def __call__(self, ids: Sequence[int]) -> Float[Tensor, "1 vocab"]:
        """Logits of the id after the last of the ids; in a buffer that the next step overwrites."""
        return self._graph(*self._embedding.numbers(ids))


class EncoderGraph:
    """One byte through a local encoder, its embedding included."""

    def __init__(self, encoder: LocalEncoder, cache: StackCache) -> None:
        self._embedding = _LastEmbedded(encoder.embedding)

        def run(numbers: Int[Tensor, " numbers"]) -> list[Float[Tensor, "1 1 dim"]]:
            return encoder.byte_states(self._embedding(numbers), cache.at(numbers[:1]))

        self._graph = _Graph(run, cache)

    def __call__(self, ids: Sequence[int]) -> list[Float[Tensor, "1 1 dim"]]:
        """States that patches read, as ``LocalEncoder.byte_states``, of the last of the ids."""
        states = self._graph(*self._embedding.numbers(ids))
        return [state.clone() for state in states]


class PatchGraph:
    """The bytes of one patch through the encoder's cross-attention and the global transformer."""

    def __init__(self, blt: BLT, cache: StackCache) -> None:
        self._buffers: list[Float[Tensor, "1 room dim"]] = []

        def run(numbers: Int[Tensor, "2"]) -> Readable:
            position, length = numbers.split(1)
            index = torch.arange(self._buffers[0].shape[1], device=numbers.device)
            is_other = (index >= length).long()
            vectors = blt.encoder.patch_vectors(self._buffers, is_other[None], 1)
            return blt.decoder.read_latents(blt.global_model(vectors, cache.at(position)))

        self._graph = _Graph(run, cache)

    def __call__(self, states: Sequence[Float[Tensor, "1 bytes dim"]]) -> Readable:
        """What bytes read of the patch; in buffers that the next patch overwrites."""
        _, length, dim = states[0].shape
        room = self._buffers[0].shape[1] if self._buffers else PATCH_BYTES
        if length > room or not self._buffers:
            while room < length:
                room *= 2
            self._buffers = [state.new_zeros(1, room, dim) for state in states]
            self._graph.reset()
        for buffer, state in zip(self._buffers, states, strict=True):
            buffer[:, :length] = state
        return self._graph(states[0].device, length)


class DecoderGraph:
    """One byte's state through a local decoder."""

    def __init__(self, decoder: LocalDecoder, cache: StackCache) -> None:
        weight = decoder.output.weight
        self._state = torch.zeros_like(weight[:1, None])
        self._readable: Readable | None = None

        def run(position: Int[Tensor, "1"]) -> Float[Tensor, "1 vocab"]:
            assert self._readable is not None
            first = torch.zeros_like(position)[None]
            return decoder(self._state, self._readable, first, cache.at(position))[0]

        self._graph = _Graph(run, cache)

    def read(self, readable: Readable) -> None:
        """Change to another latent: what ``LocalDecoder.read_latents`` says of one patch."""
        if self._readable is None:
            self._readable = [tuple(x.clone() for x in layer) for layer in readable]
        for layer, new_layer in zip(self._readable, readable, strict=True):
            for x, new in zip(layer, new_layer, strict=True):
                x.copy_(new)

    def __call__(self, state: Float[Tensor, "1 1 dim"]) -> Float[Tensor, "1 vocab"]:
        """Logits of the next id; in a buffer that the next step overwrites."""
        self._state.copy_(state)
        return self._graph(state.device)
