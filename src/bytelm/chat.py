"""Format of conversations: the turns of a chat as the bytes of one document.

::

    <|system|>
    Answer in one word.
    <|user|>
    What is the capital of France?
    <|assistant|>
    Paris

A turn is its role between ``<|`` and ``|>``, a newline and its content; a newline separates turns.
A model is trained to predict the assistant's contents and, after each, the end of the document: the
EOS is not read, so a conversation goes on with the next turn as if it had not been there. The
prompt of a reply is thus everything up to the newline after ``<|assistant|>``, and a reply ends
where the model ends the document.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bytelm.codec import to_bytes
from bytelm.errors import DataError

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function")
_SHAREGPT = {"human": "user", "gpt": ASSISTANT}
_HEADER = re.compile(rb"<\|(" + "|".join(ROLES).encode() + rb")\|>")

Messages = Sequence[Mapping[str, Any]]


def chat_prompt(messages: Messages) -> bytes:
    """Return the prompt for the assistant's reply to some messages, as models are trained on.

    >>> lm.generate(bytelm.chat_prompt([{"role": "user", "content": "Hello!"}]))

    Args:
        messages: ``{"role": ..., "content": ...}`` each, as in OpenAI's format.

    Raises:
        DataError: a message is malformed, or the last is the assistant's.
    """
    turns = [_turn(message, number) for number, message in enumerate(messages, start=1)]
    if turns and turns[-1][0] == ASSISTANT:
        raise DataError(
            "the last message is the assistant's, so there is nothing to reply to: end with "
            "another role"
        )
    return b"".join([*(_header(role) + content + b"\n" for role, content in turns), _REPLY])


def format_chat(messages: Messages) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """Return a conversation as a document, and the ranges of its bytes to train on.

    Args:
        messages: ``{"role": ..., "content": ...}`` each, or ShareGPT's ``{"from", "value"}``.
            Content is text, or a list of parts with ``text``. An assistant's message with
            ``"weight": 0`` is not trained on.

    Raises:
        DataError: a message is malformed, or none is to be trained on.
    """
    parts, trained, at = [], [], 0
    for number, message in enumerate(messages, start=1):
        role, content = _turn(message, number)
        before = (b"\n" if parts else b"") + _header(role)
        parts += [before, content]
        if role == ASSISTANT and message.get("weight") != 0:
            trained.append((at + len(before), at + len(before) + len(content)))
        at += len(before) + len(content)
    if not trained:
        raise DataError("no message is the assistant's, so there is nothing to train on")
    return b"".join(parts), tuple(trained)


def as_messages(value: Any) -> list[Mapping[str, Any]] | None:
    """Return the messages in a field of a record; ``None`` if it holds something else.

    A table may hold them as a list for each key: ``{"role": [...], "content": [...]}``.
    """
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        columns = list(value.values())
        if all(isinstance(column, list) for column in columns):
            return [dict(zip(value, row, strict=False)) for row in zip(*columns, strict=False)]
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return value
    return None


def _header(role: str) -> bytes:
    return f"<|{role}|>\n".encode()


_REPLY = _header(ASSISTANT)


def _turn(message: Mapping[str, Any], number: int) -> tuple[str, bytes]:
    """Return the role and content of a message."""
    role, content = (
        message[openai] if message.get(openai) is not None else message.get(sharegpt)
        for openai, sharegpt in (("role", "from"), ("content", "value"))
    )
    name = role.decode("utf-8", "replace") if isinstance(role, bytes) else role
    name = _SHAREGPT.get(name, name) if isinstance(name, str) else name
    if name not in ROLES:
        raise DataError(
            f"message {number} has the role {name!r:.60}, which is none of {', '.join(ROLES)}"
        )
    if message.get("tool_calls"):
        raise DataError(f"message {number} has tool_calls, which the chat format cannot hold")
    data = _content(content, number)
    found = _HEADER.search(data)
    if found:
        raise DataError(f"message {number} contains {found[0].decode()}, which begins a turn")
    return name, data


def _content(content: Any, number: int) -> bytes:
    """Return the text of a message: a text, or parts with text."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and content is not part else part
        if not isinstance(text, str | bytes):
            raise DataError(f"message {number} holds {part!r:.60}, not text")
        texts.append(to_bytes(text))
    return b"".join(texts)
