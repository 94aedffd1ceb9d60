"""Decoding steps captured as CUDA graphs.

Decoding a single position takes a GPU less time than Python needs to launch its kernels. A step is
a function of a few tensors that reads and writes a state in place, with constant shapes and without
branches on values of the device, so it can be recorded once as a CUDA graph and replayed. It is
recorded again when a cache grows, which moves its memory.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bytelm.config import nearest
from bytelm.errors import ConfigError
from bytelm.slots import Slots, SlotState

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Function that captures a step: given one, it returns an equivalent one with less overhead, on the
same tensors. It may run the step; its effects on the state are undone afterwards."""
Strategy = Literal["auto", "eager", "graphs"] | Capture
"""Way to decode single ids: eagerly, with CUDA graphs, or with a custom capture. ``auto`` uses
graphs on CUDA outside autocast (whose copies of weights a graph would own), otherwise eager mode.
"""
STRATEGIES = ("auto", "eager", "graphs")
"""Names of the strategies that are not custom captures."""


@runtime_checkable
class CapturedState(SlotState, Protocol):
    """State whose steps can be captured."""

    num_slots: int

    @property
    def rooms(self) -> tuple[int, ...]:
        """Sizes of the buffers that steps use, which change when a buffer is reallocated."""
        ...


def choose_capture(strategy: Strategy, device: torch.device) -> Capture | None:
    """Return the capture of a strategy on a device; ``None`` for eager steps.

    Captured steps must have constant shapes and read no values on the host.

    Raises:
        ConfigError: the strategy is unknown, or the device has no graphs.
    """
    if callable(strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"strategy {strategy!r} is not one of {', '.join(STRATEGIES)}"
            f"{nearest(strategy, STRATEGIES)}"
        )
    if strategy == "graphs" and device.type != "cuda":
        raise ConfigError(f"strategy 'graphs' needs CUDA, not {device.type}: use 'auto'")
    is_auto = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
    return capture_cuda if strategy == "graphs" or (strategy == "auto" and is_auto) else None


class Graphs:
    """Runner of the steps of a state, which captures them if a capture is given."""

    def __init__(self, capture: Capture | None, state: CapturedState) -> None:
        self._capture = capture
        self._state = state
        self._rooms: tuple[int, ...] = ()
        self._captured: dict[str, tuple[list[Tensor | None], Callable[[], Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What was captured runs on the memory of this state, not on that of a copy.
        return {**self.__dict__, "_rooms": (), "_captured": {}}

    def run(self, step: Callable[..., Any], slots: Slots, *inputs: Tensor | None) -> Any:
        """Return ``step(slots, *inputs)``; only steps over all slots are captured."""
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
        # The next replay overwrites the memory of a step's results.
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
    # Libraries initialise themselves at their first call, which cannot be recorded.
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
