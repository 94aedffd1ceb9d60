"""Inference: key-value caches, decoding states, sessions, sampling and generation."""

from bytelm.inference.continuation import Choice, Finish, Generated, Prediction
from bytelm.inference.decoding import (
    continue_from,
    generate,
    reference_generate,
    stream,
    stream_many,
)
from bytelm.inference.graphs import Capture, Strategy, capture_cuda
from bytelm.inference.pages import MemoryFullError, PagedMemory
from bytelm.inference.sampling import GREEDY, Sampler, Sampling
from bytelm.inference.session import Decodable, Session
from bytelm.inference.states import DecodingState, PatchedState, TransformerState

__all__ = [
    "GREEDY",
    "Capture",
    "Choice",
    "Decodable",
    "DecodingState",
    "Finish",
    "Generated",
    "MemoryFullError",
    "PagedMemory",
    "PatchedState",
    "Prediction",
    "Sampler",
    "Sampling",
    "Session",
    "Strategy",
    "TransformerState",
    "capture_cuda",
    "continue_from",
    "generate",
    "reference_generate",
    "stream",
    "stream_many",
]
