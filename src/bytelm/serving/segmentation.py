"""The patches of a text, with what they cost, for ``POST /v1/patches``."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bytelm.accounting import break_down
from bytelm.config import CalibratedPatching
from bytelm.errors import ConfigError
from bytelm.language_model import LanguageModel, PatchedText
from bytelm.serving.errors import ApiError, QueueFullError
from bytelm.serving.schemas import PatchesRequest

MAX_WAITING = 32
"""Most texts that are patched or waiting."""


class Abandoned(Exception):
    """Raised in the thread when no one waits for the patches any more."""


class Segmenter:
    """Thread that cuts texts into patches, one after the other.

    Args:
        lm: the model.
        name: its name in responses.
        max_bytes: longest text.
    """

    def __init__(self, lm: LanguageModel, name: str, max_bytes: int) -> None:
        self._lm, self._name, self._max_bytes = lm, name, max_bytes
        self._pool = ThreadPoolExecutor(1, "bytelm-patches")
        self._num_open = 0

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def patches(self, body: PatchesRequest) -> bytes:
        """Return the response to a request, as JSON.

        Raises:
            ApiError: the text is too long.
            QueueFullError: too many texts are waiting.
            BytelmError: the rule does not exist, or needs what the model lacks.
        """
        if len(body.text) > self._max_bytes:
            raise ApiError(
                400,
                f"a text of {len(body.text):,} bytes is over the limit of {self._max_bytes:,}: "
                "send it in parts",
                param="text",
                code="context_length_exceeded",
            )
        if self._num_open >= MAX_WAITING:
            raise QueueFullError
        self._num_open += 1
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self._respond, body, abandoned)
        finally:
            abandoned.set()
            self._num_open -= 1

    def _respond(self, body: PatchesRequest, abandoned: threading.Event) -> bytes:
        def check(done: int) -> None:
            if abandoned.is_set():
                raise Abandoned

        check(0)
        names = ("threshold", "increase", "length", "max_length")
        options = {name: getattr(body, name) for name in names}
        given = {name: value for name, value in options.items() if value is not None}
        patched = self._lm.patch(body.text, body.rule, report=check, **given)
        return json.dumps(describe(self._lm, self._name, patched), allow_nan=False).encode()


def describe(lm: LanguageModel, name: str, patched: PatchedText) -> dict[str, Any]:
    """Return the patches of a text in the shape of the response."""
    rule = patched.rule.model_dump(mode="json", exclude_none=True)
    data, num_patches = patched.data, len(patched.boundaries)
    return {
        "object": "patches",
        "model": name,
        "rule": rule,
        "threshold": rule.get("threshold"),
        "bytes": list(data),
        "entropies": None if patched.entropies is None else patched.entropies.tolist(),
        "patches": [
            {"begin": begin, "end": end, "text": data[begin:end].decode("utf-8", "replace")}
            for begin, end in patched.spans
        ],
        "patch_size": patched.patch_size,
        # The patch of BOS is closed by the first byte, and the last patch of the text is open.
        "global_steps": num_patches if getattr(lm.config.model, "has_patches", False) else None,
        "flops_per_byte": _flops_per_byte(lm, patched),
    }


def _flops_per_byte(lm: LanguageModel, patched: PatchedText) -> float | None:
    """Return the forward FLOPs per byte, if the model's can be counted; with a scorer if used."""
    config, num_bytes = lm.config, len(patched.data)
    if not num_bytes:
        return None
    is_scored = isinstance(patched.rule, CalibratedPatching)
    try:
        parts = break_down(
            config.model,
            num_bytes,
            len(patched.boundaries),
            element_size=4,
            scorer=config.scorer.model if config.scorer is not None and is_scored else None,
        )
    except ConfigError:
        return None
    return sum(part.forward for part in parts.values())
