"""Inference: key-value caches, decoding states, sessions, sampling and generation."""

from bytelm.inference.continuation import Choice, Finish, Generated, Prediction
from bytelm.inference.decoding import (
    answer,
    continue_from,
    generate,
    reference_generate,
    stream,
    stream_many,
)
from bytelm.inference.engine import Engine
from bytelm.inference.graphs import Capture, Strategy, capture_cuda
from bytelm.inference.pages import MemoryFullError, PagedMemory
from bytelm.inference.requests import Event, Request, RequestTooLongError, Stats
from bytelm.inference.sampling import GREEDY, Sampler, Sampling
from bytelm.inference.session import Decodable, Session
from bytelm.inference.states import DecodingState, Passes, PatchedState, TransformerState

__all__ = [
    "GREEDY",
    "Capture",
    "Choice",
    "Decodable",
    "DecodingState",
    "Engine",
    "Event",
    "Finish",
    "Generated",
    "MemoryFullError",
    "PagedMemory",
    "Passes",
    "PatchedState",
    "Prediction",
    "Request",
    "RequestTooLongError",
    "Sampler",
    "Sampling",
    "Session",
    "Stats",
    "Strategy",
    "TransformerState",
    "answer",
    "capture_cuda",
    "continue_from",
    "generate",
    "reference_generate",
    "stream",
    "stream_many",
]
