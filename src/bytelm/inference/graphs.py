"""Steps captured as CUDA graphs: the same functions that run eagerly, replayed with one call.

A single position keeps a GPU busy for less time than Python takes to launch its kernels. A step is
a function of a few tensors that reads and writes a state in place, in shapes that never change, and
branches on nothing that the device computes; so CUDA records it once and replays it. It is recorded
again when a cache outgrows its memory, which doubles.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bytelm.slots import Slots, SlotState

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Makes of a function one that does the same to the same tensors, with less overhead. It may call
the function once, whose effects are undone afterwards."""
Strategy = Literal["auto", "eager", "graphs"] | Capture
"""How single ids are run: call by call; as CUDA graphs; or by a capture of one's own. ``auto`` is
graphs on CUDA, outside autocast (whose copies of weights a graph would own), and eager elsewhere.
"""


@runtime_checkable
class CapturedState(SlotState, Protocol):
    """A state whose steps can be captured."""

    num_slots: int

    @property
    def rooms(self) -> tuple[int, ...]:
        """Sizes of the memory that steps use: when they change, it has moved."""
        ...


def choose_capture(strategy: Strategy, device: torch.device) -> Capture | None:
    """Return how steps on a device are captured; ``None`` if they are not.

    Captured steps must keep their shapes and read nothing on the host.
    """
    if callable(strategy):
        return strategy
    is_auto = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
    return capture_cuda if strategy == "graphs" or (strategy == "auto" and is_auto) else None


class Graphs:
    """Runs the steps of a state, captured if a capture is given."""

    def __init__(self, capture: Capture | None, state: CapturedState) -> None:
        self._capture = capture
        self._state = state
        self._rooms: tuple[int, ...] = ()
        self._captured: dict[str, tuple[list[Tensor | None], Callable[[], Any]]] = {}

    def run(self, step: Callable[..., Any], slots: Slots, *inputs: Tensor | None) -> Any:
        """Run ``step(slots, *inputs)``. Steps of some of the slots only run eagerly."""
        if self._capture is None or slots is not None:
            return step(slots, *inputs)
        if self._state.rooms != self._rooms:
            self._captured.clear()
            self._rooms = self._state.rooms
        if step.__name__ not in self._captured:
            self._captured[step.__name__] = self._record(self._capture, step, inputs)
        static, replay = self._captured[step.__name__]
        for buffer, value in zip(static, inputs, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        # What a step returns lies in memory that the next replay overwrites.
        return tree_map_only(Tensor, torch.clone, replay())

    def _record(
        self, capture: Capture, step: Callable[..., Any], inputs: tuple[Tensor | None, ...]
    ) -> tuple[list[Tensor | None], Callable[[], Any]]:
        static = [None if value is None else value.clone() for value in inputs]
        slots = range(self._state.num_slots)
        before = [self._state.snapshot(slot) for slot in slots]
        replay = capture(lambda: step(None, *static))
        for slot, snapshot in zip(slots, before, strict=True):
            self._state.rollback(slot, snapshot)
        return static, replay


def capture_cuda(run: Callable[[], Any]) -> Callable[[], Any]:
    """Record a CUDA graph of a function of static tensors."""
    # Libraries set themselves up when they are first called, which cannot be recorded.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Any:
        graph.replay()
        return out

    return replay
