"""Incremental sessions, sampling and generation."""

from bytelm.generation.decoding import (
    Piece,
    continue_from,
    generate,
    reference_generate,
    stream,
)
from bytelm.generation.sampling import GREEDY, Sampler, Sampling
from bytelm.generation.session import PatchedSession, Session, start_session

__all__ = [
    "GREEDY",
    "PatchedSession",
    "Piece",
    "Sampler",
    "Sampling",
    "Session",
    "continue_from",
    "generate",
    "reference_generate",
    "start_session",
    "stream",
]
