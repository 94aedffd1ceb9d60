"""Completions: requests to the engine, and what it yields in OpenAI's shape."""

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from bytelm import codec
from bytelm.inference import Choice, Generated, Request, Sampling
from bytelm.serving.errors import ApiError, api_error
from bytelm.serving.limits import deadline
from bytelm.serving.schemas import CompletionRequest
from bytelm.serving.worker import Answers

DEFAULT_BYTES = 256
"""Bytes that are generated unless ``max_tokens`` is given."""
MAX_REQUESTS = 128
"""Most continuations in one request."""
END = "<|endoftext|>"
"""Name of the end of the document among the most probable bytes."""
LOWEST = -9999.0
"""Log-probability that is shown for minus infinity, which JSON lacks."""
FINISH = {"end": "stop", "stop": "stop", "length": "length"}
DONE = b"data: [DONE]\n\n"


def engine_requests(body: CompletionRequest, client: str, max_document_bytes: int) -> list[Request]:
    """Return the requests to the engine: ``n`` for each prompt.

    The seed of choice ``i`` of a prompt is ``seed + i``.

    Raises:
        ApiError: there are too many.
        ConfigError: an option is out of range.
    """
    if len(body.prompt) * body.num_choices > MAX_REQUESTS:
        raise ApiError(400, f"prompts times n must be at most {MAX_REQUESTS}", param="n")
    seed = secrets.randbits(62) if body.seed is None else body.seed
    num_top = body.logprobs
    if num_top is None and body.trace:
        num_top = 0
    requests: list[Request] = []
    for prompt in body.prompt:
        max_bytes = body.max_tokens
        if max_bytes is None:
            max_bytes = min(DEFAULT_BYTES, max(max_document_bytes - len(prompt), 1))
        for choice in range(body.num_choices):
            sampling = Sampling(
                1.0 if body.temperature is None else body.temperature,
                body.top_k,
                body.top_p,
                body.min_p,
                seed + choice,
            )
            requests.append(Request(prompt, max_bytes, sampling, body.stops, num_top, client))
    return requests


