"""From prompts and responses to a model that gives the responses and ends."""

import json

import pytest

from builders import BASE_BLT
from bytelm import chat_prompt, load
from bytelm.config import Recipe, parse
from bytelm.data import PrepareOptions, ReadOptions, prepare
from bytelm.training import train

TRANSFORMER = {"kind": "transformer", "dim": 64, "num_layers": 2, "num_heads": 2, "ffn_dim": 128}
MODELS = {
    "bytes": {"model": TRANSFORMER},
    "patches": {"model": {"kind": "blt", **BASE_BLT}, "patching": {"kind": "space"}},
}
PAIRS = {"Say A: ": "alpha beta", "Say B: ": "bee", "Say C: ": "see the sea\nand more"}
CHAT = [
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "Of Italy?"},
    {"role": "assistant", "content": "Rome"},
]


def fine_tune(folder, records, field, model, steps=120):
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    options = PrepareOptions(read=ReadOptions(field=field), validation_share=0.0)
    prepare([str(folder / "a.jsonl")], folder / "d", options)
    settings = {
        **MODELS[model],
        "data": {"path": str(folder / "d"), "row_bytes": 128, "rows_per_step": 1},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 10},
        "train": {"steps": steps, "device": "cpu", "log_every": steps},
    }
    train(parse(Recipe, settings, "test"), folder / "run")
    return load(folder / "run", "cpu")


@pytest.mark.parametrize("model", [pytest.param("bytes", marks=pytest.mark.slow), "patches"])
def test_a_response_is_generated_exactly_and_ends(tmp_path, model):
    records = [{"prompt": p, "response": r} for p, r in PAIRS.items()]
    lm = fine_tune(tmp_path, records, "prompt,response", model)
    for prompt, response in PAIRS.items():
        assert lm.generate(prompt, max_bytes=100) == response.encode()
        *_, last = lm.stream(prompt, max_bytes=100)
        assert last.finish == "end"
    assert lm.bits_per_byte(["Say A: "]) > 1.0  # prompts are not trained on


@pytest.mark.slow
def test_every_reply_of_a_conversation_ends(run, tmp_path):
    lm = fine_tune(tmp_path, [{"messages": CHAT}], "messages", "patches")
    for turn in (1, 3):
        prompt = chat_prompt(CHAT[:turn])
        assert lm.generate(prompt, max_bytes=100) == CHAT[turn]["content"].encode()
    arguments = ["generate", tmp_path / "run", CHAT[0]["content"], "--chat", "--temperature", "0"]
    assert run(*arguments)[:2] == (0, "Paris\n")


def test_a_chat_on_the_command_line_has_the_format_of_the_data(run, monkeypatch):
    prompts = []

    class Model:
        def stream_text(self, prompt, **options):
            prompts.append(prompt)
            return iter(["hi"])

    monkeypatch.setattr("bytelm.language_model.load", lambda *arguments: Model())
    assert run("generate", "run", "Hello", "--chat", "--system", "Be brief.")[:2] == (0, "hi\n")
    assert "add --chat" in run("generate", "run", "Hello", "--system", "x")[2]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert prompts == [chat_prompt(messages)]
