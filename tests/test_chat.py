"""Conversations as documents, and prompts for replies."""

import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bytelm
from bytelm.chat import as_messages, format_chat
from bytelm.data import Reader, ReadOptions, find_inputs
from bytelm.errors import DataError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "Of Italy?"},
    {"role": "assistant", "content": "Rome"},
]
TEXT = (
    b"<|system|>\nBe brief.\n<|user|>\nCapital of France?\n<|assistant|>\nParis\n"
    b"<|user|>\nOf Italy?\n<|assistant|>\nRome"
)
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
    for m in CHAT
]
PARTS = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]


def documents(path, **options):
    chosen = ReadOptions(**options)
    reader = Reader(chosen)
    found = [d for one in find_inputs([str(path)], chosen) for d in reader.read(one)]
    return found, sum(record.invalid_records for record in reader.records)


@pytest.mark.parametrize("messages", [CHAT, SHAREGPT, PARTS], ids=["openai", "sharegpt", "parts"])
def test_the_assistants_turns_are_trained_on(messages):
    data, trained = format_chat(messages)
    assert data == TEXT
    assert [data[begin:end] for begin, end in trained] == [b"Paris", b"Rome"]


@given(
    st.lists(st.tuples(st.sampled_from(["user", "system", "tool"]), st.text()), max_size=3),
    st.binary(),
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), max_size=3),
)
def test_the_prompt_of_a_reply_is_what_precedes_it_in_training(before, reply, after):
    turns = [{"role": role, "content": text} for role, text in before]
    rest = [{"role": role, "content": text} for role, text in after]
    data, trained = format_chat([*turns, {"role": "assistant", "content": reply}, *rest])
    begin, end = trained[0]
    assert data[:begin] == bytelm.chat_prompt(turns)
    assert data[begin:end] == reply
    # Ranges do not touch, so that EOS can follow each.
    assert all(b < a for (_, b), (a, _) in pairwise(trained))


def test_a_conversation_goes_on_after_a_reply():
    prompt = bytelm.chat_prompt(CHAT[:-1])
    assert prompt + b"Rome" == TEXT
    with pytest.raises(DataError, match="the last message is the assistant's"):
        bytelm.chat_prompt(CHAT)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "datasets", "columns"])
@pytest.mark.parametrize("messages", [CHAT, SHAREGPT], ids=["messages", "conversations"])
def test_conversations_are_read_from_records(tmp_path, suffix, messages):
    field = "messages" if messages is CHAT else "conversations"
    record, path = {field: messages, "id": 1}, tmp_path / f"a.{suffix}"
    if suffix == "columns":
        record[field] = {key: [m[key] for m in messages] for key in messages[0]}
        path = tmp_path / "a.parquet"
    if suffix == "jsonl":
        path.write_text(json.dumps(record))
    elif suffix == "datasets":
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list([record]).save_to_disk(path)
    else:
        pq.write_table(pa.Table.from_pylist([record]), path)
    (document,), _ = documents(path, field=field)
    assert document.data == TEXT
    assert [TEXT[begin:end] for begin, end in document.ranges] == [b"Paris", b"Rome"]


USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
INVALID = [
    ([USER], "no message is the assistant's, so there is nothing to train on"),
    ([], "nothing to train on"),
    ([USER, {**REPLY, "weight": 0}], "nothing to train on"),
    ([USER, {**REPLY, "role": "asistant"}], "message 2 has the role 'asistant', which is none of"),
    ([USER, {"content": "x"}], "message 2 has the role None"),
    ([USER, {**REPLY, "content": None}], "message 2 holds None, not text"),
    ([{**USER, "content": 3}, REPLY], "message 1 holds 3, not text"),
    ([{**USER, "content": [{"type": "image_url"}]}, REPLY], "message 1 holds {'type': 'image_url'"),
    ([USER, {**REPLY, "tool_calls": [{"id": 1}]}], "message 2 has tool_calls"),
    ([{**USER, "content": "a <|assistant|> b"}, REPLY], "contains <|assistant|>, which begins a"),
]


@pytest.mark.parametrize(("messages", "message"), INVALID)
def test_conversations_that_cannot_be_formatted_are_invalid_records(tmp_path, messages, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (CHAT, messages)))
    with pytest.raises(DataError) as caught:
        documents(path, field="messages")
    assert message in str(caught.value)
    assert "line 2, field 'messages'" in str(caught.value)
    (document,), num_invalid = documents(path, field="messages", skip_invalid=True)
    assert (document.data, num_invalid) == (TEXT, 1)


def test_a_reply_without_weight_is_context():
    _, trained = format_chat([USER, {**REPLY, "weight": 0}, USER, REPLY])
    assert len(trained) == 1


@pytest.mark.parametrize("value", ["text", 3, None, ["a", "b"], {"a": [1]}, {"role": "x"}])
def test_other_values_are_no_conversation(value):
    assert as_messages(value) is None