class ChoiceWriter:
    """Writer of one choice: parts of an answer to pieces of OpenAI's choices.

    Text never has half a character. What is known about bytes (``logprobs`` and ``trace``) is given
    as soon as they are certain.
    """

    def __init__(self, index: int, prompt: bytes, body: CompletionRequest) -> None:
        self.index = index
        self.prompt_choices: list[Choice] = []
        """The bytes of the prompt, if it is to be echoed with log-probabilities."""
        self.num_bytes = 0
        """Bytes generated so far."""
        self._prompt, self._body = prompt, body
        self._decoder = codec.Utf8Stream()
        self._offsets = codec.Utf8Stream()
        self._offset = 0
        self._choices: deque[Choice] = deque()
        self._num_chosen = 0

    def begin(self) -> dict[str, Any]:
        """Return the first piece: the prompt if it is to be echoed, else nothing."""
        prompt = self._prompt if self._body.echo else b""
        piece = self._piece(self._decoder.feed(prompt), self.prompt_choices, None)
        if self._body.trace:
            piece["trace"] = []
        return piece

    def add(self, part: Generated) -> dict[str, Any]:
        """Return the piece that a part makes."""
        self.num_bytes += len(part.data)
        self._choices.extend(part.choices)
        text = self._decoder.feed(part.data)
        if part.finish is not None:
            text += self._decoder.close()
        finish = None if part.finish is None else FINISH[part.finish]
        return self._piece(text, self._certain(), finish)

    def _certain(self) -> list[Choice]:
        """Return the next choices whose bytes are part of the text: stop strings are not."""
        certain: list[Choice] = []
        while self._num_chosen < self.num_bytes and self._choices:
            choice = self._choices.popleft()
            self._num_chosen += len(choice.data)
            certain.append(choice)
        return certain

    def _piece(self, text: str, choices: Sequence[Choice], finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._logprobs(choices, self._body.logprobs)
        piece = {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        if self._body.trace:
            piece["trace"] = [
                {"byte": byte, "entropy": one.entropy, "begins_patch": one.begins_patch}
                for one in choices
                for byte in one.data
            ]
        return piece

    def _logprobs(self, choices: Sequence[Choice], num_top: int) -> dict[str, Any]:
        offsets: list[int] = []
        for choice in choices:
            offsets.append(self._offset)
            self._offset += len(self._offsets.feed(choice.data))
        top = [
            {token_name(data): max(value, LOWEST) for data, value in choice.top}
            for choice in choices
        ]
        return {
            "tokens": [token_name(choice.data) for choice in choices],
            "token_logprobs": [max(choice.log_prob, LOWEST) for choice in choices],
            "top_logprobs": top if num_top else None,
            "text_offset": offsets,
            "bytes": [byte for choice in choices for byte in choice.data],
        }


def token_name(data: bytes) -> str:
    """Return the name of a token, as OpenAI's API writes it: bytes that are no text as hex."""
    if not data:
        return END
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def is_empty(piece: dict[str, Any]) -> bool:
    """Whether a piece says nothing."""
    logprobs = piece["logprobs"] or {}
    known = logprobs.get("tokens") or piece.get("trace")
    return not (piece["text"] or piece["finish_reason"] or known)


class CompletionWriter:
    """Writer of the answer to a completion request, whole or as a stream of events."""

    def __init__(self, body: CompletionRequest, model: str) -> None:
        self._body = body
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        n = body.num_choices
        self._choices = [
            ChoiceWriter(index, body.prompt[index // n], body)
            for index in range(len(body.prompt) * n)
        ]

    def read(self, prompts: Mapping[bytes, list[Choice]]) -> None:
        """Add what is known about the bytes of the prompts."""
        for index, choice in enumerate(self._choices):
            choice.prompt_choices = prompts[self._body.prompt[index // self._body.num_choices]]

    @property
    def usage(self) -> dict[str, int]:
        """Bytes of the prompts, and bytes generated so far."""
        prompt = sum(map(len, self._body.prompt))
        completion = sum(choice.num_bytes for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    async def whole(self, answers: Answers) -> bytes:
        """Return the completion, as JSON, once all of it is generated."""
        parts: list[list[Generated]] = [[] for _ in self._choices]
        async for index, part in answers:
            parts[index].append(part)
        # Thousands of bytes with their log-probabilities take longer than the loop may wait.
        return await asyncio.to_thread(self._write, parts)

    def _write(self, parts: list[list[Generated]]) -> bytes:
        choices = [
            _joined(choice.begin(), choice.add(_merged(of_choice)))
            for choice, of_choice in zip(self._choices, parts, strict=True)
        ]
        return _dump({**self._head, "choices": choices, "usage": self.usage})

    async def events(self, answers: Answers, ends: float) -> AsyncIterator[bytes]:
        """Yield server-sent events with the pieces of the completion, as they are generated.

        Args:
            answers: what the engine generates.
            ends: when the request has taken too long, on the clock of :func:`deadline`.
        """
        include_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)
        rest = {"usage": None} if include_usage else {}
        for choice in self._choices:
            piece = choice.begin()
            if not is_empty(piece):
                yield _event({**self._head, "choices": [piece], **rest})
        try:
            while not answers.is_complete:
                async with deadline(ends):
                    index, part = await anext(answers)
                piece = self._choices[index].add(part)
                if not is_empty(piece):
                    yield _event({**self._head, "choices": [piece], **rest})
        except Exception as error:
            # Clients expect the shape of errors here too: the status was sent long ago.
            yield _event(api_error(error).body)
            return
        if include_usage:
            yield _event({**self._head, "choices": [], "usage": self.usage})
        yield DONE


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + _dump(data) + b"\n\n"


def _merged(parts: Sequence[Generated]) -> Generated:
    """Return consecutive parts as one."""
    choices = tuple(choice for part in parts for choice in part.choices)
    return Generated(b"".join(part.data for part in parts), parts[-1].finish, choices)


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return two consecutive pieces of a choice as one."""
    whole = {**second, "text": first["text"] + second["text"]}
    if "trace" in whole:
        whole["trace"] = first["trace"] + second["trace"]
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            name: None if values is None else values + second["logprobs"][name]
            for name, values in first["logprobs"].items()
        }
    return whole
